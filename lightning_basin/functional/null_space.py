"""The dimension of a Hessian's null space, counted or bracketed."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

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

_GRAM_ERROR = 16 * EPSILON  # of the largest eigenvalue of a Gram matrix: ten times what is measured at m = 2560
_TIE_ROUNDINGS = (
    16.0  # N eps of the largest eigenvalue: by which two matrices' eigenvalues must differ to be told apart
)
_SKETCH_FACTOR = 4.0  # singular values of a sketch with 2m columns are not larger: 1 + sqrt(1/2) for Gaussian ones

NullSpaceMethod = Literal["dense", "bracket", "gauss-newton"]


@dataclass(frozen=True, kw_only=True)
class NullSpace:
    r"""How many directions leave a loss flat to second order, and how that is known. ``None`` is what is not known.

    Attributes:
        nullity: Number of eigenvalues of H with :math:`|\lambda| \le \max(rtol\,\lambda_{max}, \|R\|_2)`, where
            R = H - P is what the remaining residual adds to the Gauss-Newton part P; without P the same as ``strict``.
            Without all eigenvalues of H it is known where ``lower`` and ``upper`` meet; not where P is zero and R is
            not, nor where rounding decides whether an eigenvalue is above the norm of R.
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

    def scaled(self, scale: float) -> "NullSpace":
        """Of the loss times a number."""
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
    multiple: float = 1.0,
    largest: float | None = None,
    rtol: float | None = None,
) -> NullSpace:
    r"""What eigenvalues of P and a bound on R = H - P prove of the eigenvalues of H, at any N.

    R moves each eigenvalue by at most its norm (Weyl). So H has at least as many eigenvalues with
    :math:`|\lambda| > \|R\|_2` as P has above :math:`2 \|R\|_2`, and at most rank(P). Where P is zero and R is
    not, as of a loss that is linear in the outputs, this would count every eigenvalue as zero: nothing is said.

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
    counted = rank if rtol is None else int((multiple * rows.singular_values.square() > rtol * steepest).sum())
    known: dict[str, Any] = {
        "gauss_newton_nullity": num_parameters - counted,
        "smallest": float(certain[-1]) if rank else None,
        "rtol": rows.rtol**2 if rtol is None else rtol,
    }
    if residual is None:
        return NullSpace(nullity=None, method="gauss-newton", **known)
    if residual == 0:  # H = P: what counts as zero in it is known, however uncertain the last singular values are.
        nullity = num_parameters - counted
        known["smallest"] = float(certain[min(counted, rank) - 1]) if counted and rank else None
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
    if rank == 0:  # All of H is residual: its norm resolves nothing.
        return NullSpace(nullity=None, residual=residual, largest=largest, method="bracket", **known)
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
    threshold = max(tolerance * largest, residual, floor)
    counted = int((magnitudes <= threshold).sum())
    nullity = min(max(counted, bracket.lower or 0), num_parameters if bracket.upper is None else bracket.upper)
    # Nearly all of H is residual where its largest eigenvalue is that of R: which is larger is not resolved.
    rounding = _TIE_ROUNDINGS * default_rtol(num_parameters, num_parameters) * largest
    off = (magnitudes - threshold).abs()
    is_tied = residual > _TIE_ROUNDINGS * rounding and bool(((off > 0) & (off <= rounding)).any())
    is_known = bracket.gauss_newton_nullity != num_parameters and (not is_tied or bracket.lower == bracket.upper)
    return replace(
        bracket,
        nullity=nullity if is_known else None,
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
