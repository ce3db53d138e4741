"""How a loss curves in the outputs of a network: its second derivative there, and a square root of that."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightning_basin.functional.differences import contradicted
from lightning_basin.functional.jacobian import vector_jacobian_products, weighted_rows
from lightning_basin.functional.rank import EPSILON

_ROUNDING_RTOL = 1e-13  # times n: what eigenvalues of an n x n block with unit diagonal do not resolve
_FORMULA_RTOL = 1e-12  # to which autograd's derivatives of a softmax follow the formula, by the scale of the loss
_PROBABILITY_RTOL = 1e-2  # and at most those of a binary cross-entropy of probabilities, where one of these is small
_SCALE_RTOL = 1e-9  # to which this scale and the labels are found at outputs where no input is saturated
_NEARBY = 1e-6  # how far to move outputs to see whether a slope is constant
_NUM_SAMPLES = (
    2  # outputs at which a softmax must be found: any function of a difference looks like one at a single one
)

LossOfOutputs = Callable[[Tensor], Tensor]
"""From outputs, shape ``(k, ...)``, to a scalar."""


@dataclass(frozen=True, eq=False)
class OutputCurvature:
    """First and second derivative of a loss with respect to the outputs, and a square root of the second.

    Attributes:
        matrices: Per input shape ``(k, c, c)``; shape ``(1, m, m)`` where the loss couples the inputs.
        factors: Of the same shape, ``factors.mT @ factors == matrices``; ``None`` where the loss is not convex.
        residual_is_zero: Whether the first derivative is exactly zero on every input, so that R = 0 and H = P.
        rounding: Absolute error of slope and matrices where larger terms have cancelled in them, as in a cross-entropy
            with soft labels; 0 where rounding is relative to the entries.
        slope: The first derivative, shape ``(k, c)``.
        factor_rounding: Absolute error of the factors, where they are not in closed form.
        closed: Which outputs have slope and matrices in closed form, where autograd's lose digits by cancellation:
            shape ``(c,)``, or ``(m,)`` where the loss couples the inputs; ``None`` for none.
        is_flat: Whether both derivatives are zero at these outputs and beside them, although the loss curves at others:
            a loss within its margin, or a saturated one of which no digit is left. H = 0 does not follow.
    """

    matrices: Tensor
    factors: Tensor | None
    residual_is_zero: bool
    rounding: float = 0.0
    slope: Tensor | None = None
    factor_rounding: float = 0.0
    closed: Tensor | None = None
    is_flat: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether some outputs have slope and matrices in closed form."""
        return self.closed is not None and bool(self.closed.any())

    @property
    def multiple(self) -> float | None:
        """The number s where the second derivative is s times the identity on every input, as of squared errors."""
        multiple = _multiple_of_identity(self.matrices)
        return multiple if multiple > 0 else None


class _Derivatives(NamedTuple):
    """Of a loss at some outputs; n is 1 where the loss couples the inputs, with all outputs in a row, else k.

    Attributes:
        outputs: Shape ``(n, c)``.
        slope: First derivatives, shape ``(n, c)``.
        matrices: Second derivatives, shape ``(n, c, c)``.
    """

    outputs: Tensor
    slope: Tensor
    matrices: Tensor

    def of_groups(self, members: Tensor) -> "_Derivatives":
        """Those of g groups of s outputs, in turn for every input: shapes ``(n, g, s)`` and ``(n, g, s, s)``."""
        blocks = self.matrices[:, members.unsqueeze(2), members.unsqueeze(1)]
        return _Derivatives(self.outputs[:, members], self.slope[:, members], blocks)


