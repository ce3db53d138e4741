"""Networks and records that several files of tests share."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_basin import BasinRecord
from tests.exact import Dual
from tests.models import Chain, integer_inputs, with_integer_weights
from tests.networks import built, generator_of

SEEDS = (0, 1, 2)


@torch.no_grad()
def generic(module: nn.Module, seed: int) -> nn.Module:
    """Weights from a continuous distribution: outside a set of measure zero."""
    generator = generator_of(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


every_case = pytest.mark.parametrize("seed", SEEDS)


def without_time(record: BasinRecord) -> dict[str, Any]:
    return {name: value for name, value in record.to_dict().items() if name not in ("measure_seconds", "seconds")}


def integer_targets(outputs: Dual, seed: int) -> np.ndarray:
    """Targets near the outputs: some residuals are zero, some small, some of either sign."""
    return outputs.value + np.random.default_rng(seed).integers(-2, 3, size=outputs.value.shape)


def large_chain(*, repeated: int, dead: int, seed: int) -> tuple[Chain, Tensor]:
    """An integer ReLU network large enough for the sketch, with repeated inputs and dead units."""
    generator = generator_of(seed)
    module = with_integer_weights(built(lambda: Chain(40, 170, 130, 2)), generator, largest=1)
    with torch.no_grad():
        module.layers[1].bias[:dead] = -10_000.0
    inputs = torch.randint(-2, 3, (160, 40), generator=generator).float()
    inputs[160 - repeated :] = inputs[:repeated]
    return module, inputs


def deep_chain() -> tuple[Chain, Tensor]:
    """34 layers, each nearly the identity: integers stay small through all of them."""
    generator = generator_of(0)
    module = Chain(*[3] * 35)
    with torch.no_grad():
        for layer in module.layers:
            layer.weight.copy_(torch.eye(3))
            layer.weight[0, 1] = float(torch.randint(-1, 2, (), generator=generator))
            layer.bias.copy_(torch.randint(-1, 2, (3,), generator=generator))
        module.layers[0].bias.fill_(9.0)
    return module, integer_inputs(generator, 5, 3)


KEPT: dict[str, nn.Module] = {}


def kept_behavior(module, inputs):
    return KEPT["module"](inputs)
