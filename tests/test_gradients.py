import pytest
import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.functional.sketch import DenseGradients, KhatriRaoGradients
from lightning_basin.layers import Network
from tests.networks import Composed, drawn, filled, finite_differences, linear_twice, measured, sequences

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")


def in_place():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def transposed():
    return Composed(
        lambda m, x: m.second(m.first(x.transpose(0, 1)).tanh()).square().sum(0),
        first=nn.Linear(3, 4),
        second=nn.Linear(4, 2),
    )


def hooked():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].register_forward_hook(lambda part, args, output: output * output + args[0].sum())
    module[2].register_forward_pre_hook(lambda part, args: (2 * args[0],))
    return module


def half_frozen(name):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for part in (module[0], module[2]):
        getattr(part, name).requires_grad_(requires_grad=False)
    return module


def normed(norm):
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def tied():
    module = Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    module.b.weight = module.a.weight
    return module


def weight_used_beside():
    return Composed(lambda m, x: m.linear(x).tanh() @ m.linear.weight, linear=nn.Linear(3, 4))


class Scaled(nn.Linear):
    """A linear layer that does more than one."""

    def forward(self, x):
        return super().forward(x) * self.weight.square().sum()


FACTORED = {
    "plain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "root": (lambda: nn.Linear(3, 2), (5, 3)),
    "called twice": (linear_twice, (5, 3)),
    "in-place activation": (in_place, (5, 3)),
    "sequences": (lambda: sequences(flatten=False), (5, 6, 3)),
    "flattened sequences": (lambda: sequences(flatten=True), (5, 6, 3)),
    "hooks that change inputs and outputs": (hooked, (5, 3)),
    "frozen weights": (lambda: half_frozen("weight"), (5, 3)),
    "frozen biases": (lambda: half_frozen("bias"), (5, 3)),
}

# Modules for which the formula of a plain is wrong or not at hand, at least in one layer.
DENSE = {
    "transposed sequences": (transposed, (5, 6, 3)),
    "transposed sequences that divide evenly": (transposed, (3, 6, 3)),
    "transposed square sequences": (transposed, (4, 4, 3)),
    "weight_norm": (lambda: normed(nn.utils.parametrizations.weight_norm), (5, 3)),
    "spectral_norm": (lambda: normed(nn.utils.parametrizations.spectral_norm), (5, 3)),
    "tied weights": (tied, (5, 3)),
    "weight used beside": (weight_used_beside, (5, 3)),
    "a subclass that does more": (lambda: nn.Sequential(Scaled(3, 2)), (5, 3)),
    "LSTM": (lambda: Composed(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(3, 2, batch_first=True)), (4, 3, 3)),
    "attention": (
        lambda: Composed(
            lambda m, x: m.attention(x, x, x, need_weights=False)[0].sum(1),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        (3, 3, 4),
    ),
    "convolution and batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (4, 2, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
}


@pytest.mark.parametrize("name", [*FACTORED, *DENSE])
def test_gradients_of_every_layer_are_those_of_finite_differences(name):
    build, shape = (FACTORED | DENSE)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    found = measured(network, probe)
    assert set(found) == {layer.name for layer in network.layers}
    for layer in network.layers:
        expected = finite_differences(network, probe, layer)
        # Central differences: truncation near step**2 = 1e-12 and rounding near eps / step = 1e-10 of outputs to 1e2.
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(found[layer.name].gradients.rows(), expected, rtol=0.0, atol=1e-7 * scale)


@pytest.mark.parametrize("name", FACTORED)
def test_gradients_of_plain_linear_layers_stay_factored(name):
    build, shape = FACTORED[name]
    found = measured(Network(filled(build())), Probe(drawn(*shape)))
    assert {type(gradients.gradients) for gradients in found.values()} == {KhatriRaoGradients}
    assert {gradients.note for gradients in found.values()} == {None}


def test_a_linear_layer_that_does_more_is_measured_row_by_row_and_said_so():
    found = measured(Network(filled(nn.Sequential(Scaled(3, 2)))), Probe(drawn(5, 3)))
    assert type(found["0"].gradients) is DenseGradients
    assert "layer '0' is measured row by row: it does not act as a plain" in found["0"].note


def test_layers_that_are_no_linear_ones_are_measured_without_a_note():
    found = measured(Network(filled(nn.Sequential(nn.LayerNorm(3)))), Probe(drawn(5, 3)))
    assert type(found["0"].gradients) is DenseGradients
    assert found["0"].note is None


def test_a_layer_that_is_never_called_has_zero_gradients():
    network = Network(filled(Composed(lambda m, x: m.used(x), used=nn.Linear(3, 2), unused=nn.Linear(3, 4))))
    found = measured(network, Probe(drawn(5, 3)))
    assert torch.equal(found["unused"].gradients.rows(), torch.zeros(10, 16, dtype=torch.float64))


def test_outputs_that_depend_on_nothing_have_zero_gradients():
    network = Network(filled(Composed(lambda m, x: m.linear(x).detach(), linear=nn.Linear(3, 2))))
    found = measured(network, Probe(drawn(4, 3)))
    assert torch.equal(found["linear"].gradients.rows(), torch.zeros(8, 8, dtype=torch.float64))


def test_gradients_of_a_behavior_are_those_of_what_it_returns():
    network = Network(filled(nn.Linear(3, 2)), behavior=lambda module, x: module(x)[:, :1] ** 2)
    probe = Probe(drawn(4, 3))
    (layer,) = network.layers
    expected = finite_differences(network, probe, layer)
    # As above: 1e-10 of outputs to 1e2.
    torch.testing.assert_close(measured(network, probe)[""].gradients.rows(), expected, rtol=0.0, atol=1e-6)


def test_gradients_of_several_inputs_are_those_of_finite_differences():
    network = Network(filled(nn.Bilinear(2, 3, 2)))
    probe = Probe((drawn(4, 2), drawn(4, 3, seed=1)))
    (layer,) = network.layers
    expected = finite_differences(network, probe, layer)
    # As above: 1e-10 of outputs to 1e2.
    torch.testing.assert_close(measured(network, probe)[""].gradients.rows(), expected, rtol=0.0, atol=1e-7)


def test_measuring_leaves_no_hooks_and_no_gradients():
    module = filled(in_place())
    network, probe = Network(module), Probe(drawn(5, 3))
    measured(network, probe)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
