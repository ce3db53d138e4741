"""Forward passes over a probe: as a whole, in chunks of inputs, and in other batches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from lightning_basin.network.network import Network, _Result
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe


def other_batches(num_inputs: int) -> Iterator[list[Tensor]]:
    """Batches in which every input has other company than in the whole, where its part of all results is the same.

    Args:
        num_inputs: k.

    Yields:
        Indices of two random halves; then, for modules that cannot run these, batches of all k in which each half is
        replaced by inputs of the other. Of a single input only itself.
    """
    if num_inputs == 1:
        yield [torch.zeros(1, dtype=torch.int64)]
        return
    order = torch.randperm(num_inputs, generator=Generator().manual_seed(0))
    # Not sorted: inputs that are paired with their mirror images, or with the other half, could keep their company.
    first, second = order.tensor_split(2)
    yield [first, second]
    replaced = []
    for kept, others in ((first, second), (second, first)):
        indices = torch.arange(num_inputs)
        indices[others] = kept[torch.arange(others.numel()) % kept.numel()]
        replaced.append(indices)
    yield replaced


def passed_otherwise(network: Network, probe: Probe, *, with_layers: bool = True) -> list[tuple[Tensor, Trace]]:
    """What enters and leaves each layer in the first of `other_batches` that the module can run, without a graph.

    Args:
        network: To run.
        probe: The inputs.
        with_layers: Whether the layers are wanted, and not the outputs alone.

    Returns:
        Indices of the inputs of each batch, and what was noted of it.

    Raises:
        TypeError: See `Network.outputs`.
        ValueError: See `Network.outputs`; if the module can run none of them.
    """

    def run(indices: Tensor) -> tuple[Tensor, Trace]:
        batch = probe.select(indices)
        return indices, network.passed(batch) if with_layers else Trace(network.outputs(batch))

    few, *many = other_batches(probe.size)
    with torch.no_grad():
        try:
            return [run(indices) for indices in few]
        except (TypeError, ValueError):  # Some modules cannot run so few: as many as in the whole they can.
            if not many:
                raise
            return [run(indices) for indices in many[0]]


class Chunk:
    """Inputs of a probe that are run at once.

    Args:
        network: To run.
        indices: Where the inputs stand in the whole probe.
        probe: The inputs.
        trace: Of these, where there is one already.
    """

    def __init__(self, network: Network, indices: Tensor, probe: Probe, trace: Trace | None = None) -> None:
        self.indices = indices
        self.probe = probe
        self._network = network
        self._trace = trace

    @property
    def trace(self) -> Trace:
        """What running them shows; they are run when it is asked for."""
        if self._trace is None:
            self._trace = self._network.trace(self.probe)
        return self._trace


class TracedProbe:
    """A probe that a network has been run on, all inputs at once or chunk by chunk where memory asks for it.

    Args:
        network: To run.
        probe: The inputs.
        chunk_size: Inputs per run; the traces of several chunks are not kept, but made anew at each iteration.
    """

    def __init__(self, network: Network, probe: Probe, *, chunk_size: int | None = None) -> None:
        self.network = network
        self.probe = probe
        self.chunk_size = probe.size if chunk_size is None else chunk_size
        self._whole: Trace | None = None

    def chunks(self) -> Iterator[Chunk]:
        """The inputs that are run at once, chunk by chunk."""
        indices = torch.arange(self.probe.size)
        if self.is_whole:
            yield Chunk(self.network, indices, self.probe, self.whole)
            return
        for chosen in indices.tensor_split(-(-self.probe.size // self.chunk_size)):
            yield Chunk(self.network, chosen, self.probe.select(chosen))

    def each(self, function: Callable[..., _Result], *args: Any) -> list[_Result]:
        """What a function makes of each chunk of inputs, in the order of the inputs.

        Args:
            function: A function of the network, a chunk and further arguments.
            args: The further arguments.
        """
        return [function(self.network, chunk, *args) for chunk in self.chunks()]

    @property
    def is_whole(self) -> bool:
        """Whether all inputs are run at once."""
        return self.chunk_size >= self.probe.size

    @property
    def whole(self) -> Trace:
        """The trace of all inputs at once; without a graph, where this would not fit into memory."""
        if self._whole is None:
            with torch.set_grad_enabled(self.is_whole):
                self._whole = self.network.trace(self.probe)
        return self._whole
