"""Behavioral gradients of a layer whose parameters fall into parts, and products of all pairs of their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.rank import singular_values


@dataclass(frozen=True, eq=False)
class StackedGradients:
    """Gradients of a layer whose parameters fall into parts, side by side.

    Attributes:
        parts: The gradients by each part of the parameters.
        columns: The places of each part's columns; columns of no part are zero.
        num_rows: The number of rows, m.
        num_columns: The number of parameters, N.
        device: The device of the gradients.
    """

    parts: "tuple[KhatriRaoGradients | DenseGradients, ...]"
    columns: tuple[Tensor, ...]
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
            rows.index_copy_(1, columns, part.rows())
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
            combination[columns] = part.combination(weights)
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

    Then :math:`G = A \otimes B`, whose singular values are the products of those of A and of B.

    Returns:
        The singular values, descending, shape ``(min(m, N),)``; ``None`` where output gradients differ.
    """
    parts = gradients.parts if isinstance(gradients, StackedGradients) else (gradients,)
    factors = parts[0] if len(parts) == 1 else None
    if not isinstance(factors, KhatriRaoGradients) or factors.num_columns != gradients.num_columns:
        return None
    k, c, t, d_out = factors.output_gradients.shape
    signals = factors.output_gradients[:1]
    if t != 1 or k == 0 or not bool((factors.output_gradients == signals).all()):
        return None
    left, right = singular_values(factors.activations.reshape(k, -1)), singular_values(signals.view(c, d_out))
    products = torch.outer(left, right).flatten().sort(descending=True).values
    return torch.cat([products, products.new_zeros(min(k * c, gradients.num_columns) - len(products))])
