"""Does a null direction of the gradients lead anywhere? Steps along it and back onto the manifold."""

from collections.abc import Callable

import torch
from torch import Tensor

_CONVERGED = 1e-11  # of the change that the step made; or of the outputs, where that is rounding


def null_directions(gradients: Tensor, directions: Tensor, *, rank: int) -> Tensor:
    """Project directions on the null space of a matrix of gradients, and give them unit length.

    Args:
        gradients: The behavioral gradients, shape ``(m, N)``.
        directions: The directions, shape ``(n, N)``.
        rank: The rank of ``gradients``; directions along its first right singular vectors are removed.

    Returns:
        Shape ``(n, N)``.

    Example:
        >>> null_directions(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]), rank=1)
        tensor([[0., 1.]])
    """
    basis: Tensor = torch.linalg.svd(gradients, full_matrices=False).Vh[:rank]
    projected = directions - (directions @ basis.mT) @ basis
    projected = projected - (projected @ basis.mT) @ basis  # Twice is enough (Kahan and Parlett).
    units: Tensor = projected / projected.norm(dim=1, keepdim=True)
    return units


def surviving_fraction(
    outputs: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Tensor],
    parameters: Tensor,
    direction: Tensor,
    *,
    step: float = 1e-3,
    max_iterations: int = 50,
) -> tuple[float, float]:
    r"""Step along a null direction, project back on the behavior manifold, see how much of the step is left.

    Where the manifold :math:`\{\theta : F(\theta) = F(\theta_0)\}` has the direction in its tangent space, the
    projection undoes only the curvature, of order ``step**2``, and the fraction is 1 - O(step). Where it does not,
    though the gradients have it in their null space, as at the crossing of two manifolds, the projection leads back.
    The projection is Levenberg's and Marquardt's, :math:`\delta = -G^T (G G^T + \mu I)^{-1} r`, with a damping
    :math:`\mu` that falls with the residual r.

    Args:
        outputs: The function from parameters, shape ``(N,)``, to outputs, shape ``(m,)``.
        jacobian: The function from parameters to the derivative of the outputs, shape ``(m, N)``.
        parameters: The parameters to start from, shape ``(N,)``.
        direction: The direction of the step, of unit length, shape ``(N,)``.
        step: Length of the step.
        max_iterations: The largest number of iterations of the projection.

    Returns:
        The fraction, and what is left of the change of the outputs beyond their rounding, relative to the one that the
        step made.

    Example:
        Along a circle, and off the crossing of two lines:

        >>> def circle(p):
        ...     return (p**2).sum().unsqueeze(0)
        >>> tangent = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> fraction, _ = surviving_fraction(circle, lambda p: 2 * p.unsqueeze(0), start, tangent)
        >>> round(fraction, 4)
        1.0
    """
    target = outputs(parameters)
    moved = parameters + step * direction
    residual = outputs(moved) - target
    change = float(residual.norm())
    rounding = 64 * torch.finfo(target.dtype).eps * float(target.norm())
    goal = max(_CONVERGED * change, rounding)
    for _ in range(max_iterations):
        size = float(residual.norm())
        if size <= goal:
            break
        gradients = jacobian(moved)
        gram = gradients @ gradients.mT
        scale = float(gram.diagonal().max())
        if scale == 0.0:
            break
        # Small beside the squares of singular values that the step itself has opened, which are of order step**2.
        relative = min(1.0, size / (step * scale**0.5))
        damping = scale * max(relative**4, torch.finfo(gram.dtype).eps)
        identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        trial = moved - gradients.mT @ torch.linalg.solve(gram + damping * identity, residual)
        trial_residual = outputs(trial) - target
        if float(trial_residual.norm()) >= size:
            break
        moved, residual = trial, trial_residual
    # Along a direction that is free everywhere the step itself has changed nothing but rounding.
    size = float(residual.norm())
    left = size / change if size > rounding else 0.0
    return float((moved - parameters) @ direction) / step, left
