"""Refusal of networks whose operations have wrong derivatives, or can be differentiated only once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from operator import or_

import torch
from torch import Tensor, nn

from lightning_basin.functional.differences import contradicted_blocks, relative_direction
from lightning_basin.functional.hessian import check_connected, flat_vector, hessian_product, is_connected
from lightning_basin.quantities.hessian.products import output_derivative
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel

_SHIFT = 1e-3  # fraction of their size by which weights are moved to where nothing is exactly at a kink
_NUM_DIRECTIONS = 3  # directions along which differences must contradict a derivative: at a kink one of them may


def check_twice_differentiable(model: QuadraticModel, is_curved: Sequence[bool]) -> None:
    """Refuse an operation of the network that can be differentiated only once, and does not say so.

    The gradient has then lost its dependence on a parameter whose Gauss-Newton part is known not to vanish.
    """
    # Some parameters may be used by the inputs of some chunks only, as by an expert.
    connected = [False] * len(model.parameters)
    for chunk in model.chunks:
        gradient = flat_vector(model.gradients(chunk))
        connected = list(map(or_, connected, is_connected(gradient, model.parameters)))
    check_connected(connected, is_curved)


def check_derivatives(model: QuadraticModel) -> None:
    """Refuse derivatives that differences contradict: of the outputs, or of the gradients that R is made of.

    They are compared along some random directions, a little beside the weights as they are. A wrong formula is wrong
    there as well, but hardly a rectifier is given an exact zero, where it has no derivative.
    """
    wrong: list[int] = []
    for seed in range(_NUM_DIRECTIONS):
        wrong = _wrong_layers(model, seed)
        if not wrong:
            return
    name = model.network.layers[wrong[-1]].name
    raise RuntimeError(
        f"the derivatives of the module do not agree with differences of its outputs and gradients, in layer {name!r} "
        f"or after it: an operation has a wrong first or second derivative, or detach() hides a part of it"
    )


def _wrong_layers(model: QuadraticModel, seed: int) -> list[int]:
    """The numbers of the layers whose derivatives along a random direction are wrong; [0] where the outputs' are."""
    sizes = [layer.num_parameters for layer in model.network.layers]
    direction = relative_direction(model.parameters, seed=seed)
    _keep_padding(model, direction)
    shift = _SHIFT * relative_direction(model.parameters, seed=seed + _NUM_DIRECTIONS)
    outputs_along, product = _derivatives_at(model, shift, direction)

    @lru_cache(maxsize=4)  # Outputs and gradients are compared over the same steps, first over the same two.
    def values(step: float) -> tuple[Tensor, Tensor]:
        return _values_at(model, shift + step * direction)

    return contradicted_blocks([outputs_along], lambda step: values(step)[:1]) or contradicted_blocks(
        torch.split(product, sizes), lambda step: torch.split(values(step)[1], sizes)
    )


def _keep_padding(model: QuadraticModel, direction: Tensor) -> None:
    """Let a direction leave the rows of embeddings that stand for padding: to autograd they are constants."""
    sizes = [parameter.numel() for parameter in model.parameters]
    parts = dict(zip(map(id, model.parameters), torch.split(direction, sizes), strict=True))
    for module in model.network.module.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            part = parts.get(id(module.weight))
            if part is not None:
                part.view(module.weight.shape)[module.padding_idx] = 0.0


@contextmanager
def _linear_part_at(model: QuadraticModel, shift: Tensor) -> Iterator[QuadraticModel]:
    """The linear part of the model, while the weights are moved."""
    parts = torch.split(shift, [parameter.numel() for parameter in model.parameters])
    moved = [parameter.detach().flatten() + part for parameter, part in zip(model.parameters, parts, strict=True)]
    with model.network.at(moved):
        # A new object, as the model's own linear part keeps gradients at the original weights.
        yield replace(model, is_linear=True)


def _derivatives_at(model: QuadraticModel, shift: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of the outputs along a direction, and R times the direction, at other weights."""
    derivatives, product, parameters = [], torch.zeros_like(direction), model.parameters
    with _linear_part_at(model, shift) as linear_part:
        for chunk in model.chunks:
            outputs = linear_part.outputs_of(chunk)
            derivatives.append(output_derivative(outputs, parameters, direction))
            gradient = flat_vector(linear_part.gradients_of(outputs, chunk))
            product += hessian_product(gradient, parameters, direction)
    return torch.cat(derivatives), product


def _values_at(model: QuadraticModel, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and the gradient of the linear part at other weights."""
    values, gradient = [], torch.zeros_like(shift)
    with _linear_part_at(model, shift) as linear_part:
        for chunk in model.chunks:
            outputs = linear_part.outputs_of(chunk)
            gradient += flat_vector(linear_part.gradients_of(outputs, chunk, create_graph=False))
            values.append(outputs.detach())
    return torch.cat(values), gradient
