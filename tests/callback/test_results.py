"""Packages copy the callbacks that they are given, and fit with the copies."""

import copy
import pickle

import pytest
import torch

from lightning_basin import BasinMonitor, Probe
from lightning_basin.callback.results import labels_of
from lightning_basin.offline import measure_checkpoints
from tests.lightning_packages import ModelCheckpoint
from tests.training import Regressor, loader, make_trainer, regression_data, steps

pytestmark = pytest.mark.fits


def fit(root, monitor, *, num_epochs=1, module=None, num_inputs=60, **options):
    make_trainer(root, monitor, max_epochs=num_epochs).fit(module or Regressor(), loader(num_inputs), **options)


def test_a_monitor_shows_what_its_copy_has_measured(tmp_path):
    monitor = BasinMonitor(probe=20, zero_loss_threshold=1e3)
    duplicate = copy.deepcopy(copy.deepcopy(monitor))
    fit(tmp_path, duplicate)
    assert steps(monitor) == [0, 3]
    assert monitor.records is duplicate.records
    assert monitor.zero_loss_step == 0
    assert torch.equal(monitor.probe.inputs, duplicate.probe.inputs)


def test_a_monitor_shows_skipped_steps_of_its_copy(tmp_path):
    monitor = BasinMonitor(probe=20, max_overhead=1e-9)
    fit(tmp_path, copy.deepcopy(monitor), num_epochs=2)
    assert monitor.skipped_steps == [3, 6]


def test_of_several_copies_the_one_is_shown_whose_fit_began_last_and_none_fills_the_list_of_another(tmp_path):
    monitor = BasinMonitor(probe=20)
    folds = [copy.deepcopy(monitor) for _ in range(3)]
    for num_epochs, fold in enumerate(folds, start=1):
        fit(tmp_path, fold, num_epochs=num_epochs)
        assert monitor.records is fold.records
    assert [steps(fold) for fold in folds] == [[0, 3], [0, 3, 6], [0, 3, 6, 9]]


class FitsAnother(BasinMonitor):
    """A second fit begins, and ends, in the middle of the first."""

    def __init__(self, inner):
        super().__init__(probe=20)
        self.inner = inner

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.inner()


def test_two_fits_at_one_time_have_records_of_their_own(tmp_path):
    monitor = BasinMonitor(probe=20)
    inner = copy.deepcopy(monitor)
    outer = FitsAnother(lambda: fit(tmp_path, inner))
    outer.progress._latest = monitor.progress._latest
    fit(tmp_path, outer, num_epochs=2)
    assert steps(outer) == [0, 3, 6]
    assert steps(inner) == [0, 3]
    assert monitor.records is inner.records


def test_a_monitor_that_was_in_a_fit_itself_shows_that(tmp_path):
    monitor = BasinMonitor(probe=20)
    fit(tmp_path, monitor)
    records = monitor.records
    duplicate = copy.deepcopy(monitor)
    assert steps(duplicate) == [0, 3]
    fit(tmp_path, duplicate, num_epochs=2)
    assert steps(monitor) == [0, 3]
    assert steps(duplicate) == [0, 3, 6]
    fit(tmp_path, monitor, num_epochs=3)  # Whoever holds the list sees the next fit.
    assert records is monitor.records
    assert steps(monitor) == [0, 3, 6, 9]


@pytest.mark.parametrize("duplicated", [copy.copy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
def test_shallow_and_pickled_copies_have_lists_of_their_own(tmp_path, duplicated):
    monitor = BasinMonitor(probe=20)
    fit(tmp_path, monitor)
    duplicate = duplicated(monitor)
    fit(tmp_path, duplicate, num_epochs=2)
    assert steps(monitor) == [0, 3]
    assert steps(duplicate) == [0, 3, 6]


def test_a_copy_that_resumes_is_shown(tmp_path):
    fit_with = make_trainer(
        tmp_path, BasinMonitor(probe=20), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True
    )
    fit_with.fit(Regressor(), loader())
    monitor = BasinMonitor(probe=20)
    fit(tmp_path, copy.deepcopy(monitor), num_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert steps(monitor) == [0, 3, 6, 9]


def test_measuring_checkpoints_leaves_what_a_monitor_shows(tmp_path):
    monitor = BasinMonitor(probe=20)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    make_trainer(tmp_path, copy.deepcopy(monitor), checkpoint, enable_checkpointing=True).fit(Regressor(), loader())
    before = list(monitor.records)
    found = measure_checkpoints(tmp_path, Regressor, monitor, progress=False)
    assert [record.step for record in found] == [3, 6]
    assert monitor.records == before


def test_labels_are_targets_that_are_few_numbers():
    inputs = torch.eye(3)
    assert labels_of(Probe(inputs, torch.tensor([2, 0, 2]))) == [2, 0, 2]
    assert labels_of(Probe(inputs, torch.tensor([[0.5], [1.0], [0.5]]))) == [0.5, 1, 0.5]
    assert labels_of(Probe(inputs)) is None
    assert labels_of(Probe(inputs, {"label": torch.zeros(3)})) is None
    assert labels_of(Probe(*regression_data(20).tensors)) is None
    assert labels_of(Probe(torch.zeros(20, 1), torch.arange(20))) is None
    assert labels_of(None) is None
