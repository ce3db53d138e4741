import re
import warnings
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.callback.keys import possible_keys
from tests.lightning_packages import Callback, EarlyStopping, MisconfigurationException, ModelCheckpoint
from tests.training import Regressor, Scripted, loader, make_trainer, regression_data, scripted_loader, steps, timeless

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

RANK = "basin/gradient_rank"


class Scheduled(Regressor):
    """Halves its rate of learning where a measured value does not fall."""

    def __init__(self, key=RANK, interval="epoch", *, strict=True, patience=0):
        super().__init__()
        self.patience = patience
        self.config = {"monitor": key, "interval": interval, "strict": strict}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {"scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=self.patience), **self.config}
        ]


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


TRAINERS = {
    "validation in the epoch": {"val_check_interval": 0.25},
    "validation after each batch": {"val_check_interval": 1},
    "sanity check": {"num_sanity_val_steps": 2, "val_check_interval": 0.5},
    "rare validation": {"check_val_every_n_epoch": 2},
    "validation by batches of all epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "accumulation": {"accumulate_grad_batches": 4, "val_check_interval": 0.25},
    "no validation": {"limit_val_batches": 0},
    "one batch": {"limit_train_batches": 1},
    "development": {"fast_dev_run": 2},
}
WATCHERS = {
    "stopping": lambda _: EarlyStopping(RANK, patience=99),
    "stopping after validation": lambda _: EarlyStopping(RANK, patience=99, check_on_train_epoch_end=False),
    "checkpoint": lambda root: ModelCheckpoint(root, monitor=RANK, save_top_k=-1),
    "checkpoint at steps": lambda root: ModelCheckpoint(root, monitor=RANK, save_last=True, every_n_train_steps=1),
    "checkpoint by time": lambda root: ModelCheckpoint(root, monitor=RANK, train_time_interval=timedelta(0)),
}


def fit(root, *callbacks, module=None, batches=None, **options):
    options = {"max_epochs": 2, "enable_checkpointing": True} | options
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(module or Regressor(), loader(60, 5) if batches is None else batches, loader(10, 5))
    return trainer


COMBINED = [
    *((watcher, options) for watcher in ("stopping after validation", "checkpoint") for options in TRAINERS),
    *((watcher, options) for watcher in WATCHERS for options in ("validation in the epoch", "one batch")),
]


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
    found = [str(warning.message) for warning in said if "counts its steps" in str(warning.message)]
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


# ------------------------------------------------------------------------------------------------- mistyped keys

MISTYPED = {
    "basin/gradient_rnak": "basin/gradient_rank",
    "basin_layer_gradient_rank/reedout": "basin_layer_gradient_rank/readout",
    "basin_layer_gradient_rnak/hidden": "basin_layer_gradient_rank/hidden",
    "basin_layers_gradient_rank/hidden": "basin_layer_gradient_rank/hidden",
    "basin_block_gradient_rank/hidden": "basin_layer_gradient_rank/hidden",
    "basin_stats/gradient_rank_p95": "basin_stats/gradient_rank_p90",
    "basin/gradient_rank_at_1e-8": "basin/gradient_rank_at_1e-08",
    "bassin/gradient_rank": "basin/gradient_rank",
}
LOOKING = {
    "stopping": lambda key, _: (Regressor(), EarlyStopping(key)),
    "lenient stopping": lambda key, _: (Regressor(), EarlyStopping(key, strict=False)),
    "checkpoint": lambda key, root: (Regressor(), ModelCheckpoint(root, monitor=key)),
    "scheduler": lambda key, _: (Scheduled(key),),
    "rank stopping": lambda key, _: (Regressor(), RankEarlyStopping(key)),
}


@pytest.mark.parametrize("looking", LOOKING)
@pytest.mark.parametrize("key", MISTYPED)
def test_a_mistyped_key_is_refused_with_the_one_that_was_meant(tmp_path, looking, key):
    module, *callbacks = LOOKING[looking](key, tmp_path)
    with pytest.raises(MisconfigurationException) as raised:
        fit(tmp_path, *callbacks, BasinMonitor(), module=module)
    assert f"Did you mean {MISTYPED[key]!r}?" in str(raised.value)
    assert module.num_training_steps == 0


@pytest.mark.parametrize("looking", LOOKING)
def test_a_key_of_another_prefix_is_refused_with_the_one_that_was_meant(tmp_path, looking):
    module, *callbacks = LOOKING[looking]("basin/gradient_rank", tmp_path)
    with pytest.raises(MisconfigurationException, match=r"prefixes .*\['b'\].* Did you mean 'b/gradient_rank'\?"):
        fit(tmp_path, *callbacks, BasinMonitor(prefix="b"), module=module)
    assert module.num_training_steps == 0


