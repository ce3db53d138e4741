import re
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.lightning_packages import (
    EarlyStopping,
    EarlyStoppingReason,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
)
from tests.training import Regressor, Scripted, loader, make_trainer, scripted_loader, seeded, steps

rank_stopping = partial(RankEarlyStopping, after_zero_loss=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def stop_on(root, stopping, ranks=(6,), losses=(1.0,), *, stopping_first=False, num_batches=1, **options):
    """Train on scripted ranks; the monitor's arguments are in `options["monitor"]`, the others are the Trainer's."""
    monitor = BasinMonitor(probe=8, hessian=False, **options.pop("monitor", {}))
    callbacks = [stopping, monitor] if stopping_first else [monitor, stopping]
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 20} | options)
    trainer.fit(Scripted(ranks, losses), scripted_loader(num_batches), scripted_loader(1))
    return trainer, monitor


# ------------------------------------------------------------------------------------------ Lightning's own callbacks


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


def stopping_epoch(root, stopping, ranks, **options):
    trainer, monitor = stop_on(root, stopping, ranks, num_batches=2, **options)
    return trainer.current_epoch, monitor


# Ranks after epochs 1, 2, ...: 6, 5, 5, 5, 5. A patience of two is over at the end of epoch 4.
FALLING_ONCE = (6, 6, 6, 5, 5)


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


@pytest.mark.parametrize("stopping_first", [True, False], ids=["before the monitor", "after the monitor"])
@pytest.mark.parametrize(
    ("options", "epoch"),
    [
        ({}, 4),
        ({"val_check_interval": 0.5}, 4),
        ({"check_val_every_n_epoch": 3}, 4),
        ({"limit_val_batches": 0}, 4),
        ({"min_epochs": 9}, 9),
        ({"monitor": {"every_n_train_steps": 2}}, 4),
        ({"monitor": {"every_n_epochs": 3}}, 9),
    ],
    ids=["default", "validation in the epoch", "rare validation", "no validation", "min_epochs", "steps", "rare"],
)
def test_rank_early_stopping_counts_measurements_in_every_combination(tmp_path, stopping_first, options, epoch):
    stopping = rank_stopping(mode="min", patience=2)
    found, monitor = stopping_epoch(tmp_path, stopping, FALLING_ONCE, stopping_first=stopping_first, **options)
    assert found == epoch
    ranks = [record.gradient_rank for record in monitor.records]
    assert ranks[-3:] == [5, 5, 5]


