"""Null spaces of a Hessian that is formed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_basin.functional.bracket import GaussNewtonEigenvalues, NullSpace
from lightning_basin.functional.hessian import hessian_matrix
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.null_space import hessian_null_space
from lightning_basin.functional.rank import EPSILON
from lightning_basin.limits import HessianLimits
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.quantities.hessian.loss import LossCurvature
from lightning_basin.quantities.hessian.products import ROUNDING_FACTOR, check_finite, residual_matrix
from lightning_basin.quantities.hessian.quadratic_model import QuadraticModel, num_activations
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
    """Count the eigenvalues of each scope's diagonal block of the Hessian, inside of the brackets that R proves.

    ``gradients`` are those of the canonical outputs, shape ``(m, N)``; the network is the last of ``scopes``.
    """
    return {
        scope: hessian_null_space(
            hessian[columns][:, columns],
            gradients=gradients[:, columns],
            curvature=loss.curvature,
            rtol=rtol,
            bracket=brackets.get(scope),
        )
        for scope, columns in _columns(scopes, hessian.device)
    }


def dense_brackets(
    residual: Tensor, eigenvalues: Mapping[Scope, GaussNewtonEigenvalues], *, uncertainty: float
) -> dict[Scope, NullSpace]:
    """Bracket the nullity of each scope's diagonal block by the eigenvalues of R, the network last.

    ``uncertainty`` is the fraction by which rounding may move the norm of R.
    """
    blocks = (residual[columns][:, columns] for _, columns in _columns(list(eigenvalues), residual.device))
    symmetric = ((block + block.mT) / 2 for block in blocks)
    norms = torch.stack([torch.linalg.eigvalsh(block).abs().max() for block in symmetric]).tolist()
    # H is made of the same R: its eigenvalues are compared with the norm as it is.
    return {
        scope: replace(own.bracket(norm * (1 + uncertainty)), residual=norm)
        for (scope, own), norm in zip(eigenvalues.items(), norms, strict=True)
    }


def _columns(scopes: Sequence[Scope], device: torch.device) -> Iterator[tuple[Scope, Tensor]]:
    """Each scope with the places of its parameters among those of the network."""
    layers = scopes[-1].layers
    positions = torch.arange(scopes[-1].num_parameters, device=device)
    columns = dict(zip(layers, torch.split(positions, [layer.num_parameters for layer in layers]), strict=True))
    for scope in scopes:
        yield scope, torch.cat([columns[layer] for layer in scope.layers])


def dense_hessian(
    runs: ProbeRuns, model: QuadraticModel, gradients: Tensor, loss: LossCurvature, limits: HessianLimits
) -> tuple[Tensor, Tensor | None]:
    """Form the Hessian of a network, and its residual part, which is free of the cancellation of their difference.

    Both are symmetric but for rounding, shape ``(N, N)``; there is no R where the loss depends on parameters beside the
    outputs. ``gradients`` are those of the canonical outputs, shape ``(m, N)``.
    """
    network, trace = runs.network, runs.full_trace
    share = 1.0 if limits.chunk_size is None else limits.chunk_size / runs.probe.size
    num_elements = max(1, int(share * num_activations(trace)))
    num_columns = max(1, min(_MAX_COLUMNS, limits.batch_elements // num_elements))
    rounding = ROUNDING_FACTOR * loss.curvature.rounding * float(gradients.square().sum())
    residual, gauss_newton = None, gradients.mT @ weighted_rows(gradients, loss.curvature.matrices)
    if not loss.has_penalty:
        atol = rounding + ROUNDING_FACTOR * EPSILON * float(gauss_newton.norm())
        residual = residual_matrix(model, chunk_size=num_columns, atol=atol)
    # P by its closed form, of which autograd loses digits by cancellation; another one has lost them before.
    if residual is None or (limits.chunk_size is None and not loss.curvature.is_closed):
        loss_value = loss.loss_fn(trace.outputs)
        hessian = hessian_matrix(loss_value, network.parameters(), chunk_size=num_columns, atol=rounding)
    else:
        hessian = residual + gauss_newton
    check_finite(hessian, network.layers)
    return hessian, residual
