"""Duplicated activations over more inputs than fit into memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_basin.functional.duplicate_stream import DuplicateSearch
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.probe import Probe
from lightning_basin.quantities.activations import layer_activations
from lightning_basin.tensors import as_result

_EVALUATED_ELEMENTS = 2**25  # most float64 elements in the activations that are evaluated at once: 256 MiB
_HELD_ELEMENTS = 2**26  # most float64 elements in the activations that the searches of all layers hold: 512 MiB


def streamed_classes(network: Network, probes: Iterable[Probe], *, rtol: float) -> dict[str | None, Tensor]:
    """Find the classes of equal activations over more inputs than fit into memory, by `DuplicateSearch`.

    Args:
        network: The network, which is run under `isolated_evaluation`. Probes are read outside of it, as in training.
        probes: The inputs as a sequence of probes; iterated over several times.
        rtol: The largest difference of two equal activations, relative to the largest element.

    Returns:
        For each layer whose activation is known input by input, in the order of first entry, and last, as ``None``, for
        the outputs: the smallest index of each input's class.

    Raises:
        ValueError: If there are no inputs, two passes differ, or activations differ in length or are not finite.
    """
    stream = _ActivationStream(network, probes)
    searches = {
        name: DuplicateSearch(
            rtol=rtol, max_elements=_HELD_ELEMENTS // len(stream.names), repeated_rtol=agreement_rtol(network.dtype)
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
    """The input activations of each layer and the outputs, chunk by chunk, evaluated anew at each iteration."""

    def __init__(self, network: Network, probes: Iterable[Probe]) -> None:
        self._network = network
        self._probes = probes
        first = next(iter(probes), None)
        if first is None:
            raise ValueError("there must be at least one input to look for duplicates in, got none")
        activations = self._evaluated(first.select([0]))
        self.names = list(activations)
        self._chunk_size = max(2, _EVALUATED_ELEMENTS // sum(tensor.numel() for tensor, _ in activations.values()))

    def __iter__(self) -> Iterator[dict[str | None, tuple[Tensor, Tensor | None]]]:
        for probe in self._probes:
            for indices in torch.split(torch.arange(probe.size), self._chunk_size):
                yield self._evaluated(probe.select(indices))

    def _evaluated(self, probe: Probe) -> dict[str | None, tuple[Tensor, Tensor | None]]:
        size, device = probe.size, self._network.parameters()[0].device
        if size == 1:  # A single input does not show which axis counts the inputs: it is run twice.
            probe = probe.select([0, 0])
        with isolated_evaluation(device, self._network.dtype), torch.no_grad():
            probe = probe.to(device, self._network.dtype)
            trace = self._network.trace(probe)
            layers = layer_activations(self._network, probe, trace)
        activations: dict[str | None, tuple[Tensor, Tensor | None]] = {
            name: (layer.entering.rows[:size], torch.from_numpy(layer.entering.scales))
            for name, layer in layers.items()
            if layer.entering is not None
        }
        return activations | {None: (as_result(trace.outputs[:size].unsqueeze(-1).flatten(1)), None)}
