import pytest
import torch

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.callback.stopping import FALLING_ONCE, RARE, WithoutLoss, batches_of, rank_stopping, stop_on, stopping_epoch
from tests.lightning_packages import EarlyStoppingReason, MisconfigurationException, ModelCheckpoint
from tests.training import Regressor, Scripted, loader, make_trainer, scripted_loader, steps

pytestmark = pytest.mark.fits


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
    ("max_overhead", "expected"),
    [(None, list(range(12))), ("auto", [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11])],
    ids=["each epoch", "ever more rarely"],
)
def test_patience_ends_at_the_same_step_where_measurements_become_rarer(tmp_path, max_overhead, expected):
    """The loss is zero from step 7 on, and all of the next five steps are measured."""
    stopping, monitor = RankEarlyStopping(patience=4), {"max_overhead": max_overhead}
    _, found = stop_on(tmp_path, stopping, losses=(1.0,) * 7 + (0.0,), monitor=monitor)
    assert steps(found) == expected


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


def test_measurements_without_the_quantity_say_nothing_of_it(tmp_path):
    trainer, monitor = stop_on(tmp_path, rank_stopping("basin/surviving_fraction", patience=2), monitor=RARE)
    assert [record.surviving_fraction for record in monitor.records[:5]] == [1.0, None, None, None, 1.0]
    assert trainer.global_step == 8


def test_a_value_that_was_not_measured_leaves_the_callback_metrics(tmp_path):
    trainer, _ = stop_on(tmp_path, rank_stopping(patience=9), max_epochs=2, monitor=RARE)
    assert "basin/gradient_rank" in trainer.callback_metrics
    assert "basin/surviving_fraction" not in trainer.callback_metrics


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, r"patience=0\).* at least 1"),
        ({"min_delta": -1.0}, r"min_delta=-1.0\).* not be negative"),
        ({"stopping_threshold": 3}, "needs a direction"),
        ({"mode": "down"}, "must be in "),
        ({"monitor": None}, r"monitor=None\)` must be the key of a logged value"),
        ({"patience": "5"}, r"patience='5'\)` must be an integer, at least 1"),
        ({"patience": 2.5}, r"patience=2.5\)` must be an integer, at least 1"),
        ({"min_delta": None}, r"min_delta=None\)` must be a number"),
        ({"min_delta": float("nan")}, r"min_delta=nan\)` must be a number, and not be negative"),
        ({"mode": "min", "stopping_threshold": "5"}, r"stopping_threshold='5'\)` must be a number or None"),
        ({"after_zero_loss": "False"}, r"after_zero_loss='False'\)` must be True or False"),
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
        (lambda: [rank_stopping(), BasinMonitor(prefix="x")], r"got monitors with the prefixes \['x'\]"),
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
