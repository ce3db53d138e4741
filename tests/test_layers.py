import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import Probe
from lightning_basin.network.layers import find_layers
from lightning_basin.network.network import Network, call_module
from tests.networks import Composed, drawn, filled


def names_and_sizes(module):
    return [(layer.name, layer.parameters, layer.num_parameters) for layer in find_layers(module)]


def test_layers_own_their_parameters_directly():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1, bias=False)))
    assert names_and_sizes(module) == [("0", ("0.weight", "0.bias"), 9), ("2.0", ("2.0.weight",), 3)]


def test_parameters_of_the_root_stand_under_the_empty_name():
    module = nn.Sequential(nn.Linear(1, 1))
    module.scale = nn.Parameter(torch.ones(3))
    assert names_and_sizes(module) == [("", ("scale",), 3), ("0", ("0.weight", "0.bias"), 2)]


def test_frozen_parameters_belong_to_no_layer():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(requires_grad=False)
    module[1].bias.requires_grad_(requires_grad=False)
    assert names_and_sizes(module) == [("1", ("1.weight",), 2)]


def test_a_tied_parameter_belongs_to_the_first_owner():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert names_and_sizes(module) == [("0", ("0.weight", "0.bias"), 6), ("1", ("1.bias",), 2)]


def test_a_module_whose_parameters_are_all_owned_elsewhere_is_no_layer():
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    module["head"].weight = module["embedding"].weight
    assert names_and_sizes(module) == [("embedding", ("embedding.weight",), 6)]


def test_a_module_used_under_two_names_is_one_layer():
    part = nn.Linear(1, 1)
    assert names_and_sizes(nn.ModuleDict({"a": part, "b": part})) == [("a", ("a.weight", "a.bias"), 2)]


def test_one_parameter_under_two_names_of_a_module_is_counted_once():
    module = nn.Module()
    module.first = nn.Parameter(torch.ones(2))
    module.second = module.first
    assert names_and_sizes(module) == [("", ("first",), 2)]


def test_a_parameter_without_elements_is_left_out_like_a_frozen_one():
    module = nn.Linear(2, 1)
    module.device_of = nn.Parameter(torch.empty(0))
    module.none = nn.Embedding(0, 3)
    assert names_and_sizes(module) == [("", ("weight", "bias"), 3)]


def test_containers_of_parameters_are_layers():
    module = nn.Module()
    module.items = nn.ParameterList([torch.ones(2), torch.ones(1)])
    module.table = nn.ParameterDict({"a": torch.ones(4)})
    assert [(name, size) for name, _, size in names_and_sizes(module)] == [("items", 3), ("table", 4)]


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.Linear(1, 1).requires_grad_(requires_grad=False), nn.ParameterList([torch.empty(0)])],
    ids=["none", "frozen", "without elements"],
)
def test_a_module_without_trainable_parameters_is_refused(module):
    with pytest.raises(ValueError, match=r"must have at least one trainable parameter, got .* with none"):
        find_layers(module)


# Calling modules.


class Echo(nn.Module):
    """Returns how it was called."""


def echo(forward):
    module = Echo()
    module.forward = forward
    return module


X, Y = torch.zeros(1), torch.ones(1)

CALLS = {
    "a tensor": (lambda x: ("one", x), X, ("one", X)),
    "a tuple that fits": (lambda x, y: ("two", x, y), (X, Y), ("two", X, Y)),
    "a list that fits": (lambda x, y: ("two", x, y), [X, Y], ("two", X, Y)),
    "a tuple for one argument": (lambda pair: ("one", pair), (X, Y), ("one", (X, Y))),
    "a list for one argument": (lambda pair: ("one", pair), [X, Y], ("one", [X, Y])),
    "a tuple of one": (lambda x: ("one", x), (X,), ("one", X)),
    "a tuple for any number of arguments": (lambda *xs: ("any", xs), (X, Y), ("any", (X, Y))),
    "a tuple with defaults left": (lambda x, y, z=3: (x, y, z), (X, Y), (X, Y, 3)),
    "a dict of arguments": (lambda x, y: ("two", x, y), {"y": Y, "x": X}, ("two", X, Y)),
    "a dict of some arguments": (lambda x, mask=None: (x, mask), {"x": X}, (X, None)),
    "a dict for one argument": (lambda batch: ("one", batch), {"x": X, "y": Y}, ("one", {"x": X, "y": Y})),
    "a dict for any arguments": (lambda **named: named, {"x": X, "y": Y}, {"x": X, "y": Y}),
    "a dict for keyword-only arguments": (lambda *, x, y: (x, y), {"x": X, "y": Y}, (X, Y)),
    "a dict of arguments and others": (
        lambda x, y, **others: (x, y, others),
        {"x": X, "y": Y, "z": X},
        (X, Y, {"z": X}),
    ),
    "a dict with other keys than names": (lambda batch: ("one", batch), {0: X}, ("one", {0: X})),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_unpacked_as_the_forward_takes_them(name):
    forward, inputs, expected = CALLS[name]
    assert str(call_module(echo(forward), inputs)) == str(expected)


# Gradients.


def test_hooks_are_gone_when_the_forward_raises():
    module = filled(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="calling the module on the inputs failed with RuntimeError"):
        Network(module).trace(Probe(drawn(5, 4)))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m, x: (m.linear(x),), TypeError, "the outputs must be a tensor, got tuple"),
        (lambda m, x: m.linear(x).argmax(1), TypeError, "the outputs must be floating point numbers, got torch.int64"),
        (lambda m, x: m.linear(x).sum(), ValueError, r"one row for each of the 5 inputs, got shape \(\)"),
        (lambda m, x: m.linear(x).mT, ValueError, r"one row for each of the 5 inputs, got shape \(2, 5\)"),
    ],
    ids=["tuple", "integers", "scalar", "transposed"],
)
def test_outputs_without_one_row_per_input_are_refused(function, error, message):
    network = Network(filled(Composed(function, linear=nn.Linear(3, 2))))
    with pytest.raises(error, match=message + ".*pass behavior=lambda"):
        network.outputs(Probe(drawn(5, 3)))


# Activations.


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
