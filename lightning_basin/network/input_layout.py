"""Which part of the tensors that enter and leave a layer belongs to which input."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import are_same, largest_entry
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe

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
            entering={name: rows(entering_of, name) for name in trace.entering},
            leaving={name: rows(leaving_of, name) for name in trace.entering},
        )


def entering_of(name: str, trace: Trace) -> list[Tensor]:
    """Return the tensors that entered a layer; none where it was not called."""
    return trace.entering.get(name, [])


def leaving_of(name: str, trace: Trace) -> list[Tensor]:
    """Return the tensors that left a layer; none where it was not called."""
    return trace.leaving.get(name, [])


def _rows_per_input(
    tensors: Sequence[Tensor], others: Sequence[tuple[Tensor, list[Tensor]]], num_inputs: int, *, rtol: float
) -> Rows:
    """Where the inputs are in tensors of all inputs, seen from those in their place in other batches."""
    parts = [by_parts(tensor.detach()) for tensor in tensors]
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
    numbers = real_numbers(tensor)
    tolerance = rtol * largest_entry(numbers)

    def agrees(expected: Tensor, found: Tensor) -> bool:
        if expected.shape != found.shape:
            return False
        found = real_numbers(found)
        if found.numel() and bool((expected - found).abs_().amax() <= tolerance):  # So do most: in few passes.
            return True
        return bool(are_same(expected.reshape(1, -1), found.reshape(1, -1), tolerance))

    count = len(tensor) // num_inputs if tensor.ndim else 0
    if count and len(tensor) == num_inputs * count:
        by_input = numbers.reshape(num_inputs, count, *numbers.shape[1:])
        if all(agrees(by_input[indices.to(tensor.device)].flatten(0, 1), by_parts(found)) for indices, found in others):
            return count
    return 0 if all(agrees(numbers, by_parts(found)) for _, found in others) else None


def by_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, side by side; any other as it is."""
    return torch.cat([tensor.real, tensor.imag], dim=-1) if tensor.is_complex() else tensor


def real_numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float64; a complex one becomes its real and imaginary parts, side by side."""
    return by_parts(tensor).to(torch.float64)
