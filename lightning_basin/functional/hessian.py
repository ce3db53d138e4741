"""The Hessian of a loss, its Gauss-Newton part, and the dimension of its null space.

Second derivatives are taken by plain double backward: in torch 2.13 those of ``torch.func`` are wrong with
LayerNorm (62 % error), and ``jvp(grad(...))`` fails for the mean squared error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_basin.functional.rank import check_rtol, default_rtol, numerical_rank, singular_values

_SYMMETRY_RTOL = 1e-8  # of a Hessian's largest entry; rounding is near 1e-14, a wrong formula near 1e-2
_ROUNDING_RTOL = 1e-13  # times c: what eigenvalues of a c x c block with unit diagonal do not resolve


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    r"""How many directions leave a loss flat to second order.

    Attributes:
        nullity: Number of eigenvalues of H with :math:`|\lambda| \le \max(rtol\,\lambda_{max}, \|R\|_2)`, where
            R = H - P is what the remaining residual adds to the Gauss-Newton part P; without P the same as ``strict``.
        strict: The same with :math:`|\lambda| \le rtol\,\lambda_{max}` only.
        negative: Number of eigenvalues below :math:`-rtol\,\lambda_{max}`.
        residual_curvature: :math:`\|R\|_2 / \lambda_{max}`; 0 for H = 0, ``None`` without P.
        gauss_newton_nullity: N - rank(P); ``None`` without P.
        rtol: Relative tolerance on eigenvalues.
    """

    nullity: int
    strict: int
    negative: int
    residual_curvature: float | None
    gauss_newton_nullity: int | None
    rtol: float


@dataclass(frozen=True, eq=False)
class OutputCurvature:
    """Second derivative of a loss with respect to the outputs, and a square root of it.

    Attributes:
        matrices: Per input shape ``(k, c, c)``; shape ``(1, m, m)`` where the loss couples the inputs.
        factors: Of the same shape, ``factors.mT @ factors == matrices``; ``None`` where the loss is not convex.
        rounding: Absolute error of the matrices where larger terms have cancelled in them, as in the cross-entropy of a
            saturated classifier; 0 where rounding is relative to the entries.
        residual_is_zero: Whether the first derivative is exactly zero on every input, so that R = 0 and H = P.
    """

    matrices: Tensor
    factors: Tensor | None
    residual_is_zero: bool
    rounding: float = 0.0


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
    _check_connected(gradient, parameters, [] if curved is None else curved)
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


def _check_connected(gradient: Tensor, parameters: Sequence[Tensor], curved: Sequence[bool]) -> None:
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


def _products(gradient: Tensor, variables: Sequence[Tensor], directions: Tensor) -> Tensor:
    """``directions @ d(gradient)/d(variables)``, shape ``(n, N)``, batched where every operation allows it."""

    def backward(vectors: Tensor, *, batched: bool) -> Tensor:
        parts = torch.autograd.grad(
            gradient, variables, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        batch = vectors.shape[: int(batched)]
        rows = [
            vectors.new_zeros(*batch, variable.numel()) if part is None else part.reshape(*batch, -1)
            for part, variable in zip(parts, variables, strict=True)
        ]
        return torch.cat(rows, dim=-1)

    try:
        return backward(directions, batched=True).detach()
    except RuntimeError:  # Some operations (recurrent cells, custom functions) have no batching rule.
        return torch.stack([backward(direction, batched=False) for direction in directions]).detach()


def output_curvature(loss_fn: Callable[[Tensor], Tensor], outputs: Tensor) -> OutputCurvature:
    r"""Differentiate a loss twice with respect to the outputs, and factor the result.

    Softmax cross-entropy is recognised by its second derivative, :math:`s_x(\mathrm{diag}(p) - p p^T)` with
    p = softmax(f), whatever function computed it (hard or soft targets, class weights, label smoothing). Its factor
    is then taken in closed form, :math:`\sqrt{s_x}\,\mathrm{diag}(\sqrt p)(I - 1 p^T)`: the difference loses all
    digits at p near 1.

    Args:
        loss_fn: From outputs, in the shape of ``outputs``, to a scalar.
        outputs: Shape ``(k, ...)``.

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
        return _constant_curvature(values, residual_is_zero=True)
    (slope,) = torch.autograd.grad(loss, values, create_graph=True)
    residual_is_zero = not bool(slope.detach().any())
    if not slope.requires_grad:
        return _constant_curvature(values, residual_is_zero=residual_is_zero)
    matrices = _curvature_blocks(slope, values)
    factors, rounding = _curvature_factors(matrices, values.detach(), shape)
    return OutputCurvature(matrices, factors, residual_is_zero, rounding)


