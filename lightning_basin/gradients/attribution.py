"""Which slice of an operation's output belongs to which input, and the derivatives of the network's outputs by it.

Axis letters: k inputs, c outputs per input, t positions of a sequence, n elements of a parameter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_basin.gradients.assemble import MeasuredUse
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ElementwiseUse, OperationOutput, ProductUse, Use

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
        moved = tensor.movedim(self.axis, 0)
        count = moved.shape[0] // num_inputs
        if self.adjacent:
            return moved.reshape(num_inputs, count, *moved.shape[1:])
        return moved.reshape(count, num_inputs, *moved.shape[1:]).transpose(0, 1)


def measure_uses(network: Network, trace: Trace, uses: Mapping[int, Use]) -> dict[int, MeasuredUse]:
    """Measure the uses in whose outputs the inputs can be distinguished.

    Args:
        network: The network that was runs.
        trace: The trace of one chunk of inputs, with its graph.
        uses: Recorded uses, by their position in the record.

    Returns:
        The output gradients and input activations, by the same positions. A use is left out where it is not clear
        which slice of its output belongs to which input.
    """
    outputs, dtype = network.rows(trace.outputs), network.gradient_dtype
    num_inputs = outputs.shape[0]
    axes = _input_axes(outputs, uses)
    products_of_biases = _products_of_biases({index: uses[index] for index in axes})
    output_gradients = _output_gradients(
        outputs, uses, {i: axis for i, axis in axes.items() if i not in products_of_biases}, dtype
    )
    measured = {}
    for index in list(output_gradients):
        use = uses[index]
        activations = None
        if isinstance(use, ProductUse):
            activations = axes[index].split(use.read_activations().to(dtype), num_inputs).flatten(1, -2)
        measured[index] = MeasuredUse(use, output_gradients.pop(index), activations)
    for index, product in products_of_biases.items():
        measured[index] = MeasuredUse(uses[index], _summed_over_positions(measured[product].output_gradients), None)
    return measured


def _output_gradients(
    outputs: Tensor, uses: Mapping[int, Use], axes: Mapping[int, InputAxis], dtype: torch.dtype
) -> dict[int, Tensor]:
    """The output gradients of some uses, as in `MeasuredUse`, by one backward pass for each output.

    Args:
        outputs: Outputs of a chunk, shape ``(k, c)``.
        uses: Recorded uses.
        axes: The order of the inputs, for the uses to measure.
        dtype: The dtype of the result.
    """
    num_inputs, num_outputs = outputs.shape
    places = output_places(uses)
    output_gradients: dict[int, Tensor] = {}
    for j in range(num_outputs):
        derivatives = differentiate_at(places, outputs[:, j].sum())
        for index, axis in axes.items():
            derivative = derivatives[id(uses[index].output)]
            of_output = _gradients_of_output(uses[index], derivative, axis, num_inputs, dtype)
            if j == 0:  # Written to their final place: a copy would take twice the memory and twice the time.
                output_gradients[index] = of_output.new_empty(num_inputs, num_outputs, *of_output.shape[1:])
            output_gradients[index][:, j] = of_output
    return output_gradients


def _gradients_of_output(use: Use, derivative: Tensor, axis: InputAxis, num_inputs: int, dtype: torch.dtype) -> Tensor:
    """The gradients of one output, input by input: shape ``(k, t, d_out)`` for a product, else ``(k, n)``.

    Args:
        use: The use.
        derivative: The derivative of the output, summed over the inputs, by the operation's output.
        axis: The order of the inputs.
        num_inputs: Inputs of the chunk, k.
        dtype: The dtype of the result.
    """
    derivative = derivative.to(dtype)  # Before anything is added up.
    if isinstance(use, ProductUse):
        return axis.split(use.arrange(derivative), num_inputs).flatten(1, -2)
    contributions = axis.split(use.contributions(derivative), num_inputs)
    positions = use.positions.movedim(axis.axis, 0)  # Of length 1 along this axis.
    repeated = [dim for dim in range(1, contributions.ndim) if positions.shape[dim - 1] == 1]
    summed = contributions.sum(repeated) if repeated else contributions
    return summed.unsqueeze(-1).flatten(1)


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
        and use.positions.numel() == use.shifts.positions.shape[0]
    }


def _summed_over_positions(output_gradients: Tensor) -> Tensor:
    """Output gradients of a bias from those of its product, shape ``(k, c, t, d_out)``; not copied for one position."""
    return output_gradients.squeeze(2) if output_gradients.shape[2] == 1 else output_gradients.sum(2)


def _input_axes(outputs: Tensor, uses: Mapping[int, Use]) -> dict[int, InputAxis]:
    """Where the inputs lie in the result of each use, seen from the outputs of some of them; absent where unclear."""
    places = output_places(uses)
    generator = Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    axes: dict[int, list[InputAxis]] = {}
    for chosen in _choices(outputs.shape[0], generator):
        chosen = chosen.to(outputs.device)
        derivatives = differentiate_at(places, (outputs * weights)[chosen].sum())
        for index, use in uses.items():
            possible = _possible_input_axes(use, derivatives[id(use.output)], chosen)
            axes[index] = [axis for axis in axes.get(index, possible) if axis in possible]
        if all(len(possible) <= 1 for possible in axes.values()):
            break
    return {index: possible[0] for index, possible in axes.items() if possible}


def _possible_input_axes(use: Use, derivative: Tensor, chosen: Tensor) -> list[InputAxis]:
    """Where the inputs can lie, seen from the derivative of some inputs' outputs.

    The derivative is exactly zero in all that belongs to other inputs. It may be zero elsewhere too, where a layer is
    dead; then further choices of inputs decide.

    Args:
        use: The use.
        derivative: Derivative of a sum over the outputs of the chosen inputs, by the operation's output.
        chosen: The inputs that are chosen, bool, shape ``(k,)``.
    """
    num_inputs = chosen.numel()
    if isinstance(use, ProductUse):
        dims, contributions = [0], use.arrange(derivative)
    else:
        contributions = use.contributions(derivative)
        dims = [dim for dim in range(contributions.ndim) if use.positions.shape[dim] == 1]
    nonzero = contributions != 0
    axes = [
        InputAxis(dim, adjacent)
        for dim in dims
        if contributions.shape[dim] % num_inputs == 0
        # With one element for each input both orders are the same.
        for adjacent in ((True,) if contributions.shape[dim] == num_inputs else (True, False))
    ]
    return [axis for axis in axes if not bool(axis.split(nonzero, num_inputs)[~chosen].any())]


def _choices(num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """Random choices of inputs, each followed by the choice of all other inputs."""
    for _ in range(_NUM_CHOICES):
        chosen = torch.randint(0, 2, (num_inputs,), generator=generator).bool()
        chosen[0], chosen[-1] = True, num_inputs == 1
        yield chosen
        if num_inputs > 1:
            yield ~chosen


def output_places(uses: Mapping[int, Use]) -> list[OperationOutput]:
    """Return the outputs of all operations, each once."""
    return list({id(use.output): use.output for use in uses.values()}.values())


def differentiate_at(places: Sequence[OperationOutput], output: Tensor) -> dict[int, Tensor]:
    """Differentiate a scalar by the outputs of some operations.

    Args:
        places: The outputs, as places in the graph.
        output: The scalar; its graph is retained.

    Returns:
        The derivatives by the identity of the place, zero where the scalar does not depend on it.
    """
    edges = {id(place): place.edge for place in places if place.edge is not None}
    shapes = {id(place): place.shape for place in places}
    gradients: Sequence[Tensor | None] = [None] * len(edges)
    if edges and output.requires_grad:  # No input of the chunk may have entered a layer.
        gradients = torch.autograd.grad(output, list(edges.values()), retain_graph=True, allow_unused=True)
    return {
        place: output.new_zeros(shapes[place]) if gradient is None else gradient
        for place, gradient in zip(edges, gradients, strict=True)
    }
