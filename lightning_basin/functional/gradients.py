"""Behavioral gradients of a layer whose parameters fall into parts, and products of all pairs of their rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gram import GramMatrix


@dataclass(frozen=True, eq=False)
class StackedGradients:
    """Gradients of a layer whose parameters fall into parts, side by side.

    Attributes:
        parts: Of different columns each.
        columns: For each part where its columns stand; columns of no part are zero.
        num_rows: m.
        num_columns: N.
        device: Where they are.
    """

    parts: "tuple[KhatriRaoGradients | DenseGradients, ...]"
    columns: tuple[Tensor, ...]
    num_rows: int
    num_columns: int
    device: torch.device

    @property
    def num_elements(self) -> int:
        """Numbers that are held."""
        return sum(part.num_elements for part in self.parts)

    def rows(self) -> Tensor:
        """The matrix, shape ``(m, N)``."""
        rows = self._zeros(self.num_rows, self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            rows.index_copy_(1, columns, part.rows())
        return rows

    @property
    def gram_work(self) -> float:
        """Operations that the Gram matrix takes, about."""
        return sum(part.gram_work for part in self.parts)

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        for part in self.parts:
            part.add_gram(gram)

    def narrowed(self, num_columns: int, generator: Generator) -> "StackedGradients":
        """Each part narrowed by its share of the columns; see `KhatriRaoGradients.narrowed`."""
        share = min(1.0, num_columns / max(1, self.num_columns))
        parts = [part.narrowed(math.ceil(part.num_columns * share), generator) for part in self.parts]
        return stacked(parts, self.num_rows, self.device)

    def kronecker_spectrum(self) -> Tensor | None:
        """See `KhatriRaoGradients.kronecker_spectrum`; ``None`` where there are other parts."""
        part = self.parts[0] if len(self.parts) == 1 else None
        is_whole = part is not None and part.num_columns == self.num_columns
        return part.kronecker_spectrum() if is_whole and isinstance(part, KhatriRaoGradients) else None

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """The sum of the sketches of the parts, shape ``(m, num_columns)``."""
        sketch = self._zeros(self.num_rows, num_columns)
        for part in self.parts:
            sketch += part.sketch(num_columns, generator)
        return sketch

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()`` without the rows; shapes ``(m,)`` and ``(N,)``."""
        combination = weights.new_zeros(self.num_columns)
        for part, columns in zip(self.parts, self.columns, strict=True):
            combination[columns] = part.combination(weights)
        return combination

    def _zeros(self, *shape: int) -> Tensor:
        dtype = self.parts[0].dtype if self.parts else torch.float64
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def weighted(self, blocks: Tensor) -> "StackedGradients":
        """Rows combined within each input, or, by one block, all of them; see `weighted_rows`."""
        parts = tuple(part.weighted(blocks) for part in self.parts)
        return replace(self, parts=parts, num_rows=blocks.shape[0] * blocks.shape[1])


LayerGradients = KhatriRaoGradients | DenseGradients | StackedGradients


def gram_of(gradients: LayerGradients) -> GramMatrix:
    """Products of all pairs of rows, of which the lower half is computed."""
    gram = GramMatrix(gradients.num_rows, gradients.device)
    gradients.add_gram(gram)
    return gram


def stacked(
    parts: Sequence[KhatriRaoGradients | DenseGradients], num_rows: int, device: torch.device
) -> StackedGradients:
    """Parts side by side, in their order."""
    widths = [part.num_columns for part in parts]
    columns = torch.split(torch.arange(sum(widths), device=device), widths)
    return StackedGradients(tuple(parts), tuple(columns), num_rows=num_rows, num_columns=sum(widths), device=device)
