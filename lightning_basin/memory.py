"""How much memory a measurement takes, said before it starts, and how it is cut to the memory that there is."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_basin.budget import FLOAT64_BYTES, MemoryRequest, cut_to_budget
from lightning_basin.free_memory import available_memory
from lightning_basin.gradients.sizes import GradientMethod, layer_sizes
from lightning_basin.limits import GROUP_ELEMENTS, HessianLimits
from lightning_basin.naming import counted
from lightning_basin.network.copying import tensors_held_by
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.settings import HessianMode

_FREE_FRACTION = 0.5  # fraction of the free memory that a measurement may use unless told otherwise


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """How large a measurement is, and how it is cut.

    Attributes:
        num_inputs: The number of inputs of the probe, k.
        num_outputs: The number of outputs per input whose gradients count, c.
        num_parameters: The number of trainable parameters, N.
        methods: The method by which the gradients of each layer are found: ``"factors"`` of the operations that use it,
            ``"chunks"`` of inputs at a time, or dense ``"rows"``.
        chunk_size: The number of inputs that are run at once.
        layer_elements: The float64 elements that the factors or the dense rows of one layer may have.
        hessian_limits: The limits of the Hessian's measurement; ``None`` where it is not measured.
        memory_bytes: The estimated peak, beside what the process holds already.
        memory_budget: The bytes to which the measurement was cut.
        unseen: The names of layers that are known to be trained, and on which the outputs do not depend.
    """

    num_inputs: int
    num_outputs: int
    num_parameters: int
    methods: Mapping[str, GradientMethod]
    chunk_size: int
    layer_elements: int
    hessian_limits: HessianLimits | None
    memory_bytes: int
    memory_budget: int
    unseen: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """The number of outputs on all inputs, m."""
        return self.num_inputs * self.num_outputs

    def __str__(self) -> str:
        """One sentence."""
        counts: Counter[str] = Counter(self.methods.values())
        others = [
            f"{counts[method]} of them {words}"
            for method, words in (("chunks", "chunk by chunk"), ("rows", "row by row"))
            if counts[method]
        ]
        how = counted(len(self.methods), "layer") + ", " + (", ".join(others) or "all factored")
        chunks = "" if self.chunk_size >= self.num_inputs else f", {counted(self.chunk_size, 'input')} at a time"
        return (
            f"{counted(self.num_inputs, 'input')} x {counted(self.num_outputs, 'output')} = "
            f"{counted(self.num_rows, 'row')} by {counted(self.num_parameters, 'parameter')} ({how}): "
            f"about {self.memory_bytes / 2**30:.2g} of {self.memory_budget / 2**30:.2g} GiB{chunks}"
        )


def _copied_bytes(module: nn.Module, *, with_trained: bool) -> int:
    """The bytes of a module's tensors, registered or not."""
    held = {id(tensor): tensor for submodule in module.modules() for tensor in tensors_held_by(vars(submodule))}
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in held.values()
        if with_trained or not (isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    )


def still_fits(plan: MeasurementPlan, module: nn.Module, device: torch.device, memory_budget: int | None) -> bool:
    """Return whether a measurement that was planned before fits into the memory that is free now."""
    return memory_budget is not None or plan.memory_bytes <= _free_budget(module, device)


def _free_budget(module: nn.Module, device: torch.device) -> int:
    """Half of the memory that is free; this was looked at after the copy was made, which counts as free."""
    return int(_FREE_FRACTION * available_memory(device)) + _copied_bytes(module, with_trained=True)


def plan_measurement(
    network: Network,
    probe: Probe,
    trace: Trace,
    *,
    num_inputs: int,
    num_outputs: int,
    num_blocks: int = 0,
    with_ranks: bool = True,
    with_readout: bool = False,
    hessian: HessianMode = False,
    memory_budget: int | None = None,
) -> MeasurementPlan:
    """Cut a measurement to a memory budget.

    Args:
        network: The network to measure.
        probe: Some inputs of the probe.
        trace: The trace of these inputs.
        num_inputs: The number of inputs of the whole probe, k.
        num_outputs: The number of outputs per input whose gradients count, c.
        num_blocks: The number of blocks of layers that are reported beside the layers.
        with_ranks: Whether more is asked for than the Gram matrix.
        with_readout: Whether the behavior is a function of the outputs, whose derivative combines all rows.
        hessian: How the Hessian's null space is measured; ``False`` where it is not.
        memory_budget: The bytes that may be used; ``None`` means half of what is free.
    """
    copied = _copied_bytes(network.module, with_trained=False)
    if memory_budget is None:
        memory_budget = _free_budget(network.module, trace.outputs.device)
    request = MemoryRequest(
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_parameters=sum(layer.num_parameters for layer in network.layers),
        num_blocks=num_blocks,
        with_ranks=with_ranks,
        with_readout=with_readout,
        hessian=hessian,
        copied=copied,
        budget=int(memory_budget),
    )
    request.check_fixed()
    sizes = layer_sizes(network, trace, num_inputs=num_inputs, num_outputs=num_outputs)
    run = cut_to_budget(request, sizes, trace, probe.size)
    largest = max(size.needed(run.elements) for size in sizes.values())
    group = min(run.elements, max(GROUP_ELEMENTS, largest), sum(size.peak for size in sizes.values()))
    peak, limits = request.copies * FLOAT64_BYTES * group, None
    if hessian is not False:  # It comes after the gradients, in their place.
        limits = run.hessian_limits(request.num_parameters)
        peak = max(peak, run.hessian_bytes(limits))
    return MeasurementPlan(
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_parameters=request.num_parameters,
        methods={layer: size.method(run.elements) for layer, size in sizes.items()},
        chunk_size=run.chunk_size,
        layer_elements=run.elements,
        hessian_limits=limits,
        memory_bytes=min(request.budget, request.fixed + run.held + peak),
        memory_budget=request.budget,
    )
