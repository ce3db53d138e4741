"""What enters and leaves each layer, input by input, and what inputs that it merges have in common."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_basin.functional.duplicate_stream import DuplicateSearch
from lightning_basin.functional.duplicates import (
    are_same,
    class_means,
    duplicate_classes,
    finer_classes,
    largest_entry,
)
from lightning_basin.layers import Network, Trace, TracedProbe, agreement_rtol, passed_otherwise
from lightning_basin.probe import Probe
from lightning_basin.replica import isolated_evaluation
from lightning_basin.structured import concatenated

_STREAMED = 2**25  # float64 numbers in the activations evaluated at once: 256 MiB

_HELD = 2**26  # and in those that the searches of all layers hold to compare others with: 512 MiB

_SIGNALS = 2**24  # float64 numbers in the signals of one layer: 128 MiB

_NUM_COMBINATIONS = 3  # of all rows, that show whether merged inputs have the same gradients

_CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError)  # so few inputs: some modules raise one of these

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: Everything that enters, flattened, shape ``(k, d)``; ``None`` where nothing that enters has one
            part per input.
        scales: The largest magnitude in the tensor that each entry belongs to, shape ``(d,)``; 0 for integers, which
            are compared exactly.
        leaving: Outputs with the units last, shape ``(k, positions, units)``; ``None`` likewise.
    """

    entering: Tensor | None
    scales: Tensor | None
    leaving: Tensor | None
    _known: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def classes(self, rtol: float) -> Tensor | None:
        """See `duplicate_classes`; ``None`` where nothing that enters has one part per input."""
        if self.entering is None or self.scales is None:
            return None
        if rtol not in self._known:
            coarser = min((known for known in self._known if known > rtol), default=None)
            self._known[rtol] = (
                duplicate_classes(self.entering, rtol=rtol, scales=self.scales)
                if coarser is None
                else finer_classes(self._known[coarser], self.entering, rtol=rtol, scales=self.scales)
            )
        return self._known[rtol]


Rows = list[int] | None
"""Rows per input of some tensors, 0 for one that all inputs share; ``None`` where an input's rows are scattered."""


@dataclass(frozen=True)
class InputLayout:
    """Which part of the tensors that enter and leave each layer belongs to which input."""

    entering: Mapping[str, Rows]
    leaving: Mapping[str, Rows]


def input_layout(network: Network, probe: Probe, trace: Trace, others: Sequence[tuple[Tensor, Trace]]) -> InputLayout:
    """Find the inputs in traced tensors by those of other batches, which together hold all of them.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        others: See `passed_otherwise`; of a single input none are needed.
    """
    rtol = agreement_rtol(network.dtype)

    def rows(of: Callable[[str, Trace], list[Tensor]], name: str) -> Rows:
        found = [(indices, of(name, other)) for indices, other in others]
        return _rows_per_input(of(name, trace), found, probe.size, rtol=rtol)

    with torch.no_grad():
        return InputLayout(
            entering={name: rows(_entering, name) for name in trace.entering},
            leaving={name: rows(_leaving, name) for name in trace.entering},
        )


def layer_activations(
    network: Network, probe: Probe, trace: Trace, layout: InputLayout | None = None
) -> dict[str, LayerActivations]:
    """What enters and leaves each called layer, input by input, in the order of first entry.

    A tensor whose rows are those of its inputs is sliced, one that stays as it is is shared, any other is collected
    from runs of single inputs.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        layout: Of the trace; ``None`` runs other batches to find it.
    """
    if layout is None:
        layout = input_layout(network, probe, trace, passed_otherwise(network, probe) if probe.size > 1 else [])
    with torch.no_grad():
        return _LaidOut(network, probe, trace, layout).activations()


