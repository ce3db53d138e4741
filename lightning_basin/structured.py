"""Gradients of layers from the operations that use their parameters, and the derivatives by what leaves these.

No gradient with respect to a parameter is taken. Whether the operations are all that use it is for the caller to check.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import GramMatrix
from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.functional.sketch import (
    DenseGradients,
    KhatriRaoGradients,
    LayerGradients,
    StackedGradients,
    stacked,
)
from lightning_basin.operations import ElementwiseUse, ProductUse, Source, Use

_Block = tuple[Tensor, KhatriRaoGradients | DenseGradients]  # columns, and the gradients by them


@dataclass(frozen=True)
class InputAxis:
    """Where the parts of the k inputs lie along an axis of what an operation returns.

    Attributes:
        axis: Of the result's derivative, in the form in which a use takes it; 0 for products.
        adjacent: Whether the parts of one input follow each other, or inputs alternate.
    """

    axis: int
    adjacent: bool

    def split(self, tensor: Tensor, num_inputs: int) -> Tensor:
        """The axis in front, as ``(k, n / k, ...)``."""
        moved = tensor.movedim(self.axis, 0)
        count = moved.shape[0] // num_inputs
        if self.adjacent:
            return moved.reshape(num_inputs, count, *moved.shape[1:])
        return moved.reshape(count, num_inputs, *moved.shape[1:]).transpose(0, 1)


def possible_input_axes(use: Use, signal: Tensor, chosen: Tensor) -> list[InputAxis]:
    """Where the inputs can be, seen from a derivative of the outputs of some inputs only.

    What belongs to other inputs is exactly zero there. So may more be, where a layer is dead: further choices of inputs
    then tell.

    Args:
        use: Of a parameter.
        signal: Derivative by the result, of a sum over the outputs of the chosen inputs.
        chosen: Which inputs these are, bool, shape ``(k,)``.
    """
    num_inputs = chosen.numel()
    if isinstance(use, ProductUse):
        axes, found = [0], use.signals(signal)
    else:
        found = use.contributions(signal)
        axes = [axis for axis in range(found.ndim) if use.positions.shape[axis] == 1]
    nonzero = found != 0
    layouts = [
        InputAxis(axis, adjacent)
        for axis in axes
        if found.shape[axis] % num_inputs == 0
        # With one part each it is the same.
        for adjacent in ((True,) if found.shape[axis] == num_inputs else (True, False))
    ]
    return [layout for layout in layouts if not bool(layout.split(nonzero, num_inputs)[~chosen].any())]


def signal_of_inputs(use: Use, signal: Tensor, layout: InputAxis, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Derivatives input by input: ``(k, t, d_out)`` for a product, ``(k, n)`` by the n used entries else."""
    signal = signal.to(dtype)  # Before anything is added up.
    if isinstance(use, ProductUse):
        return layout.split(use.signals(signal), num_inputs).flatten(1, -2)
    contributions = layout.split(use.contributions(signal), num_inputs)
    used = use.positions.movedim(layout.axis, 0)  # Of length 1 there.
    repeated = [axis for axis in range(1, contributions.ndim) if used.shape[axis - 1] == 1]
    summed = contributions.sum(repeated) if repeated else contributions
    return summed.unsqueeze(-1).flatten(1)


