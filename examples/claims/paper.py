"""Functions whose ranks, nullities and dimensions are known on paper, beside what is measured of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softmax

from examples.claims.ensembles import multilayer_perceptron
from lightning_basin import measure_basin, verify_null_space

squared_error = partial(mse_loss, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Count:
    """An integer that algebra gives, and what was measured."""

    what: str
    predicted: int
    measured: int | None


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A manifold whose dimension is known on paper.

    Attributes:
        where: The point on it.
        dimension: Its dimension there.
        nullity: N minus the rank of the gradients.
        surviving_fraction: The fraction of a step along the null space that is left on the manifold.
    """

    where: str
    dimension: int
    nullity: int
    surviving_fraction: float


class Function(nn.Module):
    """Outputs as a function of a vector of parameters and the inputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], parameters: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(parameters, dtype=torch.float64))
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        """Evaluate the function, shape ``(k, 1)``."""
        return self.function(self.theta, inputs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_network(*widths: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return multilayer_perceptron(widths, activation).double()


def dimensions() -> list[Dimension]:
    """Measure nullity and surviving fraction where the dimension of the manifold is known on paper."""
    centers = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)

    def distances(theta: Tensor, points: Tensor) -> Tensor:
        return (theta - points).square().sum(1, keepdim=True)

    def product(theta: Tensor, ones: Tensor) -> Tensor:
        return theta.prod() * ones

    def product_of_matrices(theta: Tensor, inputs: Tensor) -> Tensor:
        return inputs @ theta[:8].view(2, 4).mT @ theta[8:].view(3, 2).mT

    linear = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)).double()
    one = torch.outer(normal(2, seed=2), normal(4, seed=3)).flatten().tolist()
    other = torch.outer(normal(3, seed=4), normal(2, seed=5)).flatten().tolist()
    points: list[tuple[str, int, nn.Module, Tensor]] = [
        ("tanh 3-4-1, 5 inputs: 21 − 5", 16, small_network(3, 4, 1), normal(5, 3)),
        ("linear 4-3-5: invertible 3 x 3 changes of basis", 9, linear, normal(6, 4)),
        ("two spheres that cross in a circle", 1, Function(distances, [0.3, 0.4, 0.0]), centers),
        ("two spheres that touch", 0, Function(distances, [0.3, 0.0, 0.0]), centers),
        ("xy = 0 at the crossing", 1, Function(product, [0.0, 0.0]), torch.ones(1, 1, dtype=torch.float64)),
        ("linear 4-2-3 at weights of rank 1", 6, Function(product_of_matrices, one + other), normal(6, 4)),
    ]
    verified = [(name, dimension, verify_null_space(module, inputs)) for name, dimension, module, inputs in points]
    return [
        Dimension(where=name, dimension=dimension, nullity=result.nullity, surviving_fraction=result.surviving_fraction)
        for name, dimension, result in verified
    ]


def counts() -> list[Count]:
    """Measure the ranks of gradients and Hessian where they differ, all at minima."""
    one = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    line = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    bowl = Function(lambda theta, ones: (theta**2 + 1) * ones, [0.0])
    tilt = Function(lambda theta, signs: signs * theta - theta**2 / 2, [0.0])
    plane = Function(lambda theta, x: x @ theta[:, None], [0.0, 0.0])
    cases: list[tuple[str, nn.Module, Tensor, Tensor, Any, int, int]] = [
        ("f = θ² + 1, target 0", bowl, one, 0 * one, squared_error, 0, 1),
        ("f = (θ − θ²/2, −θ − θ²/2), targets −1", tilt, two, -two.abs(), squared_error, 1, 0),
        ("zero residual, loss Σ r⁴", plane, line, torch.zeros_like(two), lambda f, y: ((f - y) ** 4).sum(), 2, 0),
    ]
    results = []
    for name, module, inputs, targets, loss_fn, of_gradients, of_hessian in cases:
        record = measure_basin(module, inputs, targets, loss_fn=loss_fn, hessian="dense")
        strict = record.hessian_nullity_strict
        rank = None if strict is None else record.num_parameters - strict
        results.append(Count(what=f"{name}: rank(G)", predicted=of_gradients, measured=record.gradient_rank))
        results.append(Count(what=f"{name}: rank(H)", predicted=of_hessian, measured=rank))
    return results + cross_entropy_counts()


def cross_entropy_counts() -> list[Count]:
    """Measure the ranks of a classifier 4-8-3 on 6 inputs, with its own probabilities as soft labels."""
    network, inputs, loss_fn = small_network(4, 8, 3), normal(6, 4), nn.CrossEntropyLoss()
    labels = softmax(network(inputs), 1).detach()
    logits = measure_basin(network, inputs, labels, loss_fn=loss_fn, hessian="dense")
    probabilities = measure_basin(network, inputs, behavior="probabilities")
    curved = None if logits.gauss_newton_nullity is None else logits.num_parameters - logits.gauss_newton_nullity
    strict = None if logits.hessian_nullity_strict is None else logits.num_parameters - logits.hessian_nullity_strict
    # A softmax does not see what is added to all its logits: two directions remain of three.
    return [
        Count(what="cross-entropy, logits: rank(G)", predicted=18, measured=logits.gradient_rank),
        Count(what="cross-entropy, probabilities: rank(G)", predicted=12, measured=probabilities.gradient_rank),
        Count(what="cross-entropy: rank of the Gauss–Newton part", predicted=12, measured=curved),
        Count(what="cross-entropy, soft labels met: rank(H)", predicted=12, measured=strict),
    ]