@pytest.mark.parametrize(
    ("stopping", "options", "message"),
    [
        pytest.param({}, {"val_check_interval": 0.5}, "sees the one before. HINT: pass check_on", id="in the epoch"),
        pytest.param({"check_on_train_epoch_end": False}, {}, "sees the one before", id="at validation end"),
        pytest.param({}, {"check_val_every_n_epoch": 3}, "sees the one before", id="rare validation"),
        pytest.param(
            {"check_on_train_epoch_end": False}, {"limit_val_batches": 0}, "of which there is none", id="no validation"
        ),
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
    ("saving", "options", "message"),
    [
        ({"save_on_train_epoch_end": False}, {}, "under the value of the one before. HINT: pass save_on_train_epoch"),
        ({"every_n_epochs": 2}, {"monitor": {"every_n_epochs": 3}}, "HINT: pass every_n_epochs=3"),
        ({"every_n_train_steps": 2}, {"monitor": {"every_n_epochs": 3}}, "HINT: pass every_n_epochs=3"),
        ({"train_time_interval": timedelta(hours=1)}, {}, "HINT: pass every_n_epochs=1"),
        ({"every_n_train_steps": 2}, {"monitor": {"every_n_train_steps": 4}}, "HINT: pass every_n_train_steps=4"),
        ({"every_n_epochs": 3}, {"monitor": {"every_n_train_steps": 4}}, "HINT: pass every_n_train_steps=4"),
    ],
    ids=["at validation end", "between measurements", "at steps", "by the clock", "between steps", "at epochs"],
)
def test_what_model_checkpoint_cannot_do_is_said_at_the_start(tmp_path, saving, options, message):
    callback = ModelCheckpoint(tmp_path, monitor="basin/gradient_rank", **saving)
    with pytest.warns(UserWarning, match=message):
        stop_on(tmp_path, callback, num_batches=2, max_epochs=1, enable_checkpointing=True, **options)


@pytest.mark.parametrize(
    ("saving", "monitor"),
    [
        ({}, {}),
        ({"every_n_epochs": 4}, {"every_n_epochs": 2}),
        ({"every_n_train_steps": 4}, {"every_n_train_steps": 2}),
        ({"every_n_epochs": 2}, {"every_n_train_steps": 4}),
        ({"every_n_epochs": 0, "save_last": True}, {"every_n_epochs": 3}),
        ({"monitor": "val_loss"}, {"every_n_epochs": 3}),
    ],
    ids=["default", "epochs", "steps", "epochs of steps", "last only", "another value"],
)
def test_nothing_is_said_where_model_checkpoint_does_what_is_meant(tmp_path, recwarn, saving, monitor):
    callback = ModelCheckpoint(tmp_path, **{"monitor": "basin/gradient_rank"} | saving)
    stop_on(tmp_path, callback, num_batches=2, max_epochs=1, enable_checkpointing=True, monitor=monitor)
    assert not [warning for warning in recwarn if "HINT: pass every" in str(warning.message)]


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


# ---------------------------------------------------------------------------------------------------- when it stops


@pytest.mark.parametrize(
    ("options", "ranks", "last_step"),
    [
        pytest.param({"patience": 1}, (6, 5, 4, 4), 3, id="plateau"),
        pytest.param({"patience": 3}, (6, 5, 4, 4, 3, 3, 3, 3, 2), 7, id="plateau, patience starts anew"),
        pytest.param({"patience": 2}, (3, 4, 5, 5, 5), 4, id="plateau of a rising value"),
        pytest.param({"patience": 2}, (6, 5, 6, 5, 6, 5, 5, 5), 7, id="plateau after going up and down"),
        pytest.param({"patience": 2, "min_delta": 1}, (6, 5, 4, 5, 3, 1), 4, id="plateau, small moves"),
        pytest.param({"patience": 1, "min_delta": 1}, (6, 4, 2, 1), 3, id="plateau, a move of min_delta is none"),
        pytest.param({"patience": 2, "mode": "min"}, (6, 5, 6, 6, 4), 3, id="min"),
        pytest.param({"patience": 2, "mode": "max"}, (2, 3, 3, 2, 6), 3, id="max"),
        pytest.param({"patience": 2, "mode": "min", "min_delta": 1}, (6, 4, 3, 3), 3, id="min, small steps"),
        pytest.param({"patience": 9, "mode": "min", "stopping_threshold": 4}, (6, 5, 4, 3, 2), 3, id="below threshold"),
        pytest.param({"patience": 9, "mode": "max", "stopping_threshold": 4}, (2, 3, 4, 5, 6), 3, id="above threshold"),
    ],
)
@pytest.mark.parametrize("stopping_first", [True, False], ids=["before the monitor", "after the monitor"])
def test_training_stops_at_the_measurement_that_decides(tmp_path, options, ranks, last_step, stopping_first):
    trainer, monitor = stop_on(tmp_path, rank_stopping(**options), ranks, stopping_first=stopping_first)
    assert trainer.global_step == last_step
    assert steps(monitor) == list(range(last_step + 1))


def test_value_that_keeps_moving_never_stops(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=1), (6, 5) * 5, max_epochs=9)
    assert trainer.current_epoch == 9