def output_curvature(loss_fn: LossOfOutputs, outputs: Tensor) -> OutputCurvature:
    r"""Differentiate a loss twice with respect to the outputs, and factor the result.

    Outputs that the loss couples, directly or by others, form groups. A softmax cross-entropy of a group is recognised
    by its second derivative, :math:`s_x(\mathrm{diag}(p) - p p^T)` with p = softmax(f), whatever function computed it
    (hard or soft targets, class weights, label smoothing, over positions or some of the outputs): at random outputs,
    where no input is saturated, and at those given. Its factor is then taken in closed form,
    :math:`\sqrt{s_x}\,\mathrm{diag}(\sqrt p)(I - 1 p^T)`, as the difference loses all digits at p near 1; and with
    hard labels so is the slope, whose entry of the label is minus the sum of the others. An output on its own may be
    the logit of a binary cross-entropy: a softmax of two classes, of which the other has the logit 0.

    Args:
        loss_fn: From outputs, in the shape of ``outputs``, to a scalar.
        outputs: Shape ``(k, ...)``.

    Raises:
        RuntimeError: If the loss cannot be differentiated twice, or its derivatives are not finite.

    Example:
        >>> curvature = output_curvature(lambda outputs: outputs.square().sum(), torch.ones(1, 2, dtype=torch.float64))
        >>> curvature.matrices
        tensor([[[2., 0.],
                 [0., 2.]]], dtype=torch.float64)
    """
    shape = outputs.shape
    values = outputs.detach().reshape(shape[0], -1).clone().requires_grad_()
    loss = loss_fn(values.view(shape))
    if not loss.requires_grad:
        return _constant_curvature(values, torch.zeros_like(values))
    (slope,) = torch.autograd.grad(loss, values, create_graph=True)
    if not bool(slope.isfinite().all()):
        raise RuntimeError("the derivative of the loss by the outputs must be finite, but has entries that are not")
    if not slope.requires_grad:
        _check_piecewise_linear(loss_fn, values.detach(), shape, slope.detach())
        return _constant_curvature(values, slope)
    found = _second_derivatives(slope, values)
    if not bool(found.matrices.isfinite().all()):
        raise RuntimeError("the second derivative of the loss by the outputs must be finite, but has other entries")
    # Squared errors have no closed form to find, and may have many outputs.
    is_known = (multiple := _multiple_of_identity(found.matrices)) and is_square(loss_fn, outputs, multiple)
    curvature = _factored(found, [] if is_known else _sampled(loss_fn, outputs), num_inputs=shape[0])
    return replace(curvature, is_flat=curvature.is_flat and not _pulls_nearby(loss_fn, values.detach(), shape))


def _pulls_nearby(loss_fn: LossOfOutputs, values: Tensor, shape: Sequence[int]) -> bool:
    """Whether the slope is not zero where every output is moved a little, as beside a minimum of a higher order."""
    moved = (values + _NEARBY**0.5 * (1 + values.abs())).requires_grad_()
    (nearby,) = torch.autograd.grad(loss_fn(moved.view(shape)), moved)
    return bool((nearby != 0).all())


def _check_piecewise_linear(loss_fn: LossOfOutputs, values: Tensor, shape: Sequence[int], slope: Tensor) -> None:
    """Refuse a slope that torch takes for constant, but that changes a little where the outputs do."""
    moved = (values + _NEARBY * (1 + values.abs())).requires_grad_()
    (nearby,) = torch.autograd.grad(loss_fn(moved.view(shape)), moved)
    change = (nearby - slope).abs()
    # At a kink it changes by as much as it is.
    if bool(((change > _NEARBY**2 * slope.abs()) & (change < _NEARBY**0.5 * slope.abs())).any()):
        raise RuntimeError(
            "the loss is curved in the outputs, but holds an operation that can be differentiated only once"
        )


def is_square(loss_fn: LossOfOutputs, outputs: Tensor, multiple: float) -> bool:
    """Whether the second derivative is the same multiple of the identity at other outputs too, all within 0 and 1."""
    values = _drawn(outputs, seed=0).sigmoid_().requires_grad_()
    direction = _drawn(outputs, seed=1)
    try:
        (slope,) = torch.autograd.grad(loss_fn(values), values, create_graph=True)
        product = vector_jacobian_products(slope, [values], direction.unsqueeze(0)).view_as(direction)
    except (RuntimeError, ValueError, TypeError):
        return False
    return bool(((product - multiple * direction).abs() <= _SCALE_RTOL * abs(multiple) * direction.abs()).all())