def _constant_curvature(values: Tensor, *, residual_is_zero: bool) -> OutputCurvature:
    zero = values.detach().new_zeros(values.shape[0], values.shape[1], values.shape[1])
    return OutputCurvature(zero, zero, residual_is_zero)


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
    order = torch.arange(values.shape[1], device=values.device).view(*shape[1:]).movedim(axis - 1, -1)
    order = order.reshape(-1, shape[axis])  # flat index of each class at each position
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
    others = probabilities.unsqueeze(1).repeat(1, order.shape[1], 1)
    others.diagonal(dim1=1, dim2=2).zero_()
    # 1 - p as the sum of the others: every row then annihilates constants to full relative precision.
    centred = torch.diag_embed(others.sum(2)) - others
    factors = torch.zeros_like(matrices)
    found = (scale * probabilities).sqrt().unsqueeze(2) * centred
    factors[:, rows, columns] = found.view(matrices.shape[0], *order.shape, order.shape[1])
    return factors, torch.finfo(values.dtype).eps * float(scale.max())


def curvature_rows(gradients: Tensor, curvature: OutputCurvature) -> Tensor:
    """Rows whose products give the Gauss-Newton matrix, or, where the loss is not convex, half of them.

    Args:
        gradients: Behavioral gradients, shape ``(m, N)``.
        curvature: Of the loss at the outputs.
    """
    return weighted_rows(gradients, curvature.matrices if curvature.factors is None else curvature.factors)


def weighted_rows(gradients: Tensor, blocks: Tensor) -> Tensor:
    """Combine the rows of each input: ``blocks[x] @ gradients`` of input x, shape ``(m, N)``.

    Args:
        gradients: Rows ordered by input, then output, shape ``(m, N)``.
        blocks: Shape ``(k, c, c)``, or ``(1, m, m)``.
    """
    return (blocks @ gradients.view(blocks.shape[0], blocks.shape[1], -1)).view_as(gradients)


def hessian_null_space(
    hessian: Tensor,
    *,
    gradients: Tensor | None = None,
    curvature: OutputCurvature | None = None,
    rtol: float | None = None,
) -> NullSpace:
    """Count the flat directions of a Hessian at the resolution that its residual leaves.

    With exactly zero residual H equals its Gauss-Newton part, and the count is N - rank(P), read without squaring
    off the rows of ``factors @ gradients``. Otherwise, away from a perfect fit, R = H - P moves eigenvalues by up to
    its norm (Weyl), and what lies below is not told apart from zero.

    Args:
        hessian: Symmetric, shape ``(N, N)``.
        gradients: Behavioral gradients of the same parameters, shape ``(m, N)``.
        curvature: Of the loss at the outputs; given with ``gradients``.
        rtol: Relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.

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
    rtol = default_rtol(num_parameters, num_parameters) if rtol is None else rtol
    if gradients is None or curvature is None:
        strict, negative, _ = _inertia(hessian, rtol, 0.0)
        return NullSpace(
            nullity=strict,
            strict=strict,
            negative=negative,
            residual_curvature=None,
            gauss_newton_nullity=None,
            rtol=rtol,
        )
    rank, gauss_newton = _gauss_newton(gradients, curvature)
    if curvature.residual_is_zero and curvature.factors is not None:
        return NullSpace(
            nullity=num_parameters - rank,
            strict=num_parameters - rank,
            negative=0,
            residual_curvature=0.0,
            gauss_newton_nullity=num_parameters - rank,
            rtol=rtol,
        )
    # Rounding of what has cancelled in the curvature reaches the Hessian through the gradients.
    floor = curvature.rounding * float(gradients.square().sum())
    strict, negative, eigenvalues = _inertia(hessian, rtol, floor)
    magnitudes = eigenvalues.abs()
    largest = float(magnitudes.max())
    residual = float(torch.linalg.eigvalsh(hessian - gauss_newton).abs().max())
    return NullSpace(
        nullity=int((magnitudes <= max(rtol * largest, residual, floor)).sum()),
        strict=strict,
        negative=negative,
        residual_curvature=residual / largest if largest > 0 else 0.0,
        gauss_newton_nullity=num_parameters - rank,
        rtol=rtol,
    )


def _inertia(hessian: Tensor, rtol: float, floor: float) -> tuple[int, int, Tensor]:
    """Numbers of zero and of negative eigenvalues, and the eigenvalues themselves, ascending."""
    eigenvalues = torch.linalg.eigvalsh(hessian)
    threshold = max(rtol * float(eigenvalues.abs().max()), floor)
    zero = int((eigenvalues.abs() <= threshold).sum())
    return zero, int((eigenvalues < -threshold).sum()), eigenvalues


def _gauss_newton(gradients: Tensor, curvature: OutputCurvature) -> tuple[int, Tensor]:
    """Rank of the Gauss-Newton matrix, and the matrix."""
    if curvature.factors is not None:
        rows = curvature_rows(gradients, curvature)
        return numerical_rank(singular_values(rows), rtol=default_rtol(*rows.shape)), rows.mT @ rows
    matrix = gradients.mT @ weighted_rows(gradients, curvature.matrices)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return numerical_rank(eigenvalues.abs(), rtol=default_rtol(*matrix.shape)), matrix


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
    return hessian_null_space(hessian.to(torch.float64), rtol=rtol).strict
