"""What a measurement will hold and compute, said before it starts, and cut to the memory that there is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_basin.gradients import GROUP_ELEMENTS, layer_elements
from lightning_basin.layers import Network, Trace
from lightning_basin.operations import ProductUse
from lightning_basin.probe import Probe

_NUMBER = 8  # bytes of a float64
_DECOMPOSITION = 14  # m x m matrices at once: Gram matrices, a sketch of 2 m columns, its triangular factor, work space
_COPIES = 3  # of a group's factors at once: collected by output, stacked, and in a product
_TEMPORARIES = 2**28  # bytes of chunks that do not depend on the network
_FREE_FRACTION = 0.5


class MemoryBudgetError(ValueError):
    """A measurement cannot be cut to the memory that it may use."""


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """How large a measurement is, and how it is cut.

    Attributes:
        num_inputs: Inputs of the probe, k.
        num_outputs: Outputs per input whose gradients count, c.
        num_parameters: Trainable parameters, N.
        methods: For each layer ``"factors"`` (from the operations that use it) or ``"rows"`` (dense).
        chunk_size: Inputs that are run at once.
        group_elements: Float64 numbers of factors or rows that are held at once.
        memory_bytes: Estimated peak, beside what the process holds already.
        memory_budget: That it was cut to, in bytes.
        num_operations: Estimated multiplications and additions for Gram matrices and decompositions.
    """

    num_inputs: int
    num_outputs: int
    num_parameters: int
    methods: Mapping[str, str]
    chunk_size: int
    group_elements: int
    memory_bytes: int
    memory_budget: int
    num_operations: float

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self.num_inputs * self.num_outputs

    def __str__(self) -> str:
        """One sentence."""
        dense = [name or "root" for name, method in self.methods.items() if method == "rows"]
        how = f"{len(self.methods)} layers, " + (f"{len(dense)} of them row by row" if dense else "all factored")
        chunks = "" if self.chunk_size >= self.num_inputs else f", {self.chunk_size} inputs at a time"
        return (
            f"{self.num_inputs} inputs x {self.num_outputs} outputs = {self.num_rows} rows by {self.num_parameters:,} "
            f"parameters ({how}): about {self.memory_bytes / 2**30:.2g} of {self.memory_budget / 2**30:.2g} GiB"
            f"{chunks} and {self.num_operations:.1e} operations for each measurement"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def plan_measurement(
    network: Network,
    probe: Probe,
    trace: Trace,
    *,
    num_inputs: int,
    num_outputs: int,
    num_blocks: int = 0,
    with_dense_hessian: bool = False,
    memory_budget: int | None = None,
) -> MeasurementPlan:
    """Cut a measurement to a memory budget.

    Args:
        network: To measure.
        probe: Some of its inputs.
        trace: Of these.
        num_inputs: Inputs of the whole probe, k.
        num_outputs: Outputs per input whose gradients count, c.
        num_blocks: Blocks of layers that are reported beside the layers.
        with_dense_hessian: Whether the Hessian is formed.
        memory_budget: Bytes; ``None`` means half of what is free.

    Raises:
        MemoryBudgetError: If it does not fit, however it is cut.
    """
    device = trace.outputs.device
    budget = int(_FREE_FRACTION * available_memory(device)) if memory_budget is None else memory_budget
    num_rows = num_inputs * num_outputs
    num_parameters = sum(layer.num_parameters for layer in network.layers)
    fixed = _NUMBER * ((_DECOMPOSITION + 3 * num_blocks) * num_rows**2 + 5 * num_parameters)
    fixed += min(_TEMPORARIES, budget // 8)
    if with_dense_hessian:
        fixed += _NUMBER * (6 * num_parameters**2 + 3 * num_rows * num_parameters)
    if fixed > budget:
        raise MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(budget)}, but the decomposition of {num_rows} rows by "
            f"{num_parameters} parameters needs {_gib(fixed)}: take a smaller probe, fewer outputs (max_outputs), "
            f"or a larger memory_budget"
        )
    # Every result is held once by the graph and once more by what is traced; activations are kept without a graph too.
    share = num_inputs / probe.size
    traced = sum(tensor.numel() for by in (trace.entering, trace.leaving) for left in by.values() for tensor in left)
    graph = _NUMBER * (3 * trace.operations.num_elements + 2 * traced) / probe.size
    activations = int(3 * _NUMBER * traced * share)
    rest = budget - fixed
    chunk_size = num_inputs
    if graph * num_inputs > rest / 2:
        chunk_size = int((rest - activations) / 3 / graph) if rest > activations else 0
    if chunk_size < 1:
        raise MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(budget)}, but the activations of {num_inputs} inputs "
            f"need {_gib(activations + int(graph))} beside {_gib(fixed)}: take a smaller probe, or a larger "
            f"memory_budget"
        )
    held = int(graph * chunk_size) + (activations if chunk_size < num_inputs else 0)
    group = min(GROUP_ELEMENTS, int((rest - held) / _NUMBER / _COPIES))
    sizes = layer_elements(network, trace, num_inputs=num_inputs, num_outputs=num_outputs)
    name, (_, largest) = max(sizes.items(), key=lambda item: item[1][1])
    if largest > group and largest * _NUMBER * _COPIES > rest - held:
        raise MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(budget)}, but the gradients of layer {name!r} need "
            f"{_gib(_COPIES * _NUMBER * largest)} beside {_gib(fixed + held)}: take a smaller probe, fewer outputs "
            f"(max_outputs), or a larger memory_budget"
        )
    gradients = _COPIES * _NUMBER * min(max(group, largest), sum(size for _, size in sizes.values()))
    return MeasurementPlan(
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_parameters=num_parameters,
        methods={layer: "factors" if is_factored else "rows" for layer, (is_factored, _) in sizes.items()},
        chunk_size=chunk_size,
        group_elements=group,
        memory_bytes=fixed + held + gradients,
        memory_budget=budget,
        num_operations=_num_operations(network, trace, probe.size, num_rows, num_blocks),
    )


def _num_operations(network: Network, trace: Trace, traced_inputs: int, num_rows: int, num_blocks: int) -> float:
    """For Gram matrices and decompositions; passes through the network cost as much as some training steps."""
    num_parts = len(network.layers) + num_blocks + 1
    total = 10.0 * num_parts * num_rows**3
    for use in trace.operations.uses:
        if isinstance(use, ProductUse):
            d_out, d_in = use.positions.shape
            positions = use.num_activations // (traced_inputs * d_in) if d_in else 0
            total += 2.0 * num_rows**2 * (d_out * d_in if positions > 1 else d_out)
            total += 2.0 * num_rows * positions * d_out * d_in if positions > 1 else 0.0
    return total


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2g} GiB"
