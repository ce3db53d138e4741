import dataclasses
from collections import namedtuple

import pytest
import torch

from lightning_basin import Probe
from lightning_basin.tensors import tensors_of

Pair = namedtuple("Pair", ["left", "right"])


NESTED = {
    "tuple": lambda x: (x, x + 1),
    "list": lambda x: [x, x + 1],
    "dict": lambda x: {"a": x, "b": x + 1},
    "nested": lambda x: {"a": (x, [x + 1, "text"]), "b": 3},
    "namedtuple": lambda x: Pair(x, x + 1),
}


@pytest.mark.parametrize("structure", NESTED)
def test_a_probe_keeps_the_structure_of_its_inputs(structure):
    inputs = NESTED[structure](torch.arange(3))
    kept = Probe(inputs).inputs
    assert type(kept) is type(inputs)
    assert str(kept) == str(inputs)


@pytest.mark.parametrize("structure", NESTED)
def test_writing_to_the_original_tensors_leaves_the_probe_as_it_was(structure):
    original = torch.zeros(3)
    inputs = NESTED[structure](original)
    probe = Probe(inputs, inputs)
    for tensor in tensors_of(inputs):
        tensor.add_(7)
    assert all(bool((tensor < 7).all()) for tensor in tensors_of((probe.inputs, probe.targets)))


def test_writing_to_the_original_container_leaves_the_probe_as_it_was():
    inputs = {"a": torch.zeros(2)}
    probe = Probe(inputs)
    inputs["b"] = torch.zeros(2)
    assert set(probe.inputs) == {"a"}


def test_a_probe_holds_no_graph():
    inputs = torch.ones(2, requires_grad=True) * 2
    assert not Probe(inputs).inputs.requires_grad


@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_a_probe_cannot_be_changed(name):
    with pytest.raises(dataclasses.FrozenInstanceError, match=name):
        setattr(Probe(torch.zeros(2)), name, torch.ones(2))


def test_the_size_is_the_number_of_inputs():
    assert Probe({"a": torch.zeros(5, 2), "b": [torch.zeros(5)]}, torch.zeros(5)).size == 5


@pytest.mark.parametrize("inputs", ["text", None, [], {"a": 3}, 1.5])
def test_inputs_without_a_tensor_are_refused(inputs):
    with pytest.raises(TypeError, match="inputs of a probe must be a tensor or a tuple, list or dict with tensors"):
        Probe(inputs)


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ((torch.zeros(2), torch.zeros(3)), None),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.tensor(1.0)),
        (torch.tensor(1.0), None),
    ],
    ids=["inputs", "targets", "scalar target", "scalar input"],
)
def test_tensors_with_different_numbers_of_inputs_are_refused(inputs, targets):
    with pytest.raises(
        ValueError, match=r"must have the inputs along their first axis, in the same number, got shapes"
    ):
        Probe(inputs, targets)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="a probe must hold at least one input, got an empty batch"):
        Probe(torch.zeros(0, 2), torch.zeros(0))


def batches_of(*sizes):
    counter = iter(range(100))
    columns = [torch.tensor([float(next(counter)) for _ in range(size)]) for size in sizes]
    return [({"x": column.unsqueeze(1)}, (column + 100,)) for column in columns]


def test_batches_are_joined_in_order_up_to_the_size():
    probe = Probe.from_batches(batches_of(3, 2, 3), size=6)
    assert probe.inputs["x"].squeeze(1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert probe.targets[0].tolist() == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]


def test_fewer_inputs_than_asked_for_are_all_taken():
    assert Probe.from_batches(batches_of(3, 2), size=50).size == 5


def test_batches_without_targets_are_joined():
    probe = Probe.from_batches([(torch.zeros(2), None), (torch.ones(2), None)], size=3)
    assert probe.inputs.tolist() == [0.0, 0.0, 1.0]
    assert probe.targets is None


@pytest.mark.parametrize("size", [0, -3])
def test_a_probe_of_no_inputs_is_refused(size):
    with pytest.raises(ValueError, match=f"probe must hold at least 1 input, got {size}"):
        Probe.from_batches(batches_of(3), size=size)


@pytest.mark.parametrize(
    "second",
    [(torch.zeros(2, 5), torch.zeros(2)), ((torch.zeros(2, 3), torch.zeros(2)), torch.zeros(2))],
    ids=["shape", "structure"],
)
def test_batches_that_do_not_fit_together_are_refused(second):
    with pytest.raises(ValueError, match="batches must have tensors of the same structure and shapes to be joined"):
        Probe.from_batches([(torch.zeros(2, 3), torch.zeros(2)), second], size=4)


def test_batches_without_a_tensor_among_the_inputs_are_refused():
    with pytest.raises(TypeError, match="inputs of a probe must be a tensor"):
        Probe.from_batches([("text", torch.zeros(2))], size=4)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batch"):
        Probe.from_batches([], size=4)


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0])], ids=["list", "tensor"])
def test_select_takes_inputs_and_targets_in_the_order_asked_for(indices):
    chosen = Probe((torch.arange(3), torch.arange(3) + 10), torch.arange(3) + 20).select(indices)
    assert [tensor.tolist() for tensor in chosen.inputs] == [[2, 0], [12, 10]]
    assert chosen.targets.tolist() == [22, 20]


def test_select_copies():
    probe = Probe(torch.zeros(3))
    probe.select([0, 1, 2]).inputs.add_(1)
    assert probe.inputs.tolist() == [0.0, 0.0, 0.0]


BATCHES = [({"text": ["a", "b"], "x": torch.zeros(2), "names": ("u", "v", "w")}, torch.zeros(2)) for _ in range(2)]


def test_lists_with_one_word_for_each_input_are_joined_and_cut_like_tensors():
    probe = Probe.from_batches(BATCHES, 3)
    assert (probe.inputs["text"], probe.inputs["names"]) == (["a", "b", "a"], ("u", "v", "w"))


def test_lists_with_one_word_for_each_input_are_selected_like_tensors():
    probe = Probe({"text": ("a", "b", "c"), "x": torch.arange(3), "nested": [torch.arange(3), ["d", "e", "f"]]})
    chosen = probe.select([2, 0]).inputs
    assert (chosen["text"], chosen["nested"][1]) == (("c", "a"), ["f", "d"])


def test_a_list_that_has_the_length_of_one_batch_by_chance_stays():
    batches = [({"x": torch.zeros(size), "names": ["u", "v"]}, None) for size in (3, 2)]
    assert Probe.from_batches(batches, 5).inputs["names"] == ["u", "v"]


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_refused(make):
    with pytest.raises(
        ValueError, match=r"all tensors of a probe must be dense, got torch.sparse_\w+: pass tensor.to_d"
    ):
        Probe(make(torch.eye(3)))
