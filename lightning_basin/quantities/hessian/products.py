"""Products with the Hessian of the loss, and with its residual part, by plain double backward."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_basin.functional.hessian import flat_vector, gradient_derivative, hessian_product
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.network.layers import Layer
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel

ROUNDING_FACTOR = 1e3
"""By how much rounding may grow on its way into a Hessian."""

HessianOperator = Callable[[Tensor], Tensor]
"""From a direction in the parameters of some layers to the product with their diagonal block of the Hessian."""


def hessian_operator(model: QuadraticModel, layers: Sequence[Layer]) -> HessianOperator:
    """Return products with the diagonal block of some layers: of H, or of R for the linear part of a model."""
    chosen = {name for layer in layers for name in layer.parameters}
    names = [name for layer in model.network.layers for name in layer.parameters]
    indices = [index for index, name in enumerate(names) if name in chosen]
    # Inputs that the loss couples must be seen together, except where all are in one graph anyway.
    is_apart = model.curvature.couples_inputs and not model.is_linear and len(model.chunks) > 1

    def product(direction: Tensor) -> Tensor:
        total = _sum_of_products(model.linear_part if is_apart else model, indices, direction)
        if is_apart:
            total += _gauss_newton_product(model, indices, direction)
        return total

    return product


def _sum_of_products(model: QuadraticModel, indices: Sequence[int], direction: Tensor) -> Tensor:
    """Add up the products of all chunks with their Hessians; ``indices`` are the numbers of the parameters."""
    variables = [model.parameters[index] for index in indices]
    total = torch.zeros_like(direction)
    for chunk in model.chunks:
        gradients = model.gradients(chunk)
        total += hessian_product(flat_vector([gradients[index] for index in indices]), variables, direction)
    return total


def _gauss_newton_product(model: QuadraticModel, indices: Sequence[int], direction: Tensor) -> Tensor:
    """GᵀAG times a direction: G moves all outputs, A pulls them back, and Gᵀ takes the pull to the parameters."""
    variables = [model.parameters[index] for index in indices]
    moved = torch.cat([output_derivative(model.outputs_of(chunk), variables, direction) for chunk in model.chunks])
    return pulled_back(model, variables, weighted_rows(moved.reshape(-1, 1), model.curvature.matrices))


def pulled_back(model: QuadraticModel, variables: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Differentiate a weighted sum of all canonical outputs by some parameters; the gradient is flat."""
    weights = weights.view(model.outputs.shape)
    total = model.outputs.new_zeros(sum(variable.numel() for variable in variables))
    for chunk in model.chunks:
        outputs = model.outputs_of(chunk)
        if outputs.requires_grad:
            total += flat_vector(torch.autograd.grad(outputs, variables, weights[chunk], materialize_grads=True))
    return total


def output_derivative(outputs: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
    """Differentiate outputs along a direction in some parameters, as a vector-Jacobian product by its vector."""
    weights = torch.zeros_like(outputs, requires_grad=True)
    if not outputs.requires_grad:
        return weights.detach()
    gradient = flat_vector(torch.autograd.grad(outputs, variables, weights, create_graph=True, materialize_grads=True))
    if not gradient.requires_grad:
        return weights.detach()
    (derivative,) = torch.autograd.grad(gradient, weights, direction, materialize_grads=True)
    return derivative


def residual_matrix(model: QuadraticModel, *, chunk_size: int, atol: float = 0.0) -> Tensor:
    """Compute R itself, shape ``(N, N)``; an asymmetry of ``atol`` is allowed beside 1e-8 of the largest entry."""
    gradients = (flat_vector(model.linear_part.gradients(chunk)) for chunk in model.chunks)
    matrices = (
        gradient_derivative(gradient, model.parameters, chunk_size=chunk_size, atol=atol) for gradient in gradients
    )
    return reduce(Tensor.add_, matrices)


def check_finite(rows: Tensor, layers: Sequence[Layer]) -> None:
    """Refuse second derivatives that are not finite, and name the layers in whose rows they are."""
    if bool(rows.isfinite().all()):
        return
    parts = torch.split(rows, [layer.num_parameters for layer in layers])
    names = [layer.name for layer, part in zip(layers, parts, strict=True) if not bool(part.isfinite().all())]
    raise RuntimeError(
        f"second derivatives must be finite, but are NaN or infinite in the layers {names}: keep square roots, "
        f"norms and powers below 2 away from 0"
    )