def test_patience_counts_measurements_and_not_epochs(tmp_path):
    trainer, monitor = stop_on(
        tmp_path, rank_stopping(patience=3), max_epochs=30, monitor={"every_n_epochs": 5}, num_batches=2
    )
    assert trainer.current_epoch == 15
    assert steps(monitor) == [0, 10, 20, 30]


def test_cadence_of_steps_stops_inside_an_epoch(tmp_path):
    trainer, monitor = stop_on(tmp_path, rank_stopping(patience=2), num_batches=20, monitor={"every_n_train_steps": 3})
    assert trainer.global_step == 6
    assert steps(monitor) == [0, 3, 6]


def test_measurements_before_zero_loss_are_not_looked_at(tmp_path):
    losses = (1.0,) * 5 + (0.0,)
    trainer, monitor = stop_on(tmp_path, RankEarlyStopping(patience=2), losses=losses)
    assert monitor.zero_loss_step == 5
    assert trainer.global_step == 7


def test_without_zero_loss_training_is_not_stopped(tmp_path):
    trainer, _ = stop_on(tmp_path, RankEarlyStopping(patience=1))
    assert trainer.current_epoch == 20


class WithoutLoss(LightningModule):
    """A linear map whose training step keeps its loss to itself."""

    def __init__(self, outputs=1, inputs=8):
        super().__init__()
        with seeded():
            self.map = nn.Linear(inputs, outputs, bias=False)

    def forward(self, inputs):
        return self.map(inputs)

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).sum() + self.map.weight.square().sum()  # No function of the outputs alone.

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches_of(inputs, outputs=1):
    return DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), outputs)), len(inputs))


@pytest.mark.parametrize("options", [{}, {"loss_fn": "behavioral"}], ids=["no loss", "behavioral"])
@pytest.mark.filterwarnings("ignore:Loss and Hessian are not measured")
def test_that_nothing_can_reach_zero_loss_is_said_with_the_argument_that_lifts_the_condition(tmp_path, options):
    monitor = BasinMonitor(probe=8, **options)
    trainer = make_trainer(tmp_path, monitor, RankEarlyStopping(patience=1), max_epochs=4)
    with pytest.warns(
        UserWarning, match=r"will not stop this run. HINT: pass RankEarlyStopping\(after_zero_loss=False"
    ):
        trainer.fit(WithoutLoss(), batches_of(torch.eye(8)))
    assert trainer.current_epoch == 4


def test_nothing_is_said_of_zero_loss_where_it_is_not_waited_for(tmp_path, recwarn):
    trainer = make_trainer(tmp_path, BasinMonitor(probe=8), rank_stopping(patience=1), max_epochs=4)
    trainer.fit(WithoutLoss(), batches_of(torch.eye(8)))
    assert trainer.current_epoch == 1
    assert not [warning for warning in recwarn if "zero loss" in str(warning.message)]


# Each has a rank that stays as it is: that of a probe of 5 inputs, 10 singular values two digits apart with a tolerance
# in their midst, and 2 of 4 outputs.
IN_DOUBT = {
    "saturated": (torch.eye(8)[:5], 1, {"probe": 5}),
    "ill-defined": (torch.diag(10.0 ** -torch.arange(0, 16, 2)), 1, {"probe": 8, "rtol": 1e-5}),
    "lower bounds": (torch.eye(8)[:3].repeat(3, 1), 4, {"probe": 9, "max_outputs": 2}),
}


