"""Runs in which a trainer does something else than train: tuning, checking, evaluating."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.lightning_packages import BatchSizeFinder, LearningRateFinder, Tuner
from tests.training import Regressor, fingerprint, loader, make_trainer, regression_data, seeded, steps, timeless

pytestmark = pytest.mark.fits


class Tunable(Regressor):
    """Has a learning rate and a batch size that a tuner may set."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 10

    def train_dataloader(self):
        return DataLoader(regression_data(), self.batch_size)

    def val_dataloader(self):
        return DataLoader(regression_data(20), 10)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def find_learning_rate(trainer, module):
    Tuner(trainer).lr_find(module, num_training=5, update_attr=False)


def scale_batch_size(trainer, module):
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)
    module.batch_size = 10


TUNINGS = {"learning rate": find_learning_rate, "batch size": scale_batch_size}


def tuned_fit(root, tune, *callbacks):
    module = Tunable()
    trainer = make_trainer(root, *callbacks, log_every_n_steps=1)
    with seeded(3):
        if tune is not None:
            tune(trainer, module)
        after_tuning = list(root.rglob("*"))
        trainer.fit(module)
    return fingerprint(module.state_dict()), after_tuning


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tune", TUNINGS.values(), ids=TUNINGS)
def test_tuner_is_not_measured_and_the_fit_after_it_is_as_without(tmp_path, tune):
    monitor, without = BasinMonitor(probe=20), BasinMonitor(probe=20)
    weights, files = tuned_fit(tmp_path, tune, monitor, RankEarlyStopping(patience=99))
    assert (weights, files) == tuned_fit(tmp_path, tune)
    tuned_fit(tmp_path, None, without)
    assert steps(monitor) == [0, 6, 12]
    assert timeless(monitor.records) == timeless(without.records)


@pytest.mark.filterwarnings("ignore")
def test_early_stopping_hears_of_measurements_after_tuning(tmp_path):
    monitor = BasinMonitor(probe=20)
    tuned_fit(
        tmp_path, find_learning_rate, monitor, RankEarlyStopping(patience=1, after_zero_loss=False)
    )  # The rank stays as it is.
    assert steps(monitor) == [0, 6]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make_finder",
    [
        lambda: LearningRateFinder(num_training_steps=5, update_attr=False),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
    ],
    ids=TUNINGS,
)
@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_finder_among_the_callbacks_is_not_measured(tmp_path, make_finder, order):
    monitor = BasinMonitor(probe=20)
    module = Tunable()
    trainer = make_trainer(tmp_path, *[monitor, make_finder()][::order])
    with seeded(3):
        trainer.fit(module)
    other = Tunable()
    with seeded(3):
        make_trainer(tmp_path, make_finder()).fit(other)
    assert fingerprint(module.state_dict()) == fingerprint(other.state_dict())
    assert steps(monitor) == [0, trainer.global_step // 2, trainer.global_step]


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"limit_train_batches": 0},
        {"max_steps": 0},
        {"max_epochs": 0},
        {"num_sanity_val_steps": 2},
        {"min_epochs": 3, "max_steps": 4},
        {"max_time": "00:00:00:00"},
    ],
    ids=str,
)
def test_run_leaves_nothing_on_the_module_or_the_disk(tmp_path, options):
    module = Regressor()
    attributes = set(vars(module))
    trainer = make_trainer(tmp_path, BasinMonitor(probe=30), RankEarlyStopping(patience=99), **options)
    trainer.fit(module, loader(), loader(20))
    other = Regressor()
    make_trainer(tmp_path, **options).fit(other, loader(), loader(20))
    assert set(vars(module)) == set(vars(other)) >= attributes
    assert fingerprint(module.state_dict()) == fingerprint(other.state_dict())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_measures_nothing(tmp_path, stage):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    module = Regressor()
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    getattr(trainer, stage)(module, DataLoader(regression_data(20), batch_size=20))
    assert monitor.records == []
    assert monitor.probe is None


def test_fit_that_is_interrupted_by_the_user_can_be_followed_by_another(tmp_path):
    class Interrupting(Regressor):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 4:
                raise KeyboardInterrupt

    monitor = BasinMonitor(probe=20)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, monitor).fit(Interrupting(), loader())
    assert steps(monitor) == [0, 3]
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3]
    assert monitor.records[1].step == 3
