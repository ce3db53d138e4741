"""The singular values that a Gram matrix does not resolve, alone: a fraction of the cost of all."""

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_basin.functional.gram import GramMatrix, largest_eigenvalues, random_vectors
from lightning_basin.functional.rank import EPSILON, GRAM_RESOLUTION, LEAST_OF_GRAM, singular_values

_SHIFT = 1e-13  # multiple of the norm that is added, so that rounding leaves a matrix positive
_INVERSE_STEPS = 2  # steps of the inverse iteration
_SPARE = 32  # random vectors beyond the number of eigenvalues that they are to find
_MOST_UNRESOLVED = 0.25  # fraction of all singular values: where more are not resolved, all are found as quickly
_WIDEST_GAP = 100.0  # multiple of the resolution up to which the gap behind the unresolved eigenvalues may lie
_MOST_REFINEMENTS = 6  # most refinement steps; each removes at least 15/16 of the error, most often nearly all
_CLEARANCE = 16.0  # ratio between an eigenvalue as it was computed and what it is proved to be above


@dataclass(frozen=True, eq=False)
class SmallestSingularValues:
    """Singular values of which the smallest are known one by one.

    Attributes:
        spectrum: The singular values, descending, on the CPU. The first is within 20 %; in place of the others that are
            not known one by one stands the smallest of them.
        least: A lower bound on the singular values that are not known one by one.
    """

    spectrum: Tensor
    least: float


def smallest_singular_values(matrix: Tensor) -> SmallestSingularValues | None:
    r"""Find the singular values that a Gram matrix does not resolve, without squaring.

    Inverse iteration gives a basis Z of what is nearly the null space of the Gram matrix K. A Cholesky factor of
    :math:`K + \beta Z Z^T - \theta` proves that this is all of it: K has no more eigenvalues below :math:`\theta` than
    Z has columns (Weyl, 1912). The rows :math:`Z^T Y` of the matrix itself are then small. What they still hold of
    larger singular vectors is found by solving for it and removed, as in iterative refinement, until the rounding of
    the matrix remains, and not the rounding of its square.

    Args:
        matrix: The matrix Y, of any shape.

    Returns:
        The singular values, or ``None`` where too many are small, or no gap separates them from the others.

    Example:
        >>> smallest = smallest_singular_values(torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)))
        >>> smallest.spectrum.round(decimals=6)
        tensor([2., 1., 0.], dtype=torch.float64)
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    gram = GramMatrix(len(rows), rows.device)
    gram.add_products(rows)
    null_space = _near_null_space(gram)
    if null_space is None:
        return None
    basis, following, largest = null_space
    threshold = following / _CLEARANCE
    gram.add_products(gram.norm.sqrt() * basis)
    factor = gram.factor(shift=threshold)
    if factor.is_known_to_fail:
        return None
    small, previous = basis.mT @ rows, math.inf
    for _ in range(_MOST_REFINEMENTS):
        before = small
        basis = basis - _orthogonal_part(factor.solve(_orthogonal_part(rows @ small.mT, basis)), basis)
        small = basis.mT @ rows
        failed, change = torch.stack([factor.failed.to(small), (small - before).norm()]).tolist()
        if failed:
            return None
        if change <= EPSILON * largest * len(small) ** 0.5 or change > previous / 2:  # The rest is rounding.
            break
        previous = change
    others = [largest, *[math.sqrt(following)] * (len(rows) - len(small) - 1)]
    spectrum = torch.tensor([*others, *singular_values(small).tolist()], dtype=matrix.dtype)
    return SmallestSingularValues(spectrum, least=math.sqrt(threshold))


def _near_null_space(gram: GramMatrix) -> tuple[Tensor, float, float] | None:
    """Find the eigenvectors that a Gram matrix does not resolve.

    Returns:
        An orthonormal basis of them, the eigenvalue after theirs, and the largest singular value within 20 %.
    """
    num_rows, scale = gram.num_rows, gram.norm
    factor = gram.factor(shift=-_SHIFT * scale)
    if factor.is_known_to_fail:
        return None
    failed, norm, square = torch.stack(
        [factor.failed.to(scale), scale, *largest_eigenvalues(gram, gram.times)]
    ).tolist()
    unresolved = GRAM_RESOLUTION**2 * norm
    if failed or unresolved < LEAST_OF_GRAM**2:
        return None
    width = min(num_rows, _SPARE + num_rows // 8)
    while True:
        basis = random_vectors(gram, width)
        for _ in range(_INVERSE_STEPS):
            basis = torch.linalg.qr(factor.solve(basis)).Q
        values, vectors = torch.linalg.eigh(basis.mT @ gram.times(basis))
        # The basis ends at the widest gap near the resolution, so that it is well determined.
        eigenvalues = values.tolist()
        fewest, most = (bisect_right(eigenvalues, limit) for limit in (unresolved, _WIDEST_GAP * unresolved))
        if most <= width - _SPARE or (width == num_rows and most < width):
            break
        if width >= num_rows * _MOST_UNRESOLVED:
            return None
        width = min(2 * width, num_rows)
    floored = [math.log(max(value, EPSILON * norm)) for value in eigenvalues]
    count = max(range(fewest, most + 1), key=lambda i: floored[i] - floored[i - 1]) if fewest > 0 else 0
    return basis @ vectors[:, :count], eigenvalues[count], math.sqrt(square)


def _orthogonal_part(vectors: Tensor, basis: Tensor) -> Tensor:
    """The part of vectors that is orthogonal to a basis."""
    return vectors - basis @ (basis.mT @ vectors)