@pytest.mark.parametrize("kind", IN_DOUBT)
@pytest.mark.parametrize(
    "stopping",
    [
        {},
        {"mode": "min"},
        {"mode": "max", "stopping_threshold": 0.5},
        {"monitor": "basin/gradient_nullity"},
        {"monitor": "basin/gradient_rank_deficit"},
        {"monitor": "basin_layer_gradient_rank/map"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.filterwarnings("ignore:(Loss and Hessian|The probe is too small)")
def test_a_rank_that_is_not_the_networks_own_never_stops_a_run(tmp_path, kind, stopping):
    inputs, outputs, options = IN_DOUBT[kind]
    monitor = BasinMonitor(**options)
    trainer = make_trainer(tmp_path, monitor, rank_stopping(patience=1, **stopping), max_epochs=4)
    with pytest.warns(UserWarning, match=f"passes over ranks that are {kind}") as said:
        trainer.fit(WithoutLoss(outputs), batches_of(inputs, outputs))
    assert trainer.current_epoch == 4
    assert len({record.gradient_rank for record in monitor.records}) == 1
    assert sum("passes over" in str(warning.message) for warning in said) == 1


def test_what_is_no_rank_stops_a_run_on_any_probe(tmp_path):
    stopping = rank_stopping("basin/dead_units", patience=1)
    trainer = make_trainer(tmp_path, BasinMonitor(probe=5), stopping, max_epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(WithoutLoss(), batches_of(torch.eye(8)[:5]))
    assert trainer.current_epoch == 1


def test_measurements_in_doubt_are_passed_over_and_the_others_counted(tmp_path):
    # Rank 4 of 4 inputs is saturated: what counts is 3 (twice), and no 4 between them makes a move.
    stopping = rank_stopping(patience=2)
    monitor = BasinMonitor(probe=4, hessian=False)
    trainer = make_trainer(tmp_path, monitor, stopping, max_epochs=20)
    with pytest.warns(UserWarning, match="saturated"):
        trainer.fit(Scripted((4, 4, 4, 3, 4, 3, 4, 3, 2)), scripted_loader())
    assert [record.gradient_rank for record in monitor.records] == [4, 4, 4, 3, 4, 3, 4, 3]
    assert trainer.global_step == 7


def readme_snippet():
    """The callbacks of the first snippet of the README."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"L\.Trainer\(callbacks=(\[BasinMonitor.*\])\)", text)
    return eval(arguments, {"BasinMonitor": BasinMonitor, "RankEarlyStopping": RankEarlyStopping})


class Digits(LightningModule):
    """A classifier of which the default probe shows a rank that is the probe's own, for many epochs."""

    def __init__(self):
        super().__init__()
        with seeded():
            self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_snippet_of_the_readme_does_not_end_a_digits_run_before_zero_loss(tmp_path):
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    monitor, stopping = readme_snippet()
    trainer = make_trainer(tmp_path, monitor, stopping, max_epochs=6)
    trainer.fit(Digits(), DataLoader(data, 32))
    ranks = [record.gradient_rank for record in monitor.records]
    assert monitor.zero_loss_step is None
    assert trainer.current_epoch == 6
    # It would have been a plateau: every measurement shows the rank of 128 inputs with 10 outputs.
    assert ranks == [1280] * 7


RARE = {"every_n_train_steps": 1, "verify_null_space": 4}
"""Whether null directions survive is known at every fourth measurement."""


def test_measurements_without_the_quantity_say_nothing_of_it(tmp_path):
    trainer, monitor = stop_on(tmp_path, rank_stopping("basin/surviving_fraction", patience=2), monitor=RARE)
    assert [record.surviving_fraction for record in monitor.records[:5]] == [1.0, None, None, None, 1.0]
    assert trainer.global_step == 8


def test_a_value_that_was_not_measured_leaves_the_callback_metrics(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=9), max_epochs=2, monitor=RARE)
    assert "basin/gradient_rank" in trainer.callback_metrics
    assert "basin/surviving_fraction" not in trainer.callback_metrics


def test_strict_early_stopping_of_lightning_keeps_the_last_value_of_what_it_monitors(tmp_path):
    trainer, _ = stop_on(tmp_path, EarlyStopping("basin/surviving_fraction", patience=9), max_epochs=2, monitor=RARE)
    assert trainer.current_epoch == 2
    assert float(trainer.callback_metrics["basin/surviving_fraction"]) == 1.0


class Fails(Scripted):
    def training_step(self, batch, batch_idx):
        raise KeyError("a mistake of its own")


def test_a_run_that_raised_leaves_no_early_stopping_behind(tmp_path):
    monitor = BasinMonitor(probe=8, hessian=False)
    with pytest.raises(KeyError, match="a mistake of its own"):
        make_trainer(tmp_path, monitor, rank_stopping(patience=2)).fit(Fails(), scripted_loader())
    trainer = make_trainer(tmp_path, monitor, max_epochs=5)
    trainer.fit(Scripted(), scripted_loader())
    assert trainer.current_epoch == 5


def test_any_quantity_can_be_looked_at(tmp_path):
    stopping = rank_stopping("basin_layer_gradient_nullity/root", mode="max", stopping_threshold=3.5, patience=9)
    trainer, _ = stop_on(tmp_path, stopping, (6, 5, 4, 3, 2, 1))
    assert trainer.global_step == 4


def test_two_conditions_side_by_side_stop_at_the_earlier_one(tmp_path):
    slow, fast = rank_stopping(patience=9), rank_stopping(mode="min", patience=2)
    monitor = BasinMonitor(probe=8)
    trainer = make_trainer(tmp_path, slow, monitor, fast, max_epochs=20)
    trainer.fit(Scripted(), scripted_loader())
    assert trainer.global_step == 2
    assert (fast.stopping_reason, slow.stopping_reason) == (
        EarlyStoppingReason.PATIENCE_EXHAUSTED,
        EarlyStoppingReason.NOT_STOPPED,
    )


def test_monitor_of_another_prefix_is_found(tmp_path):
    stopping = rank_stopping("other/gradient_rank", patience=2)
    monitors = [BasinMonitor(probe=8), BasinMonitor(probe=8, prefix="other", every_n_epochs=2)]
    trainer = make_trainer(tmp_path, stopping, *monitors, max_epochs=20)
    trainer.fit(Scripted(), scripted_loader())
    assert trainer.global_step == 4


def test_min_epochs_postpones_the_stop(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=1), min_epochs=6)
    assert trainer.current_epoch == 6


def test_fast_dev_run_is_not_stopped(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=1), num_batches=5, fast_dev_run=4)
    assert trainer.global_step == 4


# -------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "basin/gradient_rank has stayed within 0 of 6 for the last 2 measurements"),
        ({"patience": 2, "mode": "min"}, "basin/gradient_rank did not improve in the last 2"),
        ({"mode": "min", "stopping_threshold": 7}, "Stopping threshold reached: basin/gradient_rank = 6"),
    ],
)
def test_reason_for_stopping_is_said(tmp_path, caplog, options, message):
    stopping = rank_stopping(**options)
    with caplog.at_level("INFO"):
        stop_on(tmp_path, stopping)
    assert message in stopping.stopping_reason_message
    assert sum(message in said for said in caplog.messages) == 1


