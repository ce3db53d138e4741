"""What a measurement will hold and compute, said before it starts, and cut to the memory that there is."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter

from torch import nn

from lightning_basin.free_memory import available_memory
from lightning_basin.gradients.sizes import GradientMethod, LayerSize, layer_sizes
from lightning_basin.limits import (
    GROUP_ELEMENTS,
    LAYER_PRODUCTS,
    MAX_DENSE_PARAMETERS,
    NETWORK_PRODUCTS,
    HessianLimits,
    MemoryBudgetError,
)
from lightning_basin.naming import escaped
from lightning_basin.network.copying import tensors_held_by
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ProductUse
from lightning_basin.probe import Probe
from lightning_basin.settings import HessianMode

_NUMBER = 8  # bytes of a float64, in which gradients are held and decomposed
_DECOMPOSITION = 14  # m x m matrices at once: Gram matrices, a sketch of 2 m columns, its triangular factor, work space
_KERNEL = 2  # m x m matrices where only the Gram matrix is wanted: it, and blocks of products that are added
_COPIES = 3  # of a group's factors at once: collected by output, stacked, and in a product
_READOUT = 1  # m x m matrices at most: derivatives of the behavior by the outputs
_OUTPUT_CURVATURE = 6  # second derivatives by the outputs, their factors, and what the decomposition of P begins with
_SECOND_ORDER = 4  # times the graph of a forward pass takes that of a product with the Hessian
_TEMPORARIES = 2**28  # bytes of chunks that do not depend on the network
_FREE_FRACTION = 0.5
_LANCZOS_VECTORS = NETWORK_PRODUCTS + 3  # the basis, a product and what it is orthogonalized by


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """How large a measurement is, and how it is cut.

    Attributes:
        num_inputs: Inputs of the probe, k.
        num_outputs: Outputs per input whose gradients count, c.
        num_parameters: Trainable parameters, N.
        methods: How the gradients of each layer are found: ``"factors"`` of the operations that use it, ``"chunks"``
            of inputs at a time, or dense ``"rows"``.
        chunk_size: Inputs that are run at once.
        layer_elements: Float64 elements that the factors or the dense rows of one layer may have.
        hessian_limits: What the Hessian may take; ``None`` where it is not measured.
        memory_bytes: Estimated peak, beside what the process holds already.
        memory_budget: That it was cut to, in bytes.
        num_operations: Estimated multiplications and additions for Gram matrices, decompositions and the Hessian.
        unseen: Names of layers that are known to be trained, and on which the outputs do not depend.
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
    num_operations: float
    unseen: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self.num_inputs * self.num_outputs

    def __str__(self) -> str:
        """One sentence."""
        counts: Counter[str] = Counter(self.methods.values())
        others = [
            f"{counts[method]} of them {words}"
            for method, words in (("chunks", "chunk by chunk"), ("rows", "row by row"))
            if counts[method]
        ]
        how = f"{len(self.methods)} layers, " + (", ".join(others) or "all factored")
        chunks = "" if self.chunk_size >= self.num_inputs else f", {self.chunk_size} inputs at a time"
        return (
            f"{self.num_inputs} inputs x {self.num_outputs} outputs = {self.num_rows} rows by {self.num_parameters:,} "
            f"parameters ({how}): about {self.memory_bytes / 2**30:.2g} of {self.memory_budget / 2**30:.2g} GiB"
            f"{chunks} and {self.num_operations:.1e} operations for each measurement"
        )


