"""What several processes measure together: each must give the record that one process gives alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.training import seeded


@dataclass(frozen=True)
class Case:
    """A module, whose numbers and buffers differ from process to process, with a probe and what is asked of it.

    Attributes:
        build: Makes the module of a process.
        num_inputs: Of the probe.
        options: Of `measure_basin`.
        shape: Of an input.
    """

    build: Callable[[int], nn.Module]
    num_inputs: int = 25
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (3,)

    def module(self, rank: int) -> nn.Module:
        with seeded(rank):
            return self.build(rank).eval()

    def probe(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(self.num_inputs, *self.shape, generator=generator)
        return inputs, torch.randn(self.num_inputs, 2, generator=generator)


def perceptron(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 60), nn.Tanh(), nn.Linear(60, 2)
    )


class Counting(nn.Module):
    """Scales by a buffer that counts to another number on each process, and notes how many inputs its copies get."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = perceptron()
        self.register_buffer("count", torch.tensor(2.0 + rank))

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return self.layers(inputs) * self.count


class Differing(Counting):
    """The same with a plain attribute, which no process knows of another one."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.scale = 1.0 + rank

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)


class Softened(nn.Module):
    """Uses its parameter in a way that only dense rows show."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, 3))
        self.readout = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(torch.logaddexp(inputs.unsqueeze(1), self.places).sum(2))


class Together(Softened):
    """The same, and cannot run a batch of one."""

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            raise ValueError("a batch of one")
        return super().forward(inputs)


class Alternating(nn.Module):
    """Uses one half of its parameter first, or the other, as the first input of the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        order = (0, 1) if inputs[0, 0] > 0 else (1, 0)
        by_half = {index: torch.tanh(inputs @ self.halves[index]) for index in order}
        return torch.stack([by_half[0].sum(1), by_half[1].prod(1)], dim=1)


class Penalized(nn.Module):
    """Has a loss that holds parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) + sum(p.square().sum() for p in self.parameters())


def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    """Moving one output changes the slope at all others."""
    return (outputs - targets).square().mean().exp()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets.argmax(1))


MSE = {"loss_fn": nn.functional.mse_loss}
WIDE = 3000  # units, from which on products with the Hessian are taken on all processes

CASES: dict[str, Case] = {
    "buffers of their own": Case(Counting, options=MSE),
    "attributes of their own": Case(Differing, options=MSE),
    "one input": Case(Counting, num_inputs=1, options=MSE),
    "five inputs": Case(Counting, num_inputs=5, options=MSE),
    "a convolution": Case(lambda _: convolutional(), options=MSE, shape=(1, 8, 8)),
    "a convolution in pieces": Case(
        lambda _: convolutional(), num_inputs=8, options=MSE | {"memory_budget": 1_000_000}, shape=(1, 8, 8)
    ),
    "dense rows": Case(lambda _: Softened(), options=MSE),
    "dense rows of a whole batch": Case(lambda _: Together(), options=MSE),
    "three inputs that cannot run alone": Case(lambda _: Together(), num_inputs=3, options=MSE),
    "dense rows in pieces": Case(lambda _: Softened(), options=MSE | {"hessian": "bracket", "memory_budget": 480_000}),
    "uses in another order": Case(lambda _: Alternating(), options=MSE),
    "a formed Hessian in chunks": Case(
        lambda _: perceptron(), options=MSE | {"hessian": "dense", "memory_budget": 740_000}
    ),
    "a penalty": Case(lambda _: Penalized()),
    "a projection": Case(lambda _: perceptron(), options={"max_outputs": 1}),
    "probabilities": Case(lambda _: perceptron(), options={"behavior": "probabilities"}),
    "no spectrum": Case(lambda _: perceptron(WIDE), options={"spectrum": False}),
    "many units": Case(lambda _: perceptron(WIDE), options=MSE),
    "many units, coupled": Case(lambda _: perceptron(WIDE), options={"loss_fn": coupled}),
    "many units, classes": Case(lambda _: perceptron(WIDE), options={"loss_fn": cross_entropy}),
    "many rows": Case(lambda _: perceptron(WIDE), num_inputs=200, options=MSE | {"hessian": "gauss-newton"}),
}


def options_of(case: Case, module: nn.Module) -> dict[str, Any]:
    """With the loss that a module holds itself."""
    return {"loss_fn": module.loss} if isinstance(module, Penalized) else case.options
