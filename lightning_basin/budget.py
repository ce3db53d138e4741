"""What a memory budget leaves for the inputs that are run at once, and for gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

from lightning_basin.gradients.sizes import LayerSize
from lightning_basin.limits import MAX_DENSE_PARAMETERS, NETWORK_PRODUCTS, HessianLimits, MemoryBudgetError
from lightning_basin.naming import escaped
from lightning_basin.network.trace import Trace
from lightning_basin.settings import HessianMode

FLOAT64_BYTES = 8
"""Bytes of an element of gradients."""

_DECOMPOSITION = 14  # m x m matrices at once: Gram matrices, a sketch of 2m columns, its triangular factor, work space
_BLOCK = 3  # m x m matrices of a block: its Gram matrix and its sketch
_KERNEL = 2  # m x m matrices where only the Gram matrix is asked for: it, and blocks of products that are added
_OUTPUT_CURVATURE = 6  # m x m matrices: second derivatives by the outputs, their factors, and those that decompose P
_DENSE_HESSIAN = 6  # N x N matrices, and half as many m x N matrices, where the Hessian is formed
_COPIES = 3  # copies of a group's factors at once: collected by output, stacked, and in a product
_QR_COPIES = 3  # copies of a layer's input activations whose rank is found: float64, transposed, in the decomposition
_PARAMETERS = 3  # vectors of all parameters: the copy, a combination of gradients, and one that is added to it
_HESSIAN_PARAMETERS = 2  # further ones of products with the Hessian
_SECOND_ORDER = 4  # ratio of the graph of a product with the Hessian to that of a forward pass
_TEMPORARIES = 2**28  # bytes of chunks that do not depend on the network
_LANCZOS_VECTORS = NETWORK_PRODUCTS + 3  # the basis, a product and what it is orthogonalized by


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """What is measured, as far as memory depends on it; attributes are arguments of `plan_measurement`.

    ``copied`` counts the bytes of other tensors of the module, ``budget`` those that may be used.
    """

    num_inputs: int
    num_outputs: int
    num_parameters: int
    num_blocks: int
    with_ranks: bool
    with_readout: bool
    hessian: HessianMode
    copied: int
    budget: int

    @property
    def _is_dense(self) -> bool:
        is_small = self.num_parameters <= MAX_DENSE_PARAMETERS
        return self.hessian == "dense" or (self.hessian == "auto" and is_small)

    @property
    def fixed(self) -> int:
        """Bytes of what cannot be cut."""
        num_rows = self.num_inputs * self.num_outputs
        num_matrices = _DECOMPOSITION + _BLOCK * self.num_blocks if self.with_ranks else _KERNEL
        num_matrices += self.with_readout + _OUTPUT_CURVATURE * (self.hessian is not False)
        num_vectors = _PARAMETERS + _HESSIAN_PARAMETERS * (self.hessian is not False)
        elements = num_matrices * num_rows**2 + num_vectors * self.num_parameters
        if self._is_dense:
            elements += _DENSE_HESSIAN * self.num_parameters**2 + _DENSE_HESSIAN // 2 * num_rows * self.num_parameters
        return FLOAT64_BYTES * elements + self.copied + min(_TEMPORARIES, self.budget // 8)

    @property
    def copies(self) -> int:
        """Copies of a group's factors at once: rows are combined once more for a readout, and for a Hessian."""
        return _COPIES + self.with_readout + (self.hessian is not False)

    def check_fixed(self) -> None:
        """Refuse a measurement that does not fit into memory, however it is cut."""
        if self.fixed <= self.budget:
            return
        what = "decomposition" if self.with_ranks else "Gram matrix"
        formed, other = (", with the Hessian,", "hessian='bracket', ") if self._is_dense else ("", "")
        beside = f", beside {_gib(self.copied)} of other tensors of the module," if self.copied >= 2**20 else ""
        raise self.error(
            f"the {what} of {self.num_inputs * self.num_outputs} rows by {self.num_parameters} parameters{formed}"
            f"{beside} needs {_gib(self.fixed)}: take {other}"
        )

    def error(self, reason: str) -> MemoryBudgetError:
        """The error that says what does not fit, and what to change."""
        fewer = "fewer outputs (max_outputs), " if self.with_ranks else ""
        return MemoryBudgetError(
            f"a measurement must fit into memory_budget, {_gib(self.budget)}, but {reason}a smaller probe, {fewer}or a "
            f"larger memory_budget"
        )


