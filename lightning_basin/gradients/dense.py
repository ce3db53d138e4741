"""Behavioral gradients as dense rows, by automatic differentiation: slow, and possible for every layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import LayerGradients, StackedGradients
from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.gradients.assemble import concatenated
from lightning_basin.gradients.check import AutogradCheck, MeasuredGradients, disagreement
from lightning_basin.gradients.pieces import PiecewiseGradients
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk, TracedProbe
from lightning_basin.tensors import tensors_of


def dense_gradients(
    traced: TracedProbe, group: Sequence[tuple[Layer, str | None]], check: AutogradCheck
) -> Iterator[MeasuredGradients]:
    """Yield the gradients of a group of layers as dense rows, by the first route that autograd confirms."""
    layers = [layer for layer, _ in group]
    pending = dict(group)
    for rows_of in _ROUTES:
        try:
            matrix = concatenated(traced.each(rows_of, layers)).to(traced.network.gradient_dtype)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # vmap, or a batch of one, is beyond some modules; the next way asks for less.
            if rows_of is _ROUTES[-1]:
                raise
            continue
        blocks = torch.split(matrix, [layer.num_parameters for layer in layers], dim=1)
        for layer, gradients in zip(layers, map(DenseGradients, blocks), strict=True):
            if layer not in pending:
                continue
            measured = check.measured(layer, gradients, structured=False, note=pending[layer])
            if measured is not None:
                del pending[layer]
                yield measured
        if not pending:
            return
    raise RuntimeError(disagreement([layer.name for layer in pending]))


def _rows_at_once(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """All inputs of a chunk in one batched differentiation."""
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name].detach() for name in names}

    def behavior(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return network.functional(chunk.probe, tensors, values)

    return behavioral_gradients(behavior, parameters, tensors_of(chunk.probe.inputs))


def _outputs_one_by_one(network: Network, chunk: Chunk) -> Iterator[Tensor]:
    """A forward pass for each input."""
    for index in range(chunk.probe.size):
        yield network.rows(network.outputs(chunk.probe.select([index])))


def _outputs_of_batch(network: Network, chunk: Chunk) -> Iterator[Tensor]:
    """All inputs at once: always possible, and the slowest to differentiate."""
    yield network.rows(chunk.trace.outputs)


def _rows_one_by_one(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """A backward pass for each output of each input."""
    parameters = network.parameters(layers)
    return torch.cat([gradient_rows(outputs, parameters) for outputs in _outputs_one_by_one(network, chunk)])


def _rows_of_batch(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """A backward pass through the whole batch for each row."""
    parameters = network.parameters(layers)
    return torch.cat([gradient_rows(outputs, parameters) for outputs in _outputs_of_batch(network, chunk)])


_ROUTES: Sequence[Callable[[Network, Chunk, Sequence[Layer]], Tensor]] = (
    _rows_at_once,
    _rows_one_by_one,
    _rows_of_batch,
)


def dense_in_pieces(
    traced: TracedProbe, layer: Layer, note: str | None, check: AutogradCheck, max_elements: int
) -> MeasuredGradients:
    """Some columns at a time, where not all of them can be held."""
    width = max(1, max_elements // (2 * check.num_rows))
    for outputs_of in (_outputs_one_by_one, _outputs_of_batch):
        pieces = partial(_columns_by_row, traced, layer, outputs_of, width)
        gradients = PiecewiseGradients(
            (), (), num_rows=check.num_rows, num_columns=layer.num_parameters, device=check.device, pieces=pieces
        )
        try:
            measured = check.measured(layer, gradients, structured=False, note=note)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # As above: a batch of one.
            if outputs_of is _outputs_of_batch:
                raise
            continue
        if measured is not None:
            return measured
    raise RuntimeError(disagreement([layer.name]))


def _columns_by_row(
    traced: TracedProbe, layer: Layer, outputs_of: Callable[[Network, Chunk], Iterator[Tensor]], width: int
) -> Iterator[LayerGradients]:
    positions = torch.arange(layer.num_parameters, device=traced.network.parameters([layer])[0].device)
    for columns in torch.split(positions, width):
        rows = concatenated(traced.each(_some_columns, layer, outputs_of, columns))
        yield StackedGradients(
            (DenseGradients(rows.to(traced.network.gradient_dtype)),),
            (columns,),
            num_rows=len(rows),
            num_columns=layer.num_parameters,
            device=rows.device,
        )


def _some_columns(
    network: Network,
    chunk: Chunk,
    layer: Layer,
    outputs_of: Callable[[Network, Chunk], Iterator[Tensor]],
    columns: Tensor,
) -> Tensor:
    parameters = network.parameters([layer])
    rows = [
        gradient_rows(output.reshape(1), parameters)[0, columns]
        for outputs in outputs_of(network, chunk)
        for output in outputs.flatten()
    ]
    return torch.stack(rows)