def check_second_derivative(loss_fn: LossOfOutputs, outputs: Tensor, curvature: OutputCurvature) -> None:
    """Compare the second derivative of a loss, where it is not in closed form, with differences of its first.

    Args:
        loss_fn: From outputs, in the shape of ``outputs``, to a scalar.
        outputs: Shape ``(k, ...)``.
        curvature: Of the loss at these.

    Raises:
        RuntimeError: If they disagree, as where an operation of the loss forgets a term.
    """
    values = outputs.detach().reshape(outputs.shape[0], -1)
    # Each by its own size, or by what it lacks to 1: a loss may be defined on positive outputs or probabilities only.
    direction = values * _drawn(values, seed=_NUM_SAMPLES)
    if bool(((values >= 0) & (values <= 1)).all()):
        direction *= 1 - values
    if curvature.closed is not None:
        direction = torch.where(curvature.closed.view(-1, values.shape[1]), 0.0, direction)

    def slope(step: float) -> list[Tensor]:
        moved = (values + step * direction).requires_grad_()
        loss = loss_fn(moved.view(outputs.shape))
        return list(torch.autograd.grad(loss, moved, materialize_grads=True)) if loss.requires_grad else [0 * values]

    claimed = weighted_rows(direction.reshape(-1, 1), curvature.matrices).view(values.shape)
    # What is smaller is the rounding of a constant, as of a cosine of single numbers.
    least = _FORMULA_RTOL * abs(float(loss_fn(outputs.detach()).detach()))
    if float((direction * claimed).sum().abs()) > least and contradicted([claimed], slope):
        raise RuntimeError(
            "the second derivative of the loss by the outputs does not agree with differences of its gradient: an "
            "operation of the loss has a wrong second derivative"
        )


def _constant_curvature(values: Tensor, slope: Tensor) -> OutputCurvature:
    zero = values.detach().new_zeros(values.shape[0], values.shape[1], values.shape[1])
    return OutputCurvature(zero, zero, not bool(slope.detach().any()), slope=slope.detach())


def _second_derivatives(slope: Tensor, values: Tensor) -> _Derivatives:
    """Per input; all in one block where those of different inputs mix."""
    num_inputs, num_outputs = values.shape
    if _couples_inputs(slope, values):
        identity = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
        whole = vector_jacobian_products(slope, [values], identity.view(-1, num_inputs, num_outputs))
        blocks = whole.unsqueeze(0)
    else:
        selectors = torch.eye(num_outputs, dtype=values.dtype, device=values.device)
        directions = selectors.unsqueeze(1).expand(-1, num_inputs, -1)
        products = vector_jacobian_products(slope, [values], directions)
        blocks = products.view(num_outputs, num_inputs, num_outputs).transpose(0, 1).contiguous()
    outputs, flat = (tensor.detach().reshape(len(blocks), -1) for tensor in (values, slope))
    return _Derivatives(outputs, flat, (blocks + blocks.mT) / 2)


def _couples_inputs(slope: Tensor, values: Tensor) -> bool:
    """Whether moving the outputs of some inputs changes the slope at others, be it by the smallest number.

    For any two inputs one of the directions moves one and not the other: their indices differ in some bit. A loss
    that is a sum over inputs answers with exact zeros, however small its curvature has become. The moves are random,
    as equal ones would cancel in a contrast.
    """
    positions = torch.arange(values.shape[0], device=values.device)
    move = _drawn(values, seed=_NUM_SAMPLES)
    for bit in range((values.shape[0] - 1).bit_length()):
        moved = ((positions >> bit) & 1).bool().unsqueeze(1)
        directions = torch.where(moved, move, 0.0).unsqueeze(0)
        answer = vector_jacobian_products(slope, [values], directions).view_as(values)
        if bool(answer[~moved.squeeze(1)].any()):
            return True
    return False


def _drawn(like: Tensor, *, seed: int) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _sampled(loss_fn: LossOfOutputs, outputs: Tensor) -> list[_Derivatives]:
    """Derivatives at random outputs, all of them moderate; none where the loss is not defined there.

    They lie between 0 and 1, as a loss may be defined on probabilities only, and stop a GPU for good elsewhere.
    """
    found = []
    for seed in range(_NUM_SAMPLES):
        values = _drawn(outputs.detach().reshape(outputs.shape[0], -1), seed=seed).sigmoid_().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(loss_fn(values.view(outputs.shape)), values, create_graph=True)
            found.append(_second_derivatives(slope, values))
        except (RuntimeError, ValueError, TypeError):  # Some losses check what they are given.
            return []
    return found


