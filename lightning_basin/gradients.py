"""Behavioral gradients of each layer, by the cheapest way that is right.

The operations that use a layer's parameters say what its gradients are. Nothing is concluded from them alone: what
every way gives must reproduce a random combination of all rows that plain autograd computes, else the next is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor

from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.functional.sketch import DenseGradients, LayerGradients, StackedGradients
from lightning_basin.layers import AGREEMENT_RTOL, Layer, Network, Trace, TracedProbe
from lightning_basin.operations import Leaving, ProductUse, Source, Use
from lightning_basin.probe import tensors_of
from lightning_basin.structured import (
    InputAxis,
    MeasuredUse,
    activations_of_inputs,
    gradients_from_uses,
    possible_input_axes,
    signal_of_inputs,
)

_Item = TypeVar("_Item")

GROUP_ELEMENTS = 2**27
"""Float64 numbers in the gradients, or their factors, that are held at once: 1 GiB."""

_NUM_CHOICES = 3  # of inputs whose derivatives may tell where the inputs are; one does, unless a layer is dead


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer.

    Attributes:
        layer: Whose.
        gradients: Rows ordered by input, then output.
        structured: Whether they come from the operations that use the layer, and not from dense rows.
        note: What a reader should know about how they were obtained.
    """

    layer: Layer
    gradients: LayerGradients
    structured: bool
    note: str | None = None


def layer_gradients(
    traced: TracedProbe, *, generator: Generator, max_elements: int = GROUP_ELEMENTS
) -> Iterator[MeasuredGradients]:
    """Behavioral gradients of each layer in turn, checked against autograd.

    Args:
        traced: The network on the probe.
        generator: On the CPU; for the check's random combination of all rows.
        max_elements: Numbers that may be held at once, in factors or in dense rows.

    Raises:
        RuntimeError: If no way of computing a layer's gradients agrees with autograd.
    """
    check = _AutogradCheck(traced, generator)
    waiting: list[tuple[Layer, str | None]] = []
    for layer, gradients in _structured_gradients(traced, check, max_elements):
        if gradients is None:
            waiting.append((layer, None))
        elif check.passes(layer, gradients):
            yield MeasuredGradients(layer, gradients, structured=True)
        else:
            waiting.append(
                (layer, f"layer {layer.name!r} is measured row by row: its parameters are used in other ways")
            )
    for group in _groups(waiting, lambda item: item[0].num_parameters * check.num_rows, max_elements):
        yield from _dense_gradients(traced, group, check)


class _AutogradCheck:
    """One random combination of all rows of every layer's gradients, which each way must reproduce."""

    def __init__(self, traced: TracedProbe, generator: Generator) -> None:
        network = traced.network
        parameters = network.parameters()
        combined: list[Tensor | None] = [None] * len(parameters)
        weights = []
        for trace in traced:
            outputs = network.rows(trace.outputs)
            drawn = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
            weights.append(drawn.flatten())
            if outputs.requires_grad:
                found = torch.autograd.grad(outputs, parameters, drawn, retain_graph=True, allow_unused=True)
                combined = [_sum(pair) for pair in zip(combined, found, strict=True)]
        self._weights = torch.cat(weights)
        names = [name for layer in network.layers for name in layer.parameters]
        self._expected = dict(zip(names, combined, strict=True))
        self._shapes = dict(zip(names, parameters, strict=True))
        # What is below the rounding of the largest entry is nothing: a bias before a softmax has such gradients.
        largest = [float(gradient.abs().max()) for gradient in combined if gradient is not None and gradient.numel()]
        self._floor = 1e-14 * max(largest, default=0.0)

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self._weights.numel()

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._expected[name] is None for name in layer.parameters)

    def passes(self, layer: Layer, gradients: LayerGradients) -> bool:
        """Whether gradients have the combination that autograd finds."""
        found = gradients.combination(self._weights)
        expected = []
        scales = []
        for name in layer.parameters:
            wanted, size = self._expected[name], self._shapes[name].numel()
            wanted = found.new_zeros(size) if wanted is None else wanted.flatten()
            expected.append(wanted)
            scales.append((AGREEMENT_RTOL * wanted.abs().max()).expand(size) if size else wanted)
        difference = (found - torch.cat(expected)).abs()
        return bool((difference <= torch.cat(scales) + self._floor).all())


