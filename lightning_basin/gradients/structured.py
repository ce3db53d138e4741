"""Behavioral gradients of layers whose uses are known, from one backward pass for all outputs or one for each."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import LayerGradients
from lightning_basin.gradients.assemble import MeasuredUse, combine_uses, concatenate
from lightning_basin.gradients.attribution import measure_uses
from lightning_basin.gradients.check import AutogradCheck, zero_gradients
from lightning_basin.gradients.sizes import find_uses, layer_sizes, split_by_size
from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk, ProbeRuns
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import Use


def structured_gradients(
    runs: ProbeRuns, check: AutogradCheck, layers: Sequence[Layer], max_elements: int
) -> Iterator[dict[Layer, LayerGradients | None]]:
    """Yield layers that are held together with their gradients, ``None`` where uses are not known or too large."""
    network, num_inputs = runs.network, runs.probe.size
    sizes = layer_sizes(network, _first_trace(runs), num_inputs=num_inputs, num_outputs=check.num_rows // num_inputs)
    factored, group_elements = [], min(max_elements, GROUP_ELEMENTS)
    for layer in layers:
        method = sizes[layer.name].method(max_elements)
        if check.is_unused(layer):
            yield {layer: zero_gradients(layer, check.num_rows, check.device)}
        elif method == "factors":
            factored.append(layer)
        else:
            yield {layer: _rows_by_chunks(runs, layer, group_elements) if method == "chunks" else None}
    for group in split_by_size(factored, lambda layer: sizes[layer.name].held, group_elements):
        measured = _measured_uses(runs, group, group_elements)
        yield {
            layer: None if (uses := measured.pop(layer)) is None else _from_uses(network, layer, uses, check.num_rows)
            for layer in group
        }


def _from_uses(network: Network, layer: Layer, uses: Sequence[MeasuredUse], num_rows: int) -> LayerGradients:
    parameters = {name: network.named_parameters[name] for name in layer.parameters}
    return combine_uses(parameters, uses, num_rows=num_rows)


def _rows_by_chunks(runs: ProbeRuns, layer: Layer, max_elements: int) -> DenseGradients | None:
    """Dense rows, where they are smaller than their factors; ``None`` where inputs cannot be distinguished."""
    chunks = runs.each(_rows_of_chunk, layer, max_elements)
    rows = [chunk for chunk in chunks if chunk is not None]
    return DenseGradients(concatenate(rows)) if len(rows) == len(chunks) else None


def _rows_of_chunk(network: Network, chunk: Chunk, layer: Layer, max_elements: int) -> Tensor | None:
    uses = find_uses(network, chunk.trace)[layer]
    measured = _all_of(measure_uses(network, chunk.trace, uses, max_elements), uses)
    num_rows = network.rows(chunk.trace.outputs).numel()
    return None if measured is None else _from_uses(network, layer, measured, num_rows).rows()


@dataclass(frozen=True, eq=False)
class _UsesInChunk:
    """The uses of a layer on a chunk of inputs, without the chunk's graph.

    Attributes:
        factors: The output gradients and the input activations of each use, as in `MeasuredUse`.
        used_elements: What `_used_elements` returns; empty where all inputs are in one chunk.
        rows: The rows of a table that each use looks up; ``None`` for other uses.
    """

    factors: list[tuple[Tensor, Tensor | None]]
    used_elements: list[Hashable]
    rows: list[Tensor | None]


def _measured_uses(
    runs: ProbeRuns, layers: Sequence[Layer], max_elements: int
) -> dict[Layer, list[MeasuredUse] | None]:
    """The uses of some layers over all inputs; ``None`` for layers whose inputs cannot be distinguished."""
    chunks = runs.each(_uses_of_chunk, layers, runs.probe.size, max_elements)
    by_layer = find_uses(runs.network, _first_trace(runs))
    return {layer: _joined(list(by_layer[layer].values()), [chunk[layer] for chunk in chunks]) for layer in layers}


def _uses_of_chunk(
    network: Network, chunk: Chunk, layers: Sequence[Layer], num_inputs: int, max_elements: int
) -> dict[Layer, _UsesInChunk | None]:
    by_layer = find_uses(network, chunk.trace)
    # Several layers may share a use, which is measured once.
    uses_of_all = {index: use for layer in layers for index, use in by_layer[layer].items()}
    measured = measure_uses(network, chunk.trace, uses_of_all, max_elements)
    uses_in_chunk: dict[Layer, _UsesInChunk | None] = {}
    for layer in layers:
        uses = _all_of(measured, by_layer[layer])
        used_elements = _used_elements(by_layer[layer].values()) if chunk.probe.size < num_inputs else []
        uses_in_chunk[layer] = None
        if uses is not None:
            uses_in_chunk[layer] = _UsesInChunk(
                [(use.output_gradients, use.activations) for use in uses],
                used_elements,
                [use.use.elements.rows for use in uses],
            )
    return uses_in_chunk


def _joined(uses: Sequence[Use], chunks: Sequence[_UsesInChunk | None]) -> list[MeasuredUse] | None:
    """The same uses over all chunks; ``None`` where the chunks use other elements, or one could not be measured."""
    measured = [chunk for chunk in chunks if chunk is not None]
    used_elements = _used_elements(uses) if len(chunks) > 1 else []
    if len(measured) < len(chunks) or any(chunk.used_elements != used_elements for chunk in measured):
        return None
    joined = []
    for place, use in enumerate(uses):
        output_gradients = [chunk.factors[place][0] for chunk in measured]
        activations = [chunk.factors[place][1] for chunk in measured]
        rows = [looked_up for chunk in measured if (looked_up := chunk.rows[place]) is not None]
        if rows and len(chunks) > 1:
            use, activations = _of_all_rows(use, rows, activations)
        known = [tensor for tensor in activations if tensor is not None]
        joined.append(MeasuredUse(use, concatenate(output_gradients), concatenate(known) if known else None))
    return joined


def _of_all_rows(
    use: Use, rows: Sequence[Tensor], activations: Sequence[Tensor | None]
) -> tuple[Use, list[Tensor | None]]:
    """A look-up of the rows of a table that any chunk looks up, with its one-hot activations of each chunk."""
    every: Tensor = torch.unique(torch.cat(list(rows)))
    of_all: list[Tensor | None] = []
    for looked_up, one_hot in zip(rows, activations, strict=True):
        assert one_hot is not None, "a look-up is a product"
        wide = one_hot.new_zeros(*one_hot.shape[:2], len(every))
        of_all.append(wide.index_copy_(2, torch.searchsorted(every, looked_up), one_hot))
    elements = replace(use.elements, shape=(use.elements.shape[0], len(every)), rows=every)
    return replace(use, elements=elements), of_all


def _used_elements(uses: Iterable[Use]) -> list[Hashable]:
    """For each use which view of the parameter it takes; of a table the view whose rows it looks up."""
    return [
        (elements.shape if elements.rows is None else "rows", elements.sizes, elements.strides, elements.offset)
        for elements in (use.elements for use in uses)
    ]


def _first_trace(runs: ProbeRuns) -> Trace:
    """The trace of the first chunk, whose uses stand for those of all chunks."""
    return next(runs.chunks()).trace


def _all_of(measured: Mapping[int, MeasuredUse], uses: Mapping[int, Use]) -> list[MeasuredUse] | None:
    return [measured[index] for index in uses] if uses.keys() <= measured.keys() else None
