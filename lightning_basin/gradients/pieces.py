"""Gradients of layers too large for memory: some rows and columns of each matrix at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients, stacked
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.gradients.assemble import MeasuredUse, are_disjoint, slots_of
from lightning_basin.operations.uses import ElementwiseUse, ProductUse, Use

# Layers too large for memory, in pieces: some rows and columns of each matrix at a time.


@dataclass(frozen=True, eq=False)
class PiecewiseGradients(StackedGradients):
    """Gradients of a layer whose parts are not held, but computed whenever they are needed.

    Attributes:
        pieces: Computes parts of different columns, one after the other.
    """

    pieces: Callable[[], Iterator[LayerGradients]]

    @property
    def num_elements(self) -> int:
        """Numbers that are held: none."""
        return 0

    def rows(self) -> Tensor:
        """The matrix, shape ``(m, N)``; not smaller than what could not be held."""
        return self._sum(lambda piece: piece.rows())

    @property
    def gram_work(self) -> float:
        """Operations that the Gram matrix takes, about."""
        return float(self.num_rows) ** 2 * self.num_columns

    def add_gram(self, gram: GramMatrix) -> None:
        """Add the products of all pairs of rows."""
        for piece in self.pieces():
            piece.add_gram(gram)

    def narrowed(self, num_columns: int, generator: Generator) -> StackedGradients:
        """Each piece narrowed by its share of the columns, which can be held; see `KhatriRaoGradients.narrowed`."""
        parts: list[KhatriRaoGradients | DenseGradients] = []
        for piece in self.pieces():
            narrow = piece.narrowed(num_columns, generator)
            parts += narrow.parts if isinstance(narrow, StackedGradients) else [narrow]
        return stacked(parts, self.num_rows, self.device)

    def sketch(self, num_columns: int, generator: Generator) -> Tensor:
        """The sum of the sketches of the pieces, shape ``(m, num_columns)``."""
        return self._sum(lambda piece: piece.sketch(num_columns, generator))

    def combination(self, weights: Tensor) -> Tensor:
        """``weights @ rows()`` without the rows; shapes ``(m,)`` and ``(N,)``."""
        return self._sum(lambda piece: piece.combination(weights))

    def magnitudes(self) -> "PiecewiseGradients":
        """With the magnitude of every term of every piece."""
        return replace(self, pieces=lambda: (piece.magnitudes() for piece in self.pieces()))

    def weighted(self, blocks: Tensor) -> "PiecewiseGradients":
        """Rows combined within each input, or, by one block, all of them; see `weighted_rows`."""
        return replace(
            self,
            num_rows=blocks.shape[0] * blocks.shape[1],
            pieces=lambda: (piece.weighted(blocks) for piece in self.pieces()),
        )

    def _sum(self, of: Callable[[LayerGradients], Tensor]) -> Tensor:
        pieces = map(of, self.pieces())
        total = next(pieces).clone()
        for piece in pieces:
            total += piece
        return total


@dataclass(frozen=True)
class Cuts:
    """Into how many parts the matrices of a layer are cut, along their outputs and along what enters them."""

    outputs: int = 1
    inputs: int = 1

    def piece(self, uses: Mapping[int, Use], number: int) -> dict[int, Use]:
        """The uses of one of ``outputs * inputs`` pieces."""
        if self.outputs == self.inputs == 1:
            return dict(uses)
        along_outputs, along_inputs = divmod(number, self.inputs)
        found: dict[int, Use] = {}
        for index, use in uses.items():
            if isinstance(use, ProductUse):
                part: Use | None = _cut_product(use, self, along_outputs, along_inputs)
            else:
                part = _cut_elementwise(use, self.outputs, along_outputs) if along_inputs == 0 else None
            if part is not None:
                found[index] = part
        return found


def can_be_cut(parameters: Mapping[str, Tensor], uses: Sequence[Use]) -> bool:
    """Whether the uses of a layer's parameters are of different columns, or the same ones in the same way."""
    slots = slots_of([MeasuredUse(use, use.positions, None) for use in uses])
    if any(slot.source.name is None for slot in slots):
        return False
    by_name: dict[str | None, list[Tensor]] = {}
    for slot in slots:
        by_name.setdefault(slot.source.name, []).append(slot.positions)
    return all(are_disjoint(by_name[name], parameters[name].numel()) for name in parameters if name in by_name)


def _cut_product(use: ProductUse, cuts: Cuts, along_outputs: int, along_inputs: int) -> ProductUse | None:
    d_out, d_in = use.positions.shape
    rows, columns = _part(d_out, cuts.outputs, along_outputs), _part(d_in, cuts.inputs, along_inputs)
    if rows.start == rows.stop or columns.start == columns.stop:
        return None
    return replace(
        use,
        positions=use.positions[rows, columns],
        activations=lambda: use.activations()[..., columns],
        signals=lambda signal: use.signals(signal)[..., rows],
        num_activations=use.num_activations // d_in * (columns.stop - columns.start),
    )


def _cut_elementwise(use: ElementwiseUse, count: int, number: int) -> ElementwiseUse | None:
    sizes = use.positions.shape
    if not sizes:
        return use if number == 0 else None
    axis = max(range(len(sizes)), key=lambda axis: sizes[axis])
    part = _part(sizes[axis], count, number)
    if part.start == part.stop:
        return None
    if sizes[axis] == 1:  # Repeated along all axes.
        return replace(use, shifts=None)
    return replace(
        use,
        positions=use.positions.narrow(axis, part.start, part.stop - part.start),
        contributions=lambda signal: use.contributions(signal).narrow(axis, part.start, part.stop - part.start),
        shifts=None,
    )


def _part(size: int, count: int, number: int) -> slice:
    """Neighbours, at most ``ceil(size / count)``; the last parts may be empty."""
    length = -(-size // count)
    return slice(min(size, number * length), min(size, (number + 1) * length))
