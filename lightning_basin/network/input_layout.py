"""Which rows of the tensors that enter and leave a layer belong to which input."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import are_same, largest_entry
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.tensors import as_result, float64_device

Rows = list[int] | None
"""The rows per input of each of some tensors, 0 for one that all inputs share; ``None`` if rows are scattered."""


@dataclass(frozen=True)
class InputLayout:
    """The rows per input of the tensors that enter and leave each layer."""

    entering: Mapping[str, Rows]
    leaving: Mapping[str, Rows]


def input_layout(
    network: Network, probe: Probe, trace: Trace, regrouped: Sequence[tuple[Tensor, Trace]]
) -> InputLayout:
    """Find the rows of each input in traced tensors, by comparison with runs of regrouped inputs."""
    rtol = agreement_rtol(network.dtype)

    def rows(of: Callable[[str, Trace], list[Tensor]], name: str) -> Rows:
        chunks = [(indices, of(name, chunk)) for indices, chunk in regrouped]
        return _rows_per_input(of(name, trace), chunks, probe.size, rtol=rtol)

    with torch.no_grad():
        return InputLayout(
            entering={name: rows(entering_of, name) for name in trace.entering},
            leaving={name: rows(leaving_of, name) for name in trace.entering},
        )


@torch.no_grad()
def keeps_layout(
    layout: InputLayout | None, trace: Trace, indices: Tensor, some: Trace, *, num_inputs: int, rtol: float
) -> bool:
    """Return whether some inputs, run without the others, have the results that they have among all inputs.

    Everything is compared on the device, and read in one transfer; without a layout, the outputs alone.
    """
    pairs = [(trace.outputs, some.outputs, 1)]
    for rows, of in () if layout is None else ((layout.entering, entering_of), (layout.leaving, leaving_of)):
        for name, counts in rows.items():
            tensors, others = of(name, trace), of(name, some)
            if counts is None:
                continue
            if len(tensors) != len(counts) or len(others) != len(counts):
                return False
            pairs += zip(tensors, others, counts, strict=True)
    # What leaves a layer often enters the next one as the same tensor.
    distinct = {(id(tensor), id(other), count): (tensor, other, count) for tensor, other, count in pairs}
    chosen, extremes = indices.to(float64_device(trace.outputs.device)), []
    for tensor, other, count in distinct.values():
        elements, evaluated = real_elements(tensor), real_elements(other)
        expected = _rows_of(elements, chosen, count, num_inputs)
        if expected.shape != evaluated.shape:
            return False
        if expected.numel():
            extremes += [*(expected - evaluated).aminmax(), *elements.aminmax()]
    differences, sizes = torch.stack(extremes).cpu().abs().view(-1, 2, 2).amax(2).unbind(1)
    return bool((differences <= rtol * sizes).all())


def _rows_of(elements: Tensor, chosen: Tensor, count: int, num_inputs: int) -> Tensor:
    """The rows of the chosen inputs, of a tensor with so many adjacent rows for each; all of one that inputs share."""
    if count <= 1:
        return elements[chosen] if count else elements
    return elements.reshape(num_inputs, count, *elements.shape[1:])[chosen].flatten(0, 1)


def entering_of(name: str, trace: Trace) -> list[Tensor]:
    """Return the tensors that entered a layer; none where it was not called."""
    return trace.entering.get(name, [])


def leaving_of(name: str, trace: Trace) -> list[Tensor]:
    """Return the tensors that left a layer; none where it was not called."""
    return trace.leaving.get(name, [])


def _rows_per_input(
    tensors: Sequence[Tensor], chunks: Sequence[tuple[Tensor, list[Tensor]]], num_inputs: int, *, rtol: float
) -> Rows:
    """Find the rows per input of tensors of all inputs, by the tensors in the same places of regrouped chunks."""
    if num_inputs == 1:
        return [int(tensor.ndim > 0 and len(tensor) == 1) for tensor in map(by_parts, tensors)]
    if any(len(of_chunk) != len(tensors) for _, of_chunk in chunks):
        return None
    counts = [
        _count_rows(by_parts(tensor.detach()), [(indices, held[place]) for indices, held in chunks], num_inputs, rtol)
        for place, tensor in enumerate(tensors)
    ]
    return None if None in counts else [count for count in counts if count is not None]


def _count_rows(tensor: Tensor, chunks: Sequence[tuple[Tensor, Tensor]], num_inputs: int, rtol: float) -> int | None:
    """Count the rows per input of a tensor: 0 if it is the same for all inputs, ``None`` if they are not adjacent."""
    elements = real_elements(tensor)
    tolerance = rtol * largest_entry(elements)

    def agrees(expected: Tensor, evaluated: Tensor) -> bool:
        if expected.shape != evaluated.shape:
            return False
        evaluated = real_elements(evaluated)
        if evaluated.numel() and bool((expected - evaluated).abs_().amax() <= tolerance):  # Most do: in few passes.
            return True
        return bool(are_same(expected.reshape(1, -1), evaluated.reshape(1, -1), tolerance))

    count = len(tensor) // num_inputs if tensor.ndim else 0
    if count and len(tensor) == num_inputs * count:
        by_input = elements.reshape(num_inputs, count, *elements.shape[1:])
        expected = (by_input[indices.to(elements.device)].flatten(0, 1) for indices, _ in chunks)
        if all(agrees(rows, by_parts(held)) for rows, (_, held) in zip(expected, chunks, strict=True)):
            return count
    return 0 if all(agrees(elements, by_parts(held)) for _, held in chunks) else None


def by_parts(tensor: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts, side by side; any other as it is."""
    return torch.cat([tensor.real, tensor.imag], dim=-1) if tensor.is_complex() else tensor


def real_elements(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor in float64; a complex one becomes its real and imaginary parts, side by side."""
    return as_result(by_parts(tensor))
