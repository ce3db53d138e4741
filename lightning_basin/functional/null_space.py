"""The dimension of a Hessian's null space, counted or bracketed."""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_basin.functional.bracket import NullSpace, null_space_bracket
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import Spectrum, check_rtol, default_rtol, numerical_rank, singular_values

_TIE_ROUNDINGS = 16.0  # rounding errors (N eps of the largest eigenvalue) by which distinguishable eigenvalues differ
_ASYMMETRIES = 4.0  # norm of a Hessian's rounding error, relative to that of its antisymmetric part, in which it shows


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
    its norm (Weyl), and smaller eigenvalues are not distinguished from zero. A bracket that the spectrum of P proves
    overrules eigenvalues of H that rounding has moved.

    Args:
        hessian: The Hessian, symmetric but for rounding, shape ``(N, N)``. By how much it is not shows how far rounding
            moves its eigenvalues: smaller ones count as zero.
        gradients: The behavioral gradients by the same parameters, shape ``(m, N)``.
        curvature: The curvature of the loss at the outputs; given with ``gradients``.
        rtol: The tolerance relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.
        bracket: The bracket of the nullity, with the norm of R; ``None`` finds it from ``gradients``.

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
    floor = _ASYMMETRIES * float((hessian - hessian.mT).norm())
    hessian = (hessian + hessian.mT) / 2
    if gradients is None or curvature is None:
        counts = _counted(torch.linalg.eigvalsh(hessian), tolerance, floor)
        return replace(counts, nullity=counts.strict)
    if curvature.factors is None:
        return _indefinite_null_space(hessian, gradients, curvature, tolerance, floor)
    if bracket is None:
        rows = weighted_rows(gradients, curvature.factors)
        spectrum = Spectrum(singular_values=singular_values(rows), rtol=default_rtol(*rows.shape), method="svd")
        norm = 0.0 if curvature.residual_is_zero else _norm(hessian - rows.mT @ rows)
        bracket = null_space_bracket(num_parameters, spectrum, residual=norm, rtol=rtol)
    if bracket.residual == 0:
        return replace(bracket, rtol=tolerance, method="dense")
    assert bracket.residual is not None
    # Rounding of what has cancelled in the curvature reaches the Hessian through the gradients.
    floor = max(floor, curvature.rounding * float(gradients.square().sum()))
    return _bracketed_null_space(hessian, bracket, bracket.residual, rtol=tolerance, floor=floor)


def _bracketed_null_space(
    hessian: Tensor, bracket: NullSpace, residual: float, *, rtol: float, floor: float
) -> NullSpace:
    """The count of eigenvalues that a residual does not resolve, inside of the bracket."""
    num_parameters = hessian.shape[0]
    eigenvalues = torch.linalg.eigvalsh(hessian)
    magnitudes = eigenvalues.abs()
    largest = float(magnitudes.max())
    threshold = max(rtol * largest, residual, floor)
    num_flat = int((magnitudes <= threshold).sum())
    nullity = min(max(num_flat, bracket.lower or 0), num_parameters if bracket.upper is None else bracket.upper)
    # Nearly all of H is residual where its largest eigenvalue is that of R: which is larger is not resolved.
    rounding = _TIE_ROUNDINGS * default_rtol(num_parameters, num_parameters) * largest
    distances = (magnitudes - threshold).abs()
    is_tied = residual > _TIE_ROUNDINGS * rounding and bool(((distances > 0) & (distances <= rounding)).any())
    is_known = bracket.gauss_newton_nullity != num_parameters and (not is_tied or bracket.lower == bracket.upper)
    return replace(
        _counted(eigenvalues, rtol, floor),
        nullity=nullity if is_known else None,
        lower=bracket.lower,
        upper=bracket.upper,
        gauss_newton_nullity=bracket.gauss_newton_nullity,
        residual=residual,
        smallest=bracket.smallest,
    )


def _indefinite_null_space(
    hessian: Tensor, gradients: Tensor, curvature: OutputCurvature, rtol: float, floor: float
) -> NullSpace:
    """The null space of a loss that is not convex in the outputs.

    P then has eigenvalues of both signs, and no bracket follows from it.
    """
    gauss_newton = gradients.mT @ weighted_rows(gradients, curvature.matrices)
    rank = numerical_rank(torch.linalg.eigvalsh(gauss_newton).abs(), rtol=default_rtol(*gauss_newton.shape))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    magnitudes = eigenvalues.abs()
    residual = _norm(hessian - gauss_newton)
    return replace(
        _counted(eigenvalues, rtol, floor),
        nullity=int((magnitudes <= max(rtol * float(magnitudes.max()), residual, floor)).sum()),
        gauss_newton_nullity=hessian.shape[0] - rank,
        residual=residual,
    )


def _norm(symmetric: Tensor) -> float:
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


def _counted(eigenvalues: Tensor, rtol: float, floor: float) -> NullSpace:
    """The numbers of zero and of negative eigenvalues of H, whose magnitudes are known down to a floor."""
    magnitudes = eigenvalues.abs()
    largest = float(magnitudes.max())
    threshold = max(rtol * largest, floor)
    return NullSpace(
        nullity=None,
        strict=int((magnitudes <= threshold).sum()),
        negative=int((eigenvalues < -threshold).sum()),
        largest=largest,
        rtol=rtol,
        method="dense",
    )


def hessian_nullity(hessian: Tensor, *, rtol: float | None = None) -> int:
    """Count the eigenvalues of a Hessian that are numerically zero.

    Args:
        hessian: The Hessian, symmetric, shape ``(N, N)``.
        rtol: The tolerance relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.

    Raises:
        ValueError: If ``hessian`` is not square or empty, or ``rtol`` not inside ``(0, 1)``.

    Example:
        >>> hessian_nullity(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        1
    """
    null_space = hessian_null_space(hessian.to(torch.float64), rtol=rtol)
    assert null_space.strict is not None
    return null_space.strict
