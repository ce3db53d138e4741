"""What rounding may leave of a gradient: of terms that cancel, and of backward passes that must add up."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_basin.gradients.assemble import MeasuredUse, combine_uses
from lightning_basin.gradients.attribution import differentiate_at, output_places
from lightning_basin.gradients.sizes import find_uses
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk
from lightning_basin.operations.uses import OperationOutput, ProductUse, Source, Use
from lightning_basin.tensors import as_result


def compare_backward_passes(
    network: Network, chunk: Chunk, layers: Sequence[Layer], weights: Tensor, split: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Differentiate a combination of outputs by uses and by autograd in one pass, and by autograd in two passes.

    Returns:
        For each layer two vectors, shape ``(N,)``: the difference between uses and autograd, which take the same output
        gradients; and that between the sum of the two passes and the single one.
    """
    outputs, by_layer = network.rows(chunk.trace.outputs), find_uses(network, chunk.trace)
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name] for name in names}
    ends = {name: OperationOutput(tensor.shape, get_gradient_edge(tensor)) for name, tensor in parameters.items()}
    places = output_places({index: use for layer in layers for index, use in by_layer[layer].items()})
    whole, first, second = (
        differentiate_at(where, outputs, part[chunk.indices.to(part.device)].to(outputs))
        for where, part in (
            ([*places, *ends.values()], weights),
            ([*ends.values()], split),
            ([*ends.values()], weights - split),
        )
    )

    def flat(derivatives: dict[int, Tensor], layer: Layer) -> Tensor:
        return as_result(torch.cat([derivatives[id(ends[name])].flatten() for name in layer.parameters]))

    compared = []
    for layer in layers:
        summed = [_summed_over_inputs(use, whole[id(use.output)]) for use in by_layer[layer].values()]
        by_uses = combine_uses({name: parameters[name] for name in layer.parameters}, summed, num_rows=1)
        expected = flat(whole, layer)
        passes = flat(first, layer).add_(flat(second, layer)).sub_(expected)
        compared.append((by_uses.combination(weights.new_ones(1)).sub_(expected), passes))
    return compared


def _summed_over_inputs(use: Use, derivative: Tensor) -> MeasuredUse:
    """One use as that of a single input with a single output, whose positions are those of all inputs."""
    derivative = as_result(derivative)
    if isinstance(use, ProductUse):
        activations = as_result(use.read_activations()).flatten(0, -2)
        return MeasuredUse(use, use.arrange(derivative).flatten(0, -2)[None, None], activations[None])
    contributions = use.contributions(derivative).sum_to_size(use.elements.shape)
    return MeasuredUse(use, contributions.flatten()[None, None], None)


def sum_term_magnitudes(network: Network, chunk: Chunk, layer: Layer, weights: Tensor) -> Tensor:
    """Sum the magnitudes of the terms of which the gradient of a combination of outputs is the sum, shape ``(N,)``.

    The gradient with respect to a weight is a sum over inputs and positions of output gradients times input
    activations; that of a bias is a sum of output gradients. Their rounding errors are in proportion to these terms,
    also where the sum is zero.
    """
    outputs, parameters = network.rows(chunk.trace.outputs), network.parameters([layer])
    uses = find_uses(network, chunk.trace)[layer]
    weights_of_chunk = weights[chunk.indices.to(weights.device)].to(outputs)
    derivatives = differentiate_at(output_places(uses), outputs, weights_of_chunk)
    by_source: dict[Source, Tensor] = {}
    for use in uses.values():
        magnitudes = by_source.setdefault(use.source, outputs.new_zeros(use.source.tensor.numel()))
        positions = use.elements.positions(use.source.tensor)
        magnitudes.index_add_(0, positions.flatten(), _terms(use, derivatives[id(use.output)]).flatten())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for source, magnitudes in by_source.items():  # Through a tensor that was computed from parameters: the chain rule.
        gradients = torch.autograd.grad(
            source.tensor, parameters, magnitudes.view_as(source.tensor), retain_graph=True, allow_unused=True
        )
        for total, gradient in zip(totals, gradients, strict=True):
            total += 0 if gradient is None else gradient.abs()
    return as_result(torch.cat([total.flatten() for total in totals]))


def _terms(use: Use, derivative: Tensor) -> Tensor:
    """Sum the magnitudes of the terms of one use, in the shape of its positions."""
    if isinstance(use, ProductUse):
        output_gradients, activations = use.arrange(derivative).flatten(0, -2), use.read_activations().flatten(0, -2)
        return output_gradients.abs().mT @ activations.abs()
    return use.contributions(derivative).abs().sum_to_size(use.elements.shape)
