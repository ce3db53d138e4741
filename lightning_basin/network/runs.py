"""Forward passes over a probe: of all inputs at once, in chunks, and regrouped."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe

_Result = TypeVar("_Result")


def _regroupings(num_inputs: int) -> Iterator[list[Tensor]]:
    """Regroup the inputs into chunks, in which an input's results must not change.

    Yields:
        The indices of two random halves; then, for modules that cannot run fewer inputs, two chunks of k inputs, in
        which inputs of one half replace those of the other. Of a single input only itself.
    """
    if num_inputs == 1:
        yield [torch.zeros(1, dtype=torch.int64)]
        return
    order = torch.randperm(num_inputs, generator=Generator().manual_seed(0))
    # Not sorted: inputs that are paired with their mirror images, or with the other half, could stay together.
    first, second = order.tensor_split(2)
    yield [first, second]
    chunks = []
    for kept, replaced in ((first, second), (second, first)):
        indices = torch.arange(num_inputs)
        indices[replaced] = kept[torch.arange(replaced.numel()) % kept.numel()]
        chunks.append(indices)
    yield chunks


def run_regrouped(
    network: Network, probe: Probe, *, with_layers: bool = True, num_chunks: int = 2
) -> list[tuple[Tensor, Trace]]:
    """Run the inputs in two halves; or in two chunks of k inputs, for modules that cannot run fewer.

    Return for each chunk, of which at most ``num_chunks`` are run, the indices of its inputs and its trace without a
    graph; without layers the trace has the outputs alone.
    """

    def run(indices: Tensor) -> tuple[Tensor, Trace]:
        chunk = probe.select(indices)
        return indices, network.trace_layers(chunk) if with_layers else Trace(network.outputs(chunk))

    regroupings = _regroupings(probe.size)
    with torch.no_grad():
        try:
            return [run(indices) for indices in next(regroupings)[:num_chunks]]
        except (TypeError, ValueError):  # Some modules cannot run so few inputs.
            full_chunks = next(regroupings, None)
            if full_chunks is None:
                raise
            return [run(indices) for indices in full_chunks[:num_chunks]]


def outputs_of_full_chunks(network: Network, probe: Probe) -> list[tuple[Tensor, Tensor]]:
    """Run the inputs in two chunks of k inputs, in which inputs of one half replace those of the other."""
    *_, chunks = _regroupings(probe.size)
    with torch.no_grad():
        return [(indices, network.outputs(probe.select(indices))) for indices in chunks]


class Chunk:
    """Inputs of a probe that are run together, when their trace is asked for."""

    def __init__(self, network: Network, indices: Tensor, probe: Probe, trace: Trace | None = None) -> None:
        self.indices = indices
        self.probe = probe
        self._network = network
        self._trace = trace

    @property
    def trace(self) -> Trace:
        """The trace of these inputs."""
        if self._trace is None:
            self._trace = self._network.trace(self.probe)
        return self._trace


class ProbeRuns:
    """A network's runs over a probe: all inputs at once, or chunk by chunk where memory asks for it.

    The traces of several chunks are made anew at each iteration.
    """

    def __init__(self, network: Network, probe: Probe, *, chunk_size: int | None = None) -> None:
        self.network = network
        self.probe = probe
        self.chunk_size = probe.size if chunk_size is None else chunk_size
        self._full_trace: Trace | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the inputs chunk by chunk, in their order."""
        indices = torch.arange(self.probe.size)
        if self.is_whole:
            yield Chunk(self.network, indices, self.probe, self.full_trace)
            return
        for chosen in indices.tensor_split(-(-self.probe.size // self.chunk_size)):
            yield Chunk(self.network, chosen, self.probe.select(chosen))

    def each(self, function: Callable[..., _Result], *args: Any) -> list[_Result]:
        """Return what a function of the network, a chunk and further arguments returns for each chunk, in order."""
        return [function(self.network, chunk, *args) for chunk in self.chunks()]

    @property
    def is_whole(self) -> bool:
        """Whether all inputs are run at once."""
        return self.chunk_size >= self.probe.size

    @property
    def full_trace(self) -> Trace:
        """The trace of all inputs at once; without a graph, where this would not fit into memory."""
        if self._full_trace is None:
            with torch.set_grad_enabled(self.is_whole):
                self._full_trace = self.network.trace(self.probe)
        return self._full_trace
