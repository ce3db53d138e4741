"""Products with the Hessian against differences of gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_basin.functional.output_curvature import output_curvature
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.probe import Probe
from lightning_basin.quantities.hessian import quadratic_model
from lightning_basin.quantities.hessian.products import hessian_operator, residual_matrix
from tests.networks import Composed, drawn, filled


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.attend(inputs, inputs, inputs)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.head(self.cell(inputs)[0][:, -1])


def checkpointed(*, twice=False):
    def function(m, x):
        hidden = checkpoint(lambda h: m.inner(h).tanh(), x, use_reentrant=False)
        if twice:
            hidden = checkpoint(lambda h: m.inner(h).tanh(), hidden, use_reentrant=False)
        return m.head(hidden)

    return Composed(function, inner=nn.Linear(3, 3), head=nn.Linear(3, 2))


SMOOTH = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)),
        (5, 3),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 2)),
        (4, 1, 3, 3),
    ),
    "attention": (Attention, (3, 4, 4)),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(12, 2)),
        (4, 3, 4),
    ),
    "LSTM": (Recurrent, (4, 3, 2)),
    "checkpointing": (checkpointed, (5, 3)),
    "checkpointing of one layer twice": (lambda: checkpointed(twice=True), (5, 3)),
}


every_smooth = pytest.mark.parametrize("kind", SMOOTH)


def slopes(network, probe, loss_fn, at):
    """Gradient of the loss where the parameters are moved by one vector, flat."""
    with torch.no_grad():
        for parameter, part in zip(network.parameters(), at, strict=True):
            parameter += part
    loss = loss_fn(network.outputs(probe))
    gradients = torch.autograd.grad(loss, network.parameters(), materialize_grads=True)
    with torch.no_grad():
        for parameter, part in zip(network.parameters(), at, strict=True):
            parameter -= part
    return torch.cat([gradient.flatten() for gradient in gradients])


def differences(network, probe, loss_fn, direction):
    """Central differences of the gradient along a direction, with Richardson's extrapolation."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    parts = [p.view_as(q) for p, q in zip(direction.split(sizes), network.parameters(), strict=True)]

    def central(step):
        ahead, behind = (slopes(network, probe, loss_fn, [sign * step * part for part in parts]) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    return (4 * central(5e-4) - central(1e-3)) / 3


def soft_labels(outputs, targets):
    return F.cross_entropy(outputs, targets.softmax(1))


def coupled_squares(outputs, targets):
    """Of a batch whose inputs the loss compares with each other."""
    return (outputs - targets).square().mean() + (outputs - targets).sum().square()


@every_smooth
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", [soft_labels, coupled_squares])
def test_products_are_differences_of_gradients(kind, chunk_size, loss):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        runs = ProbeRuns(network, probe)
        targets = runs.full_trace.outputs.detach() + drawn(*runs.full_trace.outputs.shape, seed=2)
        found = output_curvature(lambda outputs: loss(outputs, targets), runs.full_trace.outputs)
        model = quadratic_model.quadratic_model(runs, found, chunk_size=chunk_size)
        direction = drawn(sum(layer.num_parameters for layer in network.layers), seed=3)
        direction /= direction.norm()

        def linear(outputs):
            return (found.slope * outputs).sum()

        for part, differentiated in ((model, lambda outputs: loss(outputs, targets)), (model.linear_part, linear)):
            expected = differences(network, probe, differentiated, direction)
            product = hessian_operator(part, network.layers)(direction)
            # The error is of fourth order in the step, 1e-12 times fifth derivatives near 1e3 of the scale; rounding
            # adds 1e-16 / 1e-3 of the gradient.
            torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


@every_smooth
def test_residual_curvature_of_chunks_adds_up_to_the_matrix_of_all_products(kind):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        runs = ProbeRuns(network, probe)
        found = output_curvature(lambda outputs: outputs.pow(4).sum(), runs.full_trace.outputs)
        model = quadratic_model.quadratic_model(runs, found)
        product = hessian_operator(model.linear_part, network.layers)
        chunked = quadratic_model.quadratic_model(runs, found, chunk_size=2)
        matrix = residual_matrix(chunked, chunk_size=7)
        for index in range(0, len(matrix), 10):
            unit = torch.eye(len(matrix), dtype=torch.float64)[index]
            torch.testing.assert_close(matrix[index], product(unit), rtol=1e-9, atol=1e-12 * float(matrix.abs().max()))


@every_smooth
def test_products_with_a_layer_are_those_of_its_diagonal_block(kind):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        runs = ProbeRuns(network, probe)
        found = output_curvature(lambda outputs: outputs.pow(4).sum(), runs.full_trace.outputs)
        model = quadratic_model.quadratic_model(runs, found).linear_part
        sizes = [layer.num_parameters for layer in network.layers]
        whole = hessian_operator(model, network.layers)
        for index, layer in enumerate(network.layers):
            direction = drawn(sizes[index], seed=index)
            parts = [torch.zeros(size, dtype=torch.float64) for size in sizes]
            parts[index] = direction
            expected = whole(torch.cat(parts)).split(sizes)[index]
            torch.testing.assert_close(hessian_operator(model, [layer])(direction), expected)
