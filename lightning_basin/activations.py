"""What enters and leaves each layer, input by input, and where that is all a network knows of its input."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_basin.functional.duplicate_stream import DuplicateSearch
from lightning_basin.layers import Network, Replacement, Trace, agreement_rtol, rounding_rtol
from lightning_basin.probe import Probe
from lightning_basin.replica import isolated_evaluation

_STREAMED = 2**25  # float64 numbers in the activations evaluated at once: 256 MiB

_HELD = 2**26  # and in those that the searches of all layers hold to compare others with: 512 MiB

_SIGNALS = 2**24  # float64 numbers in the signals of one layer: 128 MiB

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: Everything that enters, flattened, shape ``(k, d)``; ``None`` where nothing that enters has one
            part per input.
        leaving: Outputs with the units last, shape ``(k, positions, units)``; ``None`` likewise.
        rows_per_input: For each tensor that enters, how many of its first-axis rows belong to one input; 0 where it is
            shared by all. Empty where the rows of an input are not adjacent.
    """

    entering: Tensor | None
    leaving: Tensor | None
    rows_per_input: tuple[int, ...]


def layer_activations(network: Network, probe: Probe, trace: Trace) -> dict[str, LayerActivations]:
    """What enters and leaves each called layer, input by input, in the order of first entry.

    Which axis of a tensor counts the inputs is found by running single inputs: a tensor whose shape does not
    grow with their number is shared, one whose rows agree is sliced, any other is collected input by input.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
    """
    with torch.no_grad():
        return _LayoutByExample(network, probe, trace).activations()


