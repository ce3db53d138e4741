from collections import Counter

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_basin import BasinMonitor
from tests.callback.monitor.modules import axis, events_of
from tests.lightning_packages import CSVLogger, TensorBoardLogger
from tests.training import Regressor, Scripted, TwoOptimizers, loader, make_trainer, scripted_loader, steps

pytestmark = [pytest.mark.fits, pytest.mark.figures]


@pytest.mark.parametrize("hessian", ["auto", "bracket"])
def test_both_ends_of_the_bracket_are_curves(tmp_path, hessian):
    monitor = BasinMonitor(probe=20, hessian=hessian)
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Regressor(), loader())
    lower, upper = (trainer.callback_metrics[f"basin/hessian_nullity_{end}"] for end in ("lower", "upper"))
    assert lower <= upper
    assert trainer.callback_metrics["basin/hessian_certified"] == (lower == upper)
    assert lower == trainer.callback_metrics["basin/gauss_newton_nullity"]
    assert monitor.records[-1].hessian_method == ("dense" if hessian == "auto" else "bracket")


def logged_run(root, monitor, module=None, **options):
    loggers = [CSVLogger(root, name="csv"), TensorBoardLogger(root, name="tensorboard")]
    trainer = make_trainer(root, monitor, logger=loggers, log_every_n_steps=1, **options)
    trainer.fit(module or Regressor(), loader(80))
    for logger in loggers:
        logger.finalize("success")
    return trainer, loggers


def test_event_file_holds_all_of_the_network_and_four_values_of_each_layer_at_every_measurement_once(tmp_path):
    monitor = BasinMonitor(every_n_epochs=1)
    _, (_, tensorboard) = logged_run(tmp_path, monitor, max_epochs=3)
    events = events_of(tensorboard)
    tags = [tag for tag in events.Tags()["scalars"] if "basin" in tag]
    found = {tag.replace("_more/", "/"): [event.value for event in events.Scalars(tag)] for tag in tags}
    assert {len(values) for values in found.values()} == {4}
    # Event files hold float32.
    expected = {key: [record.scalars()[key] for record in monitor.records] for key in found}
    assert found == {key: torch.tensor(values, dtype=torch.float32).tolist() for key, values in expected.items()}
    assert {key for key in monitor.records[0].scalars() if key.startswith("basin/")} <= found.keys()
    layers = {key for key in found if key.startswith("basin_layer_")}
    assert {key.partition("/")[0].removeprefix("basin_layer_") for key in layers} == {
        *("gradient_rank", "gradient_rank_deficit", "duplicated_activations", "hessian_nullity_lower")
    }
    assert {key.partition("/")[2] for key in layers} == {"hidden", "readout", "output"}


def test_no_tag_is_used_by_two_plugins_or_in_two_spellings(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20))
    tags = events_of(tensorboard).Tags()
    # Distributions are histograms, shown once more.
    counts = Counter(tag for kind, found in tags.items() if kind != "distributions" and found for tag in found)
    assert max(counts.values()) == 1
    assert len({tag.lower() for tag in counts}) == len(counts)


def test_epoch_measurement_stands_at_the_last_training_loss_of_the_epoch(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20), max_epochs=3)
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[3::4]]


def test_step_measurement_stands_at_the_training_loss_of_its_batch(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=20, every_n_train_steps=3), max_epochs=3)
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[2::3]]


def test_measurement_under_gradient_accumulation_stands_at_the_training_loss_of_its_step(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=1)
    _, (_, tensorboard) = logged_run(tmp_path, monitor, accumulate_grad_batches=2)
    of_training = axis(tensorboard, "train_loss")
    assert steps(monitor) == [0, 1, 2, 3, 4]
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training]


def test_measurement_with_two_optimizers_stands_at_the_training_loss_of_its_batch(tmp_path):
    monitor = BasinMonitor(probe=20, every_n_train_steps=4)
    _, (_, tensorboard) = logged_run(tmp_path, monitor, TwoOptimizers())
    of_training = axis(tensorboard, "train_loss")
    assert axis(tensorboard, "basin/gradient_rank") == [of_training[0], *of_training[1::2]]


