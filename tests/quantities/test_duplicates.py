import pytest

from tests.exact import (
    count_duplicates,
)
from tests.measure.exact_cases import every_network, measured
from tests.measure.records import every_case
from tests.models import (
    CHAINS,
    evaluated_case,
)


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
