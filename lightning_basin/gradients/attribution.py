"""Which slice of an operation's output belongs to which input, and the derivatives of the network's outputs by it.

Axis letters: k inputs, c outputs per input, t positions of a sequence, n elements of a parameter.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from lightning_basin.gradients.assemble import MeasuredUse
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ElementwiseUse, OperationOutput, ProductUse, Use
from lightning_basin.tensors import as_result

BoolArray: TypeAlias = npt.NDArray[np.bool_]

_NUM_CHOICES = 3
"""Choices of inputs whose derivatives may show where the inputs are; one shows it, unless a layer is dead."""


@dataclass(frozen=True)
class InputAxis:
    """The order of the k inputs along an axis of an operation's output.

    Attributes:
        axis: The axis of the output's derivative, in the form in which a use takes it; 0 for products.
        adjacent: Whether all elements of one input follow each other; else the inputs alternate.
    """

    axis: int
    adjacent: bool

    def split(self, tensor: Tensor, num_inputs: int) -> Tensor:
        """Move this axis to the front and split it by inputs, shape ``(k, length / k, ...)``."""
        moved = tensor.movedim(self.axis, 0) if self.axis else tensor
        count = moved.shape[0] // num_inputs
        if self.adjacent:
            return moved.reshape(num_inputs, count, *moved.shape[1:])
        return moved.reshape(count, num_inputs, *moved.shape[1:]).transpose(0, 1)


def measure_uses(network: Network, trace: Trace, uses: Mapping[int, Use], max_elements: int) -> dict[int, MeasuredUse]:
    """Measure the uses, by their position in the record, in whose outputs the inputs can be distinguished.

    A use is left out where it is not clear which slice of its output belongs to which input. The derivatives of all
    outputs are found at once where they have at most ``max_elements`` elements.
    """
    outputs, dtype = network.rows(trace.outputs), network.gradient_dtype
    num_inputs, num_outputs = outputs.shape
    products_of_biases = _products_of_biases(uses)
    others = {index: use for index, use in uses.items() if index not in products_of_biases}
    found = None
    if num_outputs > 1 and num_outputs * trace.operations.num_elements <= max_elements:
        # Not every backward pass can be batched, and those without a rule of their own warn.
        with suppress(RuntimeError, TypeError, ValueError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = _output_gradients(outputs, others, dtype, is_batched=True)
    if found is None:
        found = _output_gradients(outputs, others, dtype, is_batched=False)
    measured = {}
    for index in list(found):
        (axis, output_gradients), use, activations = found.pop(index), uses[index], None
        if isinstance(use, ProductUse):
            activations = axis.split(as_result(use.read_activations(), dtype), num_inputs).flatten(1, -2)
        measured[index] = MeasuredUse(use, output_gradients, activations)
    for index, product in products_of_biases.items():
        if product in measured:
            gradients = measured[product].output_gradients
            # One position is not copied.
            summed = gradients.squeeze(2) if gradients.shape[2] == 1 else gradients.sum(2)
            measured[index] = MeasuredUse(uses[index], summed, None)
    return measured


def _output_gradients(
    outputs: Tensor, uses: Mapping[int, Use], dtype: torch.dtype, *, is_batched: bool
) -> dict[int, tuple[InputAxis, Tensor]]:
    """The order of the inputs and the output gradients of some uses, as in `MeasuredUse`."""
    num_inputs, num_outputs = outputs.shape
    places, choices = output_places(uses), _choices(outputs)
    units = torch.eye(num_outputs, dtype=outputs.dtype, device=outputs.device).unsqueeze(1)
    units = units.expand(num_outputs, num_inputs, num_outputs)
    if is_batched:
        chosen, weights = next(choices)
        batches = differentiate_at(places, outputs, torch.cat([weights.unsqueeze(0), units]), is_batched=True)
        axes = _input_axes(outputs, uses, {place: batch[0] for place, batch in batches.items()}, chosen, choices)
        return {
            index: (
                axis,
                torch.vmap(_arranged(uses[index], axis, num_inputs, dtype), out_dims=1)(batch[1:]).contiguous(),
            )
            for index, axis in axes.items()
            for batch in [batches[id(uses[index].output)]]
        }
    found: dict[int, tuple[InputAxis, Tensor]] = {}
    for j, weights in enumerate(units):
        derivatives = differentiate_at(places, outputs, weights)
        if j == 0:
            axes = _input_axes(outputs, uses, derivatives, np.ones(num_inputs, dtype=bool), choices)
        for index, axis in axes.items():
            of_output = _arranged(uses[index], axis, num_inputs, dtype)(derivatives[id(uses[index].output)])
            if num_outputs == 1:
                found[index] = axis, of_output.unsqueeze(1).contiguous()
                continue
            if j == 0:  # Written to their final place: a copy would take twice the memory and twice the time.
                found[index] = axis, of_output.new_empty(num_inputs, num_outputs, *of_output.shape[1:])
            found[index][1][:, j] = of_output
    return found


def _arranged(use: Use, axis: InputAxis, num_inputs: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function from the derivative of an output, summed over the inputs, to its gradients, input by input.

    Their shape is ``(k, t, d_out)`` for a product, else ``(k, n)``.
    """

    def arranged(derivative: Tensor) -> Tensor:
        derivative = as_result(derivative, dtype)  # Before anything is added up.
        if isinstance(use, ProductUse):
            return axis.split(use.arrange(derivative), num_inputs).flatten(1, -2)
        contributions = axis.split(use.contributions(derivative), num_inputs)
        others = [length for dim, length in enumerate(use.elements.shape) if dim != axis.axis]
        repeated = [1, *(dim for dim, length in enumerate(others, start=2) if length == 1)]
        return contributions.sum(repeated).unsqueeze(-1).flatten(1)

    return arranged