def activations_of_inputs(use: ProductUse, layout: InputAxis, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """What is multiplied, input by input, shape ``(k, t, d_in)``."""
    return layout.split(use.activations().to(dtype), num_inputs).flatten(1, -2)


@dataclass(frozen=True, eq=False)
class MeasuredUse:
    """One use of a parameter with what was measured of it.

    Attributes:
        use: The operation.
        signals: Derivatives of each output, ``(k, c, t, d_out)`` for a product, ``(k, c, n)`` otherwise.
        activations: ``(k, t, d_in)`` for a product.
    """

    use: Use
    signals: Tensor
    activations: Tensor | None


@dataclass(eq=False)
class _Slot:
    """Uses of the same entries of one source in the same way, which add up."""

    source: Source
    positions: Tensor
    uses: list[MeasuredUse]
    bias: "_Slot | None" = None

    def holds(self, measured: MeasuredUse) -> bool:
        use = measured.use
        return (
            use.source is self.source
            and isinstance(use, ProductUse) == isinstance(self.uses[0].use, ProductUse)
            and use.positions.numel() == self.positions.numel()
            and torch.equal(use.positions, self.positions)
        )

    def shifts(self, other: "_Slot") -> bool:
        """Whether this is the bias of a product, at each of its uses."""
        shifted = [use.use.shifts if isinstance(use.use, ElementwiseUse) else None for use in self.uses]
        same = len(shifted) == len(other.uses) and all(map(is_, shifted, [use.use for use in other.uses]))
        return same and self.positions.numel() == other.positions.shape[0]

    def gradients(self) -> KhatriRaoGradients | DenseGradients:
        """With respect to the entries, in the order of `columns`."""
        signals = [use.signals for use in self.uses]
        if self.uses[0].activations is None:
            return DenseGradients(sum(signals[1:], start=signals[0]).flatten(0, 1))
        activations = concatenated([use.activations for use in self.uses if use.activations is not None], 1)
        if self.bias is not None:
            activations = torch.cat([activations, activations.new_ones(*activations.shape[:2], 1)], dim=2)
        return KhatriRaoGradients(activations, concatenated(signals, 2))

    def columns(self, starts: Mapping[int, int]) -> Tensor:
        """Where the entries stand among the parameters of the layer."""
        columns = self.positions + starts[id(self.source)]
        if self.bias is not None:
            shifted = self.bias.positions.reshape(-1, 1) + starts[id(self.bias.source)]
            columns = torch.cat([columns, shifted], dim=1)
        return columns.flatten()


def concatenated(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after the other along an axis; a single one is not copied."""
    return torch.cat(list(tensors), dim=axis) if len(tensors) > 1 else tensors[0]


def gradients_from_uses(
    parameters: Mapping[str, Tensor], used: Sequence[MeasuredUse], *, num_rows: int
) -> LayerGradients:
    """The gradients of a layer from all uses of its parameters.

    Uses of the same entries add up, as where a layer is called twice. What multiplies stays factored; entries that are
    used in several ways, as a table that is also the output head, are added up as dense rows.

    Args:
        parameters: Of the layer by name, in order, attached to the graph.
        used: All uses of them, and of tensors that were computed from them.
        num_rows: m.
    """
    sizes = [parameter.numel() for parameter in parameters.values()]
    blocks: list[_Block] = []
    slots = _slots(used)
    sources = {id(slot.source): slot.source for slot in slots}
    starts: dict[int, int] = {}
    for identity, source in sources.items():
        if source.name is None:
            blocks += _through(source, [slot for slot in slots if slot.source is source], parameters, num_rows)
        else:
            starts[identity] = sum(sizes[: list(parameters).index(source.name)])
    direct = _with_biases([slot for slot in slots if slot.source.name is not None])
    blocks += [(slot.columns(starts), slot.gradients()) for slot in direct]
    device = next(iter(parameters.values())).device
    return _in_columns(blocks, num_rows, sum(sizes), device)


def _slots(used: Sequence[MeasuredUse]) -> list[_Slot]:
    slots: list[_Slot] = []
    for measured in used:
        slot = next((slot for slot in slots if slot.holds(measured)), None)
        if slot is None:
            slots.append(_Slot(measured.use.source, measured.use.positions, [measured]))
        else:
            slot.uses.append(measured)
    return slots


def _with_biases(slots: Sequence[_Slot]) -> list[_Slot]:
    """Products joined with what shifts them: a bias is the weight of an activation that is always 1."""
    products = [slot for slot in slots if slot.uses[0].activations is not None]
    others = [slot for slot in slots if slot.uses[0].activations is None]
    for product in products:
        product.bias = next((slot for slot in others if slot.shifts(product)), None)
    joined = [product.bias for product in products if product.bias is not None]
    return [*products, *(slot for slot in others if not any(slot is bias for bias in joined))]


def _through(source: Source, slots: Sequence[_Slot], parameters: Mapping[str, Tensor], num_rows: int) -> list[_Block]:
    """Of a tensor that was computed from parameters, as by weight normalisation: the chain rule, row by row."""
    blocks = [(slot.positions.flatten(), slot.gradients()) for slot in slots]
    rows = _summed(blocks, num_rows, source.tensor.numel()).view(num_rows, *source.tensor.shape)
    values = list(parameters.values())
    products = vector_jacobian_products(source.tensor, values, rows.to(source.tensor.dtype)).to(rows.dtype)
    return [(torch.arange(products.shape[1], device=products.device), DenseGradients(products))]


def _in_columns(blocks: Sequence[_Block], num_rows: int, num_columns: int, device: torch.device) -> LayerGradients:
    """Blocks of different columns stay apart; where they overlap they are added up."""
    if _are_disjoint([columns for columns, _ in blocks], num_columns):
        return StackedGradients(
            parts=tuple(part for _, part in blocks),
            columns=tuple(columns for columns, _ in blocks),
            num_rows=num_rows,
            num_columns=num_columns,
            device=device,
        )
    return DenseGradients(_summed(blocks, num_rows, num_columns))


def _are_disjoint(columns: Sequence[Tensor], num_columns: int) -> bool:
    counted = sum(part.numel() for part in columns)
    if not columns or counted > num_columns:
        return not columns
    seen = torch.zeros(num_columns, dtype=torch.bool, device=columns[0].device)
    for part in columns:
        seen[part.flatten()] = True
    return int(seen.sum()) == counted


def _summed(blocks: Sequence[_Block], num_rows: int, num_columns: int) -> Tensor:
    rows = torch.zeros(num_rows, num_columns, dtype=blocks[0][1].dtype, device=blocks[0][0].device)
    for columns, part in blocks:
        rows.index_add_(1, columns, part.rows())
    return rows


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
    slots = _slots([MeasuredUse(use, use.positions, None) for use in uses])
    if any(slot.source.name is None for slot in slots):
        return False
    by_name: dict[str | None, list[Tensor]] = {}
    for slot in slots:
        by_name.setdefault(slot.source.name, []).append(slot.positions)
    return all(_are_disjoint(by_name[name], parameters[name].numel()) for name in parameters if name in by_name)


@dataclass(frozen=True)
class UsesSize:
    """How many numbers the uses of a layer take, of which a measurement has other inputs than were traced.

    Attributes:
        uses: All of the layer.
        num_inputs: That will be measured, k.
        num_outputs: Per input, c.
        share: How many times as many as were traced.
    """

    uses: Sequence[Use]
    num_inputs: int
    num_outputs: int
    share: float

    @property
    def factors(self) -> int:
        """Of the whole layer."""
        return sum(self._factors(Cuts()))

    @property
    def entering(self) -> int:
        """Of what enters the largest product."""
        return int(
            self.share * max((use.num_activations for use in self.uses if isinstance(use, ProductUse)), default=0)
        )

    @property
    def most_cuts(self) -> Cuts:
        """Into single rows and columns."""
        products = [use.positions.shape for use in self.uses if isinstance(use, ProductUse)]
        others = [max(use.positions.shape, default=1) for use in self.uses if isinstance(use, ElementwiseUse)]
        return Cuts(max([1, *others, *(d_out for d_out, _ in products)]), max([1, *(d_in for _, d_in in products)]))

    def piece(self, cuts: Cuts) -> int:
        """Of the largest piece, with the random vectors that sketch it."""
        return sum(self._piece(cuts))

    def cuts(self, max_elements: int) -> Cuts:
        """The fewest pieces that are so small; or as many as there can be."""
        cuts, most = Cuts(), self.most_cuts
        while self.piece(cuts) > max_elements and cuts != most:
            along_outputs, along_inputs = self._piece(cuts)
            if cuts.inputs == most.inputs or (along_outputs >= along_inputs and cuts.outputs < most.outputs):
                cuts = replace(cuts, outputs=min(most.outputs, 2 * cuts.outputs))
            else:
                cuts = replace(cuts, inputs=min(most.inputs, 2 * cuts.inputs))
        return cuts

    def _piece(self, cuts: Cuts) -> tuple[int, int]:
        along_outputs, along_inputs = self._factors(cuts)
        widest = self.most_cuts
        vectors = 2 * self.num_inputs * self.num_outputs
        has_product = any(isinstance(use, ProductUse) for use in self.uses)
        along_outputs += has_product * vectors * -(-widest.outputs // cuts.outputs)
        along_inputs += has_product * vectors * -(-widest.inputs // cuts.inputs)
        return along_outputs, along_inputs

    def _factors(self, cuts: Cuts) -> tuple[int, int]:
        """Along the outputs of the matrices, and along what enters them."""
        along_outputs, along_inputs = 0.0, 0.0
        for use in self.uses:
            if isinstance(use, ElementwiseUse):
                along_outputs += self.num_inputs * self.num_outputs * -(-use.positions.numel() // cuts.outputs)
                continue
            d_out, d_in = use.positions.shape
            positions = self.share * use.num_activations / max(1, d_in)
            along_outputs += self.num_outputs * positions * -(-d_out // cuts.outputs)
            along_inputs += positions * -(-d_in // cuts.inputs)
        return int(along_outputs), int(along_inputs)


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
