"""Small networks put together in a line, with reproducible weights."""

import numpy as np
import torch
from torch import nn

from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.network.runs import ProbeRuns


def generator_of(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=generator_of(seed), dtype=torch.float64)


def drawn32(*shape, seed=0):
    """Standard normal numbers in float32."""
    return torch.randn(shape, generator=generator_of(seed), dtype=torch.float32)


def built(build, seed=0):
    """What `build` returns, initialized from this seed, whatever the global generator holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def filled(module, seed=0):
    """The module in float64 and evaluation mode with reproducible weights."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def with_singular_values(num_rows, num_columns, values, seed=0):
    """A matrix of these singular values and zeros after them, multiplied out in numpy."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((num_rows, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((num_columns, len(values))))[0]
    return torch.from_numpy((left * np.asarray(values)) @ right.T)


class Composed(nn.Module):
    """Parts by name, and a function that says how they work together."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linear_twice():
    return Composed(lambda m, x: m.head(m.inner(m.inner(x).tanh()).tanh()), inner=nn.Linear(3, 3), head=nn.Linear(3, 2))


def sequences(flatten):
    def function(m, x):
        hidden = x.flatten(0, 1) if flatten else x
        return m.second(m.first(hidden).tanh()).view(x.shape[0], -1, 2).square().sum(1)

    return Composed(function, first=nn.Linear(3, 4), second=nn.Linear(4, 2))


def measured(network, probe, chunk_size=None, max_elements=GROUP_ELEMENTS):
    runs = ProbeRuns(network, probe, chunk_size=chunk_size)
    check = AutogradCheck(runs, torch.Generator().manual_seed(0))
    found = layer_gradients(runs, check, max_elements=max_elements)
    return {gradients.layer.name: gradients for gradients in found}


def finite_differences(network, probe, layer):
    """Central differences of the outputs by each entry of each parameter of a layer."""
    step = 1e-6
    columns = []
    with torch.no_grad():
        for parameter in network.parameters([layer]):
            for index in range(parameter.numel()):
                moved = []
                for sign in (1, -1):
                    before = parameter.flatten()[index].item()
                    parameter.view(-1)[index] += sign * step
                    moved.append(network.outputs(probe).flatten().clone())
                    parameter.view(-1)[index] = before
                columns.append((moved[0] - moved[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def convolutional(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 256, 2),
    )


def images(number, seed=0):
    return torch.randn(number, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def huge(units):
    """A first layer of so many units behind which little is left."""
    return nn.Sequential(nn.Linear(8, units), nn.ReLU(), nn.AvgPool1d(units // 40), nn.Linear(40, 2))


def planted(seed, *, k=60, d=5, rtol=1e-3):
    """Random rows, copies moved by less and by more than the tolerance, and chains of steps below it."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((k, d))
    for index in range(10, 35):  # Copies beside the tolerance, to both sides.
        step = rtol * random.choice([0.0, 0.3, 0.9, 1.1, 2.0])
        rows[index] = rows[random.integers(10)] + step * random.choice([-1, 1], d)
    for index in range(36, 45):  # A chain whose ends differ by several tolerances.
        rows[index] = rows[index - 1] + 0.8 * rtol * random.choice([-1, 1], d)
    rows[-1, 0] = 1.0 if np.abs(rows).max() < 1 else np.abs(rows).max()
    return rows[random.permutation(k)]


class OnceOnly(torch.autograd.Function):
    """The square, whose derivative has none."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient
