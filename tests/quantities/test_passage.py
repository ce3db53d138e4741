import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin
from lightning_basin.network.network import Network
from lightning_basin.network.runs import TracedProbe
from lightning_basin.quantities.passage import merging_error, parameters_before
from tests.networks import Composed, drawn, filled


def parameters_before_layers(module, inputs):
    network, probe = Network(module), Probe(inputs)
    trace = network.trace(probe)
    sizes = [parameter.numel() for parameter in network.parameters()]
    return {
        name: sum(
            size for size, is_before in zip(sizes, parameters_before(network, trace, name), strict=True) if is_before
        )
        for name in trace.entering
    }


def test_parameters_before_each_layer_of_a_chain_are_those_of_the_layers_before():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert parameters_before_layers(module, drawn(6, 3)) == {"0": 0, "2": 16, "4": 41}


def test_parameters_of_a_tied_layer_count_before_each_layer_that_they_are_used_before():
    module = filled(Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    module.b.weight = module.a.weight
    assert parameters_before_layers(module, drawn(6, 3)) == {"a": 0, "b": 12}


def test_frozen_parameters_do_not_count_before_a_layer():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module[0].weight.requires_grad_(requires_grad=False)
    assert parameters_before_layers(module, drawn(6, 3))["2"] == 4


def merging_error_of(module, inputs, classes, **kwargs):
    traced = TracedProbe(Network(module), Probe(inputs), **kwargs)
    return merging_error(traced, torch.tensor(classes), [False] * len(traced.network.parameters()))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_merging_error_is_the_deviation_of_gradients_from_their_class_means(chunk_size):
    # Gradients of w x are x: 1 and 4 deviate from their mean by 3/2 each, which random weights see times |g| sqrt(2).
    module = filled(nn.Linear(1, 1, bias=False))
    inputs = torch.tensor([[1.0], [5.0], [4.0]], dtype=torch.float64)
    found = merging_error_of(module, inputs, [0, 1, 0], chunk_size=chunk_size)
    assert found == pytest.approx(merging_error_of(module, 2 * inputs, [0, 1, 0]) / 2)
    weights = torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).squeeze(2)
    assert found == pytest.approx(float(((weights[:, 2] - weights[:, 0]) * 1.5).abs().max()))


def test_merging_error_of_inputs_with_the_same_gradients_is_zero():
    module = filled(nn.Linear(2, 3))
    inputs = drawn(3, 2)[[0, 1, 0, 2, 1]]
    assert merging_error_of(module, inputs, [0, 1, 0, 3, 1]) < 1e-14
    assert merging_error_of(module, inputs, [0, 1, 0, 3, 3]) > 1e-3


class Conditioned(nn.Module):
    """A category that skips the encoder, times a gate that may be shut."""

    def __init__(self, num_units: int, *, gated: bool) -> None:
        super().__init__()
        self.encode, self.merge = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.mix, self.readout = nn.Linear(2, num_units), nn.Linear(num_units, 1)
        self.gated = gated

    def forward(self, x):
        merged = self.merge(self.encode(x[:, :1]).relu())
        merged = merged.relu() if self.gated else merged
        return self.readout(torch.tanh(self.mix(torch.cat([merged, x[:, 1:] * (merged if self.gated else 1)], dim=1))))


@pytest.mark.parametrize("memory_budget", [None, 3_700_000])
def test_category_that_skips_a_layer_counts_also_where_a_chunk_holds_only_one(memory_budget):
    module = filled(Conditioned(300, gated=False))
    with torch.no_grad():
        module.encode.weight.fill_(1.0)
    # Sorted by category: 6 codes times 4 categories are 24 inputs, with 24 different rows of the readout alone.
    inputs = torch.stack([torch.arange(64.0) % 6 + 1, (torch.arange(64.0) / 16).floor()], dim=1)
    record = measure_basin(module, inputs, memory_budget=memory_budget)
    assert record.gradient_rank_bound >= 24


def test_skip_connection_whose_gate_is_shut_at_the_borders_of_sorted_data_counts():
    module = filled(Conditioned(40, gated=True))
    with torch.no_grad():
        module.encode.weight.fill_(1.0)
        module.merge.weight.fill_(0.3)
    codes = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, -1] * 2)
    record = measure_basin(module, torch.stack([codes, (torch.arange(20.0) / 10).floor()], dim=1))
    # Two times nine inputs with an open gate, and one row for the two with a shut one.
    assert record.gradient_rank_bound == 19


def test_layer_that_a_large_feature_makes_look_merged_does_not_lower_the_bound():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    module[0].running_mean[:] = torch.tensor([1e15 - 1, 5.0])
    module[0].running_var[:] = torch.tensor([1.0, 9.0])
    inputs = torch.stack([torch.full((10,), 1e15), torch.arange(10.0)], dim=1).double()
    # Ten different inputs of a network of 29 parameters: the normalised feature is 1, and -5/3 to 4/3 in ten steps.
    assert measure_basin(module, inputs).gradient_rank_bound == 10


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
