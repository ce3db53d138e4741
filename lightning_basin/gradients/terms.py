"""How large the terms are whose sum is a gradient: what rounding may leave of them where they cancel."""

import torch
from torch import Tensor

from lightning_basin.gradients.attribution import differentiate_at, output_places
from lightning_basin.gradients.sizes import find_uses
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.runs import Chunk
from lightning_basin.operations.uses import ProductUse, Source, Use


def sum_term_magnitudes(network: Network, chunk: Chunk, layer: Layer, weights: Tensor) -> Tensor:
    """Sum the magnitudes of the terms of which the gradient of a combination of outputs is the sum.

    The gradient with respect to a weight is a sum over inputs and positions of output gradients times input
    activations; that of a bias is a sum of output gradients. Their rounding errors are in proportion to these terms,
    also where the sum is zero.

    Args:
        network: The network.
        chunk: The inputs.
        layer: The layer, whose uses must be known; unknown uses add nothing.
        weights: The combination's weights on all inputs, shape ``(k, c)``.

    Returns:
        The sums for all elements of the layer's parameters, in their order, shape ``(N,)``.
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
    return torch.cat([total.flatten() for total in totals]).to(weights.dtype)


def _terms(use: Use, derivative: Tensor) -> Tensor:
    """Sum the magnitudes of the terms of one use, in the shape of its positions."""
    if isinstance(use, ProductUse):
        output_gradients, activations = use.arrange(derivative).flatten(0, -2), use.read_activations().flatten(0, -2)
        return output_gradients.abs().mT @ activations.abs()
    return use.contributions(derivative).abs().sum_to_size(use.elements.shape)
