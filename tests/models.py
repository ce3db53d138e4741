"""Networks whose ranks are known exactly, and points whose geometry is known on paper.

Each network stands here twice: ``forward`` in torch, and ``exact`` over dual integers. Weights and inputs are small
integers, so that float64 holds every value and derivative without rounding and there is nothing to tolerate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from tests.exact import Dual, ExactNetwork, integers


class Chain(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, *widths: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index and self.activation == "relu":
                x = x.relu()
            elif index:
                x = x.square()
            x = layer(x)
        return x

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.constant(x)
        for index in range(len(self.layers)):
            if index:
                h = h.relu() if self.activation == "relu" else h.square()
            h = network.linear(f"layers.{index}", h)
        return h


class Residual(nn.Module):
    """A branch of two layers beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.head = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.down(self.up(h).relu())
        return self.head(h.relu())

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.linear("first", network.constant(x))
        h = h + network.linear("down", network.linear("up", h).relu())
        return network.linear("head", h.relu())


class Convolutional(nn.Module):
    """Two convolutions, the second strided and padded, on one-channel images of 5 x 5."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.far(self.near(x).relu()).relu().flatten(1))

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.conv2d("near", network.constant(x)).relu()
        h = network.conv2d("far", h, stride=2, padding=1).relu()
        return network.linear("head", h.reshape(len(x), -1))


class BagOfTokens(nn.Module):
    """The sum of token embeddings, and a linear head; its weight may be the embedding itself."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tied = tied
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5 if tied else 2)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).sum(1).relu())

    def exact(self, network: ExactNetwork, tokens: np.ndarray) -> Dual:
        h = network.embedding("embed", tokens).sum(1).relu()
        return network.linear("head", h, weight="embed.weight" if self.tied else None)


class Embeddings(nn.Module):
    """The sum of token embeddings as it stands: a one-hot linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).sum(1)

    def exact(self, network: ExactNetwork, tokens: np.ndarray) -> Dual:
        return network.embedding("embed", tokens).sum(1)


class Recurrent(nn.Module):
    """A hand-written recurrence: the same cell at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.state, self.head = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 3)
        for step in range(x.shape[1]):
            h = (self.read(x[:, step]) + self.state(h)).relu()
        return self.head(h)

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.constant(np.zeros((len(x), 3), dtype=np.int64))
        for step in range(x.shape[1]):
            h = (network.linear("read", network.constant(x[:, step])) + network.linear("state", h)).relu()
        return network.linear("head", h)


class TiedLayers(nn.Module):
    """Two layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.twice.weight = self.once.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.once(x).relu()).relu())

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.linear("once", network.constant(x)).relu()
        return network.linear("head", network.linear("twice", h, weight="once.weight").relu())


class Scaled(nn.Module):
    """Parameters of the root itself beside those of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.inner(x).relu())

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        h = network.linear("inner", network.constant(x)).relu()
        return network.linear("head", h * network.parameter("scale"))


class Sequence2d(nn.Module):
    """A network applied at every position of a sequence: outputs ``(k, t, c)``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).relu())

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        return network.linear("head", network.linear("inner", network.constant(x)).relu())


class OneNumber(nn.Module):
    """A chain that returns a plain number for each input: outputs ``(k,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).relu()).squeeze(1)

    def exact(self, network: ExactNetwork, x: np.ndarray) -> Dual:
        return network.linear("head", network.linear("inner", network.constant(x)).relu())[:, 0]


@dataclass(frozen=True, eq=False)
class Case:
    """A network with integer weights on integer inputs."""

    module: Any
    inputs: Tensor

    def evaluated(self, *, second: bool = False) -> tuple[ExactNetwork, Dual]:
        """The very same network over dual integers, and its outputs."""
        network = ExactNetwork(self.module, second=second)
        return network, self.module.exact(network, integers(self.inputs))


@torch.no_grad()
def with_integer_weights(module: nn.Module, generator: Generator, *, largest: int = 2) -> nn.Module:
    """Replace every weight by a random integer."""
    for parameter in module.parameters():
        parameter.copy_(torch.randint(-largest, largest + 1, parameter.shape, generator=generator))
    return module