def _factored(found: _Derivatives, samples: Sequence[_Derivatives], *, num_inputs: int) -> OutputCurvature:
    """Square roots of the second derivatives, group by group, in closed form where there is one."""
    samples = [sample for sample in samples if sample.matrices.shape == found.matrices.shape]
    slope, matrices, factors = found.slope.clone(), found.matrices.clone(), torch.zeros_like(found.matrices)
    closed = torch.zeros(found.matrices.shape[1], dtype=torch.bool, device=found.matrices.device)
    groups = list(_factors_of_groups(found, samples))
    for group in groups:
        rows, columns = group.members.unsqueeze(2), group.members.unsqueeze(1)
        if group.roots is not None:
            factors[:, rows, columns] = group.roots
        if group.roots is not None and group.slope is not None:
            closed[group.members] = True
            slope[:, group.members] = group.slope
            matrices[:, rows, columns] = group.roots.mT @ group.roots
    return OutputCurvature(
        matrices=matrices,
        factors=None if any(group.roots is None for group in groups) else factors,
        residual_is_zero=not bool(slope.any()),
        rounding=max(group.slope_rounding for group in groups),
        slope=slope.view(num_inputs, -1),
        factor_rounding=max(group.factor_rounding for group in groups),
        closed=closed,
        is_flat=not bool(slope.any() or matrices.any()) and _is_any_curved(samples),
    )


def _multiple_of_identity(matrices: Tensor) -> float:
    """The number by which all are the identity; 0 where there is none."""
    multiple = float(matrices[0, 0, 0])
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return multiple if bool((matrices == multiple * identity).all()) else 0.0


def _is_any_curved(samples: Sequence[_Derivatives]) -> bool:
    """Whether the loss is known to be curved somewhere, or nothing is known of it elsewhere."""
    return not samples or any(bool(sample.matrices.any()) for sample in samples)


@dataclass(frozen=True, kw_only=True, eq=False)
class _GroupFactors:
    """Square roots of the curvature of g groups of s outputs.

    Attributes:
        members: Which outputs these are, shape ``(g, s)``.
        roots: Shape ``(n, g, s, s)``; ``None`` where one group is not convex.
        slope: Where it is known better than by autograd, shape ``(n, g, s)``.
        slope_rounding: Its absolute error, beside what is relative to the entries.
        factor_rounding: That of the roots.
    """

    members: Tensor
    roots: Tensor | None
    slope: Tensor | None = None
    slope_rounding: float = 0.0
    factor_rounding: float = 0.0


def _factors_of_groups(found: _Derivatives, samples: Sequence[_Derivatives]) -> Iterator[_GroupFactors]:
    for members in _groups([found, *samples]):
        scales = _softmax_scales(found.of_groups(members), [sample.of_groups(members) for sample in samples])
        closed = scales.isfinite().all(0)
        if bool(closed.any()):
            yield _softmax_factors(found, samples[0], members[closed], scales[:, closed])
        if not bool(closed.all()):
            yield _factors_by_eigenvalues(found, members[~closed])


def _is_isotropic(matrices: Tensor) -> bool:
    """Whether all are the same multiple of the identity, and not zero, as of squared errors."""
    multiple = matrices[0, 0, 0]
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return bool(multiple) and bool((matrices == multiple * identity).all())


def _groups(found: Sequence[_Derivatives]) -> Iterator[Tensor]:
    """Outputs that are coupled, directly or by others: for each size s of a group the members, shape ``(g, s)``."""
    coupled = torch.stack([(derivatives.matrices != 0).any(0) for derivatives in found]).any(0)
    lowest = torch.arange(len(coupled), device=coupled.device)
    while True:  # Each output takes over the lowest number in reach, and then what that one has taken over.
        reached = torch.where(coupled, lowest, len(coupled)).amin(1).minimum(lowest)
        reached = reached[reached]
        if torch.equal(reached, lowest):
            break
        lowest = reached
    order = lowest.argsort(stable=True)
    counts = torch.bincount(lowest)
    sizes = counts[counts > 0]
    starts = sizes.cumsum(0) - sizes
    for size in sorted(set(sizes.tolist())):
        yield order[starts[sizes == size].unsqueeze(1) + torch.arange(size, device=coupled.device)]


