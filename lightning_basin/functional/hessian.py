"""The Hessian of a loss, its Gauss-Newton part, and the dimension of its null space.

Second derivatives are taken by plain double backward: in torch 2.13 those of ``torch.func`` are wrong with
LayerNorm (62 % error), and ``jvp(grad(...))`` fails for the mean squared error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    Spectrum,
    check_rtol,
    default_rtol,
    numerical_rank,
    singular_values,
)

_SYMMETRY_RTOL = 1e-8  # of a Hessian's largest entry; rounding is near 1e-14, a wrong formula near 1e-2
_ROUNDING_RTOL = 1e-13  # times c: what eigenvalues of a c x c block with unit diagonal do not resolve
_NEARBY = 1e-6  # how far to move outputs to see whether a slope is constant
_GRAM_ERROR = 16 * EPSILON  # of the largest eigenvalue of a Gram matrix: ten times what is measured at m = 2560
_SKETCH_FACTOR = 4.0  # singular values of a sketch with 2m columns are not larger: 1 + sqrt(1/2) for Gaussian ones

NullSpaceMethod = Literal["dense", "bracket", "gauss-newton"]


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    r"""How many directions leave a loss flat to second order, and how that is known. ``None`` is what is not known.

    Attributes:
        nullity: Number of eigenvalues of H with :math:`|\lambda| \le \max(rtol\,\lambda_{max}, \|R\|_2)`, where
            R = H - P is what the remaining residual adds to the Gauss-Newton part P; without P the same as ``strict``.
            Without all eigenvalues of H it is known where ``lower`` and ``upper`` meet.
        lower: The nullity is at least this, N - rank(P).
        upper: And at most this, by the eigenvalues of P that R cannot bring down to its own norm.
        strict: Eigenvalues with :math:`|\lambda| \le rtol\,\lambda_{max}` only.
        negative: Number of eigenvalues below :math:`-rtol\,\lambda_{max}`.
        gauss_newton_nullity: N - rank(P).
        residual: :math:`\|R\|_2`, or a bound from above.
        smallest: Smallest nonzero eigenvalue of P, or a bound from below.
        largest: Largest magnitude of an eigenvalue of H.
        rtol: Relative tolerance on eigenvalues of H, or, where H is not formed, on those of P.
        method: ``"dense"`` from all eigenvalues of H, ``"bracket"`` from those of P and a bound on R,
            ``"gauss-newton"`` from those of P alone.
    """

    nullity: int | None
    lower: int | None = None
    upper: int | None = None
    strict: int | None = None
    negative: int | None = None
    gauss_newton_nullity: int | None = None
    residual: float | None = None
    smallest: float | None = None
    largest: float | None = None
    rtol: float
    method: NullSpaceMethod

    @property
    def residual_curvature(self) -> float | None:
        r""":math:`\|R\|_2 / \lambda_{max}`; 0 for H = 0."""
        if self.residual is None or self.largest is None:
            return None
        return self.residual / self.largest if self.largest > 0 else 0.0

    @property
    def smallest_curvature(self) -> float | None:
        r"""``smallest`` relative to :math:`\lambda_{max}`."""
        return self.smallest / self.largest if self.smallest is not None and self.largest else None


@dataclass(frozen=True, eq=False)
class OutputCurvature:
    """Second derivative of a loss with respect to the outputs, and a square root of it.

    Attributes:
        matrices: Per input shape ``(k, c, c)``; shape ``(1, m, m)`` where the loss couples the inputs.
        factors: Of the same shape, ``factors.mT @ factors == matrices``; ``None`` where the loss is not convex.
        rounding: Absolute error of the matrices where larger terms have cancelled in them, as in the cross-entropy of a
            saturated classifier; 0 where rounding is relative to the entries.
        residual_is_zero: Whether the first derivative is exactly zero on every input, so that R = 0 and H = P.
        slope: The first derivative, shape ``(k, c)``.
    """

    matrices: Tensor
    factors: Tensor | None
    residual_is_zero: bool
    rounding: float = 0.0
    slope: Tensor | None = None

    @property
    def multiple(self) -> float | None:
        """The number s where the second derivative is s times the identity on every input, as of squared errors."""
        multiple = float(self.matrices[0, 0, 0])
        identity = torch.eye(self.matrices.shape[1], dtype=self.matrices.dtype, device=self.matrices.device)
        return multiple if multiple > 0 and bool((self.matrices == multiple * identity).all()) else None


def hessian_matrix(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    chunk_size: int = 64,
    atol: float = 0.0,
    curved: Sequence[bool] | None = None,
) -> Tensor:
    """All second derivatives of a loss, by double backward.

    Args:
        loss: Attached to the graph of ``parameters``, shape ``()``.
        parameters: In the order of rows and columns.
        chunk_size: Columns per batched backward pass; bounds the memory.
        atol: Asymmetry to allow beside 1e-8 of the largest entry: what is left of rounding where larger terms cancel,
            as in the cross-entropy of a saturated classifier.
        curved: For each parameter whether its Gauss-Newton part is known not to vanish. An operation that can be
            differentiated once only then shows, where torch would return a silent zero.

    Returns:
        Symmetric, shape ``(N, N)``.

    Raises:
        RuntimeError: If the result is not symmetric, as happens where a derivative of an operation is wrong; or if
            the gradient has lost its dependence on a curved parameter.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_matrix(w[0] ** 2 * w[1], [w])
        tensor([[4., 2.],
                [2., 0.]])
    """
    num_parameters = sum(parameter.numel() for parameter in parameters)
    hessian = parameters[0].new_zeros(num_parameters, num_parameters).detach()
    if not loss.requires_grad:
        return hessian
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    check_connected(gradient, parameters, [] if curved is None else curved)
    if not gradient.requires_grad:  # A loss that is piecewise linear in the parameters.
        return hessian
    identity = torch.eye(num_parameters, dtype=gradient.dtype, device=gradient.device)
    for start in range(0, num_parameters, chunk_size):
        chunk = slice(start, start + chunk_size)
        hessian[chunk] = _products(gradient, parameters, identity[chunk])
    asymmetry = float((hessian - hessian.mT).abs().max())
    scale = float(hessian.abs().max())
    if asymmetry > _SYMMETRY_RTOL * scale + atol:
        raise RuntimeError(
            f"the Hessian must be symmetric, but entries differ by {asymmetry:.1e} of {scale:.1e}: an operation of the "
            f"network or the loss has a wrong second derivative"
        )
    return (hessian + hessian.mT) / 2


def check_connected(gradient: Tensor, parameters: Sequence[Tensor], curved: Sequence[bool]) -> None:
    """Refuse a gradient that has lost its dependence on parameters in which the loss is curved.

    Args:
        gradient: Of the loss, attached, shape ``(N,)``.
        parameters: All that it belongs to.
        curved: For each, whether its Gauss-Newton part is known not to vanish.

    Raises:
        RuntimeError: If one is lost, where torch would return a silent zero as second derivative.
    """
    if not any(curved):
        return
    connected = [False] * len(parameters)
    if gradient.requires_grad:
        found = torch.autograd.grad(gradient.sum(), parameters, retain_graph=True, allow_unused=True)
        connected = [part is not None for part in found]
    lost = sum(is_curved and not is_connected for is_curved, is_connected in zip(curved, connected, strict=True))
    if lost:
        raise RuntimeError(
            f"the gradient must depend on every parameter in which the loss is curved, but has lost {lost} of them: an "
            f"operation of the network can be differentiated only once"
        )


def hessian_product(gradient: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
    """The derivative of a gradient along a direction.

    Args:
        gradient: Attached to the graph of ``variables``, which is kept, shape ``(n,)``.
        variables: With n entries in all; those that ``gradient`` belongs to.
        direction: Shape ``(n,)``.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(w[0] ** 2 * w[1], w, create_graph=True)
        >>> hessian_product(gradient, [w], torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    if not gradient.requires_grad:  # Of a function that is piecewise linear.
        return torch.zeros_like(direction)
    return _backward(gradient, variables, direction, batched=False).detach()


def _products(gradient: Tensor, variables: Sequence[Tensor], directions: Tensor) -> Tensor:
    """``directions @ d(gradient)/d(variables)``, shape ``(n, N)``, batched where every operation allows it."""
    try:
        return _backward(gradient, variables, directions, batched=True).detach()
    except RuntimeError:  # Some operations (recurrent cells, custom functions) have no batching rule.
        return torch.stack([_backward(gradient, variables, row, batched=False) for row in directions]).detach()


def _backward(gradient: Tensor, variables: Sequence[Tensor], vectors: Tensor, *, batched: bool) -> Tensor:
    parts = torch.autograd.grad(
        gradient, variables, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )
    batch = vectors.shape[: int(batched)]
    rows = [
        vectors.new_zeros(*batch, variable.numel()) if part is None else part.reshape(*batch, -1)
        for part, variable in zip(parts, variables, strict=True)
    ]
    return torch.cat(rows, dim=-1)


def output_curvature(loss_fn: Callable[[Tensor], Tensor], outputs: Tensor) -> OutputCurvature:
    r"""Differentiate a loss twice with respect to the outputs, and factor the result.

    Softmax cross-entropy is recognised by its second derivative, :math:`s_x(\mathrm{diag}(p) - p p^T)` with
    p = softmax(f), whatever function computed it (hard or soft targets, class weights, label smoothing). Its factor
    is then taken in closed form, :math:`\sqrt{s_x}\,\mathrm{diag}(\sqrt p)(I - 1 p^T)`: the difference loses all
    digits at p near 1.

    Args:
        loss_fn: From outputs, in the shape of ``outputs``, to a scalar.
        outputs: Shape ``(k, ...)``.

    Raises:
        RuntimeError: If the loss cannot be differentiated twice.

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
    residual_is_zero = not bool(slope.detach().any())
    if not slope.requires_grad:
        _check_piecewise_linear(loss_fn, values.detach(), shape, slope.detach())
        return _constant_curvature(values, slope)
    matrices = _curvature_blocks(slope, values)
    factors, rounding = _curvature_factors(matrices, values.detach(), shape)
    return OutputCurvature(matrices, factors, residual_is_zero, rounding, slope.detach())


def _check_piecewise_linear(
    loss_fn: Callable[[Tensor], Tensor], values: Tensor, shape: Sequence[int], slope: Tensor
) -> None:
    """Refuse a slope that torch takes for constant, but that changes a little where the outputs do."""
    moved = (values + _NEARBY * (1 + values.abs())).requires_grad_()
    (nearby,) = torch.autograd.grad(loss_fn(moved.view(shape)), moved)
    change = (nearby - slope).abs()
    # At a kink it changes by as much as it is.
    if bool(((change > _NEARBY**2 * slope.abs()) & (change < _NEARBY**0.5 * slope.abs())).any()):
        raise RuntimeError(
            "the loss is curved in the outputs, but holds an operation that can be differentiated only once"
        )


def _constant_curvature(values: Tensor, slope: Tensor) -> OutputCurvature:
    zero = values.detach().new_zeros(values.shape[0], values.shape[1], values.shape[1])
    return OutputCurvature(zero, zero, not bool(slope.detach().any()), slope=slope.detach())


def _curvature_blocks(slope: Tensor, values: Tensor) -> Tensor:
    """Second derivatives per input; all in one block where those of different inputs mix."""
    num_inputs, num_outputs = values.shape
    selectors = torch.eye(num_outputs, dtype=values.dtype, device=values.device)
    directions = selectors.unsqueeze(1).expand(-1, num_inputs, -1)
    products = _products(slope, [values], directions).view(num_outputs, num_inputs, num_outputs)
    blocks = products.transpose(0, 1).contiguous()
    if not _couples_inputs(slope, values):
        return (blocks + blocks.mT) / 2
    identity = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
    whole = _products(slope, [values], identity.view(-1, num_inputs, num_outputs))
    return ((whole + whole.mT) / 2).unsqueeze(0)


def _couples_inputs(slope: Tensor, values: Tensor) -> bool:
    """Whether moving the outputs of some inputs changes the slope at others, be it by the smallest number.

    For any two inputs one of the directions moves one and not the other: their indices differ in some bit. A loss
    that is a sum over inputs answers with exact zeros, however small its curvature has become.
    """
    num_inputs, num_outputs = values.shape
    positions = torch.arange(num_inputs, device=values.device)
    move = torch.linspace(1, 2, num_outputs, dtype=values.dtype, device=values.device)
    for bit in range((num_inputs - 1).bit_length()):
        moved = ((positions >> bit) & 1).bool().unsqueeze(1)
        answer = _products(slope, [values], torch.where(moved, move, 0.0).unsqueeze(0)).view_as(values)
        if bool(answer[~moved.squeeze(1)].any()):
            return True
    return False


def _curvature_factors(matrices: Tensor, values: Tensor, shape: Sequence[int]) -> tuple[Tensor | None, float]:
    """Square roots of the curvature (``None`` where it is not positive semidefinite), and its absolute rounding."""
    if matrices.shape[0] == values.shape[0] and len(shape) > 1:
        # Classes are along the second axis of the outputs, as in torch, or along the last.
        for axis in {1, len(shape) - 1}:
            recognised = _softmax_factors(matrices, values, shape, axis)
            if recognised is not None:
                return recognised
    # Scaled to a unit diagonal first (Demmel and Veselic, 1992): eigenvalues of very different size stay accurate.
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        return None, 0.0
    scales = diagonal.sqrt()
    inverses = torch.where(scales > 0, 1 / scales, 1.0)
    eigenvalues, eigenvectors = torch.linalg.eigh(inverses.unsqueeze(2) * matrices * inverses.unsqueeze(1))
    if bool((eigenvalues < -_ROUNDING_RTOL * matrices.shape[1]).any()):
        return None, 0.0
    kept = torch.where(eigenvalues > _ROUNDING_RTOL * matrices.shape[1], eigenvalues, 0.0)
    roots: Tensor = kept.sqrt().unsqueeze(2) * eigenvectors.mT * scales.unsqueeze(1)
    return roots, 0.0


def _softmax_factors(matrices: Tensor, values: Tensor, shape: Sequence[int], axis: int) -> tuple[Tensor, float] | None:
    """Factors where the curvature is that of softmax cross-entropies over one axis of the outputs, else ``None``."""
    order = _order_of_classes(shape, axis).to(values.device)
    if order.shape[1] < 2:
        return None
    rows, columns = order.unsqueeze(2), order.unsqueeze(1)
    blocks = matrices[:, rows, columns].flatten(0, 1)
    beside = matrices.clone()
    beside[:, rows, columns] = 0
    if bool(beside.any()):
        return None
    probabilities = values[:, order].flatten(0, 1).softmax(1)
    # The second most likely class has p of at most 1/2: p (1 - p) suffers no cancellation there.
    entry, second = (best[:, 1:2] for best in probabilities.topk(2, dim=1))
    unit = entry * (1 - entry)
    scale = blocks.diagonal(dim1=1, dim2=2).gather(1, second) / unit.clamp(min=torch.finfo(unit.dtype).tiny)
    softmax = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    error = (blocks - scale.unsqueeze(2) * softmax).abs().amax((1, 2))
    if not bool(((scale.squeeze(1) >= 0) & (error <= 1e-12 * scale.squeeze(1))).all()):
        return None
    factors = torch.zeros_like(matrices)
    found = (scale * probabilities).sqrt().unsqueeze(2) * _centring(probabilities)
    factors[:, rows, columns] = found.view(matrices.shape[0], *order.shape, order.shape[1])
    return factors, torch.finfo(values.dtype).eps * float(scale.max())


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
    values = outputs.detach().flatten(1)
    order = _order_of_classes(outputs.shape, 1).to(values.device)
    probabilities = values[:, order].flatten(0, 1).softmax(1)
    blocks = probabilities.unsqueeze(2) * _centring(probabilities)
    jacobian = values.new_zeros(values.shape[0], values.shape[1], values.shape[1])
    jacobian[:, order.unsqueeze(2), order.unsqueeze(1)] = blocks.view(values.shape[0], *order.shape, order.shape[1])
    return jacobian


def _order_of_classes(shape: Sequence[int], axis: int) -> Tensor:
    """Flat index of each class at each position of one input's outputs, shape ``(positions, classes)``."""
    order = torch.arange(math.prod(shape[1:])).view(*shape[1:]).movedim(axis - 1, -1)
    return order.reshape(-1, shape[axis])


def _centring(probabilities: Tensor) -> Tensor:
    """I - 1 p^T of each row of probabilities, shape ``(n, classes, classes)``."""
    others = probabilities.unsqueeze(1).repeat(1, probabilities.shape[1], 1)
    others.diagonal(dim1=1, dim2=2).zero_()
    # 1 - p as the sum of the others: every row then annihilates constants to full relative precision.
    return torch.diag_embed(others.sum(2)) - others


def null_space_bracket(
    num_parameters: int,
    rows: Spectrum,
    *,
    residual: float | None,
    multiple: float = 1.0,
    largest: float | None = None,
    rtol: float | None = None,
) -> NullSpace:
    r"""What eigenvalues of P and a bound on R = H - P prove of the eigenvalues of H, at any N.

    R moves each eigenvalue by at most its norm (Weyl). So H has at least as many eigenvalues with
    :math:`|\lambda| > \|R\|_2` as P has above :math:`2 \|R\|_2`, and at most rank(P).

    Args:
        num_parameters: N.
        rows: Singular values of rows whose products are P.
        residual: Upper bound on :math:`\|R\|_2`; ``None`` where nothing is known of it.
        multiple: P is this number times the products of the rows.
        largest: Largest magnitude of an eigenvalue of H; ``None`` where it is not known.
        rtol: What counts as zero relative to the largest eigenvalue, beside the residual; ``None`` means the
            square of the tolerance of ``rows``.

    Example:
        >>> values = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
        >>> rows = Spectrum(singular_values=values, rtol=1e-15, method="svd")
        >>> [null_space_bracket(5, rows, residual=size).nullity for size in (1e-3, 1e-1)]
        [2, None]
        >>> found = null_space_bracket(5, rows, residual=1e-1)
        >>> found.lower, found.upper
        (2, 3)
    """
    check_rtol(rtol)
    rank = numerical_rank(rows.singular_values, rtol=rows.rtol)
    nullity = num_parameters - rank
    certain = multiple * _certain(rows)[:rank].square()
    steepest = multiple * float(rows.singular_values.max()) ** 2 if rank else 0.0
    smallest = float(certain[-1]) if rank else None
    known: dict[str, Any] = {
        "gauss_newton_nullity": nullity,
        "smallest": smallest,
        "rtol": rows.rtol**2 if rtol is None else rtol,
    }
    if residual is None:
        return NullSpace(nullity=None, method="gauss-newton", **known)
    if residual == 0:  # H = P: what counts as zero in it is known, however uncertain the last singular values are.
        if rtol is not None:
            curved = int((multiple * rows.singular_values.square() > rtol * steepest).sum())
            nullity = num_parameters - curved
        return NullSpace(
            nullity=nullity,
            lower=nullity,
            upper=nullity,
            strict=nullity,
            negative=0,
            residual=0.0,
            largest=steepest,
            method="bracket",
            **known,
        )
    tolerance = residual if rtol is None else max(residual, rtol * (steepest + residual))
    curved = int((certain > tolerance + residual).sum())
    return NullSpace(
        nullity=nullity if curved == rank else None,
        lower=nullity,
        upper=num_parameters - curved,
        residual=residual,
        largest=largest,
        method="bracket",
        **known,
    )


def _certain(spectrum: Spectrum) -> Tensor:
    """What the singular values are at least, behind the errors of the way in which they were obtained."""
    values = spectrum.singular_values
    if values.numel() == 0:
        return values
    largest = float(values.max())
    if spectrum.method == "svd":
        return (values - spectrum.rtol * largest).clamp_(min=0)
    certain = (values.square() - _GRAM_ERROR * largest**2).clamp_(min=0).sqrt_()
    if spectrum.method == "gram":
        return certain
    sketched = (values / _SKETCH_FACTOR - spectrum.rtol * largest).clamp_(min=0)
    return torch.where(values > GRAM_RESOLUTION * largest, certain, sketched)


def hessian_null_space(
    hessian: Tensor,
    *,
    gradients: Tensor | None = None,
    curvature: OutputCurvature | None = None,
    rtol: float | None = None,
    bracket: NullSpace | None = None,
) -> NullSpace:
    """Count the flat directions of a Hessian at the resolution that its residual leaves.

    With exactly zero residual H equals its Gauss-Newton part, and the count is N - rank(P), read without squaring
    off the rows of ``factors @ gradients``. Otherwise, away from a perfect fit, R = H - P moves eigenvalues by up to
    its norm (Weyl), and what lies below is not told apart from zero. What is proved of the count by the spectrum of P
    overrules eigenvalues of H that rounding has moved.

    Args:
        hessian: Symmetric, shape ``(N, N)``.
        gradients: Behavioral gradients of the same parameters, shape ``(m, N)``.
        curvature: Of the loss at the outputs; given with ``gradients``.
        rtol: Relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.
        bracket: What is known of the null space already; ``None`` finds it from ``gradients``.

    Raises:
        ValueError: If ``hessian`` is not square, ``rtol`` not inside ``(0, 1)``, or one of ``gradients`` and
            ``curvature`` is given alone.

    Example:
        >>> hessian_null_space(torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64))).nullity
        1
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be a square matrix, got shape {tuple(hessian.shape)}")
    if (gradients is None) != (curvature is None):
        raise ValueError("gradients and curvature are needed together, got only one of them")
    check_rtol(rtol)
    num_parameters = hessian.shape[0]
    if num_parameters == 0:
        raise ValueError("hessian must have at least one row, got shape (0, 0)")
    tolerance = default_rtol(num_parameters, num_parameters) if rtol is None else rtol
    if gradients is None or curvature is None:
        strict, negative, eigenvalues = _inertia(hessian, tolerance, 0.0)
        largest = float(eigenvalues.abs().max())
        return NullSpace(
            nullity=strict, strict=strict, negative=negative, largest=largest, rtol=tolerance, method="dense"
        )
    if curvature.factors is None:
        return _indefinite_null_space(hessian, gradients, curvature, tolerance)
    rows = weighted_rows(gradients, curvature.factors)
    if bracket is None:
        values = singular_values(rows)
        spectrum = Spectrum(singular_values=values, rtol=default_rtol(*rows.shape), method="svd")
        bound = 0.0 if curvature.residual_is_zero else _norm(hessian - rows.mT @ rows)
        bracket = null_space_bracket(num_parameters, spectrum, residual=bound, rtol=rtol)
    if bracket.residual == 0:
        return replace(bracket, rtol=tolerance, method="dense")
    # Rounding of what has cancelled in the curvature reaches the Hessian through the gradients.
    floor = curvature.rounding * float(gradients.square().sum())
    strict, negative, eigenvalues = _inertia(hessian, tolerance, floor)
    magnitudes = eigenvalues.abs()
    largest = float(magnitudes.max())
    residual = min(_norm(hessian - rows.mT @ rows), bracket.residual or math.inf)
    counted = int((magnitudes <= max(tolerance * largest, residual, floor)).sum())
    return replace(
        bracket,
        nullity=min(max(counted, bracket.lower or 0), num_parameters if bracket.upper is None else bracket.upper),
        strict=strict,
        negative=negative,
        residual=residual,
        largest=largest,
        rtol=tolerance,
        method="dense",
    )


def _indefinite_null_space(hessian: Tensor, gradients: Tensor, curvature: OutputCurvature, rtol: float) -> NullSpace:
    """Of a loss that is not convex in the outputs: P has eigenvalues of both signs, and no bracket follows from it."""
    gauss_newton = gradients.mT @ weighted_rows(gradients, curvature.matrices)
    rank = numerical_rank(torch.linalg.eigvalsh(gauss_newton).abs(), rtol=default_rtol(*gauss_newton.shape))
    strict, negative, eigenvalues = _inertia(hessian, rtol, 0.0)
    magnitudes = eigenvalues.abs()
    largest, residual = float(magnitudes.max()), _norm(hessian - gauss_newton)
    return NullSpace(
        nullity=int((magnitudes <= max(rtol * largest, residual)).sum()),
        strict=strict,
        negative=negative,
        gauss_newton_nullity=hessian.shape[0] - rank,
        residual=residual,
        largest=largest,
        rtol=rtol,
        method="dense",
    )


def _norm(symmetric: Tensor) -> float:
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


def _inertia(hessian: Tensor, rtol: float, floor: float) -> tuple[int, int, Tensor]:
    """Numbers of zero and of negative eigenvalues, and the eigenvalues themselves, ascending."""
    eigenvalues = torch.linalg.eigvalsh(hessian)
    threshold = max(rtol * float(eigenvalues.abs().max()), floor)
    zero = int((eigenvalues.abs() <= threshold).sum())
    return zero, int((eigenvalues < -threshold).sum()), eigenvalues


def hessian_nullity(hessian: Tensor, *, rtol: float | None = None) -> int:
    """How many eigenvalues of a Hessian are numerically zero.

    Args:
        hessian: Symmetric, shape ``(N, N)``.
        rtol: Relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.

    Raises:
        ValueError: See `hessian_null_space`.

    Example:
        >>> hessian_nullity(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        1
    """
    null_space = hessian_null_space(hessian.to(torch.float64), rtol=rtol)
    assert null_space.strict is not None
    return null_space.strict
