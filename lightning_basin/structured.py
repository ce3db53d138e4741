"""Gradients of layers from the operations that use their parameters, and the derivatives by what leaves these.

No gradient with respect to a parameter is taken. Whether the operations are all that use it is for the caller to check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.functional.sketch import DenseGradients, KhatriRaoGradients, LayerGradients, StackedGradients
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
        if self.adjacent:
            return moved.reshape(num_inputs, -1, *moved.shape[1:])
        return moved.reshape(-1, num_inputs, *moved.shape[1:]).transpose(0, 1)


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


def signal_of_inputs(use: Use, signal: Tensor, layout: InputAxis, num_inputs: int) -> Tensor:
    """Derivatives input by input: ``(k, t, d_out)`` for a product, ``(k, n)`` by the n used entries otherwise."""
    if isinstance(use, ProductUse):
        found = layout.split(use.signals(signal), num_inputs)
        return found.reshape(num_inputs, -1, found.shape[-1])
    contributions = layout.split(use.contributions(signal), num_inputs)
    used = use.positions.movedim(layout.axis, 0)  # Of length 1 there.
    repeated = [axis for axis in range(1, contributions.ndim) if used.shape[axis - 1] == 1]
    return contributions.sum(repeated).reshape(num_inputs, -1) if repeated else contributions.reshape(num_inputs, -1)


def activations_of_inputs(use: ProductUse, layout: InputAxis, num_inputs: int) -> Tensor:
    """What is multiplied, input by input, shape ``(k, t, d_in)``."""
    found = layout.split(use.activations(), num_inputs)
    return found.reshape(num_inputs, -1, found.shape[-1])


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
            return DenseGradients(torch.stack(signals).sum(0).flatten(0, 1))
        activations = torch.cat([use.activations for use in self.uses if use.activations is not None], dim=1)
        if self.bias is not None:
            activations = torch.cat([activations, activations.new_ones(*activations.shape[:2], 1)], dim=2)
        return KhatriRaoGradients(activations, torch.cat(signals, dim=2))

    def columns(self, starts: Mapping[int, int]) -> Tensor:
        """Where the entries stand among the parameters of the layer."""
        columns = self.positions + starts[id(self.source)]
        if self.bias is not None:
            shifted = self.bias.positions.reshape(-1, 1) + starts[id(self.bias.source)]
            columns = torch.cat([columns, shifted], dim=1)
        return columns.flatten()


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
    return _side_by_side(blocks, num_rows, sum(sizes))


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
    products = vector_jacobian_products(source.tensor, values, rows)
    return [(torch.arange(products.shape[1], device=products.device), DenseGradients(products))]


def _side_by_side(blocks: Sequence[_Block], num_rows: int, num_columns: int) -> LayerGradients:
    """Blocks of different columns stay apart; where they overlap they are added up."""
    counted = sum(columns.numel() for columns, _ in blocks)
    if counted <= num_columns:
        columns = torch.cat([columns for columns, _ in blocks]) if blocks else torch.zeros(0, dtype=torch.int64)
        if len(torch.unique(columns)) == counted:
            return StackedGradients(
                parts=tuple(part for _, part in blocks),
                columns=tuple(columns for columns, _ in blocks),
                num_rows=num_rows,
                num_columns=num_columns,
            )
    return DenseGradients(_summed(blocks, num_rows, num_columns))


def _summed(blocks: Sequence[_Block], num_rows: int, num_columns: int) -> Tensor:
    rows = torch.zeros(num_rows, num_columns, dtype=torch.float64, device=blocks[0][0].device)
    for columns, part in blocks:
        rows.index_add_(1, columns, part.rows())
    return rows
