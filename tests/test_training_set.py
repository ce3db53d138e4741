import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_basin import MergedInput, Probe, measure_basin
from lightning_basin.training_set import TrainingSet, as_probes
from tests.training_data import Items


class Rounding(nn.Module):
    """Merges numbers to their integer part in front of ``second``, and these to their sign at the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.fill_(1.0)
                layer.bias.zero_()

    def forward(self, x):
        whole = self.first(x).trunc()
        return self.second(whole).sign()


INPUTS = torch.tensor([[1.25], [2.5], [-3.0], [2.5], [1.5], [0.0], [-1.0], [2.75]])


# By hand: 3 equals 1 from the start; 4 = 0 (both 1) and 7 = 1 (both 2) from "second" on; -1 = -3 and 2 = 1 in sign.
MERGED = (
    MergedInput(1, 0, None),
    MergedInput(3, 1, "first"),
    MergedInput(4, 0, "second"),
    MergedInput(6, 2, None),
    MergedInput(7, 1, "second"),
)


def test_merged_inputs_are_named_with_the_first_layer_that_merges_them():
    record = measure_basin(Rounding(), INPUTS)
    assert record.merged_inputs == MERGED
    counts = [record.layers[name].duplicated_activations for name in ("first", "second")]
    assert (counts, record.output_duplicated_activations) == ([1, 3], 5)


def test_names_of_merged_inputs_are_read_in_one_line():
    text = str(measure_basin(Rounding(), INPUTS))
    assert "5 inputs merged, first 2 at output (1=0, 6=2); 1 at first (3=1); 2 at second (4=0, 7=1)" in text


def test_a_network_that_merges_nothing_names_nothing():
    record = measure_basin(nn.Linear(1, 1), torch.arange(3.0).unsqueeze(1))
    assert record.merged_inputs == ()
    assert "merged" not in str(record)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(INPUTS, torch.zeros(8)),
        DataLoader(TensorDataset(INPUTS, torch.zeros(8)), 3, shuffle=True, drop_last=True),
        list(INPUTS.split(3)),
        [INPUTS[:7], INPUTS[7:]],
        [(INPUTS[:2], torch.zeros(2)), (INPUTS[2:], torch.zeros(6))],
        [Probe(INPUTS)],
        None,
    ],
    ids=["data set", "loader", "tensors", "a last batch of one", "pairs", "probe", "no automatic batching"],
)
@pytest.mark.filterwarnings("error")
def test_duplicates_over_all_inputs_are_those_of_a_probe_with_all_of_them(data):
    if data is None:
        data = DataLoader(Items(INPUTS.split(1)), batch_size=None)
    record = measure_basin(Rounding(), INPUTS[:2], duplicates_over=data)
    assert record.merged_inputs == (MergedInput(1, 0, None),)
    assert record.train_merged_inputs == MERGED
    assert (record.train_num_inputs, record.train_output_duplicated_activations) == (8, 5)
    assert [record.layers[name].train_duplicated_activations for name in ("first", "second")] == [1, 3]
    assert record.train_duplicated_activations == 3  # of the layers after the first
    assert record.scalars()["basin_layer_train_duplicated_activations/output"] == 5.0
    assert record.scalars()["basin/train_num_inputs"] == 8.0


def test_names_of_merged_training_inputs_are_read_too():
    text = str(measure_basin(Rounding(), INPUTS[:1], duplicates_over=[INPUTS]))
    assert "5 of 8 training inputs merged, first 2 at output (1=0, 6=2)" in text


def test_a_record_with_merged_inputs_is_read_back_from_builtins(tmp_path):
    record = measure_basin(Rounding(), INPUTS, duplicates_over=[INPUTS])
    torch.save(record.to_dict(), tmp_path / "record.pt")
    assert type(record).from_dict(torch.load(tmp_path / "record.pt", weights_only=True)) == record


class Noisy(Items):
    """Draws from every global generator each time that an item is read."""

    def __getitem__(self, index):
        return self.items[index] + random.random() + np.random.rand() + torch.rand(1)


class Endless(IterableDataset):
    def __iter__(self):
        yield from torch.zeros(5, 1)


def test_an_augmentation_draws_the_same_numbers_at_each_pass_and_none_of_the_run():
    data = TrainingSet(Noisy(INPUTS))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    (first,), (second,) = list(data), list(data)
    assert torch.equal(first.inputs, second.inputs)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_items_are_read_in_the_precision_of_training():
    class Casting(Items):
        def __getitem__(self, index):
            return torch.tensor([0.1 * index]).float()

    seen = []

    def collate(items):
        seen.append(items[0].dtype)
        return torch.stack(items)

    measure_basin(Rounding(), INPUTS, duplicates_over=DataLoader(Casting(range(4)), 2, collate_fn=collate))
    assert set(seen) == {torch.float32}


def test_what_cannot_be_evaluated_costs_a_warning_and_nothing_else():
    with pytest.warns(UserWarning, match="the training set is left out. ValueError") as warned:
        record = measure_basin(Rounding(), INPUTS, duplicates_over=[torch.zeros(2, 7)])
    assert warned[0].filename == __file__  # The line that asked for it.
    assert record.train_num_inputs is None
    assert record.merged_inputs == MERGED


@pytest.mark.parametrize("data", [iter([INPUTS]), 3, Endless(), DataLoader(Endless(), 2)])
def test_what_cannot_be_read_twice_is_refused(data):
    with pytest.raises(TypeError, match="map-style data set"):
        as_probes(data)