def test_nothing_is_said_where_training_was_not_stopped(tmp_path):
    stopping = rank_stopping(patience=100)
    stop_on(tmp_path, stopping)
    assert stopping.stopping_reason_message is None
    assert stopping.stopping_reason == EarlyStoppingReason.NOT_STOPPED


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("options", [{"patience": 5}, {"patience": 5, "mode": "min"}], ids=["plateau", "min"])
@pytest.mark.parametrize("stopping_first", [True, False])
def test_resumed_run_goes_on_counting(tmp_path, options, stopping_first):
    ranks = (6, 5, 4)
    trainer, _ = stop_on(tmp_path, rank_stopping(**options), ranks, max_epochs=4, stopping_first=stopping_first)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stopping, monitor = rank_stopping(**options), BasinMonitor(probe=8, hessian=False)
    callbacks = [stopping, monitor] if stopping_first else [monitor, stopping]
    resumed = make_trainer(tmp_path, *callbacks, max_epochs=20)
    resumed.fit(Scripted(ranks), scripted_loader(), ckpt_path=tmp_path / "half.ckpt")
    # Rank 4 at steps 2 to 7: the first, and five more.
    assert resumed.global_step == 7
    assert steps(monitor) == list(range(8))


SAVING = {
    "epoch end": {"save_on_train_epoch_end": True, "every_n_epochs": 2},
    "middle of an epoch": {"every_n_train_steps": 5, "save_on_train_epoch_end": False},
    "validation end": {"save_on_train_epoch_end": False, "every_n_epochs": 2},
    "last batch": {"every_n_train_steps": 4, "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize(
    ("kind", "cadence"),
    [
        *((kind, {"every_n_train_steps": 1}) for kind in SAVING),
        # After one of a last batch, lightning 2.6 leaves the end of the epoch out, and with it a measurement.
        *((kind, {}) for kind in SAVING if kind != "last batch"),
    ],
)
def test_run_resumed_from_any_checkpoint_stops_where_the_uninterrupted_one_does(tmp_path, kind, cadence):
    ranks = (6, 6, 5, 5, 5, 4)

    def fit(*callbacks, **options):
        stopping, monitor = rank_stopping(patience=6), BasinMonitor(probe=8, hessian=False, **cadence)
        trainer = make_trainer(tmp_path, stopping, monitor, *callbacks, max_epochs=20, **options.pop("trainer", {}))
        trainer.fit(Scripted(ranks), scripted_loader(2), scripted_loader(), **options)
        return trainer.global_step, steps(monitor)

    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **SAVING[kind])
    uninterrupted = fit(saving, trainer={"enable_checkpointing": True})
    saved = 5 if kind == "middle of an epoch" else 4
    assert fit(ckpt_path=tmp_path / f"step={saved}.ckpt") == uninterrupted


