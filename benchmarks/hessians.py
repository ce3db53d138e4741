"""Products with the Hessian, whole Hessians through LayerNorm, and counts of flat directions, of ours and of peers.

The loss is the mean squared error in all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin
from lightning_basin.functional.hessian import hessian_matrix, hessian_product
from lightning_basin.quantities.hessian import products

Multiply = Callable[[Tensor], Tensor]
"""From directions to the products with them, both of shape ``(n, N)``."""

Prepare = Callable[[nn.Module, Tensor, Tensor], Multiply]
"""From a module, inputs and targets."""

RESIDUAL = 1e-10  # of a fit that is close to perfect, relative to outputs near 1
TOLERANCES = (1e-4, 1e-8)  # on eigenvalues, relative to the largest
LANCZOS_STEPS = 128  # of curvlinops, which has no default; its documentation takes as many

_STEP = 1e-4  # of finite differences: an error of 1e-8 times fourth derivatives, and 1e-12 of rounding
_MOST_PRODUCTS = 64
_PRODUCT_ELEMENTS = 2e6


def _loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(module(inputs), targets)


# --- products ---------------------------------------------------------------------------------------------------------


def double_backward(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """Ours: the graph of the gradient is kept, and run backward for each direction."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(_loss(module, inputs, targets), parameters, create_graph=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    return lambda directions: torch.stack([hessian_product(gradient, parameters, row) for row in directions])


