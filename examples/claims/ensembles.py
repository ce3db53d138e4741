"""Many small networks of one architecture, trained at the same time, each as if it were alone."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from lightning_basin.functional import behavioral_gradients, default_rtol, numerical_rank, singular_values


@dataclass(frozen=True, eq=False)
class Ensemble:
    """S perceptrons of one architecture.

    Attributes:
        network: A sequence of linear layers and elementwise functions, whose weights are not used.
        parameters: The parameters by name, with the S networks along the first axis, float64.
    """

    network: nn.Sequential
    parameters: dict[str, Tensor]

    @property
    def size(self) -> int:
        """The number of networks."""
        return next(iter(self.parameters.values())).shape[0]

    def activations(self, inputs: Tensor) -> list[Tensor]:
        """Evaluate all networks on the same inputs ``(k, d)``, or each on its inputs ``(S, k, d)``.

        Returns:
            What enters the first module, and what leaves each, the outputs last: each of shape ``(S, k, width)``.
        """
        values = [inputs.expand(self.size, *inputs.shape[-2:])]
        for name, module in self.network.named_children():
            if isinstance(module, nn.Linear):
                weight, bias = (self.parameters.get(f"{name}.{kind}") for kind in ("weight", "bias"))
                assert weight is not None
                product = values[-1] @ weight.mT
                values.append(product if bias is None else product + bias.unsqueeze(1))
            else:
                values.append(module(values[-1]))
        return values

    def __call__(self, inputs: Tensor) -> Tensor:
        """Evaluate all networks, see `activations`; the outputs have shape ``(S, k, c)``."""
        return self.activations(inputs)[-1]

    def member(self, index: int) -> nn.Module:
        """Copy one network out."""
        network = deepcopy(self.network)
        network.load_state_dict({name: values[index].detach() for name, values in self.parameters.items()})
        return network

    def jacobian(self, index: int, inputs: Tensor) -> Tensor:
        """Compute the behavioral gradients of one network, shape ``(k * c, N)``."""
        return behavioral_gradients(
            lambda values, tensors: functional_call(self.network, dict(values), tuple(tensors)),
            {name: values[index].detach() for name, values in self.parameters.items()},
            [inputs],
        )

    def gradient_ranks(self, inputs: Tensor, members: Iterable[int] | None = None) -> list[int]:
        """Count the independent behavioral gradients of some networks, or of all, at the default tolerance."""
        return [
            matrix_rank(self.jacobian(index, inputs)) for index in (range(self.size) if members is None else members)
        ]


def matrix_rank(matrix: Tensor) -> int:
    """Count the singular values of a matrix that are above the default tolerance."""
    return numerical_rank(singular_values(matrix), rtol=default_rtol(*matrix.shape))


def make_ensemble(make_network: Callable[[], nn.Sequential], seeds: Sequence[int]) -> Ensemble:
    """Draw the initial weights of each network from its seed, as if it were made alone."""
    networks = []
    for seed in seeds:
        torch.manual_seed(seed)
        networks.append(make_network().double())
    parameters, _ = stack_module_state(networks)
    return Ensemble(networks[0], parameters)


def multilayer_perceptron(widths: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Make linear layers with an activation function between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def squared_errors(ensemble: Ensemble, inputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean squared error of each network, shape ``(S,)``."""
    return (ensemble(inputs) - targets).square().mean(dim=(1, 2))


def train(
    ensemble: Ensemble,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    learning_rate: float = 0.01,
    decay: float = 1.0,
    losses: Callable[[Ensemble, Tensor, Tensor], Tensor] = squared_errors,
    watch: Callable[[int], None] | None = None,
    **adam: Any,
) -> None:
    """Fit all networks by full-batch Adam, which acts on each number alone: the networks do not see each other.

    Args:
        ensemble: The networks, which are changed.
        inputs: The inputs, as `Ensemble` takes them.
        targets: The targets, shape ``(k, c)``, or ``(S, k, c)``; other losses may take others.
        steps: The number of steps.
        learning_rate: The learning rate at the start.
        decay: The factor of the learning rate in each step.
        losses: The loss of each network, shape ``(S,)``, as a function of ensemble, inputs and targets.
        watch: A function that is called with the number of steps taken, before each step and at the end.
        **adam: Further arguments of `torch.optim.Adam`.
    """
    optimizer = torch.optim.Adam(ensemble.parameters.values(), learning_rate, fused=True, **adam)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    for step in range(steps):
        if watch is not None:
            watch(step)
        optimizer.zero_grad()
        torch.autograd.backward(losses(ensemble, inputs, targets).sum())
        optimizer.step()
        schedule.step()
    if watch is not None:
        watch(steps)
