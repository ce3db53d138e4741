"""Behavioral gradients of each layer, by the cheapest way that is right.

Nothing is concluded from a layer's type alone: what every way gives must reproduce a random combination of all rows
that plain autograd computes, else the next way is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.functional.sketch import DenseGradients, LayerGradients
from lightning_basin.layers import AGREEMENT_RTOL, Layer, Network, Trace
from lightning_basin.probe import Probe, tensors_of
from lightning_basin.structured import STRUCTURED, structured_gradients

_GROUP_ELEMENTS = 2**27  # float64 numbers in the dense gradients held at once: 1 GiB
_LAYER_ELEMENTS = 2**30  # and in those of one layer: 8 GiB


MeasuredLayer = tuple[Layer, str | None]  # with a note on why it is not measured as its type suggests


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer.

    Attributes:
        layer: Whose.
        gradients: Rows ordered by input, then output.
        structured: Whether they come from what enters and leaves the layer, and not from dense rows.
        note: What a reader should know about how they were obtained.
    """

    layer: Layer
    gradients: LayerGradients
    structured: bool
    note: str | None = None


def layer_gradients(
    network: Network, probe: Probe, trace: Trace, *, generator: Generator
) -> Iterator[MeasuredGradients]:
    """Behavioral gradients of each layer in turn, checked against autograd.

    Args:
        network: To differentiate.
        probe: The inputs.
        trace: Of the probe.
        generator: On the CPU; for the check's random combination of all rows.

    Raises:
        RuntimeError: If no way of computing a layer's gradients agrees with autograd.
        ValueError: If the gradients of a layer do not fit into memory.
    """
    outputs = network.rows(trace.outputs)
    check = _AutogradCheck(network, outputs, generator)
    waiting: list[MeasuredLayer] = []
    for layer, gradients in _structured_gradients(network, probe, trace):
        if gradients is None:
            waiting.append((layer, None))
        elif check.passes(layer, gradients):
            yield MeasuredGradients(layer, gradients, structured=True)
        else:
            kind = type(network.module.get_submodule(layer.name)).__name__
            note = f"layer {layer.name!r} is measured row by row: it does not act as a plain {kind}"
            waiting.append((layer, note))
    for group in _groups(waiting, outputs.numel()):
        yield from _dense_gradients(network, probe, outputs, group, check)


class _AutogradCheck:
    """One random combination of all rows of every layer's gradients, which each way must reproduce."""

    def __init__(self, network: Network, outputs: Tensor, generator: Generator) -> None:
        weights = torch.randn(outputs.numel(), generator=generator, dtype=torch.float64)
        self._weights = weights.to(outputs.device)
        parameters = network.parameters()
        if outputs.requires_grad:
            flat = outputs.flatten()
            combined = torch.autograd.grad(flat, parameters, self._weights, retain_graph=True, materialize_grads=True)
        else:
            combined = tuple(torch.zeros_like(parameter) for parameter in parameters)
        names = [name for layer in network.layers for name in layer.parameters]
        self._expected = dict(zip(names, combined, strict=True))
        # What is below the rounding of the largest entry is nothing: a bias before a softmax has such gradients.
        self._floor = 1e-14 * max(float(gradient.abs().max()) for gradient in combined if gradient.numel())

    def passes(self, layer: Layer, gradients: LayerGradients) -> bool:
        found = gradients.combination(self._weights)
        wanted = [self._expected[name].flatten() for name in layer.parameters]
        for part in wanted:
            difference, found = (found[: part.numel()] - part).abs(), found[part.numel() :]
            if bool((difference > AGREEMENT_RTOL * part.abs().max() + self._floor).any()):
                return False
        return True


def _structured_gradients(
    network: Network, probe: Probe, trace: Trace
) -> Iterator[tuple[Layer, LayerGradients | None]]:
    """Gradients of layers of a known type, from one backward pass for each output; ``None`` for other layers."""
    outputs = network.rows(trace.outputs)
    group: list[Layer] = []
    size = 0
    for layer in network.layers:
        if not outputs.requires_grad or not _is_structured(network, layer, trace, probe.size):
            yield layer, None
            continue
        elements = outputs.shape[1] * sum(tensor.numel() for tensor in trace.leaving[layer.name])
        if group and size + elements > _GROUP_ELEMENTS:
            yield from _differentiated(network, probe, trace, group)
            group, size = [], 0
        group.append(layer)
        size += elements
    yield from _differentiated(network, probe, trace, group)


