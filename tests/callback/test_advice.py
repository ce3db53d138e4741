import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from lightning_basin import BasinMonitor
from lightning_basin.callback.advice import RankedSaves, epochs_between, sufficient_patience
from lightning_basin.callback.watching import Watcher
from tests.callback.stopping import FALLING_ONCE, RARE, rank_stopping, stop_on, stopping_epoch
from tests.lightning_packages import EarlyStopping, ModelCheckpoint
from tests.training import Scripted, make_trainer, scripted_loader, steps

pytestmark = pytest.mark.fits


GEOMETRIC = {"max_overhead": "auto"}


class Validated(Scripted):
    """Logs a loss of validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", -float(self.current_epoch))


@pytest.mark.parametrize("stopping_first", [True, False])
@pytest.mark.parametrize(
    ("trainer_options", "stopping_options", "expected"),
    [
        pytest.param({}, {}, 4, id="default"),
        pytest.param({"val_check_interval": 0.5}, {}, 3, id="validation inside the epoch"),
        pytest.param({}, {"check_on_train_epoch_end": False}, 4, id="check at validation end"),
        pytest.param({"check_val_every_n_epoch": 3}, {"check_on_train_epoch_end": True}, 4, id="rare validation"),
    ],
)
def test_strict_early_stopping_of_lightning_sees_the_rank(
    tmp_path, stopping_first, trainer_options, stopping_options, expected
):
    stopping = EarlyStopping("basin/gradient_rank", mode="min", patience=2, strict=True, **stopping_options)
    trainer, monitor = stop_on(
        tmp_path, stopping, (6, 6, 5, 5, 4), num_batches=2, stopping_first=stopping_first, **trainer_options
    )
    assert stopping.best_score == min(record.gradient_rank for record in monitor.records)
    assert trainer.current_epoch < 20
    assert trainer.current_epoch <= expected + 1


def test_early_stopping_of_lightning_before_and_after_the_monitor_stops_at_the_same_epoch(tmp_path):
    epochs = set()
    for stopping_first in (True, False):
        stopping = EarlyStopping("basin/gradient_rank", mode="min", patience=2)
        epochs.add(stop_on(tmp_path, stopping, (6, 6, 5, 5, 4), stopping_first=stopping_first)[0].current_epoch)
    # Ranks at the ends of epochs: 6, 5, 5, 4, 4, 4.
    assert epochs == {6}


def test_strict_early_stopping_of_lightning_with_a_rare_measurement_does_not_raise(tmp_path):
    stopping = EarlyStopping("basin/gradient_rank", mode="min", patience=100, strict=True)
    trainer, monitor = stop_on(tmp_path, stopping, monitor={"every_n_epochs": 5})
    assert trainer.current_epoch == 20
    assert steps(monitor) == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("stopping_first", [True, False], ids=["before the monitor", "after the monitor"])
@pytest.mark.parametrize(
    ("stopping", "options", "epoch"),
    [
        pytest.param({}, {}, 4, id="default"),
        pytest.param({"check_on_train_epoch_end": True}, {"val_check_interval": 0.5}, 4, id="validation in the epoch"),
        pytest.param({"check_on_train_epoch_end": True}, {"check_val_every_n_epoch": 3}, 4, id="rare validation"),
        pytest.param({"check_on_train_epoch_end": True}, {"limit_val_batches": 0}, 4, id="no validation"),
        # One epoch late: what is seen is the measurement before.
        pytest.param({"check_on_train_epoch_end": False}, {}, 5, id="checks after validation"),
        pytest.param({}, {"min_epochs": 9}, 9, id="min_epochs"),
        pytest.param({}, {"monitor": {"every_n_train_steps": 2}}, 4, id="steps"),
        # Checked after the validation at the end of an epoch, where a measurement at its last step is already there.
        pytest.param(
            {"check_on_train_epoch_end": False}, {"monitor": {"every_n_train_steps": 2}}, 4, id="steps, validation"
        ),
        # Measured after epochs 3 and 6 only, where the rank is 5: values 6, 6, 5, 5, 5, and patience is over.
        pytest.param({}, {"monitor": {"every_n_epochs": 3}}, 5, id="rare measurements"),
        pytest.param({"patience": 6}, {"monitor": {"every_n_epochs": 3}}, 9, id="rare measurements, more patience"),
    ],
)
def test_early_stopping_of_lightning_stops_where_the_table_says(tmp_path, stopping_first, stopping, options, epoch):
    callback = EarlyStopping("basin/gradient_rank", mode="min", **{"patience": 2} | stopping)
    found, _ = stopping_epoch(tmp_path, callback, FALLING_ONCE, stopping_first=stopping_first, **options)
    assert found == epoch


@pytest.mark.parametrize(
    ("stopping", "options", "message"),
    [
        pytest.param(
            {"patience": 4}, {"monitor": {"every_n_epochs": 5}}, "patience=4 is over .* pass patience=20", id="patience"
        ),
        pytest.param(
            {"patience": 2},
            {"monitor": {"every_n_train_steps": 6}},
            "each value up to 3 times: patience=2 is over",
            id="patience, steps",
        ),
        pytest.param(
            {"patience": 2},
            {"monitor": {"every_n_epochs_after_zero_loss": 3}},
            "each value up to 3 times",
            id="patience, after zero loss",
        ),
    ],
)
def test_what_early_stopping_of_lightning_cannot_do_is_said_at_the_start(tmp_path, stopping, options, message):
    callback = EarlyStopping("basin/gradient_rank", **{"patience": 100} | stopping)
    with pytest.warns(UserWarning, match=message):
        stop_on(tmp_path, callback, num_batches=2, max_epochs=1, **options)


@pytest.mark.parametrize(
    ("stopping", "options"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"check_on_train_epoch_end": True}, {"val_check_interval": 0.5}, id="checks at epoch end"),
        pytest.param({"patience": 5}, {"monitor": {"every_n_epochs": 5}}, id="patience"),
        pytest.param({"monitor": "val_loss", "patience": 1}, {"monitor": {"every_n_epochs": 5}}, id="another value"),
    ],
)
def test_nothing_is_said_where_early_stopping_of_lightning_does_what_is_meant(tmp_path, recwarn, stopping, options):
    callback = EarlyStopping(**{"monitor": "basin/gradient_rank", "patience": 100} | stopping)
    stop_on(tmp_path, callback, num_batches=2, max_epochs=1, **options)
    stop_on(tmp_path, rank_stopping(patience=1), num_batches=2, max_epochs=1, monitor={"every_n_epochs": 3})
    assert not [warning for warning in recwarn if "HINT: pass" in str(warning.message)]


@pytest.mark.parametrize(
    ("saving", "monitor", "message"),
    [
        (
            {"save_on_train_epoch_end": False},
            {},
            "step 2, .* of step 0. HINT: pass every_n_epochs=1 and save_on_train_ep",
        ),
        ({"every_n_epochs": 2}, {"every_n_epochs": 3}, "step 4, .* of step 0. HINT: pass every_n_epochs=3"),
        ({"every_n_train_steps": 1}, {}, "step 1, .* of step 0. HINT: pass every_n_epochs=1"),
        ({"train_time_interval": timedelta(0)}, {}, "step 1, .* of step 0. HINT: pass every_n_epochs=1"),
        (
            {"every_n_train_steps": 2},
            {"every_n_train_steps": 3},
            "step 2, .* of step 0. HINT: pass every_n_train_steps=3",
        ),
        ({"every_n_epochs": 1}, {"every_n_train_steps": 3}, "step 2, .* of step 0. HINT: pass every_n_train_steps=3"),
    ],
    ids=["at validation end", "between measurements", "at steps", "by the clock", "between steps", "at epochs"],
)
def test_weights_that_model_checkpoint_ranks_by_the_value_of_others_are_said(tmp_path, saving, monitor, message):
    callback = ModelCheckpoint(tmp_path, monitor="basin/gradient_rank", save_top_k=-1, **saving)
    with pytest.warns(UserWarning, match=f"ranks weights of {message}") as said:
        stop_on(tmp_path, callback, num_batches=2, max_epochs=2, enable_checkpointing=True, monitor=monitor)
    assert len([warning for warning in said if "ranks weights" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("saving", "monitor"),
    [
        ({}, {}),
        ({"every_n_epochs": 4}, {"every_n_epochs": 2}),
        ({"every_n_train_steps": 4}, {"every_n_train_steps": 2}),
        ({"every_n_epochs": 2}, {"every_n_train_steps": 4}),
        ({"every_n_epochs": 0, "save_last": True}, {"every_n_epochs": 3}),
    ],
    ids=["default", "epochs", "steps", "epochs of steps", "last only"],
)
def test_nothing_is_said_where_model_checkpoint_does_what_is_meant(tmp_path, recwarn, saving, monitor):
    callback = ModelCheckpoint(tmp_path, **{"monitor": "basin/gradient_rank"} | saving)
    others = ModelCheckpoint(tmp_path / "others", monitor="val_loss", save_on_train_epoch_end=False)
    callbacks = [callback, others, BasinMonitor(probe=8, hessian=False, **monitor)]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(Validated(), scripted_loader(2), scripted_loader(1))
    assert len(list(tmp_path.rglob("*.ckpt"))) > 1
    assert not [warning for warning in recwarn if "ranks weights" in str(warning.message)]


def test_a_file_that_is_written_over_is_seen_by_its_value():
    checkpoint = SimpleNamespace(save_top_k=1, best_k_models={})
    saves, arguments = RankedSaves([Watcher(checkpoint, "basin/loss", "ModelCheckpoint")]), BasinMonitor()
    for value, step, measured_step, expected in (
        (3.0, 4, 4, []),
        (3.0, 5, 4, []),  # Another callback saves.
        (2.0, 6, 4, ["ModelCheckpoint ranks weights of step 6"]),
        (1.0, 7, 4, []),  # It was said.
    ):
        checkpoint.best_k_models["best.ckpt"] = torch.tensor(value)
        said = saves.misjudged(step, measured_step, arguments)
        assert [problem.partition(",")[0] for problem in said] == expected


def test_early_stopping_of_lightning_is_told_how_rarely_a_geometric_cadence_measures(tmp_path):
    # The last two measurements of a hundred epochs may be at 80 and 100.
    with pytest.warns(UserWarning, match="up to 21 times: patience=1 is over .* or use RankEarlyStopping"):
        stop_on(tmp_path, EarlyStopping("basin/gradient_rank", patience=1), max_epochs=100, monitor=GEOMETRIC)


def test_weights_between_the_measurements_of_a_geometric_cadence_are_said():
    checkpoint = SimpleNamespace(save_top_k=1, best_k_models={})
    saves = RankedSaves([Watcher(checkpoint, "basin/loss", "ModelCheckpoint")])
    checkpoint.best_k_models["best.ckpt"] = torch.tensor(1.0)
    (said,) = saves.misjudged(6, 5, BasinMonitor(**GEOMETRIC))
    assert said.endswith("by the value of step 5. HINT: pass BasinMonitor(max_overhead=None)")


@pytest.mark.parametrize(
    ("arguments", "steps_in_epoch", "expected"),
    [
        ({}, 10, 1),
        ({"every_n_epochs": 3}, 10, 3),
        ({"every_n_train_steps": 25}, 10, 3),
        ({"every_n_train_steps": 5}, 10, 1),
        ({"every_n_train_steps": 25}, math.inf, 1),
        ({"every_n_train_steps": 5, "every_n_epochs_after_zero_loss": 4}, 10, 4),
    ],
)
def test_epochs_between_measurements(arguments, steps_in_epoch, expected):
    assert epochs_between(BasinMonitor(**arguments), steps_in_epoch) == expected


@pytest.mark.parametrize(
    ("checks", "tolerated", "expected"), [(1, 0, None), (2, 0, 1), (2.5, 1, 5), (12, 10, 131), (12, 11, None)]
)
def test_patience_outlasts_the_time_between_measurements(checks, tolerated, expected):
    assert sufficient_patience(checks, tolerated) == expected
    assert sufficient_patience(math.inf, tolerated) is None


def test_model_checkpoint_saves_at_steps_under_the_value_of_these_weights(tmp_path):
    ranks = (6, 6, 5, 5, 4, 4, 3)
    saving = ModelCheckpoint(
        tmp_path,
        "{step}-{basin/gradient_rank:.0f}",
        monitor="basin/gradient_rank",
        save_top_k=-1,
        every_n_train_steps=2,
        auto_insert_metric_name=False,
    )
    options = {"max_epochs": 2, "enable_checkpointing": True, "monitor": {"every_n_train_steps": 2}}
    stop_on(tmp_path, saving, ranks, num_batches=3, **options)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["2-5.ckpt", "4-4.ckpt", "6-3.ckpt"]


def test_model_checkpoint_keeps_the_weights_of_the_lowest_rank(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", monitor="basin/gradient_rank", mode="min", save_top_k=1)
    stop_on(tmp_path, saving, (6, 5, 4, 3, 5, 6), max_epochs=6, enable_checkpointing=True)
    assert saving.best_model_path == str(tmp_path / "step=3.ckpt")
    assert saving.best_model_score == 3


def test_strict_early_stopping_of_lightning_keeps_the_last_value_of_what_it_monitors(tmp_path):
    trainer, _ = stop_on(tmp_path, EarlyStopping("basin/surviving_fraction", patience=9), max_epochs=2, monitor=RARE)
    assert trainer.current_epoch == 2
    assert float(trainer.callback_metrics["basin/surviving_fraction"]) == 1.0


def test_strict_early_stopping_of_lightning_works_on_resume_with_a_rare_measurement(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=99), max_epochs=6, monitor={"every_n_epochs": 5})
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stopping = EarlyStopping("basin/gradient_rank", strict=True, patience=99)
    resumed = make_trainer(tmp_path, stopping, BasinMonitor(probe=8, every_n_epochs=5, hessian=False), max_epochs=9)
    resumed.fit(Scripted(), scripted_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.current_epoch == 9