def test_late_baseline_stands_at_the_first_training_loss(tmp_path):
    _, (_, tensorboard) = logged_run(tmp_path, BasinMonitor(probe=60))
    assert axis(tensorboard, "basin/gradient_rank")[0] == axis(tensorboard, "train_loss")[0]


def test_csv_file_holds_one_row_for_each_measurement(tmp_path):
    monitor = BasinMonitor(probe=20)
    logged_run(tmp_path, monitor)
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("basin/gradient_rank")
    ranks = [line.split(",")[column] for line in lines[1:] if line.split(",")[column]]
    assert list(map(float, ranks)) == [record.gradient_rank for record in monitor.records]


def test_callback_metrics_hold_the_newest_record_as_scalars_of_float64_without_any_logger(tmp_path):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    trainer.fit(Regressor(), loader())
    expected = {key: torch.tensor(value, dtype=torch.float64) for key, value in monitor.records[-1].scalars().items()}
    found = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("basin")}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_training_loss_in_callback_metrics_is_the_last_one_of_training(tmp_path):
    with_monitor, without = make_trainer(tmp_path, BasinMonitor(probe=20)), make_trainer(tmp_path)
    with_monitor.fit(Regressor(), loader())
    without.fit(Regressor(), loader())
    assert with_monitor.callback_metrics["train_loss"] == without.callback_metrics["train_loss"]


class CountsLate(Regressor):
    """Adds to its mean at the very end of an epoch, after the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.mean.update(100.0)


def test_metrics_of_the_module_are_computed_when_lightning_computes_them(tmp_path):
    with_monitor, without = make_trainer(tmp_path, BasinMonitor(probe=20)), make_trainer(tmp_path)
    with_monitor.fit(CountsLate(), loader())
    without.fit(CountsLate(), loader())
    assert with_monitor.callback_metrics["mean"] == without.callback_metrics["mean"]


class Thawing(Regressor):
    """Thirty-three layers, frozen but for the last during the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(3, 3) for _ in range(33))).requires_grad_(requires_grad=False)

    def forward(self, inputs):
        return super().forward(self.body(inputs))

    def on_train_epoch_start(self):
        self.body.requires_grad_(self.current_epoch > 0)


def test_layers_that_are_freed_do_not_rename_the_curves_of_others(tmp_path):
    monitor = BasinMonitor(probe=5, hessian=False)
    make_trainer(tmp_path, monitor).fit(Thawing(), loader())
    first, last = (record.scalars() for record in (monitor.records[0], monitor.records[-1]))
    assert "basin_layer_gradient_rank/body.32" in last
    assert {key for key in first if "_layer_" in key} < last.keys()
    assert not [key for key in last if "_block_" in key]


def test_zero_loss_step_is_logged_once_and_stays_in_callback_metrics(tmp_path):
    monitor = BasinMonitor()
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, log_every_n_steps=1, max_epochs=5)
    trainer.fit(Scripted(losses=(1.0, 1.0, 1.0, 0.0)), scripted_loader())
    (event,) = events_of(logger).Scalars("basin_more/zero_loss_step")
    assert (event.step, event.value) == (axis(logger, "train_loss")[2], 3.0)
    assert trainer.callback_metrics["basin/zero_loss_step"] == 3.0


def test_log10_loss_is_a_curve_that_ends_at_a_finite_floor(tmp_path):
    monitor = BasinMonitor()
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, max_epochs=3)
    trainer.fit(Scripted(losses=(1.0, 1e-4, 0.0)), scripted_loader())
    values = [event.value for event in events_of(logger).Scalars("basin/log10_loss")]
    # Offsets are added in float32, to integers up to 9: 1e-2 is exact to 5e-7 / 2e-2 parts of its logarithm's unit.
    torch.testing.assert_close(values, [0.0, -4.0, -40.0, -40.0], rtol=0, atol=1e-4)


def test_a_logger_that_fails_ends_no_run(tmp_path):
    class FullDisk(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("basin") for key in metrics):
                raise OSError("no space left")
            super().log_metrics(metrics, step)

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="FullDisk could not log. OSError: no space left"):
        make_trainer(tmp_path, monitor, logger=FullDisk(tmp_path)).fit(Regressor(), loader())
    assert len(monitor.records) > 1
