"""Second derivatives of a loss by the outputs, and their factors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor

from lightning_basin.functional.differences import contradicted_blocks
from lightning_basin.functional.jacobian import vector_jacobian_products, weighted_rows
from lightning_basin.functional.softmax import (
    FORMULA_RTOL,
    NUM_SAMPLES,
    SCALE_RTOL,
    OutputDerivatives,
    factors_of_groups,
)

_NEARBY = 1e-6  # how far to move outputs, relative to their size, to see whether a slope is constant

LossOfOutputs = Callable[[Tensor], Tensor]
"""From outputs, shape ``(k, ...)``, to a scalar."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputCurvature:
    """First and second derivative of a loss with respect to the outputs, and a square root of the second.

    Attributes:
        slope: The first derivative, shape ``(k, c)``.
        matrices: The second derivative: for each input shape ``(k, c, c)``, or ``(1, m, m)`` where the loss couples the
            inputs.
        factors: The square root, of the same shape, ``factors.mT @ factors == matrices``; ``None`` where the loss is
            not convex.
        residual_is_zero: Whether R is known to be zero, so that H = P: the slope is exactly zero on every input.
        rounding: The absolute error of slope and matrices where larger terms have cancelled in them, as in a
            cross-entropy with soft labels; 0 where rounding is relative to the entries.
        factor_rounding: The absolute error of the factors, where they are not in closed form.
        closed: Which outputs have slope and matrices in closed form, where autograd's lose digits by cancellation:
            shape ``(c,)``, or ``(m,)`` where the loss couples the inputs; ``None`` if there is none.
        is_flat: Whether both derivatives are zero at these outputs and beside them, although the loss curves at others:
            a loss within its margin, or a saturated loss of which no digit is left. H = 0 does not follow.
    """

    slope: Tensor
    matrices: Tensor
    factors: Tensor | None
    residual_is_zero: bool
    rounding: float = 0.0
    factor_rounding: float = 0.0
    closed: Tensor | None = None
    is_flat: bool = False

    @property
    def is_closed(self) -> bool:
        """Whether some outputs have slope and matrices in closed form."""
        return self.closed is not None and bool(self.closed.any())

    @property
    def couples_inputs(self) -> bool:
        """Whether the slope at one input changes with the outputs of others."""
        return self.matrices.shape[0] < self.slope.shape[0]

    @cached_property
    def identity_scale(self) -> float | None:
        """The number s where the second derivative is s times the identity on every input, as of squared errors."""
        scale = _identity_scale(self.matrices)
        return scale if scale > 0 else None