def all_columns(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """Ours, for small networks: all of the Hessian in batched backward passes."""
    parameters = list(module.parameters())
    return lambda directions: directions @ hessian_matrix(_loss(module, inputs, targets), parameters)


def curvlinops_one_by_one(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """curvlinops: forward over reverse for each direction."""
    operator = _curvlinops_operator(module, inputs, targets)
    return lambda directions: torch.stack([operator @ row for row in directions])


def curvlinops_batched(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """curvlinops: forward over reverse for all directions at once."""
    operator = _curvlinops_operator(module, inputs, targets)
    return lambda directions: (operator @ directions.mT).mT


def _curvlinops_operator(module: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    from curvlinops import HessianLinearOperator

    parameters = list(module.parameters())
    return HessianLinearOperator(module, nn.MSELoss(), parameters, [(inputs, targets)], check_deterministic=False)


def pyhessian(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """PyHessian: double backward with the graph kept."""
    from pyhessian.utils import hessian_vector_product

    computation = _pyhessian_computation(module, inputs, targets)
    shapes = [parameter.shape for parameter in computation.params]

    def multiply(directions: Tensor) -> Tensor:
        rows = []
        for direction in directions:
            parts = direction.split([shape.numel() for shape in shapes])
            vectors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            products = hessian_vector_product(computation.gradsH, computation.params, vectors)
            rows.append(torch.cat([product.flatten() for product in products]))
        return torch.stack(rows)

    return multiply


def _pyhessian_computation(module: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    from pyhessian import hessian

    module.zero_grad()
    return hessian(module, nn.MSELoss(), data=(inputs, targets), cuda=False)


def eigenthings(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """hessian-eigenthings: double backward from the start for each direction."""
    operator = _eigenthings_operator(module, inputs, targets)
    return lambda directions: torch.stack([operator.matvec(row) for row in directions])


def _eigenthings_operator(module: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(module, [(inputs, targets)], supervised_loss(nn.MSELoss()))


def torch_func(module: nn.Module, inputs: Tensor, targets: Tensor) -> Multiply:
    """`torch.func.hessian`: forward over reverse, all of it."""
    parameters = dict(module.named_parameters())

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([parameter.numel() for parameter in parameters.values()])
        values = {
            name: part.view_as(parameter) for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        return F.mse_loss(functional_call(module, values, (inputs,)), targets)

    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    return lambda directions: directions @ torch.func.hessian(loss)(flat)


def timed_products(prepare: Prepare, module: nn.Module, inputs: Tensor) -> Stages:
    """Some products after what is done once."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(_outputs(module, inputs).shape, generator=generator).to(next(module.parameters()))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    count = int(max(2, min(_MOST_PRODUCTS, num_parameters, _PRODUCT_ELEMENTS // num_parameters)))
    directions = torch.randn(count, num_parameters, generator=generator).to(targets)
    multiply = prepare(module, inputs, targets)
    yield "prepared", {"count": count}
    yield "products", multiply(directions)


def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(inputs)


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def hessian_errors(prepare: Prepare, module: nn.Module, inputs: Tensor) -> Stages:
    """Of all of the Hessian, beside finite differences of gradients."""
    targets = torch.ones_like(_outputs(module, inputs))
    expected = finite_differences(module, inputs, targets)
    found = prepare(module, inputs, targets)(torch.eye(expected.shape[0]).to(expected)).detach()
    errors = {"error": (found - expected).norm(), "asymmetry": (found - found.mT).norm()}
    yield "hessian", {name: float(value / expected.norm()) for name, value in errors.items()}


def finite_differences(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Central differences of gradients, extrapolated to fourth order: no second derivative is taken."""
    parameters = list(module.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(values: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(values, parameters)
        found = torch.autograd.grad(_loss(module, inputs, targets), parameters)
        return torch.cat([part.flatten() for part in found])

    def difference(direction: Tensor, step: float) -> Tensor:
        return (gradient(flat + step * direction) - gradient(flat - step * direction)) / (2 * step)

    rows = [
        (4 * difference(direction, _STEP) - difference(direction, 2 * _STEP)) / 3
        for direction in torch.eye(flat.numel(), dtype=flat.dtype)
    ]
    nn.utils.vector_to_parameters(flat, parameters)
    return torch.stack(rows)


# --- counts of flat directions ----------------------------------------------------------------------------------------


def _fitted(module: nn.Module, inputs: Tensor) -> Tensor:
    """Targets from which the outputs are away by the residual of a good fit."""
    outputs = _outputs(module, inputs)
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4))
    return outputs + RESIDUAL * noise.to(outputs)


def certified_nullity(module: nn.Module, inputs: Tensor) -> Stages:
    """Ours: proved by the spectrum of the Gauss-Newton part and some products with what the residual adds."""
    count = 0

    def counted(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return hessian_product(*arguments)

    targets = _fitted(module, inputs)
    with patch.object(products, "hessian_product", counted):
        record = measure_basin(module, inputs, targets, loss_fn=F.mse_loss, hessian="bracket", layers=[])
    # For squared errors the eigenvalues of the Gauss-Newton part are squares of the gradients' singular values.
    ranks = record.gradient_rank_at
    counts = {tolerance: record.num_parameters - ranks[tolerance**0.5] for tolerance in TOLERANCES}
    yield (
        "nullity",
        {
            "counts": counts,
            "products": count,
            "lower": record.hessian_nullity_lower,
            "upper": record.hessian_nullity_upper,
            "residual_curvature": record.residual_curvature,
        },
    )


def eigenvalues_of_all(module: nn.Module, inputs: Tensor) -> Stages:
    """The truth where it can be had: all of the Hessian, and all its eigenvalues."""
    loss = _loss(module, inputs, _fitted(module, inputs))
    magnitudes = torch.linalg.eigvalsh(hessian_matrix(loss, list(module.parameters()))).abs()
    counts = {tolerance: int((magnitudes <= tolerance * magnitudes.max()).sum()) for tolerance in TOLERANCES}
    yield "nullity", {"counts": counts, "products": magnitudes.numel()}


def eigenthings_density(num_runs: int, module: nn.Module, inputs: Tensor) -> Stages:
    """hessian-eigenthings: runs of 80 Lanczos steps, its default, which has ten runs."""
    from hessian_eigenthings import spectral_density

    operator = _eigenthings_operator(module, inputs, _fitted(module, inputs))
    found = spectral_density(operator, num_runs=num_runs, lanczos_steps=min(80, operator.size))
    yield "nullity", _weighed(found.raw_eigenvalues, found.raw_weights, operator.size)


def curvlinops_density(module: nn.Module, inputs: Tensor) -> Stages:
    """curvlinops: one run of Lanczos without reorthogonalization."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = _curvlinops_operator(module, inputs, _fitted(module, inputs))
    nodes, vectors = fast_lanczos(operator, min(LANCZOS_STEPS, operator.shape[0]))
    yield "nullity", _weighed(nodes.unsqueeze(0), vectors[:1].square(), operator.shape[0])


def pyhessian_density(module: nn.Module, inputs: Tensor) -> Stages:
    """PyHessian with its defaults, one run of 100 Lanczos steps, and `torch.eig` as it was before torch removed it."""

    def eig(matrix: Tensor, *, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        assert eigenvectors
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    computation = _pyhessian_computation(module, inputs, _fitted(module, inputs))
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    with patch.object(torch, "eig", eig, create=True):
        nodes, weights = computation.density(iter=min(100, num_parameters), n_v=1)
    yield "nullity", _weighed(torch.tensor(nodes), torch.tensor(weights), num_parameters)


def _weighed(nodes: Tensor, weights: Tensor, num_parameters: int) -> dict[str, Any]:
    """How many eigenvalues are small, by the weights of the nodes of some quadratures, shapes ``(runs, steps)``."""
    magnitudes = nodes.abs()
    largest = magnitudes.nan_to_num().max()
    counts = {
        tolerance: round(num_parameters * float(weights[magnitudes <= tolerance * largest].sum()) / len(nodes))
        for tolerance in TOLERANCES
    }
    return {"counts": counts, "products": nodes.numel()}


OURS = "lightning_basin"
ALL_COLUMNS = "lightning_basin, all columns at once"
ALL_EIGENVALUES = "all eigenvalues"

_CURVLINOPS, _PYHESSIAN, _EIGENTHINGS = "curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings"
_DOUBLE = (torch.float64,)
_LARGE = ("mlp-1e6", "cnn-1e6")
_PREPARED: tuple[tuple[str, Prepare, str | None], ...] = (
    (OURS, double_backward, None),
    ("curvlinops, one by one", curvlinops_one_by_one, _CURVLINOPS),
    ("curvlinops, batched", curvlinops_batched, _CURVLINOPS),
    ("PyHessian", pyhessian, _PYHESSIAN),
    ("hessian-eigenthings", eigenthings, _EIGENTHINGS),
)

PRODUCTS = (
    *(
        Way(name, partial(timed_products, prepare), package=package, is_cumulative=False)
        for name, prepare, package in _PREPARED
    ),
    Way(ALL_COLUMNS, partial(timed_products, all_columns), _DOUBLE, is_cumulative=False, only=("seed",)),
)
HESSIANS = tuple(
    Way(name, partial(hessian_errors, prepare), _DOUBLE, package=package)
    for name, prepare, package in (*_PREPARED, ("torch.func.hessian", torch_func, None))
)
NULLITIES = (
    Way(OURS, certified_nullity, _DOUBLE),
    Way(ALL_EIGENVALUES, eigenvalues_of_all, _DOUBLE, only=("mlp-3e3",)),
    Way("hessian-eigenthings, 10 x 80", partial(eigenthings_density, 10), _DOUBLE, _EIGENTHINGS, only=("mlp-3e3",)),
    Way("hessian-eigenthings, 1 x 80", partial(eigenthings_density, 1), _DOUBLE, _EIGENTHINGS, only=_LARGE),
    Way(f"curvlinops, 1 x {LANCZOS_STEPS}", curvlinops_density, _DOUBLE, _CURVLINOPS, only=("mlp-3e3", "mlp-1e6")),
    Way("PyHessian, 1 x 100", pyhessian_density, _DOUBLE, _PYHESSIAN, only=("mlp-3e3", "mlp-1e6")),
)