def parameters_before(network: Network, trace: Trace, name: str) -> list[bool]:
    """For each parameter whether what enters a layer depends on it.

    Args:
        network: That was traced.
        trace: Of the probe.
        name: Of a layer that was called.
    """
    attached = [tensor for tensor in trace.entering[name] if tensor.requires_grad]
    parameters = network.parameters()
    if not attached:
        return [False] * len(parameters)
    ones = [torch.ones_like(tensor) for tensor in attached]
    gradients = torch.autograd.grad(attached, parameters, ones, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def is_cut(
    network: Network, probe: Probe, trace: Trace, name: str, layer: LayerActivations, before: Sequence[bool]
) -> bool:
    """Whether what enters a layer is all that crosses to what follows.

    Found by computing: where what enters a layer is rolled from each input to the next, and all outputs and
    gradients with respect to later parameters roll along, nothing else about an input gets past the layer. A
    branch beside a skip connection fails this, also one whose skip has weight zero: its gradient does not roll.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        name: Of the layer.
        layer: Its activations.
        before: Which parameters what enters depends on, from `parameters_before`.
    """
    called_once = len(trace.leaving.get(name, [])) == 1  # Later calls see the earlier ones already rolled.
    if not layer.rows_per_input or not called_once:
        return False
    rolled = network.trace(probe, replace=Replacement(name, layer.rows_per_input)).outputs
    tolerance = cut_rtol(network.dtype) * float(trace.outputs.detach().abs().max())
    if float((rolled - trace.outputs.roll(1, 0)).detach().abs().max()) > tolerance:
        return False
    after = [parameter for parameter, used in zip(network.parameters(), before, strict=True) if not used]
    return _gradients_roll(trace.outputs, rolled, after, rtol=cut_rtol(network.dtype))


def cut_rtol(dtype: torch.dtype) -> float:
    """Within which fraction of the largest number what crosses a cut is the same.

    Below what formulas agree to: a weak skip connection is not none, and inputs that differ little are not merged. Were
    they taken for it, the bound on the rank could fall below the rank.
    """
    return max(1e-9, rounding_rtol(dtype))


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer that all parameters before a cut act through.

    Attributes:
        signals: Derivative of each output by what leaves the layer, shape ``(k, c, units)``.
        inputs: What enters it, shape ``(k, features)``, where it is a linear layer and nothing else is trained before
            the cut; ``None`` otherwise.
    """

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
        cut: Name of the layer whose input is all that crosses, as `is_cut` found it.

    Returns:
        ``None`` where there is no such layer, where what leaves it is not laid out input by input, and where its
        signals are more than 2**24 numbers.
    """
    called = list(activations)
    position = called.index(cut)
    name = called[position - 1]
    left = trace.leaving.get(name, [])
    rows = network.rows(trace.outputs)
    if position == 0 or len(left) != 1 or not left[0].requires_grad or rows.shape[1] * left[0].numel() > _SIGNALS:
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
    return Passage(signals, inputs)


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
    return Passage(
        torch.cat([chunk.signals for chunk in found]), torch.cat(inputs) if len(inputs) == len(found) else None
    )


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
    (expected,) = torch.autograd.grad(rows, part.weight, weights, retain_graph=True)
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
                search.add(activations[name])
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
        self._chunk_size = max(2, _STREAMED // sum(tensor.numel() for tensor in activations.values()))

    def __iter__(self) -> Iterator[dict[str | None, Tensor]]:
        for probe in self._probes:
            for indices in torch.split(torch.arange(probe.size), self._chunk_size):
                yield self._evaluated(probe.select(indices))

    def _evaluated(self, probe: Probe) -> dict[str | None, Tensor]:
        size, device = probe.size, self._network.parameters()[0].device
        if size == 1:  # Beside itself: alone, an input does not show which axis counts the inputs.
            probe = probe.select([0, 0])
        with isolated_evaluation(device, self._network.dtype), torch.no_grad():
            probe = probe.to(device, self._network.dtype)
            trace = self._network.trace(probe)
            layers = layer_activations(self._network, probe, trace)
        found: dict[str | None, Tensor] = {
            name: layer.entering[:size] for name, layer in layers.items() if layer.entering is not None
        }
        return found | {None: trace.outputs[:size].unsqueeze(-1).flatten(1)}


def _gradients_roll(outputs: Tensor, rolled: Tensor, parameters: Sequence[Tensor], *, rtol: float) -> bool:
    """Whether rolled outputs have the rolled gradients, seen in one random combination of the rows."""
    if not parameters or not outputs.requires_grad or not rolled.requires_grad:
        return True
    generator = Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    expected = torch.autograd.grad(outputs, parameters, weights.roll(-1, 0), retain_graph=True, materialize_grads=True)
    found = torch.autograd.grad(rolled, parameters, weights, materialize_grads=True)
    tolerance = rtol * max(float(gradient.abs().max()) for gradient in expected)
    pairs = zip(found, expected, strict=True)
    return all(float((gradient - wanted).abs().max()) <= tolerance for gradient, wanted in pairs)


class _LayoutByExample:
    """Finds which part of each traced tensor belongs to which input."""

    def __init__(self, network: Network, probe: Probe, trace: Trace) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._ends = [self._single(0), self._single(probe.size - 1)]
        self._singles: list[Trace] | None = None

    def _single(self, index: int) -> Trace | None:
        try:
            return self._network.trace(self._probe.select([index]))
        except (RuntimeError, TypeError, ValueError, IndexError):  # Some modules cannot run a batch of one.
            return None

    def activations(self) -> dict[str, LayerActivations]:
        found = {}
        for name, tensors in self._trace.entering.items():
            entering, rows = self._by_input(tensors, partial(_entering, name))
            leaving, _ = self._by_input(_leaving(name, self._trace), partial(_leaving, name))
            part = self._network.module.get_submodule(name)
            found[name] = LayerActivations(
                entering=torch.cat([tensor.flatten(1) for tensor in entering], dim=1) if entering else None,
                leaving=_units_last(part, leaving),
                rows_per_input=rows,
            )
        return found

    def _by_input(
        self, tensors: Sequence[Tensor], of: Callable[[Trace], list[Tensor]]
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """The tensors that have a part per input, each as ``(k, rows, ...)``, and how all are laid out."""
        num_inputs = self._probe.size
        tensors = [_real(tensor.detach()) for tensor in tensors]
        first, last = self._ends
        if num_inputs == 1 or first is None or last is None:
            kept = [tensor for tensor in tensors if tensor.ndim and tensor.shape[0] == num_inputs]
            adjacent = len(kept) == len(tensors)
            return [tensor.unsqueeze(1) for tensor in kept], (1,) * len(tensors) if adjacent else ()
        singles = list(zip(of(first), of(last), strict=False))
        if len(singles) == len(tensors):
            rtol = agreement_rtol(self._network.dtype)
            layouts = [
                _layout(tensor, *ends, num_inputs, rtol=rtol) for tensor, ends in zip(tensors, singles, strict=True)
            ]
            if None not in layouts:
                rows = tuple(layout for layout in layouts if layout is not None)
                sliced = [
                    tensor.reshape(num_inputs, count, *tensor.shape[1:])
                    for tensor, count in zip(tensors, rows, strict=True)
                    if count
                ]
                return sliced, rows
        return self._collected(of), ()

    def _collected(self, of: Callable[[Trace], list[Tensor]]) -> list[Tensor]:
        """Tensors put together from runs of single inputs; none where these differ in shape."""
        if self._singles is None:
            runs = [self._single(index) for index in range(self._probe.size)]
            self._singles = [run for run in runs if run is not None]
        shapes = {tuple(tensor.shape for tensor in of(run)) for run in self._singles}
        if len(shapes) != 1 or len(self._singles) < self._probe.size:
            return []
        columns = zip(*(of(run) for run in self._singles), strict=True)
        return [torch.stack([_real(tensor) for tensor in column]) for column in columns]


def _entering(name: str, trace: Trace) -> list[Tensor]:
    return trace.entering.get(name, [])


def _leaving(name: str, trace: Trace) -> list[Tensor]:
    return trace.leaving.get(name, [])


def _layout(tensor: Tensor, first: Tensor, last: Tensor, num_inputs: int, *, rtol: float) -> int | None:
    """Rows per input of a tensor, 0 where it does not grow with their number, ``None`` where they are not adjacent."""
    first, last = _real(first), _real(last)
    if tensor.shape == first.shape:
        return 0
    if not tensor.ndim or tensor.shape != (num_inputs * first.shape[0], *first.shape[1:]):
        return None
    rows = tensor.reshape(num_inputs, -1)
    tolerance = rtol * float(tensor.abs().max()) if tensor.numel() else 0.0
    for found, alone in ((rows[0], first), (rows[-1], last)):
        if bool(((found - alone.flatten()).abs() > tolerance).any()):
            return None
    return int(first.shape[0])


def _real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float64; a complex one becomes its real and imaginary parts, side by side."""
    if tensor.is_complex():
        tensor = torch.cat([tensor.real, tensor.imag], dim=-1)
    return tensor.to(torch.float64)


def _units_last(part: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """Outputs of all calls as ``(k, positions, units)``."""
    if not tensors:
        return None
    moved = []
    for tensor in tensors:
        # Traced tensors carry one axis more, the rows per input; channels were second without it.
        axis = 2 - tensor.ndim if isinstance(part, _CHANNELS_SECOND) else -1
        ordered = tensor.movedim(axis, -1)
        moved.append(ordered.reshape(tensor.shape[0], -1, ordered.shape[-1]))
    return torch.cat(moved, dim=1) if len({tensor.shape[-1] for tensor in moved}) == 1 else moved[0]
