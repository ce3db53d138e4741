"""The Hessian of a scalar: the whole matrix, or products with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import vector_jacobian_products
from lightning_basin.functional.lanczos import check_symmetry


def hessian_matrix(loss: Tensor, parameters: Sequence[Tensor], *, chunk_size: int = 64, atol: float = 0.0) -> Tensor:
    """Compute all second derivatives of a loss, by double backward.

    Args:
        loss: The loss, attached to the graph of ``parameters``, shape ``()``.
        parameters: The parameters, with N elements in all, in the order of rows and columns.
        chunk_size: The number of columns per batched backward pass; bounds the memory.
        atol: The asymmetry to allow beside 1e-8 of the largest entry: what is left of rounding where larger terms
            cancel, as in the cross-entropy of a saturated classifier.

    Returns:
        The matrix, shape ``(N, N)``, which is symmetric but for rounding.

    Raises:
        RuntimeError: If the result is not symmetric, as happens where a derivative of an operation is wrong.
        ValueError: If the loss has no graph.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_matrix(w[0] ** 2 * w[1], [w])
        tensor([[4., 2.],
                [2., 0.]])
    """
    if not loss.requires_grad:
        raise ValueError("the loss must be attached to the graph of the parameters, got one without a graph")
    gradient = flat_vector(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
    return gradient_derivative(gradient, parameters, chunk_size=chunk_size, atol=atol)


def gradient_derivative(
    gradient: Tensor, variables: Sequence[Tensor], *, chunk_size: int = 64, atol: float = 0.0
) -> Tensor:
    """Differentiate a gradient by all of its variables, as `hessian_matrix` does; shape ``(n, n)``."""
    size = len(gradient)
    hessian = gradient.new_zeros(size, size).detach()
    if not gradient.requires_grad:  # The gradient of a function that is piecewise linear.
        return hessian
    identity = torch.eye(size, dtype=gradient.dtype, device=gradient.device)
    for start in range(0, size, chunk_size):
        chunk = slice(start, start + chunk_size)
        hessian[chunk] = vector_jacobian_products(gradient, variables, identity[chunk])
    del identity  # Few matrices of this size fit into memory at once.
    least, largest = hessian.aminmax()
    asymmetry, scale = torch.stack([(hessian - hessian.mT).max(), largest.maximum(-least)]).tolist()
    check_symmetry(asymmetry, scale, atol=atol)
    return hessian


def flat_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Join the elements of tensors into one vector, in their order."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def is_connected(gradient: Tensor, parameters: Sequence[Tensor]) -> list[bool]:
    """For each parameter whether the graph of a gradient, shape ``(N,)``, leads to it."""
    if not gradient.requires_grad:
        return [False] * len(parameters)
    derivatives = torch.autograd.grad(gradient.sum(), parameters, retain_graph=True, allow_unused=True)
    return [derivative is not None for derivative in derivatives]


def check_connected(connected: Sequence[bool], is_curved: Sequence[bool]) -> None:
    """Refuse a gradient that has lost its dependence on parameters in which the loss is curved."""
    num_lost = sum(curved and not reached for curved, reached in zip(is_curved, connected, strict=True))
    if num_lost:
        raise RuntimeError(
            f"the gradient must depend on every parameter in which the loss is curved, but has lost {num_lost} of "
            f"them: an operation of the network can be differentiated only once"
        )


def hessian_product(gradient: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
    """Differentiate a gradient along a direction.

    Args:
        gradient: The gradient by ``variables``, attached to their graph, which is kept; shape ``(n,)``.
        variables: The variables, with n elements in all.
        direction: The direction in the variables, shape ``(n,)``.

    Returns:
        The derivative, shape ``(n,)``.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(w[0] ** 2 * w[1], w, create_graph=True)
        >>> hessian_product(gradient, [w], torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    if not gradient.requires_grad:  # The gradient of a function that is piecewise linear.
        return torch.zeros_like(direction)
    parts = torch.autograd.grad(gradient, variables, direction, retain_graph=True, materialize_grads=True)
    return flat_vector(parts).detach()
