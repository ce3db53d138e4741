"""The Gram matrix of rows whose columns are seen some at a time, and its triangular factor.

Only the lower half is computed, in tiles of rows. The rest is never written, so that it takes no memory where the
system gives memory out on first use.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

_TILES = 8  # tiles of rows in which the lower half is computed: 9/16 of all products
_LEAST_TILE_ROWS = 64  # least rows of a tile: fewer are slower, row for row
_PANEL = 128  # columns of the factor that are computed at once
_POWER_VECTORS = 10  # random start vectors of power steps
_POWER_STEPS = 3  # power steps from these vectors: within 10 % where the spectrum falls evenly, too


class GramMatrix:
    """Products of all pairs of rows, added up over matrices side by side.

    Args:
        num_rows: The number of rows, m.
        device: The device of the rows.
        dtype: The dtype in which products are added up.

    Example:
        >>> gram = GramMatrix(2)
        >>> gram.add_products(torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64))
        >>> gram.whole()
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)
    """

    def __init__(
        self, num_rows: int, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float64
    ) -> None:
        self._lower = torch.empty(num_rows, num_rows, dtype=dtype, device=device)
        self._is_empty = True

    @property
    def num_rows(self) -> int:
        """The number of rows, m."""
        return len(self._lower)

    @property
    def device(self) -> torch.device:
        """The device of the products."""
        return self._lower.device

    def add_products(self, matrix: Tensor) -> None:
        """Add the products of all pairs of rows of a matrix, shape ``(m, columns)``."""
        for rows in self._tiles():
            tile, others = self._lower[rows, : rows.stop], matrix[: rows.stop].mT
            if self._is_empty:
                torch.mm(matrix[rows], others, out=tile)
            else:
                tile.addmm_(matrix[rows], others)
        self._is_empty = False

    def add_scaled_products(self, matrix: Tensor, scales: Tensor) -> None:
        """Add the products of all pairs of rows, each times a scale that neighbors share.

        Args:
            matrix: The rows, shape ``(k * c, columns)``.
            scales: The scale of each pair of c neighbors, shape ``(k, k)``.
        """
        count = len(matrix) // max(1, len(scales))
        columns = scales.repeat_interleave(count, dim=1)  # Long rows of memory are multiplied fastest.
        room = matrix.new_empty(0)  # For products, in the same memory for all tiles.
        for rows in self._tiles(count):
            tile, shape = self._lower[rows, : rows.stop], (-1, count, rows.stop)
            factors = columns[rows.start // count : rows.stop // count, None, : rows.stop]
            if self._is_empty:
                torch.mm(matrix[rows], matrix[: rows.stop].mT, out=tile)
                tile.view(shape).mul_(factors)
                continue
            if not room.numel():
                room = matrix.new_empty((rows.stop - rows.start) * len(matrix))
            products = room[: tile.numel()].view(tile.shape)
            torch.mm(matrix[rows], matrix[: rows.stop].mT, out=products)
            tile.view(shape).addcmul_(products.view(shape), factors)
        self._is_empty = False

    def add(self, other: "GramMatrix") -> None:
        """Add the products of the rows of another matrix beside the ones before."""
        if other._is_empty:
            return
        for rows in self._tiles():
            tile, added = self._lower[rows, : rows.stop], other._lower[rows, : rows.stop]
            tile.copy_(added) if self._is_empty else tile.add_(added)
        self._is_empty = False

    def whole(self) -> Tensor:
        """Return all products, shape ``(m, m)``, in the memory of this object."""
        if self._is_empty:
            return self._lower.zero_()
        for rows in self._tiles():
            self._lower[: rows.start, rows] = self._lower[rows, : rows.start].mT
            square = self._lower[rows, rows].tril()
            self._lower[rows, rows] = square + square.tril(-1).mT
        return self._lower

    @property
    def norm(self) -> float:
        """The Frobenius norm, no smaller than the largest eigenvalue."""
        if self._is_empty:
            return 0.0
        norms = [self._lower.diagonal().norm()]
        for rows in self._tiles():
            norms += 2 * [self._lower[rows, : rows.start].norm(), self._lower[rows, rows].tril(-1).norm()]
        return float(torch.stack(norms).norm())

    def times(self, vectors: Tensor) -> Tensor:
        """Multiply vectors, shape ``(m, count)``."""
        product = torch.zeros_like(vectors)
        for rows in () if self._is_empty else self._tiles():
            below = self._lower[rows, : rows.start]
            square = self._lower[rows, rows].tril()
            product[rows] += below @ vectors[: rows.start] + square @ vectors[rows] + square.tril(-1).mT @ vectors[rows]
            product[: rows.start] += below.mT @ vectors[rows]
        return product

    def factor(self, *, shift: float = 0.0) -> "TriangularFactor | None":
        """Find the Cholesky factor of this matrix less ``shift`` on its diagonal; ``None`` where this is not positive.

        Panel by panel, each from all before it (Golub and Van Loan, 2013, section 4.2.8): twice as fast as the LAPACK
        of torch 2.13 on a CPU.
        """
        if self._is_empty:
            return None
        if self._lower.device.type != "cpu":
            shifted = self.whole().clone()
            shifted.diagonal().sub_(shift)
            lower, failed = torch.linalg.cholesky_ex(shifted)
            return None if int(failed) else TriangularFactor(lower)
        factor = torch.empty_like(self._lower)
        for start in range(0, self.num_rows, _PANEL):
            stop = min(start + _PANEL, self.num_rows)
            panel = factor[start:, start:stop]
            panel.copy_(self._lower[start:, start:stop])
            panel.diagonal().sub_(shift)
            panel.addmm_(factor[start:, :start], factor[start:stop, :start].mT, alpha=-1.0)
            corner, failed = torch.linalg.cholesky_ex(panel[: stop - start])
            if int(failed):
                return None
            panel[: stop - start] = corner
            panel[stop - start :] = torch.linalg.solve_triangular(corner, panel[stop - start :].mT, upper=False).mT
        return TriangularFactor(factor)

    def _tiles(self, multiple: int = 1) -> Iterator[slice]:
        """The rows of each tile, a multiple of ``multiple``."""
        size = max(_LEAST_TILE_ROWS, -(-self.num_rows // _TILES))
        size = max(1, size // multiple) * multiple
        for start in range(0, self.num_rows, size):
            yield slice(start, min(self.num_rows, start + size))


class TriangularFactor:
    """The factor L of a positive matrix ``L @ L.T``.

    Args:
        lower: The factor, shape ``(m, m)``; elements above the diagonal are ignored.
    """

    def __init__(self, lower: Tensor) -> None:
        self._lower = lower

    def solve(self, vectors: Tensor) -> Tensor:
        """Multiply vectors by the inverse of ``L @ L.T``, shape ``(m, count)``."""
        half = torch.linalg.solve_triangular(self._lower, vectors, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self._lower.mT, half, upper=True)
        return whole


def random_vectors(gram: GramMatrix, count: int) -> Tensor:
    """Draw random vectors, always the same, shape ``(m, count)``."""
    generator = Generator().manual_seed(0)
    return torch.randn(gram.num_rows, count, generator=generator, dtype=torch.float32).to(gram.device, torch.float64)


def largest_eigenvalue(gram: GramMatrix, product: Callable[[Tensor], Tensor]) -> float:
    """Bound the largest eigenvalue of a positive matrix from below, within 20 %, by power steps.

    Args:
        gram: A Gram matrix of the same size, on the same device.
        product: From vectors, shape ``(m, count)``, to their products with the matrix.
    """
    vectors = random_vectors(gram, _POWER_VECTORS)
    for _ in range(_POWER_STEPS):
        vectors = product(vectors / vectors.norm(dim=0))
    return float(vectors.norm(dim=0).max())
