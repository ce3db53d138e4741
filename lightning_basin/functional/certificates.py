"""Ranks without the spectrum: a fraction of its cost, and no answer where there is doubt.

A Cholesky factor of the Gram matrix proves that rows are independent; with some of the columns it proves it for all.
Where they are not, the singular values that a Gram matrix does not resolve are looked at alone, in a sketch that is
hardly wider than the rank. It is off by a factor of 10, which is enough where none of them is near the tolerance. Else
the spectrum must be taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    RANK_TOLERANCES,
    GradientRank,
    rank_gap,
    singular_values,
)

OVERSAMPLING = 1.25
"""Columns of a narrow sketch, by the rows or columns of the matrix, whichever are fewer."""

_DISTORTION = 30.0
r"""How far a singular value of a narrow sketch, relative to the largest, may be from that of the matrix.

A Gaussian one is within :math:`(1 + \sqrt{0.8}) / (1 - \sqrt{0.8}) = 18` (Davidson and Szarek, 2001, theorem II.13).
"""

_NORM_MARGIN = 100.0  # by which a random combination of rows may be shorter than they are: in 1 of 125 cases
_POWER_VECTORS = 10
_POWER_STEPS = 3  # of so many random vectors: within 10 % where the spectrum falls evenly, too
_WORTH_DEFLATING = 256  # rows: of fewer all singular values take milliseconds
_SHIFT = 1e-13  # of the norm, added so that rounding leaves a matrix positive
_INVERSE_STEPS = 2
_SPARE = 32  # random vectors beyond the null space that they are to find
_MOST_OPEN = 0.25  # of all singular values: where more are open, all of them are found as quickly
_GAP_SOUGHT = 100.0  # times what is not resolved: so much higher the gap may be
_MOST_REFINEMENTS = 6  # each takes at least 15/16 of what is wrong, most often nearly all
_CLEARANCE = 16.0  # between an eigenvalue as it was found, and what it is proved to be above


@dataclass(frozen=True)
class IndependentRows:
    """What a triangular factor shows of the singular values of a matrix with as many of them as rows.

    Attributes:
        num_rows: m.
        least: Below every singular value.
        smallest: The smallest singular value, within a digit.
        largest: The largest, of the columns that were looked at, within 20 %.
    """

    num_rows: int
    least: float
    smallest: float
    largest: float

    def rank(self, *, rtol: float, epsilon: float = EPSILON, norm: float | None = None) -> GradientRank | None:
        """The rank of these rows with further columns, or without.

        Args:
            rtol: Relative tolerance that the rank is wanted at.
            epsilon: Rounding of the matrix.
            norm: Of one standard normal combination of all its rows, where only some columns were looked at.

        Returns:
            ``None`` where a singular value may be below the tolerance.
        """
        if norm is not None and rtol * _NORM_MARGIN * norm > self.least:
            return None
        largest = max(self.largest, 0.0 if norm is None else norm)
        resolved = self.least / largest if norm is None else self.least / (_NORM_MARGIN * largest)
        return GradientRank(
            rank=self.num_rows,
            gap=math.log10(self.smallest / (epsilon * largest)),
            at={tolerance: self.num_rows for tolerance in RANK_TOLERANCES if tolerance <= resolved},
            effective_rank=None,
            rtol=rtol,
            largest=self.largest,
            method="cholesky",
        )


def independent_rows(gram: GramMatrix, *, resolution: float = GRAM_RESOLUTION) -> IndependentRows | None:
    """Prove full rank by a Cholesky factor, ``m**3 / 3`` operations where eigenvalues take several times as many.

    The factor of ``gram - tau**2`` exists if and only if every singular value is above tau (Sylvester, 1852). With tau
    at ``GRAM_RESOLUTION`` of the largest one, rounding cannot pretend this.

    Args:
        gram: Products of all pairs of rows, or of all pairs of columns.
        resolution: Fraction of the largest singular value that all of them must be above; at least
            ``GRAM_RESOLUTION``.

    Returns:
        ``None`` where a singular value may be below the resolution.

    Example:
        >>> gram = GramMatrix(2)
        >>> gram.add_products(torch.diag(torch.tensor([4.0, 2.0], dtype=torch.float64)))
        >>> rows = independent_rows(gram)
        >>> round(rows.smallest, 1), round(rows.largest, 1)
        (2.0, 4.0)
        >>> gram = GramMatrix(2)
        >>> gram.add_products(torch.ones(2, 1, dtype=torch.float64))
        >>> independent_rows(gram) is None
        True
    """
    shift = max(resolution, GRAM_RESOLUTION) ** 2 * gram.norm
    factor = gram.factor(shift=shift) if shift > 0.0 else None
    if factor is None:
        return None
    return IndependentRows(
        num_rows=gram.num_rows,
        least=math.sqrt(shift),
        smallest=math.sqrt(shift + 1.0 / _largest_eigenvalue(factor.solve, gram)),
        largest=math.sqrt(_largest_eigenvalue(gram.times, gram)),
    )


def rank_of_sketch(sketch: Tensor, *, rtol: float, epsilon: float = EPSILON) -> GradientRank | None:
    """The rank from a narrow sketch, where it has no singular value near the tolerance.

    Args:
        sketch: The matrix times random vectors, ``OVERSAMPLING`` times as many as it has rows or columns, whichever are
            fewer, scaled such that singular values stay what they are on average; shape ``(m, s)``.
        rtol: Relative tolerance that the rank is wanted at.
        epsilon: Rounding of the matrix.

    Returns:
        The rank, or ``None`` where the distortion of the sketch may have moved a singular value over ``rtol``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> matrix = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> mixed = matrix @ torch.randn(2, 5, generator=generator, dtype=torch.float64) / 5**0.5
        >>> rank_of_sketch(mixed, rtol=1e-12).rank
        2
    """
    if not sketch.numel():
        return None
    found = smallest_singular_values(sketch) if min(sketch.shape) >= _WORTH_DEFLATING else None
    spectrum = torch.linalg.svdvals(sketch) if found is None else found.spectrum
    relative = spectrum / spectrum[0]
    # What is not resolved one by one is above this.
    resolved = 1.0 if found is None else found.least / float(spectrum[0])

    def clear_rank(tolerance: float) -> int | None:
        if tolerance * _DISTORTION > resolved:
            return None
        above = int((relative > tolerance * _DISTORTION).sum())
        return above if above == int((relative > tolerance / _DISTORTION).sum()) else None

    rank = clear_rank(rtol)
    if not rank:
        return None
    at = {tolerance: clear_rank(tolerance) for tolerance in RANK_TOLERANCES}
    return GradientRank(
        rank=rank,
        gap=rank_gap(spectrum, rank, epsilon=epsilon),
        at={tolerance: count for tolerance, count in at.items() if count is not None},
        effective_rank=None,
        rtol=rtol,
        largest=float(spectrum[0]),
        method="sketch",
    )


@dataclass(frozen=True, eq=False)
class SmallestSingularValues:
    """Singular values of which the smallest are told apart.

    Attributes:
        spectrum: Descending; in place of all others but the first, which is within 20 %, stands the smallest of these.
        least: Below each of these others.
    """

    spectrum: Tensor
    least: float


def smallest_singular_values(matrix: Tensor) -> SmallestSingularValues | None:
    r"""The singular values that a Gram matrix does not resolve, without squaring; a fraction of the cost of all.

    Inverse iteration gives a basis Z of what is nearly the null space of the Gram matrix K. That there is no more to
    it, a Cholesky factor of :math:`K + \beta Z Z^T - \theta` proves: K has no more eigenvalues below :math:`\theta`
    than Z has columns (Weyl, 1912). The rows :math:`Z^T Y` of the matrix itself are then small. What they still hold of
    larger singular vectors is found by solving for it and taken away, as in iterative refinement, until the rounding of
    the matrix remains, and not that of its square.

    Args:
        matrix: Y, of any shape.

    Returns:
        ``None`` where these are too many, or not told from the others.

    Example:
        >>> found = smallest_singular_values(torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)))
        >>> found.spectrum.round(decimals=6)
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    gram = GramMatrix(len(rows), rows.device)
    gram.add_products(rows)
    largest = math.sqrt(_largest_eigenvalue(gram.times, gram))
    bottom = _bottom(gram)
    if bottom is None:
        return None
    basis, following = bottom
    threshold = following / _CLEARANCE
    gram.add_products(math.sqrt(gram.norm) * basis)
    factor = gram.factor(shift=threshold)
    if factor is None:
        return None
    small, previous = basis.mT @ rows, math.inf
    for _ in range(_MOST_REFINEMENTS):
        before = small
        basis = basis - _apart(factor.solve(_apart(rows @ small.mT, basis)), basis)
        small = basis.mT @ rows
        change = float((small - before).norm())
        if change <= EPSILON * largest * len(small) ** 0.5 or change > previous / 2:  # The rest is rounding.
            break
        previous = change
    spectrum = matrix.new_full((len(rows),), math.sqrt(following))
    spectrum[len(rows) - len(small) :] = singular_values(small)
    spectrum[0] = largest
    return SmallestSingularValues(spectrum, least=math.sqrt(threshold))


