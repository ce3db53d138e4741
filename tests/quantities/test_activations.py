import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin import measure_basin
from tests.exact import exact_rank
from tests.functional.matrices import INFINITE
from tests.models import CASE_NAMES, evaluated_case, integer_case
from tests.networks import Composed, drawn, with_singular_values

every_network = pytest.mark.parametrize("name", CASE_NAMES)


@every_network
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rank_of_what_enters_each_layer_is_exact(name, dtype):
    case, (network, _) = integer_case(name, 0), evaluated_case(name, 0)
    record = measure_basin(case.module, case.inputs, dtype=dtype)
    expected = {
        layer: exact_rank(np.concatenate(calls, 1))
        for layer, calls in network.entering.items()
        if layer in record.layers
    }
    assert {layer: record.layers[layer].activation_rank for layer in expected} == expected
    gaps = {layer: record.layers[layer].activation_rank_gap for layer, rank in expected.items() if rank}
    assert all(gap > 3 for gap in gaps.values())
    assert expected


def test_merged_inputs_lower_the_rank_of_what_enters_a_layer():
    inputs = drawn(6, 10)
    inputs[3:] = inputs[:3]
    record = measure_basin(nn.Linear(10, 2).double(), inputs)
    assert record.layers[""].activation_rank == 3


def test_the_tolerance_of_ranks_decides_on_activations_too():
    module, inputs = nn.Linear(60, 2).double(), with_singular_values(3, 60, [1.0, 0.1, 1e-5])
    ranks = [measure_basin(module, inputs, rtol=rtol).layers[""].activation_rank for rtol in (None, 1e-4)]
    assert ranks == [3, 2]


def test_blocks_and_the_network_have_no_rank_of_activations():
    module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))).double()
    record = measure_basin(module, drawn(5, 3), layers="auto")
    assert {part.activation_rank for part in (*record.blocks.values(), record)} == {None}
    assert None not in {part.activation_rank for part in record.layers.values()}
    assert "basin/activation_rank" not in record.scalars()


class Unused(nn.Module):
    """A layer that is not called beside one that is."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.used(inputs)


def test_a_layer_that_is_not_called_has_no_rank_of_activations():
    record = measure_basin(Unused().double(), drawn(3, 4))
    assert (record.layers["used"].activation_rank, record.layers["unused"].activation_rank) == (3, None)
    scalars = record.scalars()
    assert "basin_layer_activation_rank_gap/used" in scalars
    assert not any("activation_rank" in key and key.endswith("unused") for key in scalars)


class Masked(nn.Module):
    """A layer that is called with a mask of infinities, one for each input."""

    def __init__(self):
        super().__init__()
        self.inner = Biased()

    def forward(self, inputs):
        return self.inner(inputs, torch.where(inputs > 0, 0.0, -INFINITE))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs, mask):
        return (inputs * self.scale + mask).softmax(1)


def test_infinities_that_enter_a_layer_leave_its_rank_out():
    record = measure_basin(Masked().double(), drawn(3, 4))
    assert (record.layers["inner"].activation_rank, record.layers["inner"].activation_rank_gap) == (None, None)
    assert record.layers["inner"].duplicated_activations == 0


class Scalar(nn.Module):
    """A layer with a single unit, whose output has no axis of units."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, inputs):
        return (inputs @ self.weight).relu()


def test_a_layer_whose_outputs_have_no_axis_of_units_has_one_unit():
    # One input is on. The other three are 0 at the second layer, whose bias alone moves their outputs: two rows.
    module = Composed(lambda m, x: m.b(m.a(x).unsqueeze(1)), a=Scalar(), b=nn.Linear(1, 1))
    record = measure_basin(module, torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-2.0, 0.0], [-3.0, 0.0]]))
    assert (record.gradient_rank, record.layers["a"].dead_units) == (2, 0)
    assert record.layers["b"].duplicated_activations == 2