def _with_alternative(logits: Tensor) -> Tensor:
    """The logits of a softmax; beside one on its own stands that of its alternative, which is 0."""
    return torch.cat([logits, torch.zeros_like(logits)], -1) if logits.shape[-1] == 1 else logits


def _softmax_scales(found: _Derivatives, samples: Sequence[_Derivatives]) -> Tensor:
    """By what the curvature of a softmax is multiplied in each group, shape ``(n, g)``; NaN where it is none."""
    num_inputs, num_groups, size = found.outputs.shape
    unknown = found.outputs.new_full((num_inputs, num_groups), math.nan)
    if len(samples) < _NUM_SAMPLES:
        return unknown
    fitted = [_fitted_softmax_scales(sample) for sample in samples]
    scales, targets = fitted[0], _scaled_targets(samples[0], fitted[0])
    # A softmax of one class, or of none that counts, is a constant. An output that is never curved is no logit.
    agree = (scales >= 0) & (scales.any(0) if size == 1 else True)
    for sample, again in zip(samples, fitted, strict=True):
        agree &= (again - scales).abs() <= _SCALE_RTOL * scales
        agree &= _softmax_error(sample, again) <= _formula_rtol(sample) * again
        # The slope is s (p - t) at all outputs, with the same targets t.
        agree &= (_scaled_targets(sample, again) - targets).abs().amax(-1) <= _SCALE_RTOL * scales
    agree &= _softmax_error(found, scales) <= _formula_rtol(found) * scales
    if size == 1:
        agree &= (_scaled_targets(found, scales) - targets).abs().amax(-1) <= _SCALE_RTOL * scales
    return torch.where(agree, scales, unknown)


def _formula_rtol(found: _Derivatives) -> Tensor | float:
    """To which second derivatives must follow the formula, shape ``(n, g)``."""
    if found.outputs.shape[-1] > 1:
        return _FORMULA_RTOL
    # That of torch's binary cross-entropy of probabilities is off by 2e-12 / p (1 - p). The slope is compared as well.
    spread = found.outputs.sigmoid() * (-found.outputs).sigmoid()
    return (_FORMULA_RTOL * (1 + 4 / spread)).clamp_(max=_PROBABILITY_RTOL).squeeze(-1)


def _fitted_softmax_scales(sample: _Derivatives) -> Tensor:
    # The second most likely class has p of at most 1/2: p (1 - p) suffers no cancellation there.
    entry, second = (best[..., 1:2] for best in _with_alternative(sample.outputs).softmax(-1).topk(2))
    second = second.clamp(max=sample.outputs.shape[-1] - 1)  # Of two classes both have the same curvature.
    curvatures = sample.matrices.diagonal(dim1=-2, dim2=-1).gather(-1, second)
    return (curvatures / (entry * (1 - entry))).squeeze(-1)


def _scaled_targets(found: _Derivatives, scales: Tensor) -> Tensor:
    probabilities = _with_alternative(found.outputs).softmax(-1)[..., : found.outputs.shape[-1]]
    return scales.unsqueeze(-1) * probabilities - found.slope


def _softmax_error(found: _Derivatives, scales: Tensor) -> Tensor:
    probabilities = _with_alternative(found.outputs).softmax(-1)
    softmax = torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    size = found.outputs.shape[-1]
    return (found.matrices - scales[..., None, None] * softmax[..., :size, :size]).abs().amax((-2, -1))


