"""Random networks with integer weights, whose ranks and duplicates are known exactly."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.limits import MemoryBudgetError
from tests import exact_layers
from tests.exact import Dual, ExactNetwork, count_duplicates, exact_rank, integers, jacobian

_MAX_FEATURES = 40  # of a layer; larger ones make exact arithmetic slow
_BUDGETS = (None, None, 2**17, 2**18, 2**19, 2**20, 2**22)


@dataclass(frozen=True)
class Step:
    """One operation of a network: what it does to tensors, and to dual numbers."""

    call: Callable[[nn.Module, Tensor], Tensor]
    rule: Callable[[ExactNetwork, Dual], Dual]


class RandomNetwork(nn.Module):
    """Operations one after the other, drawn by a seed.

    Args:
        generator: The source of all choices.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self._generator = generator
        self.parts = nn.ModuleDict()
        self.steps: list[Step] = []
        self.inputs = self._draw_inputs()
        for _ in range(self._choose(2, 6)):
            h = self.hidden()
            self._add_step_on_vectors(h.shape[1]) if h.ndim == 2 else self._add_step_on_images(h)
        h = self.hidden()
        if h.ndim > 2:
            self._flatten()
        self._add_linear(self.hidden().shape[1], self._choose(1, 4), repeated=1)
        for parameter in self.parameters():
            if self._choose(0, 8) == 0:
                parameter.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.call(self, x)
        return x

    def exact(self, network: ExactNetwork, inputs: Tensor) -> Dual:
        h = network.constant(integers(inputs))
        for step in self.steps:
            h = step.rule(network, h)
        return h

    @torch.no_grad()
    def hidden(self) -> Tensor:
        return self(self.inputs)

    def _choose(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def _pick(self, *choices: object) -> object:
        return choices[self._choose(0, len(choices) - 1)]

    def _draw_inputs(self) -> Tensor:
        num_inputs = self._choose(1, 9)
        shape = self._pick((self._choose(1, 5),), (self._choose(1, 2), self._choose(3, 5), self._choose(3, 5)))
        inputs = torch.randint(-2, 3, (num_inputs, *shape), generator=self._generator).float()
        if num_inputs > 2 and self._choose(0, 1):  # Something to merge.
            inputs[-1] = inputs[0]
        return inputs

    def _register(self, part: nn.Module) -> str:
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=self._generator))
        name = f"part{len(self.parts)}"
        self.parts[name] = part
        return name

    def _add_step_on_vectors(self, width: int) -> None:
        kind = self._choose(0, 9)
        if kind <= 3 or width > 6:
            self._add_linear(width, self._choose(1, 6), repeated=1)
        elif kind == 4:
            self._add_linear(width, width, repeated=self._choose(2, 3))
        elif kind == 5:
            self._add_skip(width)
        elif kind == 6:
            self._add_bilinear(width)
        elif kind == 7:
            self._add_beside(width)
        elif kind == 8:
            self._add_prelu(width)
        else:
            self.steps.append(Step(lambda _, x: x.square(), lambda _, h: h.square()))

    def _add_linear(self, width: int, num_units: int, *, repeated: int) -> None:
        name = self._register(nn.Linear(width, num_units, bias=bool(self._choose(0, 3))))
        for _ in range(repeated):
            self.steps.append(
                Step(lambda m, x: m.parts[name](x), lambda network, h: network.linear(f"parts.{name}", h))
            )
            if repeated > 1 or self._choose(0, 3):
                self.steps.append(Step(lambda _, x: x.relu(), lambda _, h: h.relu()))

    def _add_skip(self, width: int) -> None:
        name = self._register(nn.Linear(width, width))
        self.steps.append(
            Step(
                lambda m, x: x + m.parts[name](x).relu(),
                lambda network, h: h + network.linear(f"parts.{name}", h).relu(),
            )
        )

    def _add_bilinear(self, width: int) -> None:
        part = nn.Bilinear(width, width, self._choose(1, 4))
        name = self._register(part)
        self.steps.append(
            Step(
                lambda m, x: m.parts[name](x, x),
                lambda network, h: exact_layers.bilinear(
                    network, f"parts.{name}", part, exact_layers.joined([h, h], 1)
                ),
            )
        )

    def _add_beside(self, width: int) -> None:
        name = self._register(nn.Linear(width, self._choose(1, 3)))
        self.steps.append(
            Step(
                lambda m, x: torch.cat([x, m.parts[name](x)], 1),
                lambda network, h: exact_layers.joined([h, network.linear(f"parts.{name}", h)], 1),
            )
        )

    def _add_prelu(self, width: int) -> None:
        name = self._register(nn.PReLU(int(self._pick(1, width))))

        def rule(network: ExactNetwork, h: Dual) -> Dual:
            # The derivative at 0 is the slope, as torch has it.
            below = h + h.relu().scaled(-1)
            return h.relu() + below * network.parameter(f"parts.{name}.weight")

        self.steps.append(Step(lambda m, x: m.parts[name](x), rule))

    def _add_step_on_images(self, hidden: Tensor) -> None:
        _, channels, height, width = hidden.shape
        kind = self._choose(0, 6)
        if kind == 0 or min(height, width) < 2:
            self._flatten()
        elif kind == 1 and channels * height * width * 4 <= 4 * _MAX_FEATURES:
            self.steps.append(
                Step(
                    lambda _, x: F.interpolate(x, scale_factor=2),
                    lambda _, h: h[:, :, np.arange(2 * height) // 2][:, :, :, np.arange(2 * width) // 2],
                )
            )
        elif kind == 2:
            self.steps.append(Step(lambda _, x: F.avg_pool2d(x, 2, divisor_override=1), _sum_of_windows))
        else:
            self._add_convolution(channels, height, width)

    def _add_convolution(self, channels: int, height: int, width: int) -> None:
        groups = int(self._pick(1, channels))
        settings = {
            "kernel_size": (self._choose(1, min(2, height)), self._choose(1, min(3, width))),
            "stride": self._choose(1, 2),
            "groups": groups,
            "bias": bool(self._choose(0, 1)),
        }
        if self._choose(0, 3) == 0 and channels * height * width <= _MAX_FEATURES // 2:
            part: nn.Module = nn.ConvTranspose2d(channels, groups * self._choose(1, 2), **settings)
            rule = exact_layers.transposed_convolution
        else:
            part = nn.Conv2d(channels, groups * self._choose(1, 2), padding=self._choose(0, 1), **settings)
            rule = exact_layers.convolution
        name = self._register(part)
        self.steps.append(
            Step(lambda m, x: m.parts[name](x), lambda network, h: rule(network, f"parts.{name}", part, h))
        )
        if self._choose(0, 2):
            self.steps.append(Step(lambda _, x: x.relu(), lambda _, h: h.relu()))

    def _flatten(self) -> None:
        self.steps.append(Step(lambda _, x: x.flatten(1), lambda _, h: h.reshape(len(h.value), -1)))


def _sum_of_windows(_: ExactNetwork, h: Dual) -> Dual:
    height, width = (size // 2 * 2 for size in h.value.shape[2:])
    rows = h[:, :, 0:height:2] + h[:, :, 1:height:2]
    return rows[:, :, :, 0:width:2] + rows[:, :, :, 1:width:2]


def check_ranks(seed: int) -> bool:
    """Compare all ranks of a random network with the exact ones, under some memory budget.

    Returns:
        Whether there was something to compare: a network may hold nothing to train, or too large numbers.

    Raises:
        AssertionError: If a number differs.
    """
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        network = RandomNetwork(generator)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    if trained == 0 or trained * len(network.inputs) > 2**14:
        return False
    arithmetic = ExactNetwork(network)
    try:
        outputs = network.exact(arithmetic, network.inputs)
    except AssertionError:  # A number that float64 does not hold exactly.
        return False
    exact = jacobian(outputs)
    if np.abs(exact).max(initial=0) > 2**20:  # Singular values of such numbers may be small without being zero.
        return False
    budget = _BUDGETS[int(torch.randint(len(_BUDGETS), (), generator=generator))]
    spectrum = bool(torch.randint(2, (), generator=generator))
    try:
        record = measure_basin(network, network.inputs, memory_budget=budget, spectrum=spectrum)
    except MemoryBudgetError:
        record = measure_basin(network, network.inputs, spectrum=spectrum)
    expected = {name: exact_rank(exact[:, columns]) for name, columns in arithmetic.columns.items()}
    found = {name: layer.gradient_rank for name, layer in record.layers.items()}
    about = f"seed {seed}, memory_budget={budget}, spectrum={spectrum}"
    assert record.gradient_rank == exact_rank(exact), about
    assert found == expected, about
    assert record.gradient_rank_bound is not None, about
    assert record.gradient_rank_bound >= record.gradient_rank, about
    equal = count_duplicates(outputs.value.reshape(len(network.inputs), -1))
    assert record.output_duplicated_activations_exact == equal, about
    return True
