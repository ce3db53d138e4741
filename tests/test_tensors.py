from collections.abc import Mapping

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_basin import Probe
from lightning_basin.probe import ProbeCollector, split_batch
from lightning_basin.tensors import as_dtype, map_tensors, tensors_of


def test_to_another_precision_keeps_integers_and_booleans():
    probe = Probe((torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)), torch.tensor([True, False]))
    doubled = probe.to("cpu", torch.float64)
    assert [tensor.dtype for tensor in doubled.inputs] == [torch.float64, torch.int32]
    assert doubled.targets.dtype == torch.bool


def test_float64_keeps_the_numbers():
    tenth = torch.tensor([0.1], dtype=torch.float32)
    assert Probe(tenth).to("cpu", torch.float64).inputs.item() == tenth.item()


def test_float32_rounds_the_numbers_of_float64():
    tenth = torch.tensor([0.1], dtype=torch.float64)
    rounded = Probe((tenth, torch.tensor([3]))).to("cpu", torch.float32).inputs
    assert [tensor.dtype for tensor in rounded] == [torch.float32, torch.int64]
    assert rounded[0].item() == tenth.float().item()


def test_to_another_precision_leaves_the_probe_as_it_was():
    probe = Probe(torch.zeros(2))
    probe.to("cpu", torch.float64)
    assert probe.inputs.dtype == torch.float32


def test_to_moves_every_tensor():
    moved = Probe((torch.zeros(2), [torch.zeros(2)]), torch.zeros(2)).to("meta")
    assert {tensor.device.type for tensor in tensors_of((moved.inputs, moved.targets))} == {"meta"}


def test_tensors_are_found_in_a_fixed_order():
    collection = {"b": [torch.tensor(1), "x"], "a": (torch.tensor(2), {"c": torch.tensor(3)})}
    assert [int(tensor) for tensor in tensors_of(collection)] == [1, 2, 3]


def test_map_tensors_makes_new_containers():
    inner = [torch.tensor(1)]
    mapped = map_tensors(lambda tensor: tensor + 1, {"a": inner})
    assert mapped["a"] is not inner
    assert (int(mapped["a"][0]), int(inner[0])) == (2, 1)


def test_complex_numbers_are_not_cut_to_their_real_part():
    number = torch.tensor([1 + 2j])
    assert as_dtype(number, torch.float64).tolist() == [1 + 2j]


class ByBatch(Mapping):
    """A mapping that is iterated over input by input, as a TensorDict."""

    def __init__(self, fields, batch_size):
        self.fields, self.batch_size = fields, batch_size

    def __getitem__(self, key):
        return self.fields[key]

    def __iter__(self):
        return iter(range(self.batch_size))

    def __len__(self):
        return self.batch_size

    def keys(self):
        return self.fields.keys()

    def values(self):
        return self.fields.values()

    def items(self):
        return self.fields.items()


PACKED = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((PACKED, torch.ones(2)), "got a PackedSequence: pass batch_fn="),
        ({"x": [PACKED], "y": torch.ones(2)}, "got a PackedSequence: pass batch_fn="),
        (ByBatch({"seen": torch.ones(64, 3), "done": torch.ones(64)}, 64), r"ByBatch with keys \['seen', 'done'\]"),
        ((ByBatch({"seen": torch.ones(64, 3)}, 64), torch.ones(64)), r"\(batch\['seen'\], None\)"),
    ],
    ids=["packed", "packed inside", "mapping", "mapping in a pair"],
)
@pytest.mark.parametrize("take", [Probe, ProbeCollector(9, whole_batches=True).add], ids=["a probe", "from batches"])
def test_containers_that_cannot_be_made_again_are_refused_in_one_sentence(take, batch, message):
    with pytest.raises(TypeError, match=message) as refused:
        take(batch)
    assert len(str(refused.value)) < 400


def test_a_batch_by_other_keys_is_refused_by_its_keys():
    with pytest.raises(TypeError, match=r"got ByBatch with keys \['seen'\]: pass batch_fn=") as refused:
        split_batch(ByBatch({"seen": torch.ones(64, 3)}, 64))
    assert len(str(refused.value)) < 250


def test_a_tensordict_is_refused_by_its_keys_and_taken_as_a_whole():
    tensordict = pytest.importorskip("tensordict")
    batch = tensordict.TensorDict({"seen": torch.ones(64, 3), "done": torch.ones(64)}, batch_size=[64])
    with pytest.raises(TypeError, match=r"TensorDict with keys \['seen', 'done'\]"):
        split_batch(batch)
    collector = ProbeCollector(100, whole_batches=True)
    collector.add(batch)
    collector.add(batch)
    assert (Probe(batch).size, collector.probe.size) == (64, 100)
