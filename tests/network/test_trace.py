import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import Probe
from lightning_basin.network.network import Network
from tests.networks import Composed, drawn, filled


def test_hooks_are_gone_when_the_forward_raises():
    module = filled(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="calling the module on the inputs failed with RuntimeError"):
        Network(module).trace(Probe(drawn(5, 4)))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_the_number_of_first_layers_counts_what_the_first_one_sits_in():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(3, 2)
            self.last = nn.Linear(2, 2)

        def forward(self, x):
            return self.last(F.relu(self.inner(x))) * self.scale

    assert Network(filled(Outer())).trace(Probe(drawn(4, 3))).num_first == 2


def test_what_leaves_a_layer_and_enters_the_next_one_is_held_once():
    network = Network(filled(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))))
    trace = network.trace(Probe(drawn(4, 2)))
    assert trace.entering["1"][0] is trace.leaving["0"][0]


def written(how):
    """Twice what leaves the first layer, written where it is."""

    def function(module, x):
        hidden = module.first(x)
        how(hidden)
        return module.second(hidden)

    return filled(Composed(function, first=nn.Linear(2, 3), second=nn.Linear(3, 1)))


@pytest.mark.parametrize("how", [lambda hidden: hidden.mul_(2), lambda hidden: hidden.data.mul_(2)])
def test_what_is_written_between_two_layers_is_seen_to_enter_the_second_one_only(how):
    inputs = drawn(4, 2)
    network = Network(written(how))
    trace = network.trace(Probe(inputs))
    (left,), (entered,) = trace.leaving["first"], trace.entering["second"]
    weight, bias = network.module.first.weight, network.module.first.bias
    torch.testing.assert_close(left, inputs @ weight.T + bias)
    assert torch.equal(entered, 2 * left)