def copied_bytes(module: nn.Module) -> int:
    """Bytes of the tensors of a module, registered or not, that are no trainable parameters.

    Example:
        >>> import torch
        >>> module = nn.Linear(1, 1)
        >>> module.table = torch.zeros(5, dtype=torch.float64)
        >>> copied_bytes(module)
        40
    """
    held = {id(tensor): tensor for part in module.modules() for tensor in tensors_held_by(vars(part))}
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in held.values()
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad)
    )


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
        network: To measure.
        probe: Some of its inputs.
        trace: Of these.
        num_inputs: Inputs of the whole probe, k.
        num_outputs: Outputs per input whose gradients count, c.
        num_blocks: Blocks of layers that are reported beside the layers.
        with_ranks: Whether there is more to find than the Gram matrix.
        with_readout: Whether the behavior is a function of the outputs, whose derivative combines all rows.
        hessian: How its null space is measured; ``False`` where it is not.
        memory_budget: Bytes; ``None`` means half of what is free.

    Raises:
        MemoryBudgetError: If it does not fit, however it is cut.
    """
    device = trace.outputs.device
    copied = copied_bytes(network.module)
    # What is free was looked at after the copy was made.
    budget = int(_FREE_FRACTION * available_memory(device)) + copied if memory_budget is None else int(memory_budget)
    num_rows = num_inputs * num_outputs
    num_parameters = sum(layer.num_parameters for layer in network.layers)
    with_hessian = hessian is not False
    with_dense_hessian = hessian == "dense" or (hessian == "auto" and num_parameters <= MAX_DENSE_PARAMETERS)
    num_matrices = _DECOMPOSITION + 3 * num_blocks if with_ranks else _KERNEL
    fixed = _NUMBER * (num_matrices * num_rows**2 + 5 * num_parameters)
    fixed += copied + min(_TEMPORARIES, budget // 8)
    fixed += _NUMBER * (_READOUT * with_readout + _OUTPUT_CURVATURE * with_hessian) * num_rows**2
    if with_dense_hessian:
        fixed += _NUMBER * (6 * num_parameters**2 + 3 * num_rows * num_parameters)
    what, fewer = ("decomposition", "fewer outputs (max_outputs), ") if with_ranks else ("Gram matrix", "")
    formed, other = (", with the Hessian,", "hessian='bracket', ") if with_dense_hessian else ("", "")
    if fixed > budget:
        raise MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(budget)}, but the {what} of {num_rows} rows by "
            f"{num_parameters} parameters{formed}{_beside(copied)} needs {_gib(fixed)}: take {other}a smaller probe, "
            f"{fewer}or a larger memory_budget"
        )
    sizes = layer_sizes(network, trace, num_inputs=num_inputs, num_outputs=num_outputs)
    copies = _COPIES + with_readout + with_hessian  # Rows are combined once more, for each.
    name, least = max(((name, size.least) for name, size in sizes.items()), key=itemgetter(1))
    reserved = copies * _NUMBER * least
    alone = _Passes.of(trace, probe.size, num_inputs, budget - fixed, copies, reserved)
    beside = _numbers_beside_the_graph(sizes.values(), alone.elements)
    passes = _Passes.of(trace, probe.size, num_inputs, budget - fixed, copies, reserved, beside=beside)
    if passes.chunk_size < 1:
        raise MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(budget)}, but the gradients of layer {escaped(name)!r} "
            f"need {_gib(reserved)}, and the activations of {num_inputs} inputs "
            f"{_gib(passes.activations + passes.graph)}, beside {_gib(fixed)}: take a smaller probe, {fewer}or a "
            f"larger memory_budget"
        )
    largest = max(size.needed(passes.elements) for size in sizes.values())
    group = min(passes.elements, max(GROUP_ELEMENTS, largest))
    peak = copies * _NUMBER * min(group, sum(size.peak for size in sizes.values()))
    limits = None
    if with_hessian:  # It comes after the gradients, in their place.
        limits = alone.hessian_limits(num_parameters, largest_chunk=passes.chunk_size)
        basis = min(limits.basis_elements, _LANCZOS_VECTORS * num_parameters)
        peak = max(peak, _NUMBER * basis + _SECOND_ORDER * alone.graph * (limits.chunk_size or num_inputs))
    return MeasurementPlan(
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_parameters=num_parameters,
        methods={layer: size.method(passes.elements) for layer, size in sizes.items()},
        chunk_size=passes.chunk_size,
        layer_elements=passes.elements,
        hessian_limits=limits,
        memory_bytes=min(budget, fixed + passes.held + peak),
        memory_budget=budget,
        num_operations=_num_operations(network, trace, probe.size, num_rows, num_blocks)
        + (_hessian_operations(trace, probe.size, num_inputs, num_parameters, is_dense=with_dense_hessian))
        * with_hessian,
    )


def _beside(num_bytes: int) -> str:
    return f", beside {_gib(num_bytes)} of other tensors of the module," if num_bytes >= 2**20 else ""


def _numbers_beside_the_graph(sizes: Iterable[LayerSize], max_elements: int) -> int:
    """What layers that are not held as a whole take for all inputs, if these are run at once."""
    return max((_COPIES * (size.factors or 0) for size in sizes if size.method(max_elements) == "chunks"), default=0)


@dataclass(frozen=True)
class _Passes:
    """How many inputs are run at once, and what is then left for gradients.

    Attributes:
        num_inputs: Of the whole probe.
        graph: Bytes of the graph of one input.
        activations: Bytes of those of the whole probe, which are kept where it is run in chunks.
        rest: Bytes for all of this, and for gradients.
        copies: How many of a group's factors there are at once.
        reserved: Bytes for the gradients of the largest layer.
    """

    num_inputs: int
    graph: int
    activations: int
    rest: int
    copies: int
    reserved: int

    @classmethod
    def of(
        cls,
        trace: Trace,
        traced_inputs: int,
        num_inputs: int,
        rest: int,
        copies: int,
        reserved: int,
        *,
        beside: int = 0,
    ) -> "_Passes":
        """From a trace of some inputs, and from the numbers that all inputs need beside the graph."""
        element = trace.outputs.element_size()
        # Every result is held once by the graph and once more by what is traced.
        traced = sum(
            tensor.numel() for by in (trace.entering, trace.leaving) for left in by.values() for tensor in left
        )
        held = element * (3 * trace.operations.num_elements + 2 * traced) / traced_inputs
        return cls(
            num_inputs,
            int(held + _NUMBER * beside / num_inputs),
            int((element + 2 * _NUMBER) * traced * num_inputs / traced_inputs),
            rest,
            copies,
            reserved,
        )

    @property
    def chunk_size(self) -> int:
        """Inputs that are run at once; 0 where not even one fits."""
        room = self.rest - self.reserved
        if self.graph * self.num_inputs <= min(self.rest / 2, room):
            return self.num_inputs
        return max(0, int(min((self.rest - self.activations) / 3, room - self.activations) / max(1, self.graph)))

    @property
    def held(self) -> int:
        """Bytes of one chunk, and of the activations of all where there are several."""
        return self.graph * self.chunk_size + (self.activations if self.chunk_size < self.num_inputs else 0)

    @property
    def elements(self) -> int:
        """Elements that the gradients of one layer, or their factors, may have."""
        return int((self.rest - self.held) / _NUMBER / self.copies)

    def hessian_limits(self, num_parameters: int, *, largest_chunk: int) -> HessianLimits:
        """What products with the Hessian may take of the same memory.

        Args:
            num_parameters: Trainable parameters, N.
            largest_chunk: Inputs whose outputs are in one graph while a measurement runs.
        """
        limits, rest = HessianLimits(), max(0, self.rest - self.held)
        basis = min(limits.basis_elements, _LANCZOS_VECTORS * num_parameters, rest // 3 // _NUMBER)
        chunk_size = min(largest_chunk, int((rest - _NUMBER * basis) / _SECOND_ORDER / max(1, self.graph)))
        return HessianLimits(
            chunk_size=max(1, chunk_size) if chunk_size < self.num_inputs else None,
            basis_elements=basis,
            batch_elements=min(limits.batch_elements, rest // 8 // _NUMBER),
            waiting_elements=min(limits.waiting_elements, self.elements // 2),
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


def _hessian_operations(
    trace: Trace, traced_inputs: int, num_inputs: int, num_parameters: int, *, is_dense: bool
) -> float:
    """For all products that there may be, at some six forward passes each, their orthogonalization, and eigenvalues."""
    uses = [use for use in trace.operations.uses if isinstance(use, ProductUse)]
    forward = sum(2.0 * use.num_activations * use.positions.shape[0] for use in uses) * num_inputs / traced_inputs
    total = (NETWORK_PRODUCTS + LAYER_PRODUCTS) * 6 * forward + 4.0 * NETWORK_PRODUCTS**2 * num_parameters
    return total + is_dense * (num_parameters * 6 * forward + 10.0 * num_parameters**3)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2g} GiB"