def _bottom(gram: GramMatrix) -> tuple[Tensor, float] | None:
    """An orthonormal basis of the eigenvectors that a Gram matrix does not resolve, and the eigenvalue after theirs."""
    num_rows, norm = gram.num_rows, gram.norm
    factor = gram.factor(shift=-_SHIFT * norm)
    if factor is None:
        return None
    unresolved = GRAM_RESOLUTION**2 * norm
    width = min(num_rows, _SPARE + num_rows // 8)
    while True:
        basis = _start(gram, width)
        for _ in range(_INVERSE_STEPS):
            basis = torch.linalg.qr(factor.solve(basis)).Q
        values, vectors = torch.linalg.eigh(basis.mT @ gram.times(basis))
        # Where the spectrum has its widest gap thereabouts, so that the basis is well determined.
        fewest, most = (int((values <= limit).sum()) for limit in (unresolved, _GAP_SOUGHT * unresolved))
        if most <= width - _SPARE or (width == num_rows and most < width):
            break
        if width >= num_rows * _MOST_OPEN:
            return None
        width = min(2 * width, num_rows)
    steps = values.clamp(min=EPSILON * norm).log().diff(prepend=values.new_zeros(1))[fewest : most + 1]
    count = fewest + int(steps.argmax()) if fewest > 0 else 0
    return basis @ vectors[:, :count], float(values[count])


def _apart(vectors: Tensor, basis: Tensor) -> Tensor:
    """What is left of vectors at right angles to a basis."""
    return vectors - basis @ (basis.mT @ vectors)


def _start(gram: GramMatrix, count: int) -> Tensor:
    """Random vectors, always the same."""
    generator = Generator().manual_seed(0)
    return torch.randn(gram.num_rows, count, generator=generator, dtype=torch.float32).to(gram.device, torch.float64)


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: GramMatrix) -> float:
    """Of a positive matrix, by power steps from random starts."""
    vectors = _start(like, _POWER_VECTORS)
    for _ in range(_POWER_STEPS):
        vectors = product(vectors / vectors.norm(dim=0))
    return float(vectors.norm(dim=0).max())
