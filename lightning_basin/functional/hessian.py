"""The Hessian of a scalar: the whole matrix, or products with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_basin.functional.jacobian import vector_jacobian_products

_SYMMETRY_RTOL = 1e-8  # of a Hessian's largest entry; rounding is near 1e-14, a wrong formula near 1e-2


def hessian_matrix(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    chunk_size: int = 64,
    atol: float = 0.0,
    curved: Sequence[bool] | None = None,
) -> Tensor:
    """All second derivatives of a loss, by double backward.

    Args:
        loss: Attached to the graph of ``parameters``, shape ``()``.
        parameters: In the order of rows and columns.
        chunk_size: Columns per batched backward pass; bounds the memory.
        atol: Asymmetry to allow beside 1e-8 of the largest entry: what is left of rounding where larger terms cancel,
            as in the cross-entropy of a saturated classifier.
        curved: For each parameter whether its Gauss-Newton part is known not to vanish. An operation that can be
            differentiated once only then shows, where torch would return a silent zero.

    Returns:
        Symmetric, shape ``(N, N)``.

    Raises:
        RuntimeError: If the result is not symmetric, as happens where a derivative of an operation is wrong; or if
            the gradient has lost its dependence on a curved parameter.
        ValueError: If the loss has no graph.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_matrix(w[0] ** 2 * w[1], [w])
        tensor([[4., 2.],
                [2., 0.]])
    """
    if not loss.requires_grad:
        raise ValueError("the loss must be attached to the graph of the parameters, got one without a graph")
    num_parameters = sum(parameter.numel() for parameter in parameters)
    hessian = parameters[0].new_zeros(num_parameters, num_parameters).detach()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    if curved is not None:
        check_connected(is_connected(gradient, parameters), curved)
    if not gradient.requires_grad:  # A loss that is piecewise linear in the parameters.
        return hessian
    identity = torch.eye(num_parameters, dtype=gradient.dtype, device=gradient.device)
    for start in range(0, num_parameters, chunk_size):
        chunk = slice(start, start + chunk_size)
        hessian[chunk] = vector_jacobian_products(gradient, parameters, identity[chunk])
    asymmetry = float((hessian - hessian.mT).abs().max())
    scale = float(hessian.abs().max())
    if asymmetry > _SYMMETRY_RTOL * scale + atol:
        raise RuntimeError(
            f"the Hessian must be symmetric, but entries differ by {asymmetry:.1e} of {scale:.1e}: an operation of the "
            f"network or the loss has a wrong second derivative"
        )
    return (hessian + hessian.mT) / 2


def is_connected(gradient: Tensor, parameters: Sequence[Tensor]) -> list[bool]:
    """For each parameter whether the graph of a gradient, shape ``(N,)``, leads to it."""
    if not gradient.requires_grad:
        return [False] * len(parameters)
    found = torch.autograd.grad(gradient.sum(), parameters, retain_graph=True, allow_unused=True)
    return [part is not None for part in found]


def check_connected(connected: Sequence[bool], curved: Sequence[bool]) -> None:
    """Refuse a gradient that has lost its dependence on parameters in which the loss is curved.

    Args:
        connected: For each parameter whether the gradient depends on it, as far as its graph shows.
        curved: For each, whether its Gauss-Newton part is known not to vanish.

    Raises:
        RuntimeError: If one is lost, where torch would return a silent zero as second derivative.
    """
    lost = sum(is_curved and not is_found for is_curved, is_found in zip(curved, connected, strict=True))
    if lost:
        raise RuntimeError(
            f"the gradient must depend on every parameter in which the loss is curved, but has lost {lost} of them: an "
            f"operation of the network can be differentiated only once"
        )


def hessian_product(gradient: Tensor, variables: Sequence[Tensor], direction: Tensor) -> Tensor:
    """The derivative of a gradient along a direction.

    Args:
        gradient: Attached to the graph of ``variables``, which is kept, shape ``(n,)``.
        variables: With n entries in all; those that ``gradient`` belongs to.
        direction: Shape ``(n,)``.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(w[0] ** 2 * w[1], w, create_graph=True)
        >>> hessian_product(gradient, [w], torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    if not gradient.requires_grad:  # Of a function that is piecewise linear.
        return torch.zeros_like(direction)
    parts = torch.autograd.grad(gradient, variables, direction, retain_graph=True, materialize_grads=True)
    return torch.cat([part.detach().flatten() for part in parts])
