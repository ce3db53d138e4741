"""Which entries of an operation's result belong to which input, and the outputs' derivatives by them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_basin.gradients.assemble import MeasuredUse
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ElementwiseUse, Leaving, ProductUse, Use


@dataclass(frozen=True)
class InputAxis:
    """Where the parts of the k inputs lie along an axis of what an operation returns.

    Attributes:
        axis: Of the result's derivative, in the form in which a use takes it; 0 for products.
        adjacent: Whether the parts of one input follow each other, or inputs alternate.
    """

    axis: int
    adjacent: bool

    def split(self, tensor: Tensor, num_inputs: int) -> Tensor:
        """The axis in front, as ``(k, n / k, ...)``."""
        moved = tensor.movedim(self.axis, 0)
        count = moved.shape[0] // num_inputs
        if self.adjacent:
            return moved.reshape(num_inputs, count, *moved.shape[1:])
        return moved.reshape(count, num_inputs, *moved.shape[1:]).transpose(0, 1)


def possible_input_axes(use: Use, signal: Tensor, chosen: Tensor) -> list[InputAxis]:
    """Where the inputs can be, seen from a derivative of the outputs of some inputs only.

    What belongs to other inputs is exactly zero there. So may more be, where a layer is dead: further choices of inputs
    then tell.

    Args:
        use: Of a parameter.
        signal: Derivative by the result, of a sum over the outputs of the chosen inputs.
        chosen: Which inputs these are, bool, shape ``(k,)``.
    """
    num_inputs = chosen.numel()
    if isinstance(use, ProductUse):
        axes, found = [0], use.signals(signal)
    else:
        found = use.contributions(signal)
        axes = [axis for axis in range(found.ndim) if use.positions.shape[axis] == 1]
    nonzero = found != 0
    layouts = [
        InputAxis(axis, adjacent)
        for axis in axes
        if found.shape[axis] % num_inputs == 0
        # With one part each it is the same.
        for adjacent in ((True,) if found.shape[axis] == num_inputs else (True, False))
    ]
    return [layout for layout in layouts if not bool(layout.split(nonzero, num_inputs)[~chosen].any())]


def signal_of_inputs(use: Use, signal: Tensor, layout: InputAxis, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """Derivatives input by input: ``(k, t, d_out)`` for a product, ``(k, n)`` by the n used entries else."""
    signal = signal.to(dtype)  # Before anything is added up.
    if isinstance(use, ProductUse):
        return layout.split(use.signals(signal), num_inputs).flatten(1, -2)
    contributions = layout.split(use.contributions(signal), num_inputs)
    used = use.positions.movedim(layout.axis, 0)  # Of length 1 there.
    repeated = [axis for axis in range(1, contributions.ndim) if used.shape[axis - 1] == 1]
    summed = contributions.sum(repeated) if repeated else contributions
    return summed.unsqueeze(-1).flatten(1)


def activations_of_inputs(use: ProductUse, layout: InputAxis, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """What is multiplied, input by input, shape ``(k, t, d_in)``."""
    return layout.split(use.activations().to(dtype), num_inputs).flatten(1, -2)


_NUM_CHOICES = 3  # of inputs whose derivatives may tell where the inputs are; one does, unless a layer is dead


def measured_in_chunk(network: Network, trace: Trace, uses: Mapping[int, Use]) -> dict[int, MeasuredUse]:
    """The uses of which it is clear what belongs to which input."""
    outputs, dtype = network.rows(trace.outputs), network.gradient_dtype
    num_inputs = outputs.shape[0]
    edges = _edges(uses)
    layouts = _input_axes(outputs, uses)
    biases = _biases(uses, layouts)
    signals: dict[int, Tensor] = {}
    for j in range(outputs.shape[1]):
        by_edge = _derivatives(outputs[:, j].sum(), edges)
        for index, layout in layouts.items():
            if index not in biases:
                signal = by_edge[id(uses[index].leaving)]
                found = signal_of_inputs(uses[index], signal, layout, num_inputs, dtype)
                if j == 0:  # Written where they stay, as twice the memory takes twice the time.
                    signals[index] = found.new_empty(num_inputs, outputs.shape[1], *found.shape[1:])
                signals[index][:, j] = found
    measured = {}
    for index in list(signals):
        use, layout = uses[index], layouts[index]
        entering = activations_of_inputs(use, layout, num_inputs, dtype) if isinstance(use, ProductUse) else None
        measured[index] = MeasuredUse(use, signals.pop(index), entering)
    for index, product in biases.items():
        measured[index] = MeasuredUse(uses[index], _summed_positions(measured[product].signals), None)
    return measured


def _biases(uses: Mapping[int, Use], layouts: Mapping[int, InputAxis]) -> dict[int, int]:
    """Biases by the products that the same operation adds them to, whose derivatives are theirs."""
    products = {id(use): index for index, use in uses.items() if index in layouts and isinstance(use, ProductUse)}
    return {
        index: products[id(use.shifts)]
        for index, use in uses.items()
        if index in layouts
        and isinstance(use, ElementwiseUse)
        and use.shifts is not None
        and id(use.shifts) in products
        and use.shifts.leaving is use.leaving
        and use.positions.numel() == use.shifts.positions.shape[0]
    }


def _summed_positions(signals: Tensor) -> Tensor:
    """Of products, shape ``(k, c, t, d_out)``; with one position they are not copied."""
    return signals.squeeze(2) if signals.shape[2] == 1 else signals.sum(2)


def _edges(uses: Mapping[int, Use]) -> list[Leaving]:
    return list({id(use.leaving): use.leaving for use in uses.values()}.values())


def _input_axes(outputs: Tensor, uses: Mapping[int, Use]) -> dict[int, InputAxis]:
    """Where the inputs are in what left each operation, seen from the outputs of some of them."""
    edges = _edges(uses)
    generator = Generator().manual_seed(0)
    num_inputs = outputs.shape[0]
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    layouts: dict[int, list[InputAxis]] = {}
    for chosen in _choices(num_inputs, generator):
        chosen = chosen.to(outputs.device)
        by_edge = _derivatives((outputs * weights)[chosen].sum(), edges)
        for index, use in uses.items():
            possible = possible_input_axes(use, by_edge[id(use.leaving)], chosen)
            layouts[index] = [layout for layout in layouts.get(index, possible) if layout in possible]
        if all(len(possible) <= 1 for possible in layouts.values()):
            break
    return {index: possible[0] for index, possible in layouts.items() if possible}


def _choices(num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """Some of the inputs, then all others, and so on."""
    for _ in range(_NUM_CHOICES):
        chosen = torch.randint(0, 2, (num_inputs,), generator=generator).bool()
        chosen[0], chosen[-1] = True, num_inputs == 1
        yield chosen
        if num_inputs > 1:
            yield ~chosen


def _derivatives(output: Tensor, places: Sequence[Leaving]) -> dict[int, Tensor]:
    """Derivatives of a number by what left some operations, by the identity of the place."""
    edges = {id(leaving): leaving.edge for leaving in places if leaving.edge is not None}
    shapes = {id(leaving): leaving.shape for leaving in places}
    found: Sequence[Tensor | None] = [None] * len(edges)
    if edges and output.requires_grad:  # Else no input of a chunk has entered the layers, or no parameter is used.
        found = torch.autograd.grad(output, list(edges.values()), retain_graph=True, allow_unused=True)
    return {
        place: output.new_zeros(shapes[place]) if gradient is None else gradient
        for place, gradient in zip(edges, found, strict=True)
    }
