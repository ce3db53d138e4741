"""Null spaces of a Hessian that is formed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_basin.functional.hessian import hessian_matrix
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.null_space import NullSpace, hessian_null_space
from lightning_basin.limits import HessianLimits
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.quantities.hessian.loss import LossCurvature
from lightning_basin.quantities.hessian.products import ROUNDING_FACTOR, check_finite, residual_matrix
from lightning_basin.quantities.hessian.quadratic_model import num_activations, quadratic_model
from lightning_basin.quantities.scopes import Scope

_MAX_COLUMNS = 64  # most columns per batched backward pass


def dense_null_spaces(
    hessian: Tensor,
    gradients: Tensor,
    loss: LossCurvature,
    scopes: Sequence[Scope],
    brackets: Mapping[Scope, NullSpace],
    *,
    rtol: float | None,
) -> dict[Scope, NullSpace]:
    """Count the eigenvalues of each scope's diagonal block.

    Args:
        hessian: The Hessian of the network, shape ``(N, N)``.
        gradients: The gradients of the canonical outputs, shape ``(m, N)``.
        loss: The loss at the outputs.
        scopes: The scopes to report, the network last.
        brackets: The bracket that products prove for each scope; empty where they prove nothing.
        rtol: The relative tolerance on eigenvalues; ``None`` means the rounding of the arithmetic.
    """
    layers = scopes[-1].layers
    positions = torch.arange(hessian.shape[0], device=hessian.device)
    columns = dict(zip(layers, torch.split(positions, [layer.num_parameters for layer in layers]), strict=True))
    null_spaces = {}
    for scope in scopes:
        chosen = torch.cat([columns[layer] for layer in scope.layers])
        null_spaces[scope] = hessian_null_space(
            hessian[chosen][:, chosen],
            gradients=gradients[:, chosen],
            curvature=loss.curvature,
            rtol=rtol,
            bracket=brackets.get(scope),
        )
    return null_spaces


def dense_hessian(
    runs: ProbeRuns, gradients: Tensor, loss: LossCurvature, is_curved: Sequence[bool], limits: HessianLimits
) -> Tensor:
    """Form the Hessian of a network, shape ``(N, N)``.

    Args:
        runs: The network's runs over the probe.
        gradients: The gradients of the canonical outputs, shape ``(m, N)``.
        loss: The loss at the outputs.
        is_curved: For each parameter whether its Gauss-Newton part is known not to vanish.
        limits: The limits of memory.

    Raises:
        RuntimeError: If the Hessian is not symmetric or not finite, or an operation can be differentiated only once.
    """
    network, trace, curvature = runs.network, runs.full_trace, loss.curvature
    share = 1.0 if limits.chunk_size is None else limits.chunk_size / runs.probe.size
    num_elements = max(1, int(share * num_activations(trace)))
    num_columns = max(1, min(_MAX_COLUMNS, limits.batch_elements // num_elements))
    if limits.chunk_size is None and (loss.has_penalty or not curvature.is_closed):
        rounding = ROUNDING_FACTOR * curvature.rounding * float(gradients.square().sum())
        hessian = hessian_matrix(
            loss.loss_fn(trace.outputs),
            network.parameters(),
            chunk_size=num_columns,
            atol=rounding,
            is_curved=is_curved,
        )
    else:  # P by its closed form, of which autograd loses digits by cancellation.
        model = quadratic_model(runs, curvature, link=loss.canonical.link, chunk_size=limits.chunk_size)
        residual = residual_matrix(model, chunk_size=num_columns)
        hessian = residual + gradients.mT @ weighted_rows(gradients, curvature.matrices)
    check_finite(hessian, network.layers)
    return hessian
