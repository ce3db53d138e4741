"""What is measured of `lightning_basin` itself. Weights are float32, all else is float64."""

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin
from lightning_basin.functional import hessian_matrix, hessian_product
from lightning_basin.gradients import layer_gradients
from lightning_basin.measurement import evaluated
from lightning_basin.probe import Probe


def ranks(module: nn.Module, inputs: Tensor) -> Stages:
    """Each stage starts anew, from the module; all are checked against autograd as in every measurement."""
    yield "gram", gram(module, inputs)
    yield "rank", measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank
    record = measure_basin(module, inputs, spectrum=False)
    yield "layers", tuple(layer.gradient_rank for layer in record.layers.values())


def spectra(module: nn.Module, inputs: Tensor) -> Stages:
    """The default of `measure_basin`: ranks with all singular values."""
    record = measure_basin(module, inputs)
    yield "layers", tuple(layer.gradient_rank for layer in record.layers.values())


def gram(module: nn.Module, inputs: Tensor) -> Tensor:
    """Products of all pairs of rows of the gradients, shape ``(m, m)``."""
    total: Tensor | None = None
    with evaluated(module, Probe(inputs), None, None) as evaluation:
        for measured in layer_gradients(evaluation.traced, generator=torch.Generator().manual_seed(0)):
            total = measured.gradients.gram if total is None else total.add_(measured.gradients.gram)
    assert total is not None
    return total


def products(module: nn.Module, inputs: Tensor, loss: Tensor, directions: Tensor) -> Tensor:
    """The Hessian times each direction, by double backward with the graph kept."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    return torch.stack([hessian_product(gradient, parameters, direction) for direction in directions])


def hessian(module: nn.Module, loss: Tensor) -> Tensor:
    """All of it."""
    return hessian_matrix(loss, list(module.parameters()))


OURS = (
    Way("lightning_basin, ranks", ranks, dtypes=(torch.float32,), is_cumulative=False),
    Way("lightning_basin, with all singular values", spectra, dtypes=(torch.float32,), is_quick=False),
)