@dataclass(frozen=True)
class ChunkedRun:
    """How many inputs are run at once, and what is then left for gradients.

    Attributes:
        num_inputs: The number of inputs of the whole probe, k.
        graph: The bytes of the graph of one input.
        activations: The bytes of the activations of the whole probe, which are kept where it is run in chunks.
        rest: The bytes for all of this, and for gradients.
        copies: The number of copies of a group's factors at once.
        reserved: The bytes for the gradients of the largest layer.
    """

    num_inputs: int
    graph: int
    activations: int
    rest: int
    copies: int
    reserved: int

    @property
    def chunk_size(self) -> int:
        """Inputs that are run at once; 0 where not even one fits."""
        room = self.rest - self.reserved
        if self.graph * self.num_inputs <= min(self.rest / 2, room):
            return self.num_inputs
        fitting = (room - self.activations) / max(1, self.graph)
        # Gradients get two thirds of the memory, where these are not needed for a single input.
        sparing = (self.rest - self.activations) / 3 / max(1, self.graph)
        return max(0, int(min(fitting, max(1.0, sparing))))

    @property
    def held(self) -> int:
        """Bytes of one chunk, and of the activations of all where there are several."""
        return self.graph * self.chunk_size + (self.activations if self.chunk_size < self.num_inputs else 0)

    @property
    def elements(self) -> int:
        """Elements that the gradients of one layer, or their factors, may have."""
        return int((self.rest - self.held) / FLOAT64_BYTES / self.copies)

    def hessian_limits(self, num_parameters: int) -> HessianLimits:
        """What products with the Hessian may take of the same memory."""
        limits, rest = HessianLimits(), max(0, self.rest - self.held)
        basis = min(limits.basis_elements, _LANCZOS_VECTORS * num_parameters, rest // 3 // FLOAT64_BYTES)
        num_fitting = int((rest - FLOAT64_BYTES * basis) / _SECOND_ORDER / max(1, self.graph))
        chunk_size = min(self.chunk_size, num_fitting)
        return HessianLimits(
            chunk_size=max(1, chunk_size) if chunk_size < self.num_inputs else None,
            basis_elements=basis,
            batch_elements=min(limits.batch_elements, rest // 8 // FLOAT64_BYTES),
            waiting_elements=min(limits.waiting_elements, self.elements // 2),
        )

    def hessian_bytes(self, limits: HessianLimits) -> int:
        """Bytes that products with the Hessian take."""
        num_inputs = limits.chunk_size or self.num_inputs
        return FLOAT64_BYTES * limits.basis_elements + _SECOND_ORDER * self.graph * num_inputs


def cut_to_budget(
    request: MemoryRequest, sizes: Mapping[str, LayerSize], trace: Trace, traced_inputs: int
) -> ChunkedRun:
    """Choose how many inputs are run at once; refuse a budget into which not even one fits."""
    num_inputs, element = request.num_inputs, trace.outputs.element_size()
    entering = [sum(tensor.numel() for tensor in tensors) for tensors in trace.entering.values()]
    # What leaves a layer and enters the next one is held once.
    held = {
        id(tensor): tensor for by in (trace.entering, trace.leaving) for tensors in by.values() for tensor in tensors
    }
    traced = sum(tensor.numel() for tensor in held.values())
    name, least = max(((name, size.least) for name, size in sizes.items()), key=itemgetter(1))
    decomposed = _QR_COPIES * max(entering, default=0) * num_inputs // traced_inputs if request.with_ranks else 0
    run = ChunkedRun(
        num_inputs=num_inputs,
        # Every result is held once by the graph and once more by what is traced.
        graph=element * (3 * trace.operations.num_elements + 2 * traced) // traced_inputs,
        activations=(element + 2 * FLOAT64_BYTES) * traced * num_inputs // traced_inputs,
        rest=request.budget - request.fixed,
        copies=request.copies,
        reserved=FLOAT64_BYTES * max(request.copies * least, decomposed),
    )
    # A layer whose dense rows are formed chunk by chunk holds its factors beside the graph.
    chunked = [size.factors or 0 for size in sizes.values() if size.method(run.elements) == "chunks"]
    run = replace(run, graph=run.graph + FLOAT64_BYTES * _COPIES * max(chunked, default=0) // num_inputs)
    if run.chunk_size < 1:
        raise request.error(
            f"the gradients of layer {escaped(name)!r} need {_gib(run.reserved)}, and the activations of "
            f"{num_inputs} inputs {_gib(run.activations + run.graph)}, beside {_gib(request.fixed)}: take "
        )
    return run


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2g} GiB"
