"""Ranks without the spectrum: a fraction of its cost, and no answer where there is doubt.

A Cholesky factor of the Gram matrix proves that rows are independent; a factor for some of the columns proves it for
all. Where rows are not independent, a sketch that is hardly wider than the rank decides: each of its singular values is
off by a factor of 10 or so, which is enough where none of them is near the tolerance. Elsewhere the spectrum is needed.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import (
    LayerGradients,
    StackedGradients,
    gram_of,
    kronecker_factors,
    kronecker_spectrum,
    sum_of_sketches,
)
from lightning_basin.functional.gram import GramMatrix, largest_eigenvalues
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    RANK_TOLERANCES,
    GradientRank,
    check_rtol,
    rank_gap,
    resolved_tolerances,
)
from lightning_basin.functional.smallest_values import mixed_triangle, num_before_gap, values_behind_gap

_OVERSAMPLING = 1.25  # columns of a narrow sketch, as a multiple of the rows or columns of the matrix (the fewer)
_DISTORTION = 30.0
r"""How far a singular value of a narrow sketch, relative to the largest, may be from that of the matrix.

A Gaussian one is within :math:`(1 + \sqrt{0.8}) / (1 - \sqrt{0.8}) = 18` (Davidson and Szarek, 2001, theorem II.13).
"""

_MANY_ROWS = 256  # rows of a sketch from which its smallest singular values are found alone: all of fewer take ms
_NORM_MARGIN = 100.0  # factor by which a random combination of rows may be shorter than they are: in 1 of 125 cases
_NARROW = 2  # columns, as a multiple of the rows, whose singular values are hardly smaller than those of all columns
_WORTH_NARROWING = 2.0  # least ratio of operations for which the Gram matrix of fewer columns is formed


@dataclass(frozen=True)
class IndependentRows:
    """What a triangular factor shows of the singular values of a matrix with as many of them as rows.

    Attributes:
        least: A lower bound on every singular value.
        smallest: The smallest singular value, within a digit.
        largest: The largest singular value of the columns that were looked at, within 20 %.
    """

    num_rows: int
    least: float
    smallest: float
    largest: float

    def rank(self, *, rtol: float, epsilon: float = EPSILON, norm: float | None = None) -> GradientRank | None:
        """Return the rank of these rows, or of the same with further columns; ``None`` where one may be below ``rtol``.

        Where only some columns were looked at, ``norm`` is that of one standard normal combination of all rows.
        """
        if norm is not None and rtol * _NORM_MARGIN * norm > self.least:
            return None
        largest = max(self.largest, 0.0 if norm is None else norm)
        resolved = self.least / largest if norm is None else self.least / (_NORM_MARGIN * largest)
        return GradientRank(
            rank=self.num_rows,
            gap=math.log10(self.smallest / max(epsilon * largest, math.ulp(0.0))),
            at={tolerance: self.num_rows for tolerance in RANK_TOLERANCES if tolerance <= resolved},
            effective_rank=None,
            rtol=rtol,
            largest=self.largest,
            method="cholesky",
        )


def independent_rows(gram: GramMatrix, *, resolution: float = GRAM_RESOLUTION) -> IndependentRows | None:
    """Prove full rank by a Cholesky factor, ``m**3 / 3`` operations where eigenvalues take several times as many.

    The factor of ``gram - tau**2`` exists if and only if every singular value is above tau (Sylvester, 1852). With tau
    at ``GRAM_RESOLUTION`` of the largest one, rounding cannot pretend this. Return ``None`` where a singular value may
    be below the fraction ``resolution`` of the largest.
    """
    shift = max(resolution, GRAM_RESOLUTION) ** 2 * gram.norm
    factor = gram.factor(shift=shift)
    if factor.is_known_to_fail:
        return None
    inverse, square = largest_eigenvalues(gram.lower, factor.solve, gram.times)
    # All in one transfer, for which a device waits: whether there is a factor, too.
    failed, least, inverse, square = torch.stack([factor.failed.to(shift), shift, inverse, square]).tolist()
    if failed or not sys.float_info.min < least < math.inf:
        return None
    return IndependentRows(
        num_rows=gram.num_rows,
        least=math.sqrt(least),
        smallest=math.sqrt(least + 1.0 / inverse),
        largest=math.sqrt(square),
    )


def rows_independent_in_few_columns(gradients: LayerGradients, generator: Generator) -> IndependentRows | None:
    """Prove that rows are independent by some of their columns, where this takes much less than their Gram matrix.

    The columns are the gradients times random orthonormal vectors. Rows that are independent in these are so in all
    columns, whose singular values are no smaller (Weyl, 1912). Return ``None`` where they are not, or the proof would
    not be cheaper.
    """
    if gradients.num_columns < gradients.num_rows:
        return None
    if (spectrum := kronecker_spectrum(gradients)) is not None:
        values = spectrum.tolist()
        smallest, largest = values[-1], values[0]
        is_clear = smallest > GRAM_RESOLUTION * largest
        return IndependentRows(gradients.num_rows, smallest / 2, smallest, largest) if is_clear else None
    gram = _narrow_gram(gradients, generator)
    return None if gram is None else independent_rows(gram)


def _narrow_gram(gradients: LayerGradients, generator: Generator) -> GramMatrix | None:
    """The Gram matrix of fewer columns; ``None`` where it does not take much less than that of all columns."""
    parts = gradients.parts if isinstance(gradients, StackedGradients) else (gradients,)
    fraction = min(1.0, _NARROW * gradients.num_rows / max(1, gradients.num_columns))
    narrow = [
        part.narrowed(math.ceil(part.num_columns * fraction), generator)
        if isinstance(part, KhatriRaoGradients)
        else part
        for part in parts
    ]
    if _WORTH_NARROWING * sum(part.gram_work for part in narrow) >= sum(part.gram_work for part in parts):
        return None
    gram = GramMatrix(gradients.num_rows, gradients.device)
    for part in narrow:
        part.add_gram(gram)
    return gram


def certified_rank(
    matrices: Sequence[LayerGradients],
    generator: Generator,
    *,
    default_rtol: float,
    rtol: float | None = None,
    epsilon: float = EPSILON,
    gram: GramMatrix | None = None,
) -> GradientRank | None:
    """Prove the rank of matrices side by side without their spectrum.

    Args:
        matrices: The matrices of gradients, all with the same number of rows.
        generator: A generator on the CPU, for the random vectors of a sketch.
        default_rtol: The relative tolerance that decides the rank unless told otherwise. In lower precision than
            float64 it is also the resolution, see `resolved_tolerances`.
        rtol: The relative tolerance that decides the rank; ``None`` means ``default_rtol``.
        epsilon: The rounding of the matrices.
        gram: The products of all pairs of rows. ``None`` where nobody has formed them, and full rank is then proved by
            a sketch, too.

    Returns:
        The rank, or ``None`` where there is doubt, or the spectrum costs no more than the proof.

    Raises:
        ValueError: If ``rtol`` is not inside ``(0, 1)``, or the matrices do not have the same number of rows.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> certified_rank([DenseGradients(matrix)], Generator().manual_seed(0), default_rtol=1e-12).rank
        2
    """
    check_rtol(rtol)
    if len({gradients.num_rows for gradients in matrices}) != 1:
        raise ValueError(f"matrices must have one number of rows, got {[gradients.num_rows for gradients in matrices]}")
    if len(matrices) == 1 and kronecker_factors(matrices[0]) is not None:
        return None
    has_more_rows = matrices[0].num_rows > sum(gradients.num_columns for gradients in matrices)
    if has_more_rows:
        matrices = [DenseGradients(torch.cat([gradients.rows() for gradients in matrices], dim=1).mT)]
        gram = gram_of(matrices[0])
    rtol = default_rtol if rtol is None else rtol
    independent = None if gram is None else independent_rows(gram, resolution=rtol)
    if independent is not None:
        rank = independent.rank(rtol=rtol, epsilon=epsilon)
    elif epsilon >= GRAM_RESOLUTION and not has_more_rows:
        return None  # The eigenvalues of the Gram matrix decide, and are faster.
    else:
        rank = _rank_of_sketch(_narrow_sketch(matrices, generator), rtol=rtol, epsilon=epsilon)
    resolved = resolved_tolerances(default_rtol, epsilon)
    return rank and replace(
        rank, at={tolerance: count for tolerance, count in rank.at.items() if tolerance in resolved}
    )


def _narrow_sketch(matrices: Sequence[LayerGradients], generator: Generator) -> Tensor:
    """A sketch of ``_OVERSAMPLING`` times as many columns as rows; the matrix itself where it has no more."""
    num_columns = math.ceil(_OVERSAMPLING * matrices[0].num_rows)
    if sum(gradients.num_columns for gradients in matrices) > num_columns:
        return sum_of_sketches(matrices, num_columns, generator)
    return torch.cat([gradients.rows() for gradients in matrices], dim=1)


def _rank_of_sketch(sketch: Tensor, *, rtol: float, epsilon: float) -> GradientRank | None:
    """The rank from a narrow sketch; ``None`` where its distortion may have moved a singular value over ``rtol``."""
    if not sketch.numel():
        return None
    small, num_before = None, 0
    if min(sketch.shape) >= _MANY_ROWS:
        sketch = mixed_triangle(sketch)
        num_before = num_before_gap(sketch)
        small = values_behind_gap(sketch, num_before)
    if small is None:
        spectrum = torch.linalg.svdvals(sketch).cpu()
    else:
        others = [small.largest, *[small.least] * (num_before - 1)]
        spectrum = torch.cat([small.values.new_tensor(others), small.values])
    largest, relative = float(spectrum[0]), (spectrum / spectrum[0]).tolist()
    # Singular values that are not known one by one are above this.
    resolved = 1.0 if small is None else small.least / largest

    def clear_rank(tolerance: float) -> int | None:
        if tolerance * _DISTORTION > resolved:
            return None
        limits = tolerance * _DISTORTION, tolerance / _DISTORTION
        fewest, most = (sum(value > limit for value in relative) for limit in limits)
        return fewest if fewest == most else None

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
        largest=largest,
        method="sketch",
    )
