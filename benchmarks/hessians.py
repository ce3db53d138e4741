"""Products with the Hessian, and counts of its flat directions, by us and by peers.

The loss is the mean squared error everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ours import NAME
from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin
from lightning_basin.functional.hessian import hessian_matrix, hessian_product

Multiply = Callable[[Tensor], Tensor]
"""From directions to the products with them, both of shape ``(n, N)``."""

Prepare = Callable[[nn.Module, Tensor, Tensor], Multiply]
"""From a module, inputs and targets."""

RESIDUAL = 1e-10  # of a fit that is close to perfect, relative to outputs near 1
TOLERANCES = (1e-4, 1e-8)  # on eigenvalues, relative to the largest
NUM_PRODUCTS = 16


def _loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(module(inputs), targets)


def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(inputs)


def double_backward(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """Ours: the graph of the gradient is kept, and run backward for each direction."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(_loss(module, inputs, targets), parameters, create_graph=True)
    gradient = torch.cat([block.flatten() for block in gradients])
    return lambda directions: torch.stack([hessian_product(gradient, parameters, row) for row in directions])


def curvlinops_operator(module: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """curvlinops: forward over reverse."""
    from curvlinops import HessianLinearOperator

    parameters = list(module.parameters())
    return HessianLinearOperator(module, nn.MSELoss(), parameters, [(inputs, targets)], check_deterministic=False)


def curvlinops(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """Its products with all directions at once."""
    operator = curvlinops_operator(module, inputs, targets)
    return lambda directions: (operator @ directions.mT).mT


def pyhessian(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """PyHessian: double backward with the graph kept, one direction after the other."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    module.zero_grad()
    operator = hessian(module, nn.MSELoss(), data=(inputs, targets), cuda=False)
    sizes = [parameter.numel() for parameter in operator.params]

    def product(direction: Tensor) -> Tensor:
        blocks = zip(direction.split(sizes), operator.params, strict=True)
        vectors = [block.view_as(parameter) for block, parameter in blocks]
        products = hessian_vector_product(operator.gradsH, operator.params, vectors)
        return torch.cat([block.flatten() for block in products])

    return lambda directions: torch.stack([product(row) for row in directions])


def eigenthings_operator(module: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """hessian-eigenthings: double backward from the start for each direction."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(module, [(inputs, targets)], supervised_loss(nn.MSELoss()))


def eigenthings(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """Its products with one direction after the other."""
    operator = eigenthings_operator(module, inputs, targets)
    return lambda directions: torch.stack([operator.matvec(row) for row in directions])


def products(prepare: Prepare, module: nn.Module, inputs: Tensor) -> Stages:
    """Products with random directions."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(_outputs(module, inputs).shape, generator=generator).to(next(module.parameters()))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    directions = torch.randn(NUM_PRODUCTS, num_parameters, generator=generator).to(targets)
    yield "products", prepare(module, inputs, targets)(directions)


def _targets(module: nn.Module, inputs: Tensor) -> Tensor:
    """Targets whose distance from the outputs is the residual of a good fit."""
    outputs = _outputs(module, inputs)
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4))
    return outputs + RESIDUAL * noise.to(outputs)


def certified_nullity(module: nn.Module, inputs: Tensor) -> Stages:
    """Ours: certified by the spectrum of the Gauss-Newton part and the norm of what the residual adds."""
    record = measure_basin(module, inputs, _targets(module, inputs), loss_fn=F.mse_loss, hessian="bracket", layers=[])
    # For squared errors the eigenvalues of the Gauss-Newton part are squares of the gradients' singular values.
    ranks = record.gradient_rank_at
    counts = _said([record.num_parameters - ranks[tolerance**0.5] for tolerance in TOLERANCES])
    yield "counts", f"{counts}; certified: {record.hessian_nullity_lower} to {record.hessian_nullity_upper}"


def all_eigenvalues(module: nn.Module, inputs: Tensor) -> Stages:
    """The truth where one can have it: the whole Hessian, and all its eigenvalues."""
    loss = _loss(module, inputs, _targets(module, inputs))
    magnitudes = torch.linalg.eigvalsh(hessian_matrix(loss, list(module.parameters()))).abs()
    yield "counts", _said([int((magnitudes <= tolerance * magnitudes.max()).sum()) for tolerance in TOLERANCES])


def eigenthings_density(num_runs: int, module: nn.Module, inputs: Tensor) -> Stages:
    """hessian-eigenthings: runs of 80 Lanczos steps, its default, which has ten runs."""
    from hessian_eigenthings import spectral_density

    operator = eigenthings_operator(module, inputs, _targets(module, inputs))
    density = spectral_density(operator, num_runs=num_runs, lanczos_steps=min(80, operator.size))
    yield "counts", _weighed(density.raw_eigenvalues, density.raw_weights, operator.size)


def curvlinops_density(module: nn.Module, inputs: Tensor) -> Stages:
    """curvlinops: one run of Lanczos without reorthogonalization, of as many steps as in its documentation."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = curvlinops_operator(module, inputs, _targets(module, inputs))
    nodes, vectors = fast_lanczos(operator, min(128, operator.shape[0]))
    yield "counts", _weighed(nodes.unsqueeze(0), vectors[:1].square(), operator.shape[0])


def _weighed(nodes: Tensor, weights: Tensor, num_parameters: int) -> str:
    """How many eigenvalues are small, by the weights of the nodes of quadratures, shapes ``(runs, steps)``."""
    magnitudes = nodes.abs() / nodes.abs().nan_to_num().max()
    shares = [float(weights[magnitudes <= tolerance].sum()) / len(nodes) for tolerance in TOLERANCES]
    return _said([round(num_parameters * share) for share in shares])


def _said(counts: list[int]) -> str:
    return ", ".join(f"{count} below {tolerance:.0e}" for count, tolerance in zip(counts, TOLERANCES, strict=True))


_CURVLINOPS, _PYHESSIAN, _EIGENTHINGS = "curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings"
_DOUBLE = (torch.float64,)

PRODUCTS = (
    Way(NAME, partial(products, double_backward)),
    Way("curvlinops", partial(products, curvlinops), _CURVLINOPS),
    Way("PyHessian", partial(products, pyhessian), _PYHESSIAN),
    Way("hessian-eigenthings", partial(products, eigenthings), _EIGENTHINGS),
)
NULLITIES = (
    Way(NAME, certified_nullity, dtypes=_DOUBLE),
    Way("all eigenvalues", all_eigenvalues, dtypes=_DOUBLE, only=("mlp-3e3",)),
    Way("hessian-eigenthings, 10 x 80", partial(eigenthings_density, 10), _EIGENTHINGS, _DOUBLE, only=("mlp-3e3",)),
    Way("hessian-eigenthings, 1 x 80", partial(eigenthings_density, 1), _EIGENTHINGS, _DOUBLE, only=("mlp-1e6",)),
    Way("curvlinops, 1 x 128", curvlinops_density, _CURVLINOPS, _DOUBLE),
)
