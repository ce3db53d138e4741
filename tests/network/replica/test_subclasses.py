"""Tensors of classes of one's own: made by a behavior, returned by it, or kept by a module."""

import pytest
import torch
from torch import Tensor, nn

from lightning_basin import BasinMonitor, measure_basin
from tests.networks import Composed, drawn, filled
from tests.training import Regressor, loader, make_trainer, steps


class Labelled(Tensor):
    """Knows the names of its columns, as PINA's LabelTensor does; what is computed from it does not."""

    @staticmethod
    def __new__(cls, x, _):
        return super().__new__(cls, x)

    def __init__(self, _, labels):
        self.labels = labels

    def to(self, *arguments, **options):
        moved = super().to(*arguments, **options)
        moved.labels = list(self.labels)
        return moved

    def clone(self, *arguments, **options):
        copied = super().clone(*arguments, **options)
        copied.labels = list(self.labels)
        return copied


class OfColumns(nn.Module):
    """Reads columns by their names."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        assert x.labels == ["x", "y"]
        return self.head(self.inner(x).tanh())


def plain(module, x):
    return module.head(module.inner(x).tanh())


BEHAVIORS = {
    "made": lambda m, x: m(Labelled(x, ["x", "y"])),
    "made, output plain": lambda m, x: m(Labelled(x, ["x", "y"])).as_subclass(Tensor),
    "output made": lambda m, x: Labelled(plain(m, x), ["u"]),
    "inside": lambda m, x: plain(m, Labelled(x, ["x", "y"]).as_subclass(Tensor)),
}


@pytest.mark.parametrize("memory_budget", [None, 700_000])
@pytest.mark.parametrize("behavior", BEHAVIORS.values(), ids=BEHAVIORS)
def test_a_behavior_that_makes_tensors_of_a_subclass_has_the_record_of_plain_ones(behavior, memory_budget):
    inputs, targets = drawn(9, 2, seed=1), drawn(9, 1, seed=2)
    inputs[4] = inputs[2].clone()
    settings = {"loss_fn": nn.MSELoss(), "memory_budget": memory_budget}
    found = measure_basin(filled(OfColumns()), inputs, targets, behavior=behavior, **settings)
    expected = measure_basin(filled(OfColumns()), inputs, targets, behavior=plain, **settings)
    assert found.quantities().keys() == expected.quantities().keys()
    for name, value in expected.quantities().items():
        if float(value).is_integer() and name != "measure_seconds":
            assert found.quantities()[name] == value, name
    assert {name: layer.gradient_rank for name, layer in found.layers.items()} == {
        name: layer.gradient_rank for name, layer in expected.layers.items()
    }


@pytest.mark.fits
def test_a_tensor_that_a_module_keeps_is_copied_without_its_own_methods(tmp_path):
    class Keeps(Regressor):
        def training_step(self, batch, batch_idx):
            self.residual = (self(batch[0]) - batch[1]).as_subclass(Labelled)  # Has no labels, which `to` needs.
            return super().training_step(batch, batch_idx)

    monitor = BasinMonitor(20)
    make_trainer(tmp_path, monitor).fit(Keeps(), loader())
    assert steps(monitor) == [0, 3, 6]


def test_a_tensor_that_a_module_reads_keeps_its_attributes_in_the_copy():
    module = Composed(lambda m, x: m.head(x * m.scale) + len(m.scale.labels), head=nn.Linear(2, 1))
    module.scale = Labelled(torch.ones(2), ["x", "y"])
    record = measure_basin(filled(module), drawn(5, 2))
    assert record.gradient_rank == 3


def test_the_cause_of_a_failed_copy_is_named():
    class Refusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x):
            return self.net(x)

        def __reduce_ex__(self, protocol):
            raise OSError("the socket is in use")

    cause = r"shares its Refusing: copying Refusing failed with OSError: the socket is in use"
    with pytest.raises(TypeError, match=cause):
        measure_basin(Refusing(), drawn(5, 2))
