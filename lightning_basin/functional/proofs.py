"""Ranks without the spectrum: a fraction of its cost, and no answer where there is doubt.

A Cholesky factor of the Gram matrix proves full rank. A sketch that is hardly wider than the rank has singular values
that are off by a factor of 10, which is enough where none of them is near the tolerance. Else the spectrum must be
taken, from the Gram matrix and a sketch of twice the rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_basin.functional.rank import EPSILON, GRAM_RESOLUTION, RANK_TOLERANCES, GradientRank, rank_gap

OVERSAMPLING = 1.25
"""Columns of a narrow sketch, by the rows or columns of the matrix, whichever are fewer."""

_DISTORTION = 30.0
r"""How far a singular value of a narrow sketch, relative to the largest, may be from that of the matrix.

A Gaussian one is within :math:`(1 + \sqrt{0.8}) / (1 - \sqrt{0.8}) = 18` (Davidson and Szarek, 2001, theorem II.13).
"""

_POWER_STEPS = 10  # From a random start that is 10 % for 2560 rows (Kuczynski and Wozniakowski, 1992).


def full_rank_of_gram(gram: Tensor, *, rtol: float, epsilon: float = EPSILON) -> GradientRank | None:
    """Prove full rank by a Cholesky factor, ``m**3 / 3`` operations where eigenvalues take several times as many.

    The factor of ``gram - tau**2`` exists if and only if every singular value is above tau (Sylvester, 1852). With tau
    at ``GRAM_RESOLUTION`` of the largest one, rounding cannot pretend this.

    Args:
        gram: Products of all pairs of rows, or of all pairs of columns, shape ``(n, n)``.
        rtol: Relative tolerance that the rank is wanted at.
        epsilon: Rounding of the matrix whose rows or columns these are.

    Returns:
        The rank, or ``None`` where a singular value may be below ``GRAM_RESOLUTION`` or ``rtol``.

    Example:
        >>> full_rank_of_gram(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), rtol=1e-12).rank
        2
        >>> full_rank_of_gram(torch.ones(2, 2, dtype=torch.float64), rtol=1e-12) is None
        True
    """
    num_rows = gram.shape[0]
    # The largest row sum bounds the largest eigenvalue from above (Gershgorin, 1931): a bound on the safe side.
    bound = float(gram.abs().sum(1).max())
    resolution = max(rtol, GRAM_RESOLUTION)
    shift = resolution**2 * bound
    if bound == 0.0:
        return None
    shifted = gram.clone()
    shifted.diagonal().sub_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        return None

    def inverse_gram(vector: Tensor) -> Tensor:  # cholesky_solve copies the factor every time.
        half: Tensor = torch.linalg.solve_triangular(factor, vector, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return whole

    largest = math.sqrt(_largest_eigenvalue(lambda vector: gram @ vector, gram))
    inverse = _largest_eigenvalue(inverse_gram, gram)
    above = math.sqrt(shift + 1 / inverse)
    return GradientRank(
        rank=num_rows,
        gap=math.log10(above / (epsilon * largest)),
        at={tolerance: num_rows for tolerance in RANK_TOLERANCES if tolerance <= resolution},
        effective_rank=None,
        rtol=rtol,
        largest=largest,
        method="cholesky",
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
    spectrum = torch.linalg.svdvals(sketch)
    relative = spectrum / spectrum[0]

    def clear_rank(tolerance: float) -> int | None:
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


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Of a positive matrix, by power steps from a fixed random start."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(like.shape[0], 1, generator=generator, dtype=torch.float64).to(like.device)
    for _ in range(_POWER_STEPS):
        vector = product(vector / vector.norm())
    return float(vector.norm())
