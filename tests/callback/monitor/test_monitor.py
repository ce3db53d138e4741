import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_basin import BasinMonitor, RankEarlyStopping, measure_basin
from tests.callback.monitor.modules import Wide, measured_at_start
from tests.training import (
    Regressor,
    Scripted,
    TwoOptimizers,
    loader,
    make_trainer,
    regression_data,
    scripted_loader,
    steps,
    timeless,
    witnessed,
)

pytestmark = pytest.mark.fits


def test_without_arguments_the_initial_weights_and_every_epoch_are_measured(tmp_path):
    module, monitor = Regressor(), BasinMonitor()
    inputs, targets = regression_data(160).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs[:128], targets[:128], loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor, max_epochs=3).fit(module, loader(160))
    assert steps(monitor) == [0, 8, 16, 24]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_last_record_is_of_the_final_weights(tmp_path):
    module, monitor = Regressor(), BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(module, loader())
    inputs, targets = regression_data().tensors
    final = measure_basin(module, inputs[:20], targets[:20], loss_fn=nn.MSELoss(), layers="auto", step=6)
    assert timeless(monitor.records[-1:]) == timeless([final])


@pytest.mark.parametrize(("every_n_epochs", "expected"), [(1, [0, 3, 6, 9, 12, 15]), (2, [0, 6, 12]), (3, [0, 9])])
def test_every_n_epochs_measures_at_the_end_of_every_nth_epoch(tmp_path, every_n_epochs, expected):
    monitor = BasinMonitor(probe=20, every_n_epochs=every_n_epochs)
    make_trainer(tmp_path, monitor, max_epochs=5).fit(Regressor(), loader())
    assert steps(monitor) == expected


@pytest.mark.parametrize(
    ("every_n_train_steps", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 2, 4, 6]), (4, [0, 4])]
)
def test_every_n_train_steps_measures_across_epochs(tmp_path, every_n_train_steps, expected):
    monitor = BasinMonitor(probe=20, every_n_train_steps=every_n_train_steps)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert steps(monitor) == expected


def test_every_n_train_steps_counts_optimizer_steps_under_gradient_accumulation(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=2)
    make_trainer(tmp_path, monitor, accumulate_grad_batches=3).fit(Regressor(), loader(240))
    assert steps(monitor) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("every_n_train_steps", "expected"), [(4, [0, 4, 8, 12]), (3, [0, 4, 6, 10, 12])])
def test_every_n_train_steps_counts_the_steps_of_both_optimizers(tmp_path, every_n_train_steps, expected):
    monitor = BasinMonitor(probe=20, every_n_train_steps=every_n_train_steps)
    make_trainer(tmp_path, monitor).fit(TwoOptimizers(), loader())
    assert steps(monitor) == expected


def test_manual_optimization_is_measured_at_every_epoch(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(TwoOptimizers(), loader())
    assert steps(monitor) == [0, 6, 12]


def test_optimizers_whose_steps_no_trainer_counts_are_said(tmp_path):
    class WithItsOwn(Regressor):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            torch.optim.SGD(self.parameters(), 0.01).step()

        def configure_optimizers(self):
            return None

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="nothing after the baseline as long as the trainer counts no optimizer steps"):
        make_trainer(tmp_path, monitor).fit(WithItsOwn(), loader())
    assert steps(monitor) == [0]


def test_only_chosen_layers_are_reported(tmp_path):
    monitor = BasinMonitor(probe=20, layers=["readout"], hessian=False)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert list(monitor.records[0].layers) == ["readout"]
    assert monitor.records[0].hessian_nullity is None


def test_training_is_bit_identical_when_the_dataset_is_smaller_than_the_probe(tmp_path):
    monitor = BasinMonitor(probe=500)
    assert witnessed(tmp_path, monitor) == witnessed(tmp_path)
    assert len(monitor.records) == 3


def test_training_is_bit_identical_with_a_behavior_that_draws_random_numbers(tmp_path):
    def behavior(module, inputs):
        torch.rand(3)
        return module(inputs)

    monitor = BasinMonitor(probe=10, behavior=behavior)
    assert witnessed(tmp_path, monitor) == witnessed(tmp_path)
    assert len(monitor.records) == 3


def test_same_seed_gives_the_same_records(tmp_path):
    runs = []
    for _ in range(2):
        runs.append(BasinMonitor(probe=20, seed=4))
        make_trainer(tmp_path, runs[-1]).fit(Regressor(), loader())
    assert timeless(runs[0].records) == timeless(runs[1].records)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fast_dev_run": True}, [0, 1]),
        ({"fast_dev_run": 2}, [0, 2]),
        ({"overfit_batches": 2}, [0, 2, 4]),
        ({"limit_train_batches": 1}, [0, 1, 2]),
        ({"limit_train_batches": 0}, []),
        ({"max_steps": 0}, []),
        ({"max_steps": 2}, [0, 2]),
        ({"max_steps": 5, "max_epochs": None}, [0, 3, 5]),
        ({"num_sanity_val_steps": 2}, [0, 3, 6]),
        ({"barebones": True, "logger": None, "enable_checkpointing": None, "num_sanity_val_steps": None}, [0, 3, 6]),
    ],
    ids=str,
)
@pytest.mark.parametrize("probe", [20, 128], ids=["full at once", "never full"])
def test_run_of_unusual_length_is_measured_where_it_trains(tmp_path, options, expected, probe):
    monitor = BasinMonitor(probe)
    make_trainer(tmp_path, monitor, **options).fit(Regressor(), loader(), loader(20))
    assert steps(monitor) == expected


def test_iterable_dataset_is_measured(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(regression_data())

    monitor = BasinMonitor(probe=40)
    make_trainer(tmp_path, monitor).fit(Regressor(), DataLoader(Stream(), 20))
    ordinary = BasinMonitor(probe=40)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_second_fit_with_one_monitor_starts_anew(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(40))
    assert steps(monitor) == [0, 2]
    assert monitor.zero_loss_step is None


def test_second_fit_after_one_that_never_measured_takes_its_own_initial_weights(tmp_path):
    monitor, module = BasinMonitor(probe=20), Regressor()
    baseline = measured_at_start(
        copy.deepcopy(module), *(t[:20] for t in regression_data().tensors), loss_fn=nn.MSELoss()
    )
    make_trainer(tmp_path, monitor, max_steps=0).fit(Regressor(), loader())
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_second_fit_is_not_stopped_by_the_early_stopping_of_the_first(tmp_path):
    monitor = BasinMonitor()
    first = make_trainer(tmp_path, monitor, RankEarlyStopping(patience=1, after_zero_loss=False), max_epochs=6)
    first.fit(Scripted(), scripted_loader())
    second = make_trainer(tmp_path, monitor, max_epochs=6)
    second.fit(Scripted(), scripted_loader())
    assert (first.current_epoch, second.current_epoch) == (1, 6)


def test_monitor_can_be_copied_after_a_fit(tmp_path):
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert copy.deepcopy(monitor).records == monitor.records


def test_many_outputs_are_measured_along_some_directions(tmp_path):
    monitor = BasinMonitor()
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Wide(), loader(160))
    record = monitor.records[-1]
    assert (record.num_inputs, record.num_rows) == (128, 128 * 16)
    assert any("lower bounds" in note for note in record.notes)