def _is_structured(network: Network, layer: Layer, trace: Trace, num_inputs: int) -> bool:
    part = network.module.get_submodule(layer.name)
    entering, leaving = trace.entering.get(layer.name, []), trace.leaving.get(layer.name, [])
    return (
        isinstance(part, STRUCTURED)
        and {name.rpartition(".")[2] for name in layer.parameters} <= {"weight", "bias"}
        and len(leaving) > 0
        and len(entering) == len(leaving) * (2 if isinstance(part, nn.Bilinear) else 1)
        and all(tensor.ndim > 0 and tensor.shape[0] % num_inputs == 0 for tensor in (*entering, *leaving))
        and all(tensor.requires_grad for tensor in leaving)
    )


def _differentiated(
    network: Network, probe: Probe, trace: Trace, layers: Sequence[Layer]
) -> Iterator[tuple[Layer, LayerGradients | None]]:
    outputs = network.rows(trace.outputs)
    left = [tensor for layer in layers for tensor in trace.leaving[layer.name]]
    if not left:
        return
    passes = [
        torch.autograd.grad(outputs[:, j].sum(), left, retain_graph=True, materialize_grads=True)
        for j in range(outputs.shape[1])
    ]
    signals = iter([torch.stack([column[i] for column in passes]) for i in range(len(left))])
    del passes
    for layer in layers:
        entered = [tensor.detach() for tensor in trace.entering[layer.name]]
        per_call = len(entered) // len(trace.leaving[layer.name])
        calls = [(entered[i : i + per_call], next(signals)) for i in range(0, len(entered), per_call)]
        owned = frozenset(name.rpartition(".")[2] for name in layer.parameters)
        try:
            yield layer, structured_gradients(network.module.get_submodule(layer.name), owned, calls, probe.size)
        except (RuntimeError, ValueError):  # What enters is not laid out as the type has it.
            yield layer, None


def _dense_gradients(
    network: Network, probe: Probe, outputs: Tensor, group: Sequence[MeasuredLayer], check: _AutogradCheck
) -> Iterator[MeasuredGradients]:
    layers = [layer for layer, _ in group]
    pending = dict(group)
    for rows_of in _ROUTES:
        try:
            matrix = rows_of(network, probe, outputs, layers)
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


def _rows_at_once(network: Network, probe: Probe, outputs: Tensor, layers: Sequence[Layer]) -> Tensor:
    """All inputs of a chunk in one batched differentiation."""
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name].detach() for name in names}

    def behavior(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return network.functional(probe, tensors, values)

    return behavioral_gradients(behavior, parameters, tensors_of(probe.inputs))


def _rows_one_by_one(network: Network, probe: Probe, outputs: Tensor, layers: Sequence[Layer]) -> Tensor:
    """A forward pass for each input, a backward pass for each output."""
    parameters = network.parameters(layers)
    return torch.cat(
        [gradient_rows(network.rows(network.outputs(probe.select([index]))), parameters) for index in range(probe.size)]
    )


def _rows_of_batch(network: Network, probe: Probe, outputs: Tensor, layers: Sequence[Layer]) -> Tensor:
    """A backward pass through the whole batch for each row: always possible, and the slowest."""
    return gradient_rows(outputs, network.parameters(layers))


_ROUTES: Sequence[Callable[[Network, Probe, Tensor, Sequence[Layer]], Tensor]] = (
    _rows_at_once,
    _rows_one_by_one,
    _rows_of_batch,
)


def _groups(waiting: Sequence[MeasuredLayer], num_rows: int) -> Iterator[list[MeasuredLayer]]:
    """Layers whose dense gradients fit into memory together."""
    group: list[MeasuredLayer] = []
    size = 0
    for layer, note in waiting:
        elements = _checked_elements(layer, num_rows)
        if group and size + elements > _GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append((layer, note))
        size += elements
    if group:
        yield group


def _checked_elements(layer: Layer, num_rows: int) -> int:
    elements = layer.num_parameters * num_rows
    if elements > _LAYER_ELEMENTS:
        raise ValueError(
            f"the gradients of layer {layer.name!r} must fit into {_LAYER_ELEMENTS * 8 / 2**30:.0f} GiB, but "
            f"{num_rows} rows x {layer.num_parameters} parameters need {elements * 8 / 2**30:.0f} GiB: "
            f"take a smaller probe, or fewer outputs (max_outputs)"
        )
    return elements


def check_memory(network: Network, probe: Probe, trace: Trace, *, num_rows: int) -> None:
    """Refuse what would not fit into memory, before any gradient is taken.

    Raises:
        ValueError: If the dense gradients of a layer without a formula are too large.
    """
    for layer in network.layers:
        if not _is_structured(network, layer, trace, probe.size):
            _checked_elements(layer, num_rows)
