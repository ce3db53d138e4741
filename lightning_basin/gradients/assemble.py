"""Gradients of a layer from the operations that use its parameters.

No gradient with respect to a parameter is taken. Whether the operations are all that use it is for the caller to check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.operations.uses import ElementwiseUse, ProductUse, Source, Use

_Block = tuple[Tensor, KhatriRaoGradients | DenseGradients]  # columns, and the gradients by them


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
    slots = slots_of(used)
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


def slots_of(used: Sequence[MeasuredUse]) -> list[_Slot]:
    """Join uses of the same entries of one source."""
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
    if are_disjoint([columns for columns, _ in blocks], num_columns):
        return StackedGradients(
            parts=tuple(part for _, part in blocks),
            columns=tuple(columns for columns, _ in blocks),
            num_rows=num_rows,
            num_columns=num_columns,
            device=device,
        )
    return DenseGradients(_summed(blocks, num_rows, num_columns))


def are_disjoint(columns: Sequence[Tensor], num_columns: int) -> bool:
    """Whether no column stands in two of the sets."""
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
