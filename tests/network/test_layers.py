import pytest
import torch
from torch import nn

from lightning_basin.network.layers import find_layers


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
