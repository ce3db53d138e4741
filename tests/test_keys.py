import warnings
from collections import Counter

import pytest
from torch import nn

from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.keys import FIRST_QUANTITIES, key_of_tag, possible_keys, tensorboard_values
from tests.callback.watchers import Scheduled, fit
from tests.lightning_packages import EarlyStopping, MisconfigurationException, ModelCheckpoint
from tests.runs import deep_records
from tests.training import Regressor
from tests.whole_records import basin_record, layer_record

pytestmark = [pytest.mark.fits, pytest.mark.filterwarnings("ignore")]

MISTYPED = {
    "basin_more/saturated": "basin/saturated",
    "basin_more/loss": "basin/loss",
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


def test_a_block_has_no_key_of_what_only_layers_have():
    few, many = ([f"layers.{i}" for i in range(count)] for count in (32, 33))
    assert "basin_layer_activation_rank/layers.0" in possible_keys("basin", few, "auto")
    of_blocks = [key for key in possible_keys("basin", many, "auto") if key.startswith("basin_block_")]
    assert "basin_block_gradient_rank/layers.0-1" in of_blocks
    assert not [key for key in of_blocks if "activation_rank" in key]


def groups_of(tags):
    return Counter(tag.partition("/")[0] for tag in tags)


@pytest.mark.parametrize(
    ("num_layers", "curves_of_layers"),
    [(1, 4), (8, 4 * 8), (16, 4 * 16), (17, 3 * 17), (32, 2 * 32), (50, 2 * 25), (200, 2 * 25)],
)
def test_tensorboard_shows_eight_values_first_and_about_a_hundred_in_all(num_layers, curves_of_layers):
    values = deep_records(num_layers, 1)[0].scalars()
    shown = tensorboard_values(values, "basin")
    groups = groups_of(shown)
    assert groups["basin"] == len(FIRST_QUANTITIES) == 8
    assert min(groups) == "basin"  # TensorBoard sorts them.
    of_layers = sum(number for group, number in groups.items() if group.startswith(("basin_layer", "basin_block")))
    assert of_layers == curves_of_layers + 1  # The duplicates of the outputs.
    assert groups["basin_more"] == 21
    assert groups["basin_stats"] == (6 if num_layers > 1 else 0)
    assert {key_of_tag(tag): value for tag, value in shown.items()}.items() <= values.items()
    assert len(shown) <= 100


def test_tensorboard_shows_something_of_each_layer_that_was_asked_for():
    record = basin_record({f"fc{i}": layer_record() for i in range(90)})
    assert groups_of(tensorboard_values(record.scalars(), "basin"))["basin_layer_gradient_rank"] == 90


@pytest.mark.parametrize(
    "tag", ["basin_more/gradient_rank", "val_more/error", "loss", "basin_layer_gradient_rank/more"]
)
def test_tags_that_were_not_moved_are_keys(tag):
    assert key_of_tag(tag) == tag
