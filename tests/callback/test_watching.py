import re
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.callback.watchers import COMBINED, RANK, TRAINERS, WATCHERS, Scheduled, fit
from tests.lightning_packages import Callback, EarlyStopping, ModelCheckpoint
from tests.training import Regressor, Scripted, make_trainer, regression_data, scripted_loader, steps, timeless

pytestmark = [pytest.mark.fits, pytest.mark.filterwarnings("ignore")]


class Seen(Callback):
    """Takes down the value that is there after each validation."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.values.append(trainer.callback_metrics.get(RANK))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(regression_data(30))


@pytest.mark.parametrize(("watcher", "options"), dict.fromkeys(COMBINED))
def test_nobody_ends_a_run_whose_probe_is_not_full_at_the_first_check(tmp_path, watcher, options):
    callback, monitor = WATCHERS[watcher](tmp_path), BasinMonitor(hessian=False)
    settings = {name: getattr(callback, name, None) for name in ("strict", "verbose", "save_top_k")}
    trainer = fit(tmp_path, callback, monitor, **TRAINERS[options])
    assert trainer.state.finished
    assert trainer.current_epoch == (1 if options == "development" else 2)
    # All inputs of an epoch, as these are fewer than 128; the probe is no smaller for anybody's sake.
    num_inputs = {"one batch": 5, "development": 10}.get(options, 60)
    assert {record.num_inputs for record in monitor.records} == {num_inputs}
    assert {name: getattr(callback, name, None) for name in settings} == settings
    if isinstance(callback, EarlyStopping) and not trainer.fast_dev_run and options != "no validation":
        assert callback.best_score in [record.gradient_rank for record in monitor.records]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("options", TRAINERS)
def test_no_scheduler_ends_a_run_whose_probe_is_not_full_at_its_first_step(tmp_path, interval, options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, BasinMonitor(hessian=False), module=Scheduled(interval=interval), **TRAINERS[options])
    assert trainer.state.finished
    (config,) = trainer.lr_scheduler_configs
    assert (config.strict, config.frequency) == (True, 1)
    assert not [warning for warning in said if "not available" in str(warning.message)]


def test_a_stream_is_checked_as_soon_as_there_is_a_value(tmp_path):
    stopping, monitor, seen = EarlyStopping(RANK, patience=99), BasinMonitor(probe=25, hessian=False), Seen()
    batches = DataLoader(Stream(), 5)
    fit(tmp_path, stopping, monitor, seen, batches=batches, val_check_interval=2, max_epochs=1)
    # The probe is full at the fifth of six batches, before which two validations have passed.
    assert [value is None for value in seen.values] == [True, True, False]
    assert stopping.wait_count == 0
    assert stopping.best_score == monitor.records[0].gradient_rank


def test_numbers_are_those_of_a_run_in_which_nobody_looks_for_them(tmp_path):
    watched, alone = BasinMonitor(40), BasinMonitor(40)
    stopping = EarlyStopping("basin/hessian_nullity_upper", patience=99, strict=True)
    fit(tmp_path, stopping, ModelCheckpoint(tmp_path, monitor=RANK), watched, val_check_interval=0.25)
    fit(tmp_path, alone, val_check_interval=0.25)
    assert timeless(watched.records) == timeless(alone.records)


CALLS: list[int] = []
"""Of a behavior: here, as what a function holds is copied with it."""


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("num_failures", [1, 9])
def test_a_measurement_that_fails_ends_no_run_that_looks_for_its_value(tmp_path, watcher, num_failures):
    CALLS.clear()

    def behavior(module, inputs):
        CALLS.append(len(inputs))
        if len(inputs) == 20 and CALLS.count(20) <= num_failures:  # Not in the check, of the first batch alone.
            raise torch.linalg.LinAlgError("did not converge")
        return module(inputs)

    callback = WATCHERS[watcher](tmp_path)
    monitor = BasinMonitor(20, behavior=behavior, hessian=False, max_failures=None)
    with pytest.warns(UserWarning, match=r"monitor='basin/gradient_rank'\) is passed over until there is a value"):
        trainer = fit(tmp_path, callback, monitor, val_check_interval=0.5)
    assert trainer.state.finished
    assert len(monitor.records) == (2 if num_failures == 1 else 0)
    assert bool(list(tmp_path.glob("*epoch*.ckpt"))) == (isinstance(callback, ModelCheckpoint) and num_failures == 1)


def test_strictness_comes_back_after_a_run_that_raised(tmp_path):
    class Fails(Regressor):
        def training_step(self, batch, batch_idx):
            raise KeyError("a mistake of its own")

    stopping = EarlyStopping(RANK)
    with pytest.raises(KeyError, match="a mistake"):
        fit(tmp_path, stopping, BasinMonitor(), module=Fails())
    assert stopping.strict


@pytest.mark.parametrize(
    "make",
    [
        lambda key, _: EarlyStopping(key, strict=True, patience=99),
        lambda key, root: ModelCheckpoint(root, monitor=key),
        lambda key, _: RankEarlyStopping(key, after_zero_loss=False, patience=99),
    ],
    ids=["stopping", "checkpoint", "rank stopping"],
)
@pytest.mark.parametrize("key", ["basin/zero_loss_step", "basin/surviving_fraction"])
def test_a_value_that_comes_with_zero_loss_is_waited_for(tmp_path, make, key):
    callback = make(key, tmp_path)
    monitor = BasinMonitor(8, hessian=False, verify_null_space="zero_loss")
    trainer = make_trainer(tmp_path, callback, monitor, max_epochs=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="not there before the loss has reached zero"):
        trainer.fit(Scripted((6,), (1.0, 1.0, 0.0)), scripted_loader(), scripted_loader())
    expected = {"basin/zero_loss_step": 2.0, "basin/surviving_fraction": 1.0}[key]
    assert trainer.callback_metrics[key] == expected
    assert (callback.best_model_score if isinstance(callback, ModelCheckpoint) else callback.best_score) == expected


@pytest.mark.parametrize("key", ["basin/hessian_nullity", "basin/loss", "basin_layer_gauss_newton_nullity/hidden"])
def test_what_has_no_value_without_a_loss_is_said_and_ends_no_run(tmp_path, key):
    module = Regressor()
    del module.loss_fn

    def training_step(batch, batch_idx):  # With a penalty on parameters, so that the loss cannot be read from it.
        return module(batch[0]).square().mean() + module.hidden.weight.square().sum()

    module.training_step = training_step
    with pytest.warns(UserWarning, match="is passed over until there is a value"):
        trainer = fit(tmp_path, EarlyStopping(key), BasinMonitor(20), module=module)
    assert trainer.current_epoch == 2


@pytest.mark.parametrize(
    ("interval", "patience", "monitor", "expected"),
    [
        ("epoch", 0, {}, None),
        ("epoch", 1, {"every_n_epochs": 3}, "up to 3 times: patience=1 is over .* patience=5"),
        ("epoch", 2, {"every_n_epochs": 3}, None),
        ("step", 10, {}, "up to 12 times: patience=10 is over"),
        ("step", 11, {}, None),
        ("step", 0, {"every_n_train_steps": 2}, "up to 2 times"),
        ("step", 0, {"every_n_train_steps": 1}, None),
    ],
)
def test_a_scheduler_that_counts_one_value_several_times_is_warned_of(tmp_path, interval, patience, monitor, expected):
    module = Scheduled(interval=interval, patience=patience)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, BasinMonitor(20, hessian=False, **monitor), module=module, max_epochs=1)
    found = [str(warning.message) for warning in said if "counts its checks" in str(warning.message)]
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


def test_a_run_resumed_finds_the_last_value_of_what_is_measured_rarely(tmp_path):
    def run(**options):
        stopping = EarlyStopping("basin/surviving_fraction", patience=5)
        monitor = BasinMonitor(8, hessian=False, verify_null_space=4)
        trainer = make_trainer(tmp_path, stopping, monitor, **{"max_epochs": 20} | options.pop("trainer", {}))
        trainer.fit(Scripted(), scripted_loader(), **options)
        return trainer, steps(monitor)

    whole, _ = run()
    half, _ = run(trainer={"max_epochs": 2})
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(ckpt_path=tmp_path / "half.ckpt")
    assert resumed.current_epoch == whole.current_epoch == 6
