"""From a matrix to its numerical rank: singular values, tolerance, gap, effective rank."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import neg
from typing import Literal

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
"""Rounding of gradients that were evaluated in float64, in which all singular values are computed."""

RANK_TOLERANCES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-2)
"""Relative tolerances at which every rank is also reported: where the ranks differ no single integer is right."""

GRAM_RESOLUTION = 1e-7
"""Singular values below this fraction of the largest cannot be read off a float64 Gram matrix.

Its eigenvalues are squares and carry an absolute error near ``eps * sigma_max**2``, so that the noise floor
stands at ``sqrt(eps) = 1.5e-8`` of ``sigma_max``; the margin leaves the last resolved value two digits.
"""

LEAST_OF_GRAM = 1e-147
"""Singular values below this cannot be read off a float64 Gram matrix either, however small the largest one is.

Their squares come near the least normal number of float64, 2e-308, below which digits are lost: as in the first layers
of a deep network whose gradients vanish.
"""

_LEAST_COLUMNS = (
    64  # columns of a wide matrix that count at least: rounding can move ten rows of attention by 6 epsilon
)

BINS_PER_DECADE = 4
"""The resolution of `count_by_magnitude`: neighbouring edges differ by a factor of 1.8, and powers of ten are edges."""

RankMethod = Literal["svd", "gram", "gram+sketch", "cholesky", "sketch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Singular values of a matrix of gradients, and how they were obtained.

    Attributes:
        singular_values: The singular values, descending, float64, shape ``(min(num_rows, num_columns),)``.
        rtol: The default relative tolerance, ``max(shape) * epsilon`` of the matrix that was decomposed.
        method: ``"svd"`` of the matrix itself; ``"gram"`` where the Gram matrix resolves all singular values, or all
            above ``epsilon``; ``"gram+sketch"`` where those below ``GRAM_RESOLUTION`` come from the unsquared sketch.
        epsilon: The rounding of the elements of the matrix, relative to the largest.
        leading: A unit vector near the left singular vector of the largest singular value, shape ``(num_rows,)``;
            ``None`` where it was not looked for.
    """

    singular_values: Tensor
    rtol: float
    method: RankMethod
    epsilon: float = EPSILON
    leading: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GradientRank:
    """The rank of a matrix of gradients with what is needed to judge it.

    Attributes:
        rank: The number of singular values above ``rtol * sigma_max``.
        gap: The gap ``log10(sigma_r / sigma_{r+1})``, to about one digit where the method is ``"sketch"``, and a lower
            bound where some columns proved the rank (``"cholesky"``); ``None`` where the rank is zero.
        at: The rank at each of ``RANK_TOLERANCES``, as far as it is known and above rounding.
        effective_rank: The exponential of the entropy of the squared singular values; ``None`` without them.
        rtol: The relative tolerance that decided ``rank``.
        largest: The largest singular value, within a factor of two where the method is ``"sketch"``; where some columns
            proved the rank, the largest of these columns.
        method: How the singular values were obtained, see `Spectrum`; ``"cholesky"`` or ``"sketch"`` where the rank
            was proved without them, see `lightning_basin.functional.certified_rank`.
    """

    rank: int
    gap: float | None
    at: Mapping[float, int]
    effective_rank: float | None
    rtol: float
    largest: float
    method: RankMethod


def default_rtol(num_rows: int, num_columns: int, epsilon: float = EPSILON) -> float:
    """Return the relative tolerance ``max(num_rows, num_columns) * epsilon``, below which singular values are rounding.

    The rule of ``numpy.linalg.matrix_rank`` (Golub and Van Loan, 2013, section 5.5.8). In lower precision than float64
    no more columns count than a sketch of the matrix has: the norm of what rounding leaves does not grow with them, and
    with 1e5 of them a hundredth of the largest singular value would count as zero.

    Args:
        num_rows: The number of rows of the matrix that is decomposed.
        num_columns: The number of its columns.
        epsilon: The rounding of its elements, relative to the largest; by default that of float64.

    Example:
        >>> default_rtol(4, 2) == 4 * 2.0**-52
        True
    """
    if epsilon > EPSILON:
        num_columns = min(num_columns, max(2 * num_rows, _LEAST_COLUMNS))
    return max(num_rows, num_columns) * epsilon


def resolved_tolerances(resolution: float, epsilon: float) -> tuple[float, ...]:
    """Select the ``RANK_TOLERANCES`` that matter for gradients of a precision; all were chosen for float64.

    Args:
        resolution: The fraction of the largest singular value below which others are rounding.
        epsilon: The rounding of the gradients.

    Example:
        >>> resolved_tolerances(6e-5, epsilon=2.0**-23)
        (0.0001, 0.01)
    """
    return tuple(tolerance for tolerance in RANK_TOLERANCES if epsilon == EPSILON or tolerance >= resolution)