def integer_inputs(generator: Generator, *shape: int) -> Tensor:
    """Random integers; the last input repeats the second, so that there is something to merge at every layer."""
    inputs = torch.randint(-3, 4, shape, generator=generator).float()
    inputs[-1] = inputs[1]
    return inputs


def tokens(generator: Generator, *shape: int, vocabulary: int) -> Tensor:
    """Random token indices; the last input repeats the second."""
    chosen = torch.randint(0, vocabulary, shape, generator=generator)
    chosen[-1] = chosen[1]
    return chosen


_CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Generator], Tensor]]] = {
    "mlp": (lambda: Chain(3, 5, 4, 2), lambda g: integer_inputs(g, 8, 3)),
    "narrow": (lambda: Chain(3, 1, 5, 1), lambda g: integer_inputs(g, 12, 3)),
    "deep": (lambda: Chain(2, 3, 3, 3, 3, 3, 2), lambda g: integer_inputs(g, 9, 2)),
    "bottleneck": (lambda: Chain(3, 5, 2, 5, 2), lambda g: integer_inputs(g, 9, 3)),
    "quadratic": (lambda: Chain(2, 4, 2, activation="square"), lambda g: integer_inputs(g, 10, 2)),
    "many inputs": (lambda: Chain(2, 3, 3, 1), lambda g: integer_inputs(g, 40, 2)),
    "residual": (Residual, lambda g: integer_inputs(g, 8, 2)),
    "convolutional": (Convolutional, lambda g: integer_inputs(g, 7, 1, 5, 5)),
    "bag of tokens": (BagOfTokens, lambda g: tokens(g, 9, 3, vocabulary=5)),
    "embeddings": (Embeddings, lambda g: tokens(g, 9, 3, vocabulary=6)),
    "recurrent": (Recurrent, lambda g: integer_inputs(g, 8, 3, 2)),
    "tied layers": (TiedLayers, lambda g: integer_inputs(g, 8, 3)),
    "tied embedding": (lambda: BagOfTokens(tied=True), lambda g: tokens(g, 8, 3, vocabulary=5)),
    "scaled": (Scaled, lambda g: integer_inputs(g, 9, 2)),
    "sequence": (Sequence2d, lambda g: integer_inputs(g, 5, 3, 2)),
    "one number": (OneNumber, lambda g: integer_inputs(g, 9, 2)),
}

CASE_NAMES = tuple(_CASES)
CHAINS = ("mlp", "narrow", "deep", "bottleneck", "quadratic", "many inputs")


def integer_case(name: str, seed: int) -> Case:
    """One of ``CASE_NAMES`` with the integer weights and inputs of a seed."""
    build, draw = _CASES[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # default initialisations draw from the global generator
        module = build()
    return Case(with_integer_weights(module, generator), draw(generator))


@cache
def evaluated_case(name: str, seed: int, *, second: bool = False) -> tuple[ExactNetwork, Dual]:
    """A case over dual integers, computed once."""
    return integer_case(name, seed).evaluated(second=second)


class SquaredDistances(nn.Module):
    """Squared distances of a point theta to the inputs.

    On the line through two centres both spheres touch: the gradients are parallel and the null space of G has 2
    dimensions, but the set of all theta with these distances is the point itself.
    """

    def __init__(self, theta: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, centres: Tensor) -> Tensor:
        return (self.theta - centres).square().sum(1, keepdim=True)


class Crossing(nn.Module):
    """f = x y on every input: where x = y = 0 the null space has 2 dimensions, and the zero set, a cross, only 1."""

    def __init__(self, theta: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.theta[0] * self.theta[1]


class Parabolas(nn.Module):
    """f_i = a_i + b_i theta + c_i theta**2 of one parameter, at theta = 0; the inputs are rows (a, b, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, coefficients: Tensor) -> Tensor:
        a, b, c = coefficients.split(1, dim=1)
        return a + b * self.theta + c * self.theta.square()


def sum_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum (f - y)**2; its Hessian is 2 Gᵀ G where the residual is zero."""
    return (outputs - targets).square().sum()


def half_sum_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """0.5 * sum (f - y)**2; its Hessian is Gᵀ G where the residual is zero."""
    return 0.5 * sum_of_squares(outputs, targets)


def fourth_powers(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum (f - y)**4: flat to second order at a perfect fit, whatever the rank of the gradients."""
    return (outputs - targets).pow(4).sum()
