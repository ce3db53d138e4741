"""The dimension of a Hessian's null space, counted or bracketed."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.output_curvature import OutputCurvature
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    Spectrum,
    check_rtol,
    default_rtol,
    numerical_rank,
    singular_values,
)

_GRAM_ERROR = 16 * EPSILON  # relative error of a Gram matrix's eigenvalues: ten times what is measured at m = 2560

SKETCH_FACTOR = 4.0
"""Singular values of a sketch with 2m columns are at most so many times the true ones: 1 + sqrt(1/2) if Gaussian."""

_TIE_ROUNDINGS = 16.0  # rounding errors (N eps of the largest eigenvalue) by which distinguishable eigenvalues differ

NullSpaceMethod = Literal["dense", "bracket", "gauss-newton"]


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    r"""How many directions leave a loss flat to second order, and how that is known.

    ``None`` stands for what is not known.

    Attributes:
        nullity: The number of eigenvalues of H with :math:`|\lambda| \le \max(rtol\,\lambda_{max}, \|R\|_2)`, where
            R = H - P is what the remaining residual adds to the Gauss-Newton part P; without P the same as ``strict``.
            Without all eigenvalues of H it is known where ``lower`` and ``upper`` meet. It is not known where P is zero
            and R is not, nor where rounding decides whether an eigenvalue is above the norm of R.
        lower: The nullity is at least N - rank(P).
        upper: The nullity is at most this: R cannot bring the other eigenvalues of P down to its own norm.
        strict: The number of eigenvalues with :math:`|\lambda| \le rtol\,\lambda_{max}`.
        negative: The number of eigenvalues below :math:`-rtol\,\lambda_{max}`.
        gauss_newton_nullity: The nullity of P, N - rank(P).
        residual: :math:`\|R\|_2`, or a bound from above.
        smallest: The smallest nonzero eigenvalue of P, or a bound from below.
        largest: The largest magnitude of an eigenvalue of H.
        rtol: The relative tolerance on eigenvalues of H, or, where H is not formed, on the eigenvalues of P.
        method: ``"dense"`` from all eigenvalues of H, ``"bracket"`` from the eigenvalues of P and a bound on R,
            ``"gauss-newton"`` from the eigenvalues of P alone.
        resolving_loss: The loss below which ``lower`` and ``upper`` would meet, about; 0 where it would be below the
            rounding of the outputs.
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
    resolving_loss: float | None = None

    def scaled(self, scale: float) -> "NullSpace":
        """Return the null space of the loss times a number."""
        sizes = {name: getattr(self, name) for name in ("residual", "smallest", "largest")}
        return replace(self, **{name: size * scale for name, size in sizes.items() if size is not None})

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


def null_space_bracket(
    num_parameters: int,
    rows: Spectrum,
    *,
    residual: float | None,
    scale: float = 1.0,
    largest: float | None = None,
    rtol: float | None = None,
) -> NullSpace:
    r"""Bracket the nullity of H by eigenvalues of P and a bound on R = H - P, at any N.

    R moves each eigenvalue by at most its norm (Weyl). So H has at least as many eigenvalues with
    :math:`|\lambda| > \|R\|_2` as P has above :math:`2 \|R\|_2`, and at most rank(P). Where P is zero and R is
    not, as for a loss that is linear in the outputs, this would count every eigenvalue as zero: nothing is said.

    Args:
        num_parameters: The number N of parameters.
        rows: The singular values of rows whose products are P.
        residual: An upper bound on :math:`\|R\|_2`; ``None`` where nothing is known of it.
        scale: The number by which the products of the rows are multiplied to give P.
        largest: The largest magnitude of an eigenvalue of H; ``None`` where it is not known.
        rtol: The size, relative to the largest eigenvalue, below which an eigenvalue counts as zero, beside the
            residual; ``None`` means the square of the tolerance of ``rows``.

    Raises:
        ValueError: If ``rtol`` is not inside ``(0, 1)``.

    Example:
        >>> values = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
        >>> rows = Spectrum(singular_values=values, rtol=1e-15, method="svd")
        >>> [null_space_bracket(5, rows, residual=size).nullity for size in (1e-3, 1e-1)]
        [2, None]
        >>> null_space = null_space_bracket(5, rows, residual=1e-1)
        >>> null_space.lower, null_space.upper
        (2, 3)
    """
    check_rtol(rtol)
    rank = numerical_rank(rows.singular_values, rtol=rows.rtol)
    least = scale * _lower_bounds(rows)[:rank].square()  # Each nonzero eigenvalue of P is at least this.
    steepest = scale * float(rows.singular_values.max()) ** 2 if rank else 0.0
    num_above = rank if rtol is None else int((scale * rows.singular_values.square() > rtol * steepest).sum())
    gauss_newton = NullSpace(
        nullity=None,
        gauss_newton_nullity=num_parameters - num_above,
        smallest=float(least[-1]) if rank else None,
        rtol=rows.rtol**2 if rtol is None else rtol,
        method="gauss-newton",
    )
    if residual is None:
        return gauss_newton
    if residual == 0:  # H = P: what counts as zero in it is known, however uncertain the last singular values are.
        smallest = float(least[min(num_above, rank) - 1]) if num_above and rank else None
        return _without_residual(replace(gauss_newton, smallest=smallest, largest=steepest))
    bracket = replace(gauss_newton, residual=residual, largest=largest, method="bracket")
    if rank == 0:  # All of H is residual: its norm resolves nothing.
        return bracket
    tolerance = residual if rtol is None else max(residual, rtol * (steepest + residual))
    num_curved = int((least > tolerance + residual).sum())
    lower, upper = num_parameters - rank, num_parameters - num_curved
    return replace(bracket, nullity=lower if lower == upper else None, lower=lower, upper=upper)