def singular_values(matrix: Tensor) -> Tensor:
    """Find singular values without squaring, descending.

    A matrix that is clearly wider than tall (or taller than wide) is first reduced to its triangular factor,
    which has the same singular values; that halves the time.

    Args:
        matrix: The matrix, shape ``(rows, columns)``.

    Returns:
        The singular values, shape ``(min(rows, columns),)``, of the dtype of ``matrix``.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([4., 3.])
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    if tall.shape[1] == 0:
        return tall.new_zeros(0)
    if tall.shape[0] > 1.2 * tall.shape[1]:
        tall = torch.linalg.qr(tall, mode="r").R
    values: Tensor = torch.linalg.svdvals(tall)
    return values


def numerical_rank(spectrum: Tensor, *, rtol: float) -> int:
    """Count the singular values above ``rtol`` times the largest.

    Args:
        spectrum: The singular values (not their squares) in any order, shape ``(n,)``.
        rtol: The tolerance, relative to the largest.

    Raises:
        ValueError: If ``rtol`` is not inside ``(0, 1)``.

    Example:
        >>> numerical_rank(torch.tensor([2.0, 1.0, 1e-9]), rtol=1e-6)
        2
    """
    check_rtol(rtol)
    return _count_above(sorted(spectrum.tolist(), reverse=True), rtol)


def _count_above(values: Sequence[float], rtol: float) -> int:
    """Count the values, descending, above ``rtol`` times the first."""
    # Strict: the zero matrix has threshold 0 and must have rank 0.
    return bisect_left(values, -rtol * values[0], key=neg) if values else 0


def check_rtol(rtol: float | None, name: str = "rtol") -> None:
    """Refuse a relative tolerance that cannot separate anything."""
    if rtol is not None and not isinstance(rtol, int | float):
        raise TypeError(f"{name} must be a number or None, got {rtol!r}")
    if rtol is not None and not 0.0 < rtol < 1.0:
        raise ValueError(f"{name} must be a relative tolerance inside (0, 1), got {rtol}")


def rank_gap(spectrum: Tensor, rank: int, *, epsilon: float = EPSILON) -> float | None:
    """Measure the digits between the last singular value that counts and the first that does not.

    Below 3 the rank is ill-defined. The rounding floor ``epsilon * sigma_max`` stands in for a following value that is
    smaller or absent, so that the gap is finite and says how far the last singular value is from the noise.

    Args:
        spectrum: The singular values, descending, shape ``(n,)``.
        rank: The number of singular values that count.
        epsilon: The rounding of the matrix.

    Returns:
        The gap ``log10(sigma_r / sigma_{r+1})``, or ``None`` for rank 0.

    Example:
        >>> rank_gap(torch.tensor([10.0, 1.0, 1e-5], dtype=torch.float64), 2)
        5.0
    """
    if rank == 0:
        return None
    values = [*spectrum.tolist(), 0.0]
    return math.log10(values[rank - 1] / max(values[rank], epsilon * values[0], math.ulp(0.0)))


def effective_rank(spectrum: Tensor) -> float:
    r"""Compute the exponential of the entropy of :math:`p_i = \sigma_i^2 / \sum_j \sigma_j^2`.

    Roy and Vetterli (2007) with squared singular values. A zero matrix has effective rank 0.

    Args:
        spectrum: The singular values (not their squares) in any order, shape ``(n,)``.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 9)
        2.0
    """
    values = [value for value in spectrum.tolist() if value > 0.0]
    if not values:
        return 0.0
    largest = max(values)
    energies = [(value / largest) ** 2 for value in values]
    total = math.fsum(energies)
    shares = [energy / total for energy in energies]
    return math.exp(math.fsum(-share * math.log(share) for share in shares if share > 0.0))


def log_det_gram(spectrum: Tensor, rank: int) -> float | None:
    r"""Compute the logarithm of :math:`\prod_{i \le r} \sigma_i^2`, the determinant of the Gram matrix on its range.

    Args:
        spectrum: The singular values (not their squares), descending, shape ``(n,)``.
        rank: The number of nonzero singular values, r.

    Returns:
        The logarithm, or ``None`` for rank 0, where the product is empty.

    Example:
        >>> round(math.exp(log_det_gram(torch.tensor([3.0, 2.0, 0.0]), 2)))
        36
    """
    return 2 * math.fsum(map(math.log, spectrum[:rank].tolist())) if rank else None


def count_by_magnitude(spectrum: Tensor, *, rtol: float) -> dict[int, int]:
    """Count singular values by quarters of a decade, on a scale that is the same for all matrices.

    Args:
        spectrum: The singular values, descending, shape ``(n,)``.
        rtol: The tolerance relative to the largest, below which values are rounding and are not counted.

    Returns:
        The number of values in ``[10**(b / 4), 10**((b + 1) / 4))`` by the integer b, the largest first, without zeros.

    Example:
        >>> count_by_magnitude(torch.tensor([5.0, 2.0, 1.0, 0.02, 1e-9]), rtol=1e-6)
        {2: 1, 1: 1, 0: 1, -7: 1}
    """
    check_rtol(rtol)
    values = spectrum.tolist()
    counted = values[: _count_above(values, rtol)]
    return dict(Counter(math.floor(BINS_PER_DECADE * math.log10(value)) for value in counted))


def gradient_rank(spectrum: Spectrum, *, rtol: float | None = None) -> GradientRank:
    """Judge a spectrum: rank, gap, ranks at other tolerances, effective rank.

    Args:
        spectrum: The spectrum of the matrix of gradients.
        rtol: The relative tolerance; ``None`` means the one of the spectrum.

    Raises:
        ValueError: If ``rtol`` is not inside ``(0, 1)``.
    """
    sigmas = spectrum.singular_values.cpu()
    values = sigmas.tolist()
    decided_by = spectrum.rtol if rtol is None else rtol
    check_rtol(decided_by)
    rank = _count_above(values, decided_by)
    return GradientRank(
        rank=rank,
        gap=rank_gap(sigmas, rank, epsilon=spectrum.epsilon),
        at={
            tolerance: _count_above(values, tolerance)
            for tolerance in resolved_tolerances(spectrum.rtol, spectrum.epsilon)
        },
        effective_rank=effective_rank(sigmas),
        rtol=decided_by,
        largest=values[0] if values else 0.0,
        method=spectrum.method,
    )
