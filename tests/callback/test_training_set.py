import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_basin import BasinMonitor, MergedInput
from tests.lightning_packages import MisconfigurationException
from tests.training import Eventful, Regressor, Witness, make_trainer, regression_data
from tests.training_data import Items

pytestmark = pytest.mark.fits


def merged_data():
    """Sixty inputs, the last ten of which repeat the first ten."""
    inputs, targets = regression_data(60).tensors
    return TensorDataset(torch.cat([inputs[:50], inputs[:10]]), targets)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"drop_last": True}, {"num_workers": 1}], ids=str)
@pytest.mark.filterwarnings("ignore:.*(num_workers|many workers|log_every)")
def test_duplicates_are_counted_over_the_whole_training_set_of_a_run(tmp_path, options):
    monitor = BasinMonitor(probe=8, duplicates_over="train", hessian=False)
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Regressor(), DataLoader(merged_data(), 25, **options))
    for record in monitor.records:
        assert (record.train_num_inputs, record.train_duplicated_activations) == (60, 10)
        assert record.layers["hidden"].train_duplicated_activations == 10
    expected = tuple(MergedInput(50 + index, index, "hidden") for index in range(10))
    assert [record.train_merged_inputs for record in monitor.records] == [(), expected]
    assert trainer.callback_metrics["basin/train_duplicated_activations"] == 10


def test_inputs_are_those_that_the_training_step_gets(tmp_path):
    class Switched(Regressor):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return torch.zeros_like(batch[0]), batch[1]

    monitor = BasinMonitor(probe=8, duplicates_over="train", hessian=False)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Switched(), DataLoader(merged_data(), 20))
    assert monitor.records[-1].train_duplicated_activations == 59


def test_batch_fn_tells_inputs_from_targets(tmp_path):
    class Named(Regressor):
        def split(self, batch):
            return batch["x"], batch["y"]

    data = Items([{"x": x, "y": y} for x, y in merged_data()])
    monitor = BasinMonitor(
        probe=8, duplicates_over="train", hessian=False, batch_fn=lambda batch: (batch["x"], batch["y"])
    )
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Named(), DataLoader(data, 20))
    assert monitor.records[-1].train_duplicated_activations == 10


@pytest.mark.parametrize("data", [merged_data(), [merged_data().tensors]], ids=["data set", "batches"])
def test_another_data_set_may_be_given(tmp_path, data):
    monitor = BasinMonitor(probe=8, duplicates_over=data, hessian=False)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), DataLoader(regression_data(20), 20))
    assert (monitor.records[-1].train_num_inputs, monitor.records[-1].train_duplicated_activations) == (60, 10)


class Rows(IterableDataset):
    def __iter__(self):
        yield from merged_data()


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (lambda: DataLoader(Rows(), 20), "Rows"),
        (lambda: {"a": DataLoader(merged_data(), 20), "b": DataLoader(merged_data(), 20)}, "dict"),
    ],
    ids=["iterable data set", "two loaders"],
)
def test_a_loader_that_cannot_be_read_again_is_refused_before_training(tmp_path, loader, got):
    module = Regressor()
    with pytest.raises(MisconfigurationException, match=rf"map-style data set.* got {got}. HINT: pass such a data set"):
        make_trainer(tmp_path, BasinMonitor(duplicates_over="train")).fit(module, loader())
    assert module.num_training_steps == 0


def test_any_other_word_than_train_is_refused():
    with pytest.raises(
        MisconfigurationException, match=r"duplicates_over='all'.* must be 'train', a data set or batch"
    ):
        BasinMonitor(duplicates_over="all")


class NoisyPairs(Items):
    """An augmentation that draws from every global generator."""

    def __getitem__(self, index):
        x, y = self.items[index]
        return x + 0.01 * (random.random() + np.random.rand() + torch.rand(1)), y


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*(num_workers|many workers|log_every)")
def test_training_is_bit_identical_while_the_training_set_is_read(tmp_path, num_workers):
    seen = []
    for monitors in ([], [BasinMonitor(probe=8, duplicates_over="train", every_n_train_steps=1, hessian=False)]):
        generator = torch.Generator().manual_seed(0)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        witness = Witness(generator)
        loader = DataLoader(
            NoisyPairs(merged_data()),
            20,
            shuffle=True,
            generator=generator,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        make_trainer(tmp_path, *monitors, witness).fit(Eventful(), loader)
        seen.append(witness.seen)
        assert all(len(monitor.records) == 7 for monitor in monitors)
        assert all(record.train_num_inputs == 60 for monitor in monitors for record in monitor.records)
    assert seen[0] == seen[1]
