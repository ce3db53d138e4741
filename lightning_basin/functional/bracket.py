"""A bracket of the dimension of a Hessian's null space, from eigenvalues of its Gauss-Newton part."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_basin.functional.rank import EPSILON, GRAM_RESOLUTION, Spectrum, check_rtol

_GRAM_ERROR = 16 * EPSILON  # relative error of a Gram matrix's eigenvalues: ten times what is measured at m = 2560

SKETCH_FACTOR = 4.0
"""Singular values of a sketch with 2m columns are at most so many times the true ones: 1 + sqrt(1/2) if Gaussian."""

_Values = npt.NDArray[np.float64]

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
        residual_estimate: :math:`\|R\|_2` within a factor of two, where the bound may be further away.
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
    residual_estimate: float | None = None
    smallest: float | None = None
    largest: float | None = None
    rtol: float
    method: NullSpaceMethod
    resolving_loss: float | None = None

    def scaled(self, scale: float) -> "NullSpace":
        """Return the null space of the loss times a number."""
        sizes = {name: getattr(self, name) for name in ("residual", "residual_estimate", "smallest", "largest")}
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


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussNewtonEigenvalues:
    """Eigenvalues of the Gauss-Newton part P of a Hessian, in the memory of the CPU.

    Attributes:
        values: The largest eigenvalues, descending, as they were found; all others are zero.
        least: A lower bound on each nonzero eigenvalue, descending.
        rtol: The relative tolerance on eigenvalues; ``None`` means the rounding of the arithmetic.
        rounding: The relative tolerance on eigenvalues that the rounding of the arithmetic leaves.
    """

    num_parameters: int
    values: _Values
    least: _Values
    rtol: float | None
    rounding: float

    @property
    def rank(self) -> int:
        """The rank of P."""
        return len(self.least)

    @cached_property
    def largest(self) -> float:
        """The largest eigenvalue; 0 for P = 0."""
        return float(self.values.max()) if self.rank else 0.0

    @property
    def second(self) -> float:
        """The eigenvalue after the largest; 0 where there is none."""
        return float(self.values[1]) if self.rank and len(self.values) > 1 else 0.0

    @property
    def smallest(self) -> float | None:
        """A lower bound on the smallest nonzero eigenvalue; ``None`` for P = 0."""
        return float(self.least[-1]) if self.rank else None

    def num_curved(self, residual: float) -> int:
        r"""Count the eigenvalues that H has above :math:`\|R\|_2` for certain, where this is at most ``residual``."""
        tolerance = residual if self.rtol is None else max(residual, self.rtol * (self.largest + residual))
        return int((self.least > tolerance + residual).sum())

    def bracket(
        self, residual: float | None, *, estimate: float | None = None, largest: float | None = None
    ) -> NullSpace:
        """Bracket the nullity of H by an upper bound on the norm of R = H - P; ``None`` where nothing is known of it.

        ``estimate`` is the norm within a factor of two, ``largest`` the largest magnitude of an eigenvalue of H.
        """
        num_above = self.rank if self.rtol is None else int((self.values > self.rtol * self.largest).sum())
        gauss_newton = NullSpace(
            nullity=None,
            gauss_newton_nullity=self.num_parameters - num_above,
            smallest=self.smallest,
            rtol=self.rounding if self.rtol is None else self.rtol,
            method="gauss-newton",
        )
        if residual is None:
            return gauss_newton
        if residual == 0:  # H = P: what counts as zero in it is known, however uncertain the last values are.
            smallest = float(self.least[min(num_above, self.rank) - 1]) if num_above and self.rank else None
            return _without_residual(replace(gauss_newton, smallest=smallest, largest=self.largest))
        bracket = replace(
            gauss_newton, residual=residual, residual_estimate=estimate, largest=largest, method="bracket"
        )
        if self.rank == 0:  # All of H is residual: its norm resolves nothing.
            return bracket
        lower, upper = self.num_parameters - self.rank, self.num_parameters - self.num_curved(residual)
        return replace(bracket, nullity=lower if lower == upper else None, lower=lower, upper=upper)


def gauss_newton_eigenvalues(
    num_parameters: int, rows: Spectrum, *, scale: float = 1.0, rtol: float | None = None
) -> GaussNewtonEigenvalues:
    """Square the singular values of rows whose products are P, with what the method that found them leaves unknown.

    The arguments are those of `null_space_bracket`.
    """
    check_rtol(rtol)
    values = rows.singular_values.cpu().numpy()
    largest = float(values.max()) if values.size else 0.0
    rank = int((values > rows.rtol * largest).sum())
    return GaussNewtonEigenvalues(
        num_parameters=num_parameters,
        values=scale * np.square(values),
        least=scale * np.square(_lower_bounds(values, largest, rows)[:rank]),
        rtol=rtol,
        rounding=rows.rtol**2,
    )


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
        >>> import torch
        >>> values = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
        >>> rows = Spectrum(singular_values=values, rtol=1e-15, method="svd")
        >>> [null_space_bracket(5, rows, residual=size).nullity for size in (1e-3, 1e-1)]
        [2, None]
        >>> null_space = null_space_bracket(5, rows, residual=1e-1)
        >>> null_space.lower, null_space.upper
        (2, 3)
    """
    return gauss_newton_eigenvalues(num_parameters, rows, scale=scale, rtol=rtol).bracket(residual, largest=largest)


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


def _lower_bounds(values: _Values, largest: float, spectrum: Spectrum) -> _Values:
    """A lower bound on each singular value, by the errors of the method that found it."""
    if spectrum.method == "svd":
        return np.maximum(values - spectrum.rtol * largest, 0.0)
    by_gram: _Values = np.sqrt(np.maximum(np.square(values) - _GRAM_ERROR * largest**2, 0.0))
    if spectrum.method == "gram":
        return by_gram
    by_sketch = np.maximum(values / SKETCH_FACTOR - spectrum.rtol * largest, 0.0)
    return np.where(values > GRAM_RESOLUTION * largest, by_gram, by_sketch)