@pytest.mark.parametrize(
    ("key", "prefixes"),
    [
        ("val_loss", ["basin"]),
        ("val/loss", ["vals"]),
        ("train_loss", ["basin"]),
        ("basin/accuracy", ["b"]),
        ("gradient_norm", ["basin"]),
        ("held_out/gradient_rank", ["basin", "held_out"]),
        ("basin_layer_2/gradient_rank", ["basin", "basin_layer_2"]),
        ("basin_layer_gradient_rank/output", ["basin"]),
    ],
)
def test_a_value_of_the_users_own_or_of_another_monitor_is_left_alone(tmp_path, key, prefixes):
    monitors = [BasinMonitor(prefix=prefix, hessian=False) for prefix in prefixes]
    if key.endswith("output"):  # Not a layer, and only counted on duplicates.
        with pytest.raises(MisconfigurationException, match="Did you mean"):
            fit(tmp_path, EarlyStopping(key, strict=False), *monitors)
        return
    trainer = fit(tmp_path, EarlyStopping(key, strict=False, patience=99), *monitors)
    assert trainer.current_epoch == 2


@pytest.mark.parametrize(("key", "is_said"), [("gradient_rank", True), ("loss", False), ("hidden", False)])
def test_a_quantity_without_a_prefix_is_asked_about(tmp_path, key, is_said):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, EarlyStopping(key, strict=False), BasinMonitor(20, hessian=False), max_epochs=1)
    assert any(f"Did you mean 'basin/{key}'?" in str(warning.message) for warning in said) == is_said


def test_a_layer_that_is_only_part_of_what_is_measured_is_refused(tmp_path):
    stopping = EarlyStopping("basin_layer_gradient_rank/hidden")
    with pytest.raises(MisconfigurationException, match="Did you mean 'basin_layer_gradient_rank/readout'"):
        fit(tmp_path, stopping, BasinMonitor(20, layers=["readout"]))
    module = Regressor()
    module.deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(33)))
    stopping = EarlyStopping("basin_layer_gradient_rank/deep.7")
    with pytest.raises(MisconfigurationException, match=r"Did you mean 'basin_block_gradient_rank/deep\.6-7'"):
        fit(tmp_path, stopping, BasinMonitor(20), module=module)


def test_a_frozen_layer_may_be_looked_for(tmp_path):
    module = Regressor()
    module.hidden.requires_grad_(requires_grad=False)
    stopping = EarlyStopping("basin_layer_gradient_rank/hidden")
    with pytest.warns(UserWarning, match=r"is passed over .* Did you mean 'basin_layer_gradient_rank/readout'"):
        trainer = fit(tmp_path, stopping, BasinMonitor(20), module=module)
    assert trainer.current_epoch == 2


LEFT_OUT = {
    "basin/hessian_nullity": ({"hessian": False}, "hessian=False"),
    "basin_layer_residual_curvature/hidden": ({"dtype": "float32"}, "dtype='float32'"),
    "basin/surviving_fraction": ({}, "verify_null_space=None"),
    "basin_layer_train_duplicated_activations/output": ({}, "duplicates_over=None"),
}


@pytest.mark.parametrize("looking", LOOKING)
@pytest.mark.parametrize("key", LEFT_OUT)
def test_a_value_that_the_settings_leave_out_is_refused_with_the_setting(tmp_path, looking, key):
    options, setting = LEFT_OUT[key]
    module, *callbacks = LOOKING[looking](key, tmp_path)
    if looking == "lenient stopping":
        with pytest.warns(UserWarning, match=rf"`BasinMonitor\({setting}\)` does not measure"):
            assert fit(tmp_path, *callbacks, BasinMonitor(**options), module=module).current_epoch == 2
        return
    with pytest.raises(MisconfigurationException, match=rf"`BasinMonitor\({setting}\)` does not measure"):
        fit(tmp_path, *callbacks, BasinMonitor(**options), module=module)
    assert module.num_training_steps == 0


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


def test_a_block_has_no_key_of_what_only_layers_have():
    few, many = ([f"layers.{i}" for i in range(count)] for count in (32, 33))
    assert "basin_layer_activation_rank/layers.0" in possible_keys("basin", few, "auto")
    of_blocks = [key for key in possible_keys("basin", many, "auto") if key.startswith("basin_block_")]
    assert "basin_block_gradient_rank/layers.0-1" in of_blocks
    assert not [key for key in of_blocks if "activation_rank" in key]