def output_curvature(loss_fn: LossOfOutputs, outputs: Tensor) -> OutputCurvature:
    r"""Differentiate a loss twice with respect to the outputs, and factor the result.

    Outputs that the loss couples, directly or through others, form groups. A softmax cross-entropy of a group is
    recognised by its second derivative, :math:`s_x(\mathrm{diag}(p) - p p^T)` with p = softmax(f), whatever function
    computed it (hard or soft targets, class weights, label smoothing, over positions or some of the outputs): at random
    outputs, where no input is saturated, and at the given ones. Its factor is then taken in closed form,
    :math:`\sqrt{s_x}\,\mathrm{diag}(\sqrt p)(I - 1 p^T)`, as the difference loses all digits at p near 1; and with
    hard labels so is the slope, whose entry of the label is minus the sum of the others. An output on its own may be
    the logit of a binary cross-entropy: a softmax of two classes, of which the other has the logit 0.

    Args:
        loss_fn: The loss, from outputs in the shape of ``outputs`` to a scalar.
        outputs: The outputs, shape ``(k, ...)``.

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
        return _without_curvature(torch.zeros_like(values))
    (slope,) = torch.autograd.grad(loss, values, create_graph=True)
    if not bool(slope.isfinite().all()):
        raise RuntimeError("the derivative of the loss by the outputs must be finite, but has entries that are not")
    if not slope.requires_grad:
        _check_piecewise_linear(loss_fn, values.detach(), shape, slope.detach())
        return _without_curvature(slope)
    derivatives = _second_derivatives(slope, values)
    if not bool(derivatives.matrices.isfinite().all()):
        raise RuntimeError("the second derivative of the loss by the outputs must be finite, but has other entries")
    # Squared errors have no closed form to find, and may have many outputs.
    is_square = (scale := _identity_scale(derivatives.matrices)) and is_quadratic(loss_fn, outputs, scale)
    curvature = _factored(derivatives, [] if is_square else _sampled(loss_fn, outputs), num_inputs=shape[0])
    if not curvature.is_flat:
        return curvature
    # Beside a minimum of a higher order the slope is not zero where every output is moved a little.
    pulls_nearby = bool((_slope_nearby(loss_fn, values.detach(), shape, _NEARBY**0.5) != 0).all())
    return replace(curvature, is_flat=not pulls_nearby)


def _slope_nearby(loss_fn: LossOfOutputs, values: Tensor, shape: Sequence[int], distance: float) -> Tensor:
    """The slope where every output is moved by a fraction of its size."""
    moved = (values + distance * (1 + values.abs())).requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(moved.view(shape)), moved)
    return slope


def _check_piecewise_linear(loss_fn: LossOfOutputs, values: Tensor, shape: Sequence[int], slope: Tensor) -> None:
    """Refuse a slope that torch takes for constant, but that changes a little where the outputs do."""
    change = (_slope_nearby(loss_fn, values, shape, _NEARBY) - slope).abs()
    # At a kink it changes by as much as it is.
    if bool(((change > _NEARBY**2 * slope.abs()) & (change < _NEARBY**0.5 * slope.abs())).any()):
        raise RuntimeError(
            "the loss is curved in the outputs, but holds an operation that can be differentiated only once"
        )


def is_quadratic(loss_fn: LossOfOutputs, outputs: Tensor, scale: float) -> bool:
    """Whether the second derivative is a number times the identity at other outputs too, all within 0 and 1."""
    values = _random_like(outputs, seed=0).sigmoid_().requires_grad_()
    direction = _random_like(outputs, seed=1)
    try:
        (slope,) = torch.autograd.grad(loss_fn(values), values, create_graph=True)
        product = vector_jacobian_products(slope, [values], direction.unsqueeze(0)).view_as(direction)
    except (RuntimeError, ValueError, TypeError):
        return False
    return bool(((product - scale * direction).abs() <= SCALE_RTOL * abs(scale) * direction.abs()).all())


def check_second_derivative(loss_fn: LossOfOutputs, outputs: Tensor, curvature: OutputCurvature) -> None:
    """Compare the second derivative of a loss, where it is not in closed form, with differences of its first."""
    values = outputs.detach().reshape(outputs.shape[0], -1)
    # Each output moves by its size, or by its distance to 1: a loss may be defined on probabilities only.
    direction = values * _random_like(values, seed=NUM_SAMPLES)
    if bool(((values >= 0) & (values <= 1)).all()):
        direction *= 1 - values
    if curvature.closed is not None:
        direction = torch.where(curvature.closed.view(-1, values.shape[1]), 0.0, direction)

    def slope(step: float) -> list[Tensor]:
        moved = (values + step * direction).requires_grad_()
        loss = loss_fn(moved.view(outputs.shape))
        return list(torch.autograd.grad(loss, moved, materialize_grads=True)) if loss.requires_grad else [0 * values]

    derivative = weighted_rows(direction.reshape(-1, 1), curvature.matrices).view(values.shape)
    # A smaller derivative is the rounding of a constant, as of a cosine of single numbers.
    least = FORMULA_RTOL * abs(float(loss_fn(outputs.detach()).detach()))
    if float((direction * derivative).sum().abs()) > least and contradicted_blocks([derivative], slope):
        raise RuntimeError(
            "the second derivative of the loss by the outputs does not agree with differences of its gradient: an "
            "operation of the loss has a wrong second derivative"
        )


def _without_curvature(slope: Tensor) -> OutputCurvature:
    """The curvature of a loss that is linear in the outputs."""
    slope = slope.detach()
    zero = slope.new_zeros(slope.shape[0], slope.shape[1], slope.shape[1])
    return OutputCurvature(slope=slope, matrices=zero, factors=zero, residual_is_zero=not bool(slope.any()))


def _second_derivatives(slope: Tensor, values: Tensor) -> OutputDerivatives:
    """Second derivatives by the outputs of each input; in one block where the loss couples the inputs."""
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
    outputs, slope = (tensor.detach().reshape(len(blocks), -1) for tensor in (values, slope))
    return OutputDerivatives(outputs, slope, (blocks + blocks.mT) / 2)


def _couples_inputs(slope: Tensor, values: Tensor) -> bool:
    """Whether moving the outputs of some inputs changes the slope at others, be it by the smallest number.

    For any two inputs one of the directions moves one and not the other: their indices differ in some bit. A loss
    that is a sum over inputs answers with exact zeros, however small its curvature has become. The moves are random,
    as equal ones would cancel in a contrast.
    """
    num_bits = (values.shape[0] - 1).bit_length()
    if num_bits == 0:
        return False
    positions, bits = (torch.arange(size, device=values.device) for size in (values.shape[0], num_bits))
    is_moved = ((positions >> bits.unsqueeze(1)) & 1).bool().unsqueeze(2)
    directions = torch.where(is_moved, _random_like(values, seed=NUM_SAMPLES), 0.0)
    changes = vector_jacobian_products(slope, [values], directions).view_as(directions)
    return bool(torch.where(is_moved, 0.0, changes).any())


def _random_like(outputs: Tensor, *, seed: int) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)


def _sampled(loss_fn: LossOfOutputs, outputs: Tensor) -> list[OutputDerivatives]:
    """Derivatives at random outputs, all of them moderate; none where the loss is not defined there.

    They lie between 0 and 1: a loss may be defined on probabilities only, and elsewhere it may stop a GPU for good.
    """
    samples = []
    for seed in range(NUM_SAMPLES):
        values = _random_like(outputs.detach().reshape(outputs.shape[0], -1), seed=seed).sigmoid_().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(loss_fn(values.view(outputs.shape)), values, create_graph=True)
            samples.append(_second_derivatives(slope, values))
        except (RuntimeError, ValueError, TypeError):  # Some losses check what they are given.
            return []
    return samples


def _factored(
    derivatives: OutputDerivatives, samples: Sequence[OutputDerivatives], *, num_inputs: int
) -> OutputCurvature:
    """Square roots of the second derivatives, group by group, in closed form where there is one."""
    slope, matrices = derivatives.slope.clone(), derivatives.matrices.clone()
    factors = torch.zeros_like(matrices)
    samples = [sample for sample in samples if sample.matrices.shape == matrices.shape]
    closed = torch.zeros(matrices.shape[1], dtype=torch.bool, device=matrices.device)
    groups = list(factors_of_groups(derivatives, samples))
    for group in groups:
        rows, columns = group.members.unsqueeze(2), group.members.unsqueeze(1)
        if group.roots is not None:
            factors[:, rows, columns] = group.roots
        if group.roots is not None and group.slope is not None:
            closed[group.members] = True
            slope[:, group.members] = group.slope
            matrices[:, rows, columns] = group.roots.mT @ group.roots
    is_zero = not bool(slope.any() or matrices.any())
    return OutputCurvature(
        slope=slope.view(num_inputs, -1),
        matrices=matrices,
        factors=None if any(group.roots is None for group in groups) else factors,
        residual_is_zero=not bool(slope.any()),
        rounding=max(group.slope_rounding for group in groups),
        factor_rounding=max(group.factor_rounding for group in groups),
        closed=closed,
        # Where nothing is known of the loss at other outputs, it may be curved there.
        is_flat=is_zero and (not samples or any(bool(sample.matrices.any()) for sample in samples)),
    )


def _identity_scale(matrices: Tensor) -> float:
    """The number by which the identity is multiplied in all matrices; 0 where there is none."""
    scale = float(matrices[0, 0, 0])
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return scale if bool((matrices == scale * identity).all()) else 0.0
