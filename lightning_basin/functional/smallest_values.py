"""The small singular values of a matrix, from a small block of its triangular factor where a gap is before them."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import largest_eigenvalues
from lightning_basin.functional.rank import EPSILON, GRAM_RESOLUTION

_WIDEST_GAP = 10.0  # multiple of the resolution of a Gram matrix up to which the values behind a gap may lie
_LEAST_GAP = 3.0  # least ratio of the values before and behind a gap: these are then exact to 10 %
_LONGEST_ROWS = 1e6  # norm of the rows that leave those behind: beyond it rounding would hide the unit rows beside them


@dataclass(frozen=True, eq=False)
class SmallSingularValues:
    """The singular values behind a gap, one by one.

    Attributes:
        values: The singular values behind the gap, descending, on the CPU.
        least: The smallest singular value before the gap, within 20 %.
        largest: The largest singular value, within 20 %.
    """

    values: Tensor
    least: float
    largest: float


def mixed_triangle(matrix: Tensor) -> Tensor:
    """Find the lower triangular factor of a matrix whose rows are mixed at random: the singular values stay the same.

    Its diagonal shows where they fall, as the first rows hardly ever miss a direction that all rows have (Demmel,
    Dumitriu and Holtz, 2007, "Fast linear algebra is stable", section 5).

    Args:
        matrix: The matrix, of any shape; its columns are mixed where these are fewer.

    Returns:
        The factor, shape ``(m, m)`` for m rows or columns.
    """
    tall = matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix
    factor: Tensor = torch.linalg.qr(_mixed(tall), mode="r").R.mT
    return factor


def num_before_gap(triangle: Tensor) -> int:
    """Count the singular values before the widest gap among those that a Gram matrix hardly resolves.

    Args:
        triangle: The factor by `mixed_triangle`.

    Returns:
        The count; of all where none is so small.

    Example:
        >>> num_before_gap(mixed_triangle(torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))))
        2
    """
    diagonal = triangle.diagonal().abs().cummin(0).values.cpu()
    diagonal = diagonal.clamp(min=EPSILON * float(diagonal[0])).log()
    falls = diagonal[:-1] - diagonal[1:]
    falls[diagonal[1:] > diagonal[0] + math.log(_WIDEST_GAP * GRAM_RESOLUTION)] = 0.0
    return int(falls.argmax()) + 1 if bool(falls.any()) else len(triangle)


def values_behind_gap(triangle: Tensor, num_before: int) -> SmallSingularValues | None:
    r"""Find the singular values behind a gap, to the rounding of the matrix itself.

    With the blocks :math:`A` before the gap, :math:`B` below it and :math:`C` beside that, the rows
    :math:`[-B A^{-1}, I]` times the triangle are :math:`[0, C]`. Made orthonormal, they leave a block :math:`T`, whose
    singular values are those behind the gap, but for the square of what the gap divides (Mathias and Stewart, 1993).

    Args:
        triangle: The factor by `mixed_triangle`, shape ``(m, m)``.
        num_before: The number of singular values before the gap, at least 1.

    Returns:
        The singular values; ``None`` where there is no gap.

    Example:
        >>> small = values_behind_gap(torch.diag(torch.tensor([2.0, 1.0, 1e-9], dtype=torch.float64)), 2)
        >>> small.values.log10().round().tolist(), round(small.least, 3), round(small.largest, 3)
        ([-9.0], 1.0, 2.0)
    """
    before, below = triangle[:num_before, :num_before], triangle[num_before:, :num_before]
    beside = triangle[num_before:, num_before:]
    rows = torch.linalg.solve_triangular(before, below, upper=False, left=False)
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    factor, failed = torch.linalg.cholesky_ex(rows @ rows.mT + identity)

    def inverse_square(vectors: Tensor) -> Tensor:  # Of the columns before the gap, by Woodbury's formula.
        vectors = torch.linalg.solve_triangular(before.mT, vectors, upper=True)
        vectors = vectors - rows.mT @ torch.cholesky_solve(rows @ vectors, factor)
        inverse: Tensor = torch.linalg.solve_triangular(before, vectors, upper=False)
        return inverse

    (inverse,) = largest_eigenvalues(before, inverse_square)
    (square,) = largest_eigenvalues(triangle, lambda vectors: triangle @ (triangle.mT @ vectors))
    facts = torch.stack([failed.to(inverse), rows.norm(), beside.norm(), inverse, square]).tolist()
    failed, norm_of_rows, norm, inverse, square = facts
    if failed or not norm_of_rows < _LONGEST_ROWS or not 0.0 < inverse < math.inf:
        return None
    least = inverse**-0.5
    if not _LEAST_GAP * norm <= least:
        return None
    values = torch.linalg.svdvals(torch.linalg.solve_triangular(factor, beside, upper=False)).cpu()
    return SmallSingularValues(values, least=least, largest=math.sqrt(square))


def _mixed(matrix: Tensor) -> Tensor:
    """Mix columns by random signs and a Fourier transform, orthogonal and in a random order."""
    count, generator = matrix.shape[1], Generator().manual_seed(0)
    order, picked = (torch.randperm(count, generator=generator).to(matrix.device) for _ in range(2))
    signs = torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1).to(matrix)
    spectrum = torch.view_as_real(torch.fft.rfft((matrix * signs)[:, order], norm="ortho")).flatten(1)
    # Each frequency stands for two of the whole transform, which are conjugate; but the first one, and the last of an
    # even number, for one without an imaginary part.
    scales = matrix.new_full((count,), math.sqrt(2))
    scales[:: count - 1 if count % 2 == 0 else count] = 1.0
    places = torch.where(picked == 0, 0, picked + 1)
    return torch.gather(spectrum, 1, places.expand(len(matrix), -1)).mul_(scales[picked])