def _sum(pair: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    left, right = pair
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _structured_gradients(
    traced: TracedProbe, check: _AutogradCheck, max_elements: int
) -> Iterator[tuple[Layer, LayerGradients | None]]:
    """Gradients of layers whose uses are known, from one backward pass for each output; ``None`` for other layers."""
    network, num_inputs = traced.network, traced.probe.size
    first = next(iter(traced))
    uses = _uses_by_layer(network, first)
    num_outputs = check.num_rows // num_inputs
    planned = []
    for layer in network.layers:
        if check.is_unused(layer):
            empty = StackedGradients((), (), num_rows=check.num_rows, num_columns=layer.num_parameters)
            yield layer, empty
        elif not uses[layer]:
            yield layer, None
        else:
            size = sum(_num_elements(use, num_outputs) for use in uses[layer].values())
            planned.append((layer, size * num_inputs // first.outputs.shape[0]))
    for group in _groups(planned, lambda item: item[1], max_elements):
        layers = [layer for layer, _ in group]
        measured = _measured_uses(traced, layers)
        for layer in layers:
            found = measured.pop(layer)
            if found is None:
                yield layer, None
                continue
            parameters = {name: network.named_parameters[name] for name in layer.parameters}
            yield layer, gradients_from_uses(parameters, found, num_rows=check.num_rows)


def layer_elements(network: Network, trace: Trace, *, num_inputs: int, num_outputs: int) -> dict[str, tuple[bool, int]]:
    """For each layer whether its gradients stay factored, and how many numbers are held of them.

    Args:
        network: That was traced.
        trace: Of some inputs.
        num_inputs: That will be measured.
        num_outputs: Per input.
    """
    traced_inputs = trace.outputs.shape[0]
    found = {}
    for layer, uses in _uses_by_layer(network, trace).items():
        factors = sum(_num_elements(use, num_outputs) for use in uses.values()) * num_inputs // traced_inputs
        dense = layer.num_parameters * num_inputs * num_outputs
        found[layer.name] = (True, factors) if uses else (False, dense)
    return found


def _num_elements(use: Use, num_outputs: int) -> int:
    """Numbers that are held of a use: what enters, and the derivatives of each output."""
    if isinstance(use, ProductUse):
        return use.num_activations + num_outputs * use.leaving.shape.numel()
    return num_outputs * use.positions.numel()


def _uses_by_layer(network: Network, trace: Trace) -> dict[Layer, dict[int, Use]]:
    """Which of the recorded uses each layer's gradients are made of, by their position in the record."""
    owners = {name: layer for layer in network.layers for name in layer.parameters}
    found: dict[Layer, dict[int, Use]] = {layer: {} for layer in network.layers}
    reached: dict[int, set[Layer]] = {}
    for index, use in enumerate(trace.operations.uses):
        if use.leaving.edge is None:
            continue
        if id(use.source) not in reached:
            reached[id(use.source)] = _layers_behind(network, use.source, owners)
        for layer in reached[id(use.source)]:
            found[layer][index] = use
    return found


def _layers_behind(network: Network, source: Source, owners: Mapping[str, Layer]) -> set[Layer]:
    if source.name is not None:
        return {owners[source.name]}
    names = list(owners)
    parameters = [network.named_parameters[name] for name in names]
    gradients = torch.autograd.grad(source.tensor.sum(), parameters, retain_graph=True, allow_unused=True)
    return {owners[name] for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _measured_uses(traced: TracedProbe, layers: Sequence[Layer]) -> dict[Layer, list[MeasuredUse] | None]:
    """What entered the operations of some layers and the derivatives by what left them, over all chunks of inputs."""
    chunks: list[dict[Layer, list[MeasuredUse] | None]] = []
    for trace in traced:
        by_layer = _uses_by_layer(traced.network, trace)
        uses = {index: use for layer in layers for index, use in by_layer[layer].items()}
        measured = _measured_in_chunk(traced.network, trace, uses)
        chunks.append({layer: _all_of(measured, by_layer[layer]) for layer in layers})
    return {layer: _concatenated([chunk[layer] for chunk in chunks]) for layer in layers}


def _all_of(measured: Mapping[int, MeasuredUse], wanted: Mapping[int, Use]) -> list[MeasuredUse] | None:
    return [measured[index] for index in wanted] if set(wanted) <= set(measured) else None


def _measured_in_chunk(network: Network, trace: Trace, uses: Mapping[int, Use]) -> dict[int, MeasuredUse]:
    """The uses of which it is clear what belongs to which input."""
    outputs = network.rows(trace.outputs)
    num_inputs = outputs.shape[0]
    edges = list({id(use.leaving): use.leaving for use in uses.values()}.values())
    layouts = _input_axes(outputs, uses, edges)
    signals: dict[int, list[Tensor]] = {index: [] for index in layouts}
    for j in range(outputs.shape[1]):
        by_edge = _derivatives(outputs[:, j].sum(), edges)
        for index, layout in layouts.items():
            use = uses[index]
            signals[index].append(signal_of_inputs(use, by_edge[id(use.leaving)], layout, num_inputs))
    measured = {}
    for index, layout in layouts.items():
        use = uses[index]
        entering = activations_of_inputs(use, layout, num_inputs) if isinstance(use, ProductUse) else None
        measured[index] = MeasuredUse(use, torch.stack(signals.pop(index), dim=1), entering)
    return measured


def _input_axes(outputs: Tensor, uses: Mapping[int, Use], edges: Sequence[Leaving]) -> dict[int, InputAxis]:
    """Where the inputs are in what left each operation, seen from the outputs of some of them."""
    generator = Generator().manual_seed(0)
    num_inputs = outputs.shape[0]
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    layouts: dict[int, list[InputAxis]] = {}
    for chosen in _choices(num_inputs, generator):
        chosen = chosen.to(outputs.device)
        by_edge = _derivatives((outputs * weights)[chosen].sum(), edges)
        for index, use in uses.items():
            possible = possible_input_axes(use, by_edge[id(use.leaving)], chosen)
            layouts[index] = [layout for layout in layouts.get(index, possible) if layout in possible]
        if all(len(possible) <= 1 for possible in layouts.values()):
            break
    return {index: possible[0] for index, possible in layouts.items() if possible}


def _choices(num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """Some of the inputs, then all others, and so on."""
    for _ in range(_NUM_CHOICES):
        chosen = torch.randint(0, 2, (num_inputs,), generator=generator).bool()
        chosen[0], chosen[-1] = True, num_inputs == 1
        yield chosen
        if num_inputs > 1:
            yield ~chosen


def _derivatives(output: Tensor, places: Sequence[Leaving]) -> dict[int, Tensor]:
    """Derivatives of a number by what left some operations, by the identity of the place."""
    edges = {id(leaving): leaving.edge for leaving in places if leaving.edge is not None}
    shapes = {id(leaving): leaving.shape for leaving in places}
    found = torch.autograd.grad(output, list(edges.values()), retain_graph=True, allow_unused=True)
    return {
        place: output.new_zeros(shapes[place]) if gradient is None else gradient
        for place, gradient in zip(edges, found, strict=True)
    }


def _concatenated(chunks: Sequence[list[MeasuredUse] | None]) -> list[MeasuredUse] | None:
    """The same uses over all chunks of inputs; ``None`` where these differ, or some could not be measured."""
    columns = []
    for chunk in chunks:
        if chunk is None or len(chunk) != len(chunks[0] or []):
            return None
        columns.append(chunk)
    if len(columns) == 1:
        return columns[0]
    joined = []
    for parts in zip(*columns, strict=True):
        first = parts[0]
        if any(not torch.equal(part.use.positions, first.use.positions) for part in parts):
            return None
        entering = [part.activations for part in parts if part.activations is not None]
        signals = torch.cat([part.signals for part in parts])
        joined.append(MeasuredUse(first.use, signals, torch.cat(entering) if entering else None))
    return joined


def _dense_gradients(
    traced: TracedProbe, group: Sequence[tuple[Layer, str | None]], check: _AutogradCheck
) -> Iterator[MeasuredGradients]:
    layers = [layer for layer, _ in group]
    pending = dict(group)
    for rows_of in _ROUTES:
        try:
            matrix = rows_of(traced, layers)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # vmap, or a batch of one, is beyond some modules; the next way asks for less.
            if rows_of is _ROUTES[-1]:
                raise
            continue
        blocks = torch.split(matrix, [layer.num_parameters for layer in layers], dim=1)
        for layer, gradients in zip(layers, map(DenseGradients, blocks), strict=True):
            if layer in pending and check.passes(layer, gradients):
                yield MeasuredGradients(layer, gradients, structured=False, note=pending.pop(layer))
        if not pending:
            return
    names = [layer.name for layer in pending]
    raise RuntimeError(f"the gradients of layers {names} cannot be computed: two evaluations of them disagree")


def _rows_at_once(traced: TracedProbe, layers: Sequence[Layer]) -> Tensor:
    """All inputs of a chunk in one batched differentiation."""
    network, probe = traced.network, traced.probe
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name].detach() for name in names}

    def behavior(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return network.functional(probe, tensors, values)

    return behavioral_gradients(behavior, parameters, tensors_of(probe.inputs))


def _rows_one_by_one(traced: TracedProbe, layers: Sequence[Layer]) -> Tensor:
    """A forward pass for each input, a backward pass for each output."""
    network, probe = traced.network, traced.probe
    parameters = network.parameters(layers)
    return torch.cat(
        [gradient_rows(network.rows(network.outputs(probe.select([index]))), parameters) for index in range(probe.size)]
    )


def _rows_of_batch(traced: TracedProbe, layers: Sequence[Layer]) -> Tensor:
    """A backward pass through the whole batch for each row: always possible, and the slowest."""
    network = traced.network
    return torch.cat([gradient_rows(network.rows(trace.outputs), network.parameters(layers)) for trace in traced])


_ROUTES: Sequence[Callable[[TracedProbe, Sequence[Layer]], Tensor]] = (_rows_at_once, _rows_one_by_one, _rows_of_batch)


def _groups(items: Sequence[_Item], size_of: Callable[[_Item], int], max_size: int) -> Iterator[list[_Item]]:
    """Neighbours whose sizes fit into memory together; one that is too large alone."""
    group: list[_Item] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > max_size:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group
