"""Behavioral gradients of layers whose uses are known, from one backward pass for each output."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import LayerGradients
from lightning_basin.gradients.assemble import MeasuredUse, concatenated, gradients_from_uses
from lightning_basin.gradients.attribution import _input_axes, measured_in_chunk
from lightning_basin.gradients.check import AutogradCheck, no_gradients
from lightning_basin.gradients.pieces import Cuts, PiecewiseGradients
from lightning_basin.gradients.sizes import groups_of, layer_sizes, uses_by_layer
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk, TracedProbe
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import Use


def structured_gradients(
    traced: TracedProbe, check: AutogradCheck, layers: Sequence[Layer], max_elements: int
) -> Iterator[tuple[Layer, LayerGradients | None]]:
    """Gradients of layers whose uses are known, from one backward pass for each output; ``None`` for other layers."""
    network, num_inputs = traced.network, traced.probe.size
    sizes = layer_sizes(network, first_trace(traced), num_inputs=num_inputs, num_outputs=check.num_rows // num_inputs)
    planned = []
    for layer in layers:
        size = sizes[layer.name]
        method = size.method(max_elements)
        if check.is_unused(layer):
            yield layer, no_gradients(layer, check.num_rows, check.device)
        elif method == "factors":
            planned.append((layer, size.whole))
        elif method == "chunks":
            yield layer, _chunk_by_chunk(traced, layer)
        elif method == "pieces":
            yield layer, _in_pieces(traced, layer, size.uses.cuts(max_elements), check)
        else:
            yield layer, None
    for group in groups_of(planned, lambda item: item[1], max_elements):
        measured = _measured_uses(traced, {layer: Cuts() for layer, _ in group}, 0)
        for layer, _ in group:
            found = measured.pop(layer)
            yield layer, None if found is None else _from_uses(network, layer, found, check.num_rows)


def _from_uses(network: Network, layer: Layer, found: Sequence[MeasuredUse], num_rows: int) -> LayerGradients:
    parameters = {name: network.named_parameters[name] for name in layer.parameters}
    return gradients_from_uses(parameters, found, num_rows=num_rows)


def _chunk_by_chunk(traced: TracedProbe, layer: Layer) -> DenseGradients | None:
    """Dense rows, where these are smaller than their factors; ``None`` where inputs cannot be told apart."""
    chunks = traced.each(_rows_from_uses, layer)
    rows = [chunk for chunk in chunks if chunk is not None]
    return DenseGradients(concatenated(rows)) if len(rows) == len(chunks) else None


def _rows_from_uses(network: Network, chunk: Chunk, layer: Layer) -> Tensor | None:
    uses = uses_by_layer(network, chunk.trace)[layer]
    found = _all_of(measured_in_chunk(network, chunk.trace, uses), uses)
    num_rows = network.rows(chunk.trace.outputs).numel()
    return None if found is None else _from_uses(network, layer, found, num_rows).rows()


def _in_pieces(traced: TracedProbe, layer: Layer, cuts: Cuts, check: AutogradCheck) -> LayerGradients | None:
    """Gradients whose factors cannot all be held; ``None`` where what chunks of inputs use does not fit together."""
    first = uses_by_layer(traced.network, first_trace(traced))[layer]
    if any(entries != used_entries(first.values()) for entries in traced.each(_entries_told_apart, layer)):
        return None
    numbers = [number for number in range(cuts.outputs * cuts.inputs) if cuts.piece(first, number)]
    del first  # And the graph that it holds.

    def pieces() -> Iterator[LayerGradients]:
        for number in numbers:
            found = _measured_uses(traced, {layer: cuts}, number)[layer]
            if found is None:
                raise RuntimeError(f"two evaluations of layer {escaped(layer.name)!r} use its parameters differently")
            yield _from_uses(traced.network, layer, found, check.num_rows)

    return PiecewiseGradients(
        (), (), num_rows=check.num_rows, num_columns=layer.num_parameters, device=check.device, pieces=pieces
    )


def _entries_told_apart(network: Network, chunk: Chunk, layer: Layer) -> list[bytes] | None:
    """The entries that a layer uses, where it is clear what belongs to which input."""
    uses = uses_by_layer(network, chunk.trace)[layer]
    is_clear = set(_input_axes(network.rows(chunk.trace.outputs), uses)) == set(uses)
    return used_entries(uses.values()) if is_clear else None


@dataclass(frozen=True, eq=False)
class _Piece:
    """What was measured of the uses of one layer on some inputs: of `MeasuredUse` what can be sent.

    Attributes:
        measured: Signals and activations of each use.
        entries: See `used_entries`; of what is not split over chunks nothing.
    """

    measured: list[tuple[Tensor, Tensor | None]]
    entries: list[bytes]


def _measured_uses(
    traced: TracedProbe, layers: Mapping[Layer, Cuts], number: int
) -> dict[Layer, list[MeasuredUse] | None]:
    """What entered the operations of some layers and the derivatives by what left them, over all chunks of inputs.

    Args:
        traced: The network on the probe.
        layers: How each is cut.
        number: Of the piece to measure.
    """
    chunks = traced.each(_measured_pieces, layers, number, traced.probe.size)
    by_layer = uses_by_layer(traced.network, first_trace(traced))
    return {
        layer: _joined(list(cuts.piece(by_layer[layer], number).values()), [chunk[layer] for chunk in chunks])
        for layer, cuts in layers.items()
    }


def _measured_pieces(
    network: Network, chunk: Chunk, layers: Mapping[Layer, Cuts], number: int, num_inputs: int
) -> dict[Layer, _Piece | None]:
    by_layer = uses_by_layer(network, chunk.trace)
    pieces = {layer: cuts.piece(by_layer[layer], number) for layer, cuts in layers.items()}
    # A tensor that was computed from parameters of several layers is used by each of them.
    uses = {index: use for piece in pieces.values() for index, use in piece.items()}
    measured = measured_in_chunk(network, chunk.trace, uses)
    found: dict[Layer, _Piece | None] = {}
    for layer, piece in pieces.items():
        parts = _all_of(measured, piece)
        entries = used_entries(piece.values()) if chunk.probe.size < num_inputs else []
        found[layer] = None
        if parts is not None:
            found[layer] = _Piece([(part.signals, part.activations) for part in parts], entries)
    return found


def _joined(uses: Sequence[Use], pieces: Sequence[_Piece | None]) -> list[MeasuredUse] | None:
    """The same uses over all chunks of inputs; ``None`` where these differ, or some could not be measured."""
    found = [piece for piece in pieces if piece is not None]
    is_split = len(pieces) > 1
    if len(found) < len(pieces) or (is_split and any(piece.entries != used_entries(uses) for piece in found)):
        return None
    joined = []
    for use, parts in zip(uses, zip(*(piece.measured for piece in found), strict=True), strict=True):
        signals = [signals for signals, _ in parts]
        entering = [activations for _, activations in parts if activations is not None]
        joined.append(MeasuredUse(use, concatenated(signals), concatenated(entering) if entering else None))
    return joined


def used_entries(uses: Iterable[Use]) -> list[bytes]:
    """A fingerprint of which entries of a parameter each use takes: the same where two evaluations are alike."""
    positions = [use.positions.cpu().contiguous() for use in uses]
    return [sha256(f"{tuple(entries.shape)}".encode() + entries.numpy().tobytes()).digest() for entries in positions]


def first_trace(traced: TracedProbe) -> Trace:
    """Of the first inputs, from which the uses of all can be told."""
    return next(traced.chunks()).trace


def _all_of(measured: Mapping[int, MeasuredUse], wanted: Mapping[int, Use]) -> list[MeasuredUse] | None:
    return [measured[index] for index in wanted] if set(wanted) <= set(measured) else None
