"""The Gram matrix of rows whose columns are seen some at a time, and its triangular factor.

Only the lower half is computed, in tiles of rows, where a device works best in its cache; else all in one product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

_TILES = 8  # tiles of rows in which the lower half is computed: 9/16 of all products
_LEAST_TILE_ROWS = 128  # least rows of a tile: fewer are slower, row for row
_LEAST_COPIED_ROWS = 512  # least rows that are mirrored at once
_POWER_VECTORS = 10  # random start vectors of power steps
_POWER_STEPS = 3  # power steps from these vectors: within 10 % where the spectrum falls evenly, too


def slices(length: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``size`` that cover ``length``."""
    for start in range(0, length, max(1, size)):
        yield slice(start, min(length, start + max(1, size)))


def is_cached(device: torch.device) -> bool:
    """Whether a device works fastest in tiles that stay in its cache; others take one large product.

    Example:
        >>> is_cached(torch.device("cpu")), is_cached(torch.device("cuda"))
        (True, False)
    """
    return device.type == "cpu"


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
        self._is_whole = False

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
        others = matrix.mT
        for rows in self._tiles():
            tile = self._lower[rows, : rows.stop]
            if self._is_empty:
                torch.mm(matrix[rows], others[:, : rows.stop], out=tile)
            else:
                tile.addmm_(matrix[rows], others[:, : rows.stop])
        self._is_empty = self._is_whole = False

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
        self._is_empty = self._is_whole = False

    def add(self, other: "GramMatrix") -> None:
        """Add the products of the rows of another matrix beside the ones before."""
        if other._is_empty:
            return
        for rows in self._tiles():
            tile, added = self._lower[rows, : rows.stop], other._lower[rows, : rows.stop]
            tile.copy_(added) if self._is_empty else tile.add_(added)
        self._is_empty = self._is_whole = False

    @property
    def lower(self) -> Tensor:
        """All products on the diagonal and below; what stands above is not defined, shape ``(m, m)``."""
        return self._lower.zero_() if self._is_empty else self._lower

    def whole(self) -> Tensor:
        """Return all products, shape ``(m, m)``, in the memory of this object."""
        if not self._is_whole:
            products, self._is_whole = self.lower, True
            for rows in slices(self.num_rows, max(_LEAST_COPIED_ROWS, -(-self.num_rows // _TILES))):
                if rows.start:
                    products[: rows.start, rows] = products[rows, : rows.start].mT
                square = products[rows, rows].tril_()
                square.add_(square.mT.clone(memory_format=torch.contiguous_format)).diagonal().mul_(0.5)
        return self._lower

    @property
    def norm(self) -> Tensor:
        """The Frobenius norm, no smaller than the largest eigenvalue, shape ``()``."""
        norm: Tensor = self.whole().norm()
        return norm

    def times(self, vectors: Tensor) -> Tensor:
        """Multiply vectors, shape ``(m, count)``."""
        return self.whole() @ vectors

    def factor(self, *, shift: float | Tensor = 0.0) -> "TriangularFactor":
        """Find the Cholesky factor of this matrix less ``shift`` on its diagonal.

        Args:
            shift: The shift, also as a tensor of shape ``()``.
        """
        shifted = self.lower.clone()
        shifted.diagonal().sub_(shift)
        return TriangularFactor(*torch.linalg.cholesky_ex(shifted))

    def _tiles(self, multiple: int = 1) -> Iterator[slice]:
        """The rows of each tile, a multiple of ``multiple``; all rows where a device takes one product best."""
        size = max(_LEAST_TILE_ROWS, -(-self.num_rows // _TILES)) if is_cached(self.device) else self.num_rows
        size = max(1, size // multiple) * multiple
        return slices(self.num_rows, size)


@dataclass(frozen=True, eq=False)
class TriangularFactor:
    """The factor L of a positive matrix ``L @ L.T``.

    Attributes:
        lower: The factor, shape ``(m, m)``; elements above the diagonal are ignored.
        failed: Not zero where the matrix is not positive, and the factor of no use; shape ``()``.
    """

    lower: Tensor
    failed: Tensor

    @property
    def is_known_to_fail(self) -> bool:
        """Whether the factor is of no use, where this can be read without waiting for a device."""
        return is_cached(self.failed.device) and bool(self.failed.tolist())

    def solve(self, vectors: Tensor) -> Tensor:
        """Multiply vectors by the inverse of ``L @ L.T``, shape ``(m, count)``."""
        half = torch.linalg.solve_triangular(self.lower, vectors, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.lower.mT, half, upper=True)
        return whole


def _random_vectors(matrix: Tensor) -> Tensor:
    """Draw random vectors, always the same, shape ``(m, count)``, for a matrix of m rows."""
    generator = Generator().manual_seed(0)
    vectors = torch.randn(len(matrix), _POWER_VECTORS, generator=generator, dtype=torch.float32)
    return vectors.to(matrix.device, torch.float64)


def largest_eigenvalues(like: Tensor, *products: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Bound the largest eigenvalue of positive matrices from below, within 20 %, by power steps.

    Args:
        like: A matrix with as many rows, on the same device.
        products: For each matrix the function from vectors, shape ``(m, count)``, to their products with it.

    Returns:
        The bounds, each of shape ``()``.
    """
    start = _random_vectors(like)
    start /= start.norm(dim=0)
    return [_largest_eigenvalue(start, product) for product in products]


def leading_eigenvector(gram: GramMatrix) -> Tensor:
    """Find a unit vector near the eigenvector of the largest eigenvalue, by power steps of a subspace, shape ``(m,)``.

    Where the largest eigenvalues all but coincide it is near their eigenvectors' span.

    Example:
        >>> gram = GramMatrix(2)
        >>> gram.add_products(torch.tensor([[3.0], [4.0]], dtype=torch.float64))
        >>> (leading_eigenvector(gram).abs() * 5).round()
        tensor([3., 4.], dtype=torch.float64)
    """
    vectors = _random_vectors(gram.lower)
    for _ in range(_POWER_STEPS):
        vectors = torch.linalg.qr(gram.times(vectors)).Q
    inside = torch.linalg.eigh(vectors.mT @ gram.times(vectors)).eigenvectors
    leading: Tensor = vectors @ inside[:, -1]
    return leading


def _largest_eigenvalue(vectors: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(_POWER_STEPS - 1):
        vectors = product(vectors)
        vectors = vectors / vectors.norm(dim=0)
    largest: Tensor = product(vectors).norm(dim=0).max()
    return largest
