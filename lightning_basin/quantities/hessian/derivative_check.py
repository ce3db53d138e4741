"""Refusal of networks whose operations have wrong derivatives, or can be differentiated only once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import or_

import torch
from torch import Tensor

from lightning_basin.functional.differences import contradicted_blocks, relative_direction
from lightning_basin.functional.hessian import check_connected, flat_vector, is_connected
from lightning_basin.quantities.hessian.products import output_derivative, sum_of_products
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel

_SHIFT = 1e-3  # fraction of their size by which weights are moved to where nothing is exactly at a kink
_NUM_DIRECTIONS = 3  # directions along which differences must contradict a derivative: at a kink one of them may


def check_twice_differentiable(model: QuadraticModel, is_curved: Sequence[bool]) -> None:
    """Refuse an operation of the network that can be differentiated only once, and does not say so.

    Args:
        model: The quadratic model of the loss.
        is_curved: For each parameter whether its Gauss-Newton part is known not to vanish.

    Raises:
        RuntimeError: If the gradient has lost its dependence on a curved parameter.
    """
    # Some parameters may be used by the inputs of some chunks only, as by an expert.
    connected = [False] * len(model.parameters)
    for chunk in model.chunks:
        gradient = flat_vector(model.gradients(chunk))
        connected = list(map(or_, connected, is_connected(gradient, model.parameters)))
    check_connected(connected, is_curved)


def check_derivatives(model: QuadraticModel) -> None:
    """Refuse derivatives that differences contradict: of the outputs, or of the gradients that R is made of.

    They are compared a little beside the weights as they are. A wrong formula is wrong there as well, but hardly a
    rectifier is given an exact zero, where it has no derivative.

    Args:
        model: The quadratic model of the loss.

    Raises:
        RuntimeError: If along each of some random directions the derivative of an operation is wrong.
    """
    layers = model.network.layers
    sizes = [layer.num_parameters for layer in layers]
    wrong: list[int] = []
    for seed in range(_NUM_DIRECTIONS):
        direction = relative_direction(model.parameters, seed=seed)
        shift = _SHIFT * relative_direction(model.parameters, seed=seed + _NUM_DIRECTIONS)
        outputs_along, product = _derivatives_at(model, shift, direction)

        def outputs(step: float, shift: Tensor = shift, direction: Tensor = direction) -> list[Tensor]:
            return [_outputs_at(model, shift + step * direction)]

        def gradient(step: float, shift: Tensor = shift, direction: Tensor = direction) -> list[Tensor]:
            return list(torch.split(_gradient_at(model, shift + step * direction), sizes))

        wrong = contradicted_blocks([outputs_along], outputs)
        wrong = wrong or contradicted_blocks(torch.split(product, sizes), gradient)
        if not wrong:
            return
    raise RuntimeError(
        f"the derivatives of the module do not agree with differences of its outputs and gradients, in layer "
        f"{layers[wrong[-1]].name!r} or after it: an operation has a wrong first or second derivative, or detach() "
        f"hides a part of it"
    )


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
    with _linear_part_at(model, shift) as linear_part:
        derivative = output_derivative(linear_part, model.parameters, direction)
        return derivative, sum_of_products(linear_part, range(len(model.parameters)), direction)


def _outputs_at(model: QuadraticModel, shift: Tensor) -> Tensor:
    with _linear_part_at(model, shift) as linear_part, torch.no_grad():
        return torch.cat([linear_part.outputs_of(chunk) for chunk in model.chunks])


def _gradient_at(model: QuadraticModel, shift: Tensor) -> Tensor:
    """The gradient of the linear part at other weights."""
    total = torch.zeros_like(shift)
    with _linear_part_at(model, shift) as linear_part:
        for chunk in model.chunks:
            total += flat_vector(linear_part.gradients(chunk)).detach()
    return total
