"""Behavioral gradients of each layer, by the cheapest method that is right.

The recorded operations say what the gradients of a layer are. Nothing is concluded from them alone: the gradients must
reproduce a random combination of all rows that plain autograd computes. Those of other layers are dense rows, from
automatic differentiation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.gradients.assemble import concatenate
from lightning_basin.gradients.check import AutogradCheck, MeasuredGradients, disagreement
from lightning_basin.gradients.sizes import split_by_size
from lightning_basin.gradients.structured import structured_gradients
from lightning_basin.limits import GROUP_ELEMENTS, MemoryBudgetError
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk, ProbeRuns
from lightning_basin.tensors import as_result, tensors_of

_UNKNOWN_USE = "layer {!r} is measured row by row: its parameters are used in other ways"


def layer_gradients(
    runs: ProbeRuns, check: AutogradCheck, *, layers: Sequence[Layer] | None = None, max_elements: int = GROUP_ELEMENTS
) -> Iterator[MeasuredGradients]:
    """Yield the behavioral gradients of each layer, checked against autograd.

    The factors or the dense rows of one layer may have ``max_elements``; smaller layers are measured together. A layer
    whose rows have more raises a MemoryBudgetError, one that no method computes as autograd does a RuntimeError.
    """
    layers = runs.network.layers if layers is None else layers
    waiting: list[tuple[Layer, str | None]] = []
    for group in structured_gradients(runs, check, layers, max_elements):
        known = {layer: gradients for layer, gradients in group.items() if gradients is not None}
        confirmed = check.confirm(known, structured=True, notes={})
        notes = {layer: _UNKNOWN_USE.format(escaped(layer.name)) if layer in known else None for layer in group}
        known.clear()  # Of a layer that has been looked at nothing shall be held.
        group.clear()
        for layer, note in notes.items():
            if layer in confirmed:
                yield confirmed.pop(layer)
                continue
            _check_dense_size(layer, check.num_rows, max_elements)
            waiting.append((layer, note))
    group_elements = min(max_elements, GROUP_ELEMENTS)
    for dense in split_by_size(waiting, lambda item: item[0].num_parameters * check.num_rows, group_elements):
        yield from dense_gradients(runs, dense, check)


def _check_dense_size(layer: Layer, num_rows: int, max_elements: int) -> None:
    if num_rows * layer.num_parameters > max_elements:
        raise MemoryBudgetError(
            f"layer {escaped(layer.name)!r} must be measured row by row, but its {num_rows} rows by "
            f"{layer.num_parameters} parameters do not fit into memory_budget: take a smaller probe, fewer outputs "
            f"(max_outputs of measure_basin), or a larger memory_budget"
        )


def dense_gradients(
    runs: ProbeRuns, group: Sequence[tuple[Layer, str | None]], check: AutogradCheck
) -> Iterator[MeasuredGradients]:
    """Yield the gradients of a group of layers as dense rows, by the first route that autograd confirms."""
    layers = [layer for layer, _ in group]
    pending = dict(group)
    for rows_of in _ROUTES:
        try:
            matrix = as_result(concatenate(runs.each(rows_of, layers)), runs.network.gradient_dtype)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # Some modules support neither vmap nor a batch of one. The next route asks for less.
            if rows_of is _ROUTES[-1]:
                raise
            continue
        columns = torch.split(matrix, [layer.num_parameters for layer in layers], dim=1)
        gradients = dict(zip(layers, map(DenseGradients, columns), strict=True))
        unconfirmed = {layer: gradients[layer] for layer in pending}
        for measured in check.confirm(unconfirmed, structured=False, notes=pending).values():
            del pending[measured.layer]
            yield measured
        if not pending:
            return
    raise RuntimeError(disagreement([layer.name for layer in pending]))


def _rows_at_once(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """Rows of all inputs of a chunk by one batched differentiation."""
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name].detach() for name in names}

    def behavior(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return network.functional(chunk.probe, tensors, values)

    return behavioral_gradients(behavior, parameters, tensors_of(chunk.probe.inputs))


def _rows_one_by_one(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """Rows by a forward pass for each input, and a backward pass for each of its outputs."""
    parameters = network.parameters(layers)
    inputs = (chunk.probe.select([index]) for index in range(chunk.probe.size))
    return torch.cat([gradient_rows(network.rows(network.outputs(single)), parameters) for single in inputs])


def _rows_of_batch(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """Rows by a backward pass through the whole chunk for each row: the slowest route, and always possible."""
    return gradient_rows(network.rows(chunk.trace.outputs), network.parameters(layers))


_ROUTES: Sequence[Callable[[Network, Chunk, Sequence[Layer]], Tensor]] = (
    _rows_at_once,
    _rows_one_by_one,
    _rows_of_batch,
)