def parameters_before(network: Network, trace: Trace, name: str) -> list[bool]:
    """For each parameter whether what enters a layer depends on it.

    Args:
        network: That was traced.
        trace: Of the probe.
        name: Of a layer; one that was not called, on these inputs, depends on none.
    """
    attached = [tensor for tensor in trace.entering.get(name, []) if tensor.requires_grad]
    parameters = network.parameters()
    if not attached:
        return [False] * len(parameters)
    ones = [torch.ones_like(tensor) for tensor in attached]
    gradients = torch.autograd.grad(attached, parameters, ones, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def merging_error(
    traced: TracedProbe, classes: Tensor, before: Sequence[bool], through: "Passage | None" = None
) -> float:
    """How far gradients are from being those of merged inputs: the norm of what tells inputs of one class apart.

    Behind a layer, inputs of a class must have the same gradients: what these deviate from their mean is an error of G.
    So is what the signals before it deviate from theirs, times the derivatives by the parameters they act on. Where
    the whole error is below a tolerance, replacing the gradients by their means moves no singular value past it (Weyl,
    1912). Three random combinations of all rows see it, over all inputs at once: it takes a chance of one in a hundred
    for each to see less than a hundredth.

    Args:
        traced: The network on the probe.
        classes: First member of each input's class, shape ``(k,)``.
        before: For each parameter whether its gradients are taken to differ within the classes.
        through: What all parameters before act through; ``None`` where nothing is taken to be the same before.

    Returns:
        The largest norm over the combinations, of standard normal weights.
    """
    network, generator = traced.network, Generator().manual_seed(0)
    parameters = network.parameters()
    apart = None if through is None else through.signals - class_means(through.signals, classes)
    behind = [not used for used in before]
    outputs = network.rows(traced.whole.outputs)
    shape = (_NUM_COMBINATIONS, *outputs.shape)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(outputs.device)
    within = [weights - class_means(weights, classes) for weights in drawn]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    combined = [drawn.new_zeros(num_parameters) for _ in drawn]
    for chunk in traced.chunks():
        rows, part = network.rows(chunk.trace.outputs), chunk.indices.to(drawn.device)
        for total, weights, deviations in zip(combined, drawn, within, strict=True):
            total += _gradient(rows, parameters, deviations[part], behind)
            if through is not None and apart is not None:
                by_left = torch.einsum("kc,kcu->ku", weights[part], apart[part])
                left = chunk.trace.leaving[through.name][0]
                total += _gradient(left, parameters, by_left.view_as(left), before)
    return max(float(total.norm()) for total in combined)


def _gradient(tensor: Tensor, parameters: Sequence[Tensor], weights: Tensor, wanted: Sequence[bool]) -> Tensor:
    """Of a weighted sum by all parameters side by side; zero for those that are not wanted."""
    chosen = [parameter for parameter, is_wanted in zip(parameters, wanted, strict=True) if is_wanted]
    found = iter([parameter.new_zeros(()) for parameter in chosen])
    if chosen and tensor.requires_grad:
        weights = weights.to(tensor)
        found = iter(torch.autograd.grad(tensor, chosen, weights, retain_graph=True, materialize_grads=True))
    parts = zip(parameters, wanted, strict=True)
    return torch.cat(
        [(next(found) if used else parameter.new_zeros(())).expand_as(parameter).flatten() for parameter, used in parts]
    )


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer that all parameters before a cut act through.

    Attributes:
        name: Of the layer.
        signals: Derivative of each output by what leaves the layer, shape ``(k, c, units)``.
        inputs: What enters it, shape ``(k, features)``, where it is a linear layer and nothing else is trained before
            the cut; ``None`` otherwise.
    """

    name: str
    signals: Tensor
    inputs: Tensor | None


def passage(
    network: Network, probe: Probe, trace: Trace, activations: dict[str, LayerActivations], cut: str
) -> Passage | None:
    """The layer called last before a cut, if everything trained before the cut acts on the outputs through it alone.

    The graph of the outputs tells: no such parameter may be reached on a way around what leaves the layer. A weight
    that is used on both sides of the cut is, and so is one beside a skip connection.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        activations: Of the probe.
        cut: Name of the layer whose input is all that crosses.

    Returns:
        ``None`` where there is no such layer, where what leaves it is not laid out input by input, and where its
        signals are more than 2**24 numbers.
    """
    called = list(activations)
    position = called.index(cut) if cut in called else 0  # Not where no input of a chunk enters it.
    if position == 0 or not trace.outputs.requires_grad:
        return None
    name = called[position - 1]
    left = trace.leaving.get(name, [])
    rows = network.rows(trace.outputs)
    if len(left) != 1 or not left[0].requires_grad or rows.shape[1] * left[0].numel() > _SIGNALS:
        return None
    part, arranged = network.module.get_submodule(name), activations[name].leaving
    if left[0].shape[:1] != (probe.size,):
        return None
    by_input = _units_last(part, [_real(left[0].detach()).unsqueeze(1)])
    if arranged is None or by_input is None or not torch.equal(by_input, arranged):
        return None
    used = parameters_before(network, trace, cut)
    before = [parameter for parameter, is_used in zip(network.parameters(), used, strict=True) if is_used]
    if _reached_around(trace.outputs, left[0], before):
        return None
    signals = torch.stack([_derivative(row.sum(), left[0]) for row in rows.unbind(1)], 1).flatten(2).to(torch.float64)
    inputs = _linear_inputs(part, trace.entering[name], before, rows, signals, rtol=agreement_rtol(network.dtype))
    return Passage(name, signals, inputs)


def _derivative(output: Tensor, passed: Tensor) -> Tensor:
    """Of a number by a tensor: zero where a module makes no use of it."""
    (derivative,) = torch.autograd.grad(output, passed, retain_graph=True, materialize_grads=True)
    return derivative


def joined_passages(chunks: Sequence[Passage | None]) -> Passage | None:
    """The passage of all inputs from those of chunks of them; ``None`` where one of these is."""
    found = [chunk for chunk in chunks if chunk is not None]
    if len(found) < len(chunks) or sum(chunk.signals.numel() for chunk in found) > _SIGNALS:
        return None
    inputs = [chunk.inputs for chunk in found if chunk.inputs is not None]
    if len({chunk.name for chunk in found}) != 1:
        return None
    signals = torch.cat([chunk.signals for chunk in found])
    return Passage(found[0].name, signals, torch.cat(inputs) if len(inputs) == len(found) else None)


def _reached_around(outputs: Tensor, passed: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of the outputs leads to any parameter on a way that does not pass a tensor."""
    wanted = {id(parameter) for parameter in parameters}
    waiting, seen = [outputs.grad_fn], {outputs.grad_fn}
    while waiting:
        node = waiting.pop()
        for following, number in () if node is None else node.next_functions:
            if following is None or following in seen or (following, number) == (passed.grad_fn, passed.output_nr):
                continue
            if id(getattr(following, "variable", None)) in wanted:
                return True
            seen.add(following)
            waiting.append(following)
    return False


def _linear_inputs(
    part: nn.Module,
    entering: Sequence[Tensor],
    before: Sequence[Tensor],
    rows: Tensor,
    signals: Tensor,
    *,
    rtol: float,
) -> Tensor | None:
    """What enters a linear layer, if its parameters are all there are before a cut, and it acts as such a layer."""
    if type(part) is not nn.Linear or len(entering) != 1 or entering[0].ndim != 2:  # noqa: PLR2004 - a matrix
        return None
    others = {id(parameter) for parameter in before} - {id(part.bias)}
    if others != {id(part.weight)}:
        return None
    generator = Generator().manual_seed(0)
    weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    (expected,) = torch.autograd.grad(rows, part.weight, weights, retain_graph=True, materialize_grads=True)
    inputs = _real(entering[0].detach())
    found = (weights.unsqueeze(2) * signals).sum(1).mT @ inputs
    if bool(((found - expected).abs() > rtol * expected.abs().max()).any()):
        return None
    return inputs


def streamed_classes(network: Network, probes: Iterable[Probe], *, rtol: float) -> dict[str | None, Tensor]:
    """Classes of equal activations over more inputs than fit into memory; see `DuplicateSearch`.

    Args:
        network: Is run under `isolated_evaluation`; probes are taken outside of it, where they are what training sees.
        probes: The inputs, in parts; iterated over several times.
        rtol: Two activations are the same when they differ by at most this, relative to the largest.

    Returns:
        For each layer whose activation is known input by input, in the order of first entry, and last, as ``None``, for
        the outputs: the smallest index of each input's class.

    Raises:
        ValueError: If there are no inputs, two passes differ, or activations differ in length or are not finite.
    """
    stream = _ActivationStream(network, probes)
    searches = {
        name: DuplicateSearch(
            rtol=rtol, max_elements=_HELD // len(stream.names), repeated_rtol=agreement_rtol(network.dtype)
        )
        for name in stream.names
    }
    unfinished = searches
    while unfinished:
        for activations in stream:
            for name, search in unfinished.items():
                search.add(*activations[name])
        unfinished = {name: search for name, search in unfinished.items() if search.finish_pass()}
    return {name: search.classes for name, search in searches.items()}


class _ActivationStream:
    """What enters each layer and what leaves the network, chunk by chunk, at each iteration anew."""

    def __init__(self, network: Network, probes: Iterable[Probe]) -> None:
        self._network = network
        self._probes = probes
        first = next(iter(probes), None)
        if first is None:
            raise ValueError("there must be at least one input to look for duplicates in, got none")
        activations = self._evaluated(first.select([0]))
        self.names = list(activations)
        self._chunk_size = max(2, _STREAMED // sum(tensor.numel() for tensor, _ in activations.values()))

    def __iter__(self) -> Iterator[dict[str | None, tuple[Tensor, Tensor | None]]]:
        for probe in self._probes:
            for indices in torch.split(torch.arange(probe.size), self._chunk_size):
                yield self._evaluated(probe.select(indices))

    def _evaluated(self, probe: Probe) -> dict[str | None, tuple[Tensor, Tensor | None]]:
        size, device = probe.size, self._network.parameters()[0].device
        if size == 1:  # Beside itself: alone, an input does not show which axis counts the inputs.
            probe = probe.select([0, 0])
        with isolated_evaluation(device, self._network.dtype), torch.no_grad():
            probe = probe.to(device, self._network.dtype)
            trace = self._network.trace(probe)
            layers = layer_activations(self._network, probe, trace)
        found: dict[str | None, tuple[Tensor, Tensor | None]] = {
            name: (layer.entering[:size], layer.scales) for name, layer in layers.items() if layer.entering is not None
        }
        return found | {None: (trace.outputs[:size].unsqueeze(-1).flatten(1), None)}


class _LaidOut:
    """Cuts traced tensors into the parts of the inputs."""

    def __init__(self, network: Network, probe: Probe, trace: Trace, layout: InputLayout) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._layout = layout
        self._singles: list[Trace] | None = None

    def activations(self) -> dict[str, LayerActivations]:
        found = {}
        for name in self._trace.entering:
            entering = self._by_input(partial(_entering, name), self._layout.entering[name])
            leaving = self._by_input(partial(_leaving, name), self._layout.leaving[name])
            part = self._network.module.get_submodule(name)
            found[name] = LayerActivations(
                entering=concatenated([_real(tensor).flatten(1) for tensor in entering], 1) if entering else None,
                scales=torch.cat([_scales(tensor) for tensor in entering]) if entering else None,
                leaving=_units_last(part, leaving),
            )
        return found

    def _by_input(self, of: Callable[[Trace], list[Tensor]], rows: Rows) -> list[Tensor]:
        """The tensors that have a part per input, each as ``(k, rows, ...)``."""
        if rows is None:
            return self._collected(of)
        tensors = [_by_parts(tensor.detach()) for tensor in of(self._trace)]
        return [
            tensor.reshape(self._probe.size, count, *tensor.shape[1:])
            for tensor, count in zip(tensors, rows, strict=True)
            if count
        ]

    def _collected(self, of: Callable[[Trace], list[Tensor]]) -> list[Tensor]:
        """Tensors put together from runs of single inputs; none where these differ in shape."""
        if self._singles is None:
            try:
                self._singles = [self._network.passed(self._probe.select([index])) for index in range(self._probe.size)]
            except _CANNOT_RUN:
                self._singles = []
        shapes = {tuple(tensor.shape for tensor in of(run)) for run in self._singles}
        if len(shapes) != 1 or len(self._singles) < self._probe.size:
            return []
        columns = zip(*(of(run) for run in self._singles), strict=True)
        return [torch.stack([_by_parts(tensor) for tensor in column]) for column in columns]


def _entering(name: str, trace: Trace) -> list[Tensor]:
    return trace.entering.get(name, [])


def _leaving(name: str, trace: Trace) -> list[Tensor]:
    return trace.leaving.get(name, [])


def _rows_per_input(
    tensors: Sequence[Tensor], others: Sequence[tuple[Tensor, list[Tensor]]], num_inputs: int, *, rtol: float
) -> Rows:
    """Where the inputs are in tensors of all inputs, seen from those in their place in other batches."""
    parts = [_by_parts(tensor.detach()) for tensor in tensors]
    if num_inputs == 1:
        return [int(part.ndim > 0 and len(part) == 1) for part in parts]
    if any(len(found) != len(parts) for _, found in others):
        return None
    layouts = [
        _layout(part, [(indices, found[place]) for indices, found in others], num_inputs, rtol=rtol)
        for place, part in enumerate(parts)
    ]
    return None if None in layouts else [layout for layout in layouts if layout is not None]


def _layout(tensor: Tensor, others: Sequence[tuple[Tensor, Tensor]], num_inputs: int, *, rtol: float) -> int | None:
    """Rows per input of a tensor, 0 where it is the same for all inputs, ``None`` where they are not adjacent.

    Args:
        tensor: Of all inputs.
        others: Indices of the inputs of other batches, and the tensor in their place.
        num_inputs: k.
        rtol: To which two evaluations agree.
    """
    numbers = _real(tensor)
    tolerance = rtol * largest_entry(numbers)

    def agrees(expected: Tensor, found: Tensor) -> bool:
        if expected.shape != found.shape:
            return False
        found = _real(found)
        if found.numel() and bool((expected - found).abs_().amax() <= tolerance):  # So do most: in few passes.
            return True
        return bool(are_same(expected.reshape(1, -1), found.reshape(1, -1), tolerance))

    count = len(tensor) // num_inputs if tensor.ndim else 0
    if count and len(tensor) == num_inputs * count:
        by_input = numbers.reshape(num_inputs, count, *numbers.shape[1:])
        if all(
            agrees(by_input[indices.to(tensor.device)].flatten(0, 1), _by_parts(found)) for indices, found in others
        ):
            return count
    return 0 if all(agrees(numbers, _by_parts(found)) for _, found in others) else None


def _by_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, side by side; any other as it is."""
    return torch.cat([tensor.real, tensor.imag], dim=-1) if tensor.is_complex() else tensor


def _real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float64; a complex one becomes its real and imaginary parts, side by side."""
    return _by_parts(tensor).to(torch.float64)


def _scales(tensor: Tensor) -> Tensor:
    """What each entry of an input's part is compared relative to: the largest of the tensor, 0 for integers."""
    scale = largest_entry(_real(tensor)) if tensor.is_floating_point() else _real(tensor).new_zeros(())
    return scale.expand(tensor[:1].numel())


def _units_last(part: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """Outputs of all calls as ``(k, positions, units)``."""
    if not tensors:
        return None
    moved = []
    for tensor in tensors:
        # Traced tensors carry one axis more, the rows per input; channels were second without it.
        axis = 2 - tensor.ndim if isinstance(part, _CHANNELS_SECOND) else -1
        ordered = _real(tensor).movedim(axis, -1)
        moved.append(ordered.flatten(1, -2))
    return concatenated(moved, 1) if len({tensor.shape[-1] for tensor in moved}) == 1 else moved[0]