def test_strict_early_stopping_of_lightning_works_on_resume_with_a_rare_measurement(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=99), max_epochs=6, monitor={"every_n_epochs": 5})
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stopping = EarlyStopping("basin/gradient_rank", strict=True, patience=99)
    resumed = make_trainer(tmp_path, stopping, BasinMonitor(probe=8, every_n_epochs=5, hessian=False), max_epochs=9)
    resumed.fit(Scripted(), scripted_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.current_epoch == 9


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, r"patience=0\).* at least 1"),
        ({"min_delta": -1.0}, r"min_delta=-1.0\).* not be negative"),
        ({"stopping_threshold": 3}, "needs a direction"),
        ({"mode": "down"}, "must be in "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_out_of_range_raises_at_once(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        rank_stopping(**options)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [rank_stopping()], "needs a BasinMonitor that logs this key, got none"),
        (lambda: [rank_stopping(), BasinMonitor(prefix="x")], r"got those with prefixes \['x'\]"),
        (lambda: [rank_stopping("val_loss"), BasinMonitor()], "needs a BasinMonitor that logs this key"),
    ],
    ids=["no monitor", "another prefix", "another key"],
)
def test_missing_monitor_raises_before_training(tmp_path, callbacks, message):
    module = Regressor()
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, *callbacks()).fit(module, loader())
    assert module.num_training_steps == 0


def test_strict_stopping_on_a_quantity_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"hessian_nullity.*`BasinMonitor\(hessian=False\)` does not"):
        stop_on(tmp_path, rank_stopping("basin/hessian_nullity"))


def test_lenient_stopping_on_a_quantity_that_is_not_measured_warns(tmp_path):
    stopping = rank_stopping("basin/hessian_nullity", strict=False, verbose=True)
    with pytest.warns(RuntimeWarning, match=r"basin/hessian_nullity.*not available"):
        trainer, _ = stop_on(tmp_path, stopping, max_epochs=2)
    assert trainer.current_epoch == 2


def test_state_of_early_stopping_loads_with_weights_only(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=3), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    states = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("RankEarlyStopping"))
    assert state["wait_count"] == 2
