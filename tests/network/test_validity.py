import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_basin import measure_basin, verify_null_space
from tests.measure.records import KEPT, kept_behavior
from tests.networks import Composed, drawn32


def kept_parameters(module, inputs):
    return nn.functional.linear(inputs, KEPT["module"].weight)


def test_a_behavior_that_runs_the_module_itself_is_refused(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))
    monkeypatch.setitem(KEPT, "module", module[0])
    with pytest.raises(ValueError, match="a copy of the module is measured, but the submodule '0' itself is run"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_behavior)


def test_a_behavior_that_uses_the_parameters_themselves_is_refused(monkeypatch):
    module = nn.Linear(3, 2, dtype=torch.float64)
    monkeypatch.setitem(KEPT, "module", module)
    with pytest.raises(ValueError, match="but its parameters themselves are used: the module, or the behavior, finds"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_parameters)


class Coupled(nn.Module):
    """Outputs that depend on other inputs, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.norm, self.way = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), way

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.way == "batch statistics":
            return self.norm(hidden)
        if self.way == "inner inputs":
            return torch.cat([hidden[:1], hidden[1:-1] + hidden[1:-1].roll(1, 0), hidden[-1:]])
        if self.way == "batch size":
            return hidden * len(x)
        return hidden


@pytest.mark.parametrize(
    ("way", "num_inputs"),
    [("batch statistics", 2), ("batch statistics", 3), ("batch statistics", 8), ("inner inputs", 8), ("batch size", 3)],
)
def test_outputs_that_depend_on_other_inputs_are_refused(way, num_inputs):
    module, inputs = Coupled(way), drawn32(num_inputs, 3)
    for refusing in (measure_basin, verify_null_space):
        with pytest.raises(ValueError, match="each output must depend on its own input only"):
            refusing(module, inputs)


@pytest.mark.parametrize("seed", range(10))
def test_random_numbers_are_noticed_whichever_are_drawn(seed):
    torch.manual_seed(seed)
    module = Composed(lambda m, x: F.dropout(m.linear(x), 0.5, training=True), linear=nn.Linear(4, 1))
    with pytest.raises(ValueError, match="draws random numbers in evaluation mode, or keeps a state"):
        measure_basin(module, drawn32(16, 4))


SIZES: list[int] = []


def noting_its_size(module, inputs):
    SIZES.append(len(inputs))
    return module(inputs)


@pytest.mark.parametrize("layers", [[], "all"])
def test_a_measurement_runs_the_network_on_few_inputs_on_all_and_once_on_each_half(layers):
    SIZES.clear()
    measure_basin(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)),
        drawn32(9, 3),
        behavior=noting_its_size,
        layers=layers,
    )
    # Two inputs also show, a few times, whether training gives the same outputs and gradients.
    assert [size for size in SIZES if size > 2] == [9, 5, 4]
    assert SIZES.index(9) == SIZES.count(2) <= 5


def test_outputs_that_compare_all_inputs_are_refused():
    # As many outputs for each input as there are inputs: a batch of half of them has other shapes.
    class Similarities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ self.net(x).mT

    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure_basin(Similarities(), drawn32(6, 3))
