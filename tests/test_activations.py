import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin
from lightning_basin.activations import is_cut, layer_activations, parameters_before
from lightning_basin.layers import Network
from tests.networks import Composed, drawn, filled, linear_twice, sequences


def activations_of(module, inputs):
    network, probe = Network(module), Probe(inputs)
    return layer_activations(network, probe, network.trace(probe))


def test_what_enters_and_leaves_a_linear_layer_is_kept_by_input():
    module, inputs = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), drawn(5, 3)
    found = activations_of(module, inputs)
    before = inputs @ module[0].weight.mT + module[0].bias
    torch.testing.assert_close(found["0"].entering, inputs)
    torch.testing.assert_close(found["0"].leaving, before.unsqueeze(1).detach())
    torch.testing.assert_close(found["2"].entering, before.relu().detach())


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "flattened"])
def test_all_positions_of_an_input_are_one_activation(layout):
    def function(m, x):
        if layout == "flattened":
            return m.linear(x.flatten(0, 1)).view(x.shape[0], -1, 2).sum(1)
        arranged = x if layout == "batch first" else x.transpose(0, 1)
        return m.linear(arranged).sum(1 if layout == "batch first" else 0)

    module, inputs = filled(Composed(function, linear=nn.Linear(3, 2))), drawn(5, 4, 3)
    found = activations_of(module, inputs)["linear"]
    torch.testing.assert_close(found.entering, inputs.flatten(1))
    torch.testing.assert_close(found.leaving, (inputs @ module.linear.weight.mT + module.linear.bias).detach())


def test_all_calls_of_a_layer_are_one_activation():
    module = filled(Composed(lambda m, x: m.a(m.a(x)), a=nn.Linear(2, 2)))
    inputs = drawn(4, 2)
    once = (inputs @ module.a.weight.mT + module.a.bias).detach()
    torch.testing.assert_close(activations_of(module, inputs)["a"].entering, torch.cat([inputs, once], dim=1))


def test_channels_of_a_convolution_are_its_units():
    module, inputs = filled(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten())), drawn(4, 2, 5)
    expected = torch.einsum("kit,oi->kto", inputs, module[0].weight.squeeze(2)) + module[0].bias
    torch.testing.assert_close(activations_of(module, inputs)["0"].leaving, expected.detach())


def test_tensors_that_all_inputs_share_are_no_activation():
    module = filled(
        Composed(
            lambda m, x: m.a(x) + m.positions(torch.zeros(1, dtype=torch.int64)),
            a=nn.Linear(2, 2),
            positions=nn.Embedding(1, 2),
        )
    )
    found = activations_of(module, drawn(4, 2))
    assert found["positions"].entering is None
    assert found["positions"].leaving is None
    assert found["positions"].rows_per_input == (0,)


def test_what_enters_is_kept_also_if_it_is_overwritten_later():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.shift

    def function(m, x):
        x = x.clone()
        shifted = m.shift(x)
        x.zero_()
        return shifted + x

    inputs = drawn(4, 3)
    found = activations_of(filled(Composed(function, shift=Shift())), inputs)
    torch.testing.assert_close(found["shift"].entering, inputs)


def test_a_layer_that_is_never_called_has_no_activation():
    module = filled(Composed(lambda m, x: m.used(x), used=nn.Linear(2, 1), unused=nn.Linear(2, 1)))
    assert set(activations_of(module, drawn(3, 2))) == {"used"}


# Cuts.


def cuts_of(module, inputs):
    network, probe = Network(module), Probe(inputs)
    trace = network.trace(probe)
    sizes = [parameter.numel() for parameter in network.parameters()]
    found = {}
    for name, layer in layer_activations(network, probe, trace).items():
        before = parameters_before(network, trace, name)
        if is_cut(network, probe, trace, name, layer, before):
            found[name] = sum(size for size, is_before in zip(sizes, before, strict=True) if is_before)
    return found


def test_every_layer_of_a_chain_is_a_cut():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert cuts_of(module, drawn(6, 3)) == {"0": 0, "2": 16, "4": 41}


def skipping():
    return filled(
        Composed(
            lambda m, x: m.head(x + m.up(m.down(x).tanh())),
            down=nn.Linear(4, 1),
            up=nn.Linear(1, 4),
            head=nn.Linear(4, 2),
        )
    )


def test_a_branch_beside_a_skip_connection_is_no_cut():
    # The input of "down" is the whole input, but it also passes by; behind the sum all is one again.
    assert cuts_of(skipping(), drawn(6, 4)) == {"head": 5 + 8}


def test_a_gate_beside_a_layer_is_no_cut():
    module = filled(
        Composed(lambda m, x: m.gate(x).sigmoid() * m.value(x), gate=nn.Linear(3, 2), value=nn.Linear(3, 2))
    )
    assert cuts_of(module, drawn(6, 3)) == {}


@pytest.mark.parametrize("blind", ["zero head", "dead units"])
def test_a_branch_is_no_cut_where_all_outputs_are_the_same(blind):
    module = skipping()
    with torch.no_grad():
        module.head.weight.zero_()
        if blind == "dead units":
            module.down.weight.zero_()
    assert not {"down", "up"} & set(cuts_of(module, drawn(6, 4)))


def test_sequences_with_adjacent_rows_are_cut_too():
    assert cuts_of(filled(sequences(flatten=True)), drawn(5, 6, 3)) == {"first": 0, "second": 16}


def test_parameters_of_a_tied_layer_count_before_each_cut_that_they_are_used_before():
    module = filled(Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    module.b.weight = module.a.weight
    assert cuts_of(module, drawn(6, 3)) == {"a": 0, "b": 12}


def test_frozen_parameters_do_not_count_before_a_cut():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module[0].weight.requires_grad_(requires_grad=False)
    assert cuts_of(module, drawn(6, 3))["2"] == 4


def test_a_layer_that_is_called_twice_is_not_taken_for_a_cut():
    module = filled(linear_twice())
    assert set(cuts_of(module, drawn(6, 3))) == {"head"}


class Discards(nn.Module):
    """Calls a layer and makes no use of what leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.discarded, self.readout = nn.Linear(2, 3), nn.Linear(2, 1)

    def forward(self, inputs):
        self.discarded(inputs)
        return self.readout(inputs.sign())


def test_layer_whose_output_is_not_used_before_a_cut_adds_no_rank():
    record = measure_basin(Discards(), torch.arange(1.0, 9.0).reshape(4, 2))
    # All four inputs cross to the readout as one, and nothing is trained before it.
    assert record.gradient_rank == record.gradient_rank_bound == 1
    assert record.layers["discarded"].gradient_rank == 0
