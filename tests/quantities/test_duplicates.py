import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin
from lightning_basin.evaluation import open_evaluation
from lightning_basin.functional.rank import GradientRank
from lightning_basin.quantities.activations import measure_activation_ranks, measure_activations
from lightning_basin.quantities.duplicates import measure_duplicates
from lightning_basin.quantities.rank_bound import measure_rank_bound
from lightning_basin.quantities.scopes import select_scopes
from lightning_basin.settings import Settings
from tests.counting import Dispatched
from tests.exact import count_duplicates
from tests.measure.exact_cases import every_network, measured
from tests.measure.records import every_case
from tests.models import CHAINS, evaluated_case
from tests.networks import built, drawn


@every_network
@every_case
def test_duplicated_activations_of_each_layer_are_the_exact_counts(name, seed):
    network, _ = evaluated_case(name, seed)
    record = measured(name, seed)
    called = network.duplicates()
    # Whole numbers below 1e6 are equal or further apart than the relative tolerance: both counts agree.
    found = {
        layer: (record.layers[layer].duplicated_activations_exact, record.layers[layer].duplicated_activations)
        for layer in called
        if layer in record.layers
    }
    assert found == {layer: (called[layer], called[layer]) for layer in found}
    assert found


@every_network
@every_case
def test_duplicated_outputs_are_counted_exactly(name, seed):
    _, outputs = evaluated_case(name, seed)
    expected = count_duplicates(outputs.value)
    record = measured(name, seed)
    assert record.output_duplicated_activations_exact == record.output_duplicated_activations == expected


@pytest.mark.parametrize("name", [*CHAINS, "residual", "convolutional", "bag of tokens", "recurrent", "tied layers"])
@every_case
def test_duplicated_activations_of_the_network_are_the_largest_after_the_first_layer(name, seed):
    network, _ = evaluated_case(name, seed)
    _, *later = network.duplicates().values()
    record = measured(name, seed)
    assert record.duplicated_activations == record.duplicated_activations_exact == max(later)


@every_network
@every_case
def test_dead_units_of_each_layer_are_outputs_constant_over_the_probe(name, seed):
    network, _ = evaluated_case(name, seed)
    record = measured(name, seed)
    expected = {layer: count for layer, count in network.dead_units().items() if layer in record.layers}
    assert {layer: record.layers[layer].dead_units for layer in expected} == expected


def operations_of(num_layers):
    """Operations that duplicates, dead units, ranks of activations and the rank bound take for distinct inputs."""
    layers = [nn.Linear(12, 12, bias=False) for _ in range(num_layers)]
    module = nn.Sequential(*layers, nn.Linear(12, 1)).double()
    with torch.no_grad():  # Nothing merges from layer to layer.
        for layer in layers:
            layer.weight.copy_(torch.eye(12))
    rank = GradientRank(rank=7, gap=9.0, at={}, effective_rank=None, rtol=1e-13, largest=1.0, method="svd")
    with open_evaluation(module, Probe(drawn(8, 12)), Settings(), with_layout=True) as evaluation:
        scopes = select_scopes(evaluation.network.layers, "all")
        with Dispatched() as operations:
            activations = measure_activations(evaluation)
            ranks = measure_activation_ranks(evaluation, scopes, activations)
            duplicates = measure_duplicates(evaluation, activations, also_at=[rank.rtol])
            measure_rank_bound(evaluation, activations, rank)
    assert [fields["activation_rank"] for fields in ranks.values()] == (num_layers + 1) * [8]
    assert duplicates.network["duplicated_activations"] == 0
    return operations


def test_layers_whose_inputs_are_distinct_wait_together():
    few, many = operations_of(10), operations_of(30)
    assert many.waits == few.waits == 0
    # What is read at once is put together once.
    assert many.results["cat"] == few.results["cat"] <= 4
    assert many.results.total() - few.results.total() <= 20 * 16


def test_tensors_that_enter_several_layers_are_looked_at_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return torch.cat([self.first(x), self.second(x)], dim=1)

    module = built(Branches).double()
    inputs = drawn(6, 4)
    inputs[4:] = inputs[:2]
    with open_evaluation(module, Probe(inputs), Settings(), with_layout=True) as evaluation:
        activations = measure_activations(evaluation)
    record = measure_basin(module, inputs)
    assert {layer.duplicated_activations for layer in record.layers.values()} == {2}
    assert {layer.activation_rank for layer in record.layers.values()} == {4}
    assert activations["first"].leaving.shape == (6, 1, 3)


def test_merged_inputs_are_named_with_the_layer_where_they_merge_first():
    # Two of four inputs are equal from the start; the ReLU merges another one, which is negative, with the zero.
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        module[0].weight.fill_(1.0)
        module[2].weight.fill_(3.0)
    record = measure_basin(module, torch.tensor([[0.0], [2.0], [-5.0], [2.0]]))
    merged = [(found.index, found.equals, found.layer) for found in record.merged_inputs]
    assert merged == [(2, 0, "2"), (3, 1, "0")]