def _without_residual(gauss_newton: NullSpace) -> NullSpace:
    """The null space of H = P."""
    nullity = gauss_newton.gauss_newton_nullity
    return replace(
        gauss_newton,
        nullity=nullity,
        lower=nullity,
        upper=nullity,
        strict=nullity,
        negative=0,
        residual=0.0,
        method="bracket",
    )


def _lower_bounds(spectrum: Spectrum) -> Tensor:
    """A lower bound on each singular value, by the errors of the method that found it."""
    values = spectrum.singular_values
    if values.numel() == 0:
        return values
    largest = float(values.max())
    if spectrum.method == "svd":
        return (values - spectrum.rtol * largest).clamp_(min=0)
    by_gram = (values.square() - _GRAM_ERROR * largest**2).clamp_(min=0).sqrt_()
    if spectrum.method == "gram":
        return by_gram
    by_sketch = (values / SKETCH_FACTOR - spectrum.rtol * largest).clamp_(min=0)
    return torch.where(values > GRAM_RESOLUTION * largest, by_gram, by_sketch)


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
        hessian: The Hessian, symmetric, shape ``(N, N)``.
        gradients: The behavioral gradients by the same parameters, shape ``(m, N)``.
        curvature: The curvature of the loss at the outputs; given with ``gradients``.
        rtol: The tolerance relative to the eigenvalue of largest magnitude; ``None`` means ``N * eps`` of float64.
        bracket: The bracket of the nullity, where it is known already; ``None`` finds it from ``gradients``.

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
        counts = _counted(torch.linalg.eigvalsh(hessian), tolerance)
        return replace(counts, nullity=counts.strict)
    if curvature.factors is None:
        return _indefinite_null_space(hessian, gradients, curvature, tolerance)
    rows = weighted_rows(gradients, curvature.factors)
    if bracket is None:
        spectrum = Spectrum(singular_values=singular_values(rows), rtol=default_rtol(*rows.shape), method="svd")
        norm = 0.0 if curvature.residual_is_zero else _norm(hessian - rows.mT @ rows)
        bracket = null_space_bracket(num_parameters, spectrum, residual=norm, rtol=rtol)
    if bracket.residual == 0:
        return replace(bracket, rtol=tolerance, method="dense")
    # Rounding of what has cancelled in the curvature reaches the Hessian through the gradients.
    floor = curvature.rounding * float(gradients.square().sum())
    residual = min(_norm(hessian - rows.mT @ rows), bracket.residual or math.inf)
    return _bracketed_null_space(hessian, bracket, residual, rtol=tolerance, floor=floor)


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


def _indefinite_null_space(hessian: Tensor, gradients: Tensor, curvature: OutputCurvature, rtol: float) -> NullSpace:
    """The null space of a loss that is not convex in the outputs.

    P then has eigenvalues of both signs, and no bracket follows from it.
    """
    gauss_newton = gradients.mT @ weighted_rows(gradients, curvature.matrices)
    rank = numerical_rank(torch.linalg.eigvalsh(gauss_newton).abs(), rtol=default_rtol(*gauss_newton.shape))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    magnitudes = eigenvalues.abs()
    residual = _norm(hessian - gauss_newton)
    return replace(
        _counted(eigenvalues, rtol),
        nullity=int((magnitudes <= max(rtol * float(magnitudes.max()), residual)).sum()),
        gauss_newton_nullity=hessian.shape[0] - rank,
        residual=residual,
    )


def _norm(symmetric: Tensor) -> float:
    return float(torch.linalg.eigvalsh(symmetric).abs().max())


def _counted(eigenvalues: Tensor, rtol: float, floor: float = 0.0) -> NullSpace:
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