def _softmax_factors(found: _Derivatives, sample: _Derivatives, members: Tensor, scales: Tensor) -> _GroupFactors:
    """In closed form.

    Args:
        found: At the outputs.
        sample: Where nothing is saturated, which shows the labels.
        members: Of groups whose curvature is that of a softmax.
        scales: By what it is multiplied, shape ``(n, g)``.
    """
    size = members.shape[1]
    centring = _centring(_with_alternative(found.outputs[:, members]).softmax(-1))
    probabilities = _with_alternative(found.outputs[:, members]).softmax(-1)[..., :size]
    remaining = centring.diagonal(dim1=-2, dim2=-1)[..., :size]  # 1 - p with all digits.
    slope, targets = found.slope[:, members], _scaled_targets(sample.of_groups(members), scales)
    scales = scales.unsqueeze(-1)
    is_label = targets > 0.5 * scales
    exact = scales * torch.where(is_label, -remaining, probabilities)
    is_hard = (targets - scales * is_label).abs().amax(-1, keepdim=True) <= _SCALE_RTOL * scales
    is_hard &= (exact - slope).abs().amax(-1, keepdim=True) <= _FORMULA_RTOL * scales
    roots = (scales * probabilities).sqrt()
    return _GroupFactors(
        members=members,
        roots=(roots * remaining.sqrt()).unsqueeze(-1) if size == 1 else roots.unsqueeze(-1) * centring,
        slope=torch.where(is_hard, exact, slope),
        slope_rounding=EPSILON * float(torch.where(is_hard, 0.0, scales).max()),
    )


def _factors_by_eigenvalues(found: _Derivatives, members: Tensor) -> _GroupFactors:
    blocks = found.of_groups(members).matrices
    roots = _square_roots(blocks.flatten(0, 1))
    if roots is None or members.shape[1] == 1:  # A single square root is exact.
        return _GroupFactors(members=members, roots=None if roots is None else roots.view_as(blocks))
    largest = float(torch.linalg.matrix_norm(roots, 2).max())
    return _GroupFactors(members=members, roots=roots.view_as(blocks), factor_rounding=EPSILON * largest)


def _square_roots(blocks: Tensor) -> Tensor | None:
    """Of symmetric matrices, shape ``(n, s, s)``; ``None`` where one is not positive semidefinite."""
    # Scaled to a unit diagonal first (Demmel and Veselic, 1992): eigenvalues of very different size stay accurate.
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        return None
    if blocks.shape[1] == 1:
        return blocks.sqrt()
    # What stands beside a zero on the diagonal is compared with the largest entry.
    scales = torch.where(diagonal > 0, diagonal, blocks.abs().amax((1, 2)).unsqueeze(1)).sqrt()
    inverses = torch.where(scales > 0, 1 / scales, 1.0)
    eigenvalues, eigenvectors = torch.linalg.eigh(inverses.unsqueeze(2) * blocks * inverses.unsqueeze(1))
    if bool((eigenvalues < -_ROUNDING_RTOL * blocks.shape[1]).any()):
        return None
    kept = torch.where(eigenvalues > _ROUNDING_RTOL * blocks.shape[1], eigenvalues, 0.0)
    roots: Tensor = kept.sqrt().unsqueeze(2) * eigenvectors.mT * scales.unsqueeze(1)
    return roots


def softmax_jacobian(outputs: Tensor) -> Tensor:
    """Derivative of the softmax over the second axis with respect to the outputs, as blocks for `weighted_rows`.

    Args:
        outputs: Shape ``(k, classes, ...)``.

    Returns:
        Of the flattened outputs of each input, shape ``(k, c, c)``.

    Example:
        >>> softmax_jacobian(torch.zeros(1, 2, dtype=torch.float64))
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]], dtype=torch.float64)
    """
    values, classes = outputs.detach().flatten(1), outputs.shape[1]
    # Flat index of each class at each position of one input.
    order = torch.arange(values.shape[1], device=values.device).view(classes, -1).mT
    probabilities = values[:, order].softmax(-1)
    jacobian = values.new_zeros(values.shape[0], values.shape[1], values.shape[1])
    jacobian[:, order.unsqueeze(2), order.unsqueeze(1)] = probabilities.unsqueeze(-1) * _centring(probabilities)
    return jacobian


def _centring(probabilities: Tensor) -> Tensor:
    """I - 1 p^T of each row of probabilities, shape ``(..., classes, classes)``."""
    classes = probabilities.shape[-1]
    others = probabilities.unsqueeze(-2).expand(*probabilities.shape[:-1], classes, classes).clone()
    others.diagonal(dim1=-2, dim2=-1).zero_()
    # 1 - p as the sum of the others: every row then annihilates constants to full relative precision.
    return torch.diag_embed(others.sum(-1)) - others