def _products_of_biases(uses: Mapping[int, Use]) -> dict[int, int]:
    """For each bias the product to which the same operation adds it, and whose output gradients are its own."""
    products = {id(use): index for index, use in uses.items() if isinstance(use, ProductUse)}
    return {
        index: products[id(use.shifts)]
        for index, use in uses.items()
        if isinstance(use, ElementwiseUse)
        and use.shifts is not None
        and id(use.shifts) in products
        and use.shifts.output is use.output
        and use.elements.count == use.shifts.elements.shape[0]
    }


def _input_axes(
    outputs: Tensor,
    uses: Mapping[int, Use],
    derivatives: Mapping[int, Tensor],
    chosen: BoolArray,
    choices: Iterator[tuple[BoolArray, Tensor]],
) -> dict[int, InputAxis]:
    """Where the inputs lie in the result of each use; absent where unclear.

    Where only one order is possible it is taken: whether it is right shows when autograd confirms the gradients.
    """
    axes = _possible_input_axes(uses, derivatives, chosen)
    while unclear := {index: uses[index] for index, possible in axes.items() if len(possible) > 1}:
        further, weights = next(choices, (None, None))
        if further is None or weights is None:
            break
        found = _possible_input_axes(unclear, differentiate_at(output_places(unclear), outputs, weights), further)
        axes |= {index: [axis for axis in axes[index] if axis in possible] for index, possible in found.items()}
    return {index: possible[0] for index, possible in axes.items() if possible}


def _possible_input_axes(
    uses: Mapping[int, Use], derivatives: Mapping[int, Tensor], chosen: BoolArray
) -> dict[int, list[InputAxis]]:
    """Where the inputs can lie in the result of each use, seen from the derivative of some inputs' outputs.

    The derivative is exactly zero in all that belongs to other inputs. It may be zero elsewhere too, where a layer is
    dead; then further choices of inputs decide.
    """
    num_inputs = len(chosen)
    possible: dict[int, list[InputAxis]] = {index: [] for index in uses}
    profiles: list[tuple[int, InputAxis, Tensor]] = []
    for index, use in uses.items():
        for axis, contributions in _axes_of_inputs(use, derivatives[id(use.output)]):
            length = contributions.shape[axis]
            # With one element for each input both orders are the same.
            orders = (True,) if length == num_inputs else (True, False) if length % num_inputs == 0 else ()
            if chosen.all():
                possible[index] += [InputAxis(axis, adjacent) for adjacent in orders]
            elif orders:
                profile = _largest_along(contributions, axis)
                profiles += [(index, InputAxis(axis, adjacent), profile) for adjacent in orders]
    if not profiles:
        return possible
    # One transfer for all uses: each would let a device wait.
    read = torch.cat([profile for _, _, profile in profiles]).cpu().numpy()
    stops = itertools.accumulate(len(profile) for _, _, profile in profiles)
    for (index, order, profile), stop in zip(profiles, stops, strict=True):
        places = read[stop - len(profile) : stop]
        by_input = places.reshape(num_inputs, -1) if order.adjacent else places.reshape(-1, num_inputs).T
        if not by_input[~chosen].any():
            possible[index].append(order)
    return possible


def _axes_of_inputs(use: Use, derivative: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The axes along which the inputs may lie, with the contributions that have these axes."""
    if isinstance(use, ProductUse):
        yield 0, use.arrange(derivative)
        return
    contributions = use.contributions(derivative)
    yield from ((axis, contributions) for axis, length in enumerate(use.elements.shape) if length == 1)


def _largest_along(tensor: Tensor, axis: int) -> Tensor:
    """The largest magnitude at each place along an axis."""
    others = [dim for dim in range(tensor.ndim) if dim != axis]
    return torch.linalg.vector_norm(tensor, math.inf, others) if others else tensor.abs()


def _choices(outputs: Tensor) -> Iterator[tuple[BoolArray, Tensor]]:
    """Random choices of inputs, each followed by that of all other inputs, with weights of their outputs."""
    num_inputs, generator = len(outputs), Generator().manual_seed(0)
    drawn = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    for _ in range(_NUM_CHOICES):
        chosen = torch.randint(0, 2, (num_inputs,), generator=generator).numpy().astype(bool)
        chosen[0], chosen[-1] = True, num_inputs == 1
        for some in (chosen, ~chosen) if num_inputs > 1 else (chosen,):
            yield some, (drawn * torch.from_numpy(some).unsqueeze(1)).to(outputs.device)


def output_places(uses: Mapping[int, Use]) -> list[OperationOutput]:
    """Return the outputs of all operations, each once."""
    return list({id(use.output): use.output for use in uses.values()}.values())


def differentiate_at(
    places: Sequence[OperationOutput], outputs: Tensor, weights: Tensor, *, is_batched: bool = False
) -> dict[int, Tensor]:
    """Differentiate a combination of outputs, whose graph is retained, by the outputs of some operations.

    Return the derivatives by the identity of the place, zero where the combination does not depend on it. The weights
    of several combinations stand along a first axis; an operation that does not support such a batch raises a
    RuntimeError.
    """
    edges = {id(place): place.edge for place in places if place.edge is not None}
    shapes = {id(place): (*weights.shape[: int(is_batched)], *place.shape) for place in places}
    gradients: Sequence[Tensor | None] = [None] * len(edges)
    if edges and outputs.requires_grad:  # No input of the chunk may have entered a layer.
        gradients = torch.autograd.grad(
            outputs, list(edges.values()), weights, retain_graph=True, allow_unused=True, is_grads_batched=is_batched
        )
    return {
        place: outputs.new_zeros(shapes[place]) if gradient is None else gradient
        for place, gradient in zip(edges, gradients, strict=True)
    }
