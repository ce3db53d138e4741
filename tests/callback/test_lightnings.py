"""Both Lightning packages: each has a trainer of its own, which asks whether a callback is of its own package."""

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.callback.lightnings import BaseCallback, Callback, EarlyStopping, LightningModule, Trainer
from tests.training import loader, seeded, steps, timeless

pytestmark = pytest.mark.fits

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.fixture(params=PACKAGES)
def package(request):
    return import_module(request.param)


def regressor(package, **attributes):
    """Three inputs, four tanh units, two outputs, in a module of this package."""

    class Regressor(package.LightningModule):
        def __init__(self):
            super().__init__()
            with seeded():
                self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            self.loss_fn = nn.MSELoss()
            vars(self).update(attributes)

        def forward(self, inputs):
            return self.network(inputs)

        def training_step(self, batch, batch_idx):
            loss = self.loss_fn(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss_fn(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Regressor()


def fit(package, root, *callbacks, module=None, ckpt_path=None, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    trainer = package.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    module = module or regressor(package)
    trainer.fit(module, loader(), loader(20), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("package_name", PACKAGES)
def test_names_stand_for_the_classes_of_every_package(package_name):
    package = import_module(package_name)
    assert issubclass(package.Trainer, Trainer)
    assert isinstance(regressor(package), LightningModule)
    assert issubclass(package.callbacks.EarlyStopping, EarlyStopping)
    assert issubclass(package.callbacks.EarlyStopping, Callback)
    assert issubclass(BaseCallback, package.Callback)
    assert isinstance(BasinMonitor(), package.Callback)
    assert isinstance(RankEarlyStopping(), package.callbacks.EarlyStopping)


def test_both_packages_give_the_same_records(tmp_path):
    first, second = BasinMonitor(probe=20), BasinMonitor(probe=20)
    fit(import_module(PACKAGES[0]), tmp_path, first)
    fit(import_module(PACKAGES[1]), tmp_path, second)
    assert steps(first) == steps(second) == [0, 3, 6]
    # 3·4 + 4 + 4·2 + 2 parameters, 20 · 2 rows: generic weights of a tanh network are all seen.
    assert [record.gradient_rank for record in second.records] == [26, 26, 26]
    assert timeless(first.records) == timeless(second.records)


def test_training_is_the_same_with_and_without(package, tmp_path):
    _, alone = fit(package, tmp_path)
    _, measured = fit(package, tmp_path, BasinMonitor(probe=20), RankEarlyStopping(patience=9))
    assert all(
        torch.equal(parameter, other)
        for parameter, other in zip(alone.parameters(), measured.parameters(), strict=True)
    )


@pytest.mark.parametrize("monitor_last", [False, True])
def test_a_rank_stops_training_and_says_why_in_the_words_of_the_package(package, tmp_path, monitor_last):
    # The rank is 26 at all of the measurements: the first sets it, two more have not moved.
    stopping = RankEarlyStopping(patience=2, after_zero_loss=False)
    callbacks = [BasinMonitor(probe=20), stopping]
    trainer, _ = fit(package, tmp_path, *(callbacks[::-1] if monitor_last else callbacks), max_epochs=9)
    assert trainer.current_epoch == 2
    assert trainer.early_stopping_callback is stopping
    assert stopping.stopping_reason == package.callbacks.early_stopping.EarlyStoppingReason.PATIENCE_EXHAUSTED


def test_callbacks_of_the_package_monitor_what_is_measured(package, tmp_path):
    stopping = package.callbacks.EarlyStopping("basin/gradient_rank", mode="max", patience=2)
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, monitor="basin/gradient_rank", mode="max")
    trainer, _ = fit(
        package, tmp_path, stopping, BasinMonitor(probe=20), checkpoint, max_epochs=9, enable_checkpointing=True
    )
    assert trainer.current_epoch == 3
    assert float(checkpoint.best_model_score) == 26


def test_a_callback_of_the_package_that_cannot_work_is_warned_of(package, tmp_path):
    stopping = package.callbacks.EarlyStopping("basin/gradient_rank", mode="max", patience=1)
    with pytest.warns(UserWarning, match="patience=1 is over before the next measurement"):
        fit(package, tmp_path, stopping, BasinMonitor(probe=20, every_n_epochs=3))


def test_a_checkpoint_resumes_the_curves(package, tmp_path):
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(package, tmp_path, BasinMonitor(probe=20), checkpoint, enable_checkpointing=True)
    resumed = BasinMonitor(probe=20)
    trainer, module = fit(package, tmp_path, resumed, ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert steps(resumed) == [0, 3, 6, 9]
    trainer.validate(module, loader(20), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert steps(resumed) == [0, 3, 6, 9]


def test_a_checkpoint_of_one_package_goes_on_in_the_other(tmp_path):
    first, second = map(import_module, PACKAGES)
    checkpoint = first.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    stopping = RankEarlyStopping(patience=9, after_zero_loss=False)
    fit(first, tmp_path, BasinMonitor(probe=20), stopping, checkpoint, enable_checkpointing=True)
    resumed, stopping = BasinMonitor(probe=20), RankEarlyStopping(patience=9, after_zero_loss=False)
    fit(second, tmp_path, resumed, stopping, ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert steps(resumed) == [0, 3, 6, 9]
    assert stopping.wait_count == 3
    assert stopping.stopping_reason == second.callbacks.early_stopping.EarlyStoppingReason.NOT_STOPPED


def test_loggers_of_the_package_get_the_curves(package, tmp_path):
    logger = package.loggers.CSVLogger(tmp_path)
    fit(package, tmp_path, BasinMonitor(probe=20), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [
            (row["step"], float(row["basin/gradient_rank"]))
            for row in csv.DictReader(file)
            if row["basin/gradient_rank"]
        ]
    assert logged == [("0", 26), ("2", 26), ("5", 26)]


def test_a_measurement_that_fails_costs_a_warning(package, tmp_path):
    def fails_later(module, inputs):
        outputs = module(inputs)
        return outputs if trained["steps"] == 0 else outputs[:, :, 0, 0]

    trained = {"steps": 0}

    class Counter(package.Callback):
        def on_train_batch_end(self, *_):
            trained["steps"] += 1

    with pytest.warns(UserWarning, match="could not measure at step 3, training goes on"):
        trainer, _ = fit(package, tmp_path, BasinMonitor(probe=20, behavior=fails_later), Counter())
    assert trainer.global_step == 6


def test_what_cannot_be_measured_raises_what_the_package_calls_a_misconfiguration(package, tmp_path):
    exceptions = import_module(f"{package.__name__}.utilities.exceptions")
    with pytest.raises(exceptions.MisconfigurationException, match="needs a BasinMonitor that logs this key"):
        fit(package, tmp_path, RankEarlyStopping())
    with pytest.raises(exceptions.MisconfigurationException, match="at least 1"):
        BasinMonitor(every_n_epochs=0)


def test_averaged_weights_of_the_package_are_left_out_as_they_renew_batch_statistics(package, tmp_path):
    monitor = BasinMonitor(probe=20)
    module = regressor(package)
    module.network.insert(1, nn.BatchNorm1d(4))
    averaging = package.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(package, tmp_path, monitor, averaging, module=module)
    assert steps(monitor) == [0, 3, 6]


def test_a_step_that_asks_what_its_optimizer_is_can_be_read(package, tmp_path):
    module = import_module(f"{package.__name__}.demos.boring_classes").ManualOptimBoringModel()
    inputs = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    module.train_dataloader = lambda: DataLoader(inputs, 8)
    monitor = BasinMonitor(probe=32)
    trainer = package.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[monitor],
    )
    trainer.fit(module)
    # Of 33 parameters for each of two outputs, 32 inputs see 32; the loss is the mean square of the outputs less 1.
    assert [record.gradient_rank for record in monitor.records] == [64, 64]
    assert [record.hessian_nullity for record in monitor.records] == [2, 2]
    outputs = module(monitor.probe.inputs)
    assert monitor.records[-1].loss == pytest.approx(float((outputs - 1).square().mean()), rel=1e-4)


ALONE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from importlib import import_module
from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.callback.test_lightnings import fit
monitor = BasinMonitor(probe=20)
stopping = RankEarlyStopping(patience=1, after_zero_loss=False)
fit(import_module({package!r}), {root!r}, monitor, stopping)
print([record.gradient_rank for record in monitor.records], stopping.stopped_epoch)
assert not {blocked!r} & {{name.partition(".")[0] for name in sys.modules}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "blocked"),
    [("lightning.pytorch", {"pytorch_lightning", "lightning_fabric"}), ("pytorch_lightning", {"lightning"})],
)
def test_one_of_both_is_enough(tmp_path, package, blocked):
    program = ALONE.format(package=package, blocked=blocked, root=str(tmp_path))
    environment = {**os.environ, "LIGHTNING": package}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[26, 26] 0"
