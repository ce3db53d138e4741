import pytest
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.network.layers import find_layers
from lightning_basin.quantities.scopes import select_scopes
from tests.exact import ExactNetwork, columns_of, exact_rank, integers, jacobian
from tests.measure.records import deep_chain
from tests.models import integer_case


def test_more_than_32_layers_are_reported_by_blocks_of_exact_rank():
    module, inputs = deep_chain()
    network = ExactNetwork(module)
    gradients = jacobian(module.exact(network, integers(inputs)))
    record = measure_basin(module, inputs, layers="auto")
    assert len(record.layers) == 34
    expected = {
        f"layers.{i}-{i + 1}": exact_rank(gradients[:, columns_of(network, [f"layers.{i}", f"layers.{i + 1}"])])
        for i in range(0, 34, 2)
    }
    assert {name: block.gradient_rank for name, block in record.blocks.items()} == expected
    assert record.gradient_rank == exact_rank(gradients)


@pytest.mark.parametrize("layers", ["all", "auto"])
def test_few_layers_have_no_blocks(layers):
    case = integer_case("mlp", 0)
    assert not measure_basin(case.module, case.inputs, layers=layers).blocks


def test_names_of_modules_are_blocks_of_the_layers_in_them():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 1))
    layers = find_layers(module)
    scopes = select_scopes(layers, ["1", "0", "0.2"])
    assert [(scope.kind, scope.name, [layer.name for layer in scope.layers]) for scope in scopes] == [
        ("layer", "1", ["1"]),
        ("block", "0", ["0.0", "0.2"]),
        ("layer", "0.2", ["0.2"]),
        ("network", "", ["0.0", "0.2", "1"]),
    ]
    with pytest.raises(ValueError, match=r"or hold some of these, got \['0.1'\]"):
        select_scopes(layers, ["0.1"])
