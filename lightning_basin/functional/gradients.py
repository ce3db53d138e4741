"""Behavioral gradients of a layer whose parameters fall into parts, and products of all pairs of their rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.rank import singular_values


@dataclass(frozen=True)
class Block:
    """Columns of a matrix that are a view of all its columns: they need no tensor of their places."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, matrix: Tensor) -> Tensor:
        """Return a view of these columns of a matrix with contiguous rows, shape ``(..., *sizes)``."""
        strides = (*matrix.stride()[:-1], *self.strides)
        return matrix.as_strided((*matrix.shape[:-1], *self.sizes), strides, matrix.storage_offset() + self.start)


Columns = tuple[Block, ...] | Tensor
"""The places of columns: a block, or those of a weight and its bias, row beside element; or a tensor of places."""


def add_columns(matrix: Tensor, columns: Columns, values: Tensor) -> None:
    """Add values to some columns of a matrix with contiguous rows, or to some elements of a vector."""
    if isinstance(columns, Tensor):
        matrix.index_add_(-1, columns.to(matrix.device), values)
        return
    counts = [math.prod(block.sizes) for block in columns]
    widths = [count // counts[-1] for count in counts]
    parts = torch.split(values.reshape(*values.shape[:-1], counts[-1], sum(widths)), widths, dim=-1)
    for block, part in zip(columns, parts, strict=True):
        view = block.of(matrix)
        view.add_(part if part.shape == view.shape else part.reshape(view.shape))


@dataclass(frozen=True, eq=False)
class StackedGradients:
    """Gradients of a layer whose parameters fall into parts, side by side.

    Attributes:
        parts: The gradients by each part of the parameters.
        columns: The places of each part's columns; columns of no part are zero.
    """

    parts: "tuple[KhatriRaoGradients | DenseGradients, ...]"
    columns: tuple[Columns, ...]
    num_rows: int
    num_columns: int
    device: torch.device

    @property
    def num_elements(self) -> int:
        """The number of elements that are held."""
        return sum(part.num_elements for part in self.parts)

    def rows(self) -> Tensor:
        """Return the matrix, shape ``(m, N)``."""
        rows = self._zeros(self.num_rows, self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            add_columns(rows, columns, part.rows())
        return rows

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        for part in self.parts:
            part.add_gram(gram)

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """Add up the sketches of the parts, shape ``(m, num_columns)``."""
        sketch = self._zeros(self.num_rows, num_columns)
        for part in self.parts:
            sketch += part.sketch(num_columns, generator)
        return sketch

    def combination(self, weights: Tensor) -> Tensor:
        """Compute ``weights @ rows()`` without the rows; shapes ``(m,)`` and ``(N,)``."""
        combination = weights.new_zeros(self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            add_columns(combination, columns, part.combination(weights))
        return combination

    def _zeros(self, *shape: int) -> Tensor:
        dtype = self.parts[0].dtype if self.parts else torch.float64
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def weighted(self, blocks: Tensor) -> "StackedGradients":
        """Combine rows within each input, or by one block all of them; see `weighted_rows`."""
        parts = tuple(part.weighted(blocks) for part in self.parts)
        return replace(self, parts=parts, num_rows=blocks.shape[0] * blocks.shape[1])


LayerGradients = KhatriRaoGradients | DenseGradients | StackedGradients


def gram_of(gradients: LayerGradients) -> GramMatrix:
    """Multiply all pairs of rows, of which the lower half is computed."""
    gram = GramMatrix(gradients.num_rows, gradients.device)
    gradients.add_gram(gram)
    return gram


def sum_of_sketches(matrices: Sequence[LayerGradients], num_columns: int, generator: Generator) -> Tensor:
    """Sketch matrices side by side, shape ``(m, num_columns)``."""
    total = matrices[0].sketch(num_columns, generator)
    for gradients in matrices[1:]:
        total.add_(gradients.sketch(num_columns, generator))
    return total


def kronecker_spectrum(gradients: LayerGradients) -> Tensor | None:
    r"""Find the singular values where all inputs have the same output gradients, as for a linear layer at the end.

    Then :math:`G = A \otimes B`, whose singular values are the products of those of A and of B. They descend, on the
    CPU; ``None`` where output gradients differ.
    """
    factors = kronecker_factors(gradients)
    if factors is None:
        return None
    left, right = (singular_values(factor) for factor in factors)
    products = torch.outer(left, right).flatten().sort(descending=True).values
    num_zeros = min(gradients.num_rows, gradients.num_columns) - len(products)
    return torch.cat([products, products.new_zeros(num_zeros)]).cpu()


def kronecker_factors(gradients: LayerGradients) -> tuple[Tensor, Tensor] | None:
    """Return the two matrices whose Kronecker product the gradients are; ``None`` where output gradients differ."""
    parts = gradients.parts if isinstance(gradients, StackedGradients) else (gradients,)
    factors = parts[0] if len(parts) == 1 else None
    if not isinstance(factors, KhatriRaoGradients) or factors.num_columns != gradients.num_columns:
        return None
    k, c, t, d_out = factors.output_gradients.shape
    if t != 1 or k == 0 or not factors.has_equal_outputs:
        return None
    return factors.activations.reshape(k, -1), factors.output_gradients[0].reshape(c, d_out)
