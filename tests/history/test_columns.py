import json

import numpy as np
import pytest

from lightning_basin import MergedInput
from lightning_basin.history.columns import History, history_of
from tests.runs import LAYER_RANKS, MERGED, RANKS, STEPS, ZERO_LOSS_STEP, records
from tests.whole_records import basin_record, layer_record


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


def test_columns_hold_the_values_of_the_records():
    history = history_of(records(), name="a run", zero_loss_step=ZERO_LOSS_STEP)
    assert history.steps.tolist() == list(STEPS)
    assert history.column("gradient_rank").tolist() == list(RANKS)
    assert list(history.layers) == ["fc1", "fc2", "head"]
    assert {layer: history.column("gradient_rank", layer).tolist() for layer in history.layers} == {
        layer: list(ranks) for layer, ranks in LAYER_RANKS.items()
    }
    assert history.merged_inputs == MERGED


def test_what_is_derived_of_rank_and_deficit_is_what_the_records_say():
    history = history_of(records())
    assert history.largest_rank().tolist() == [8] * 4  # 8 rows, 40 parameters
    assert history.num_parameters().tolist() == [40] * 4
    assert history.num_parameters("fc2").tolist() == [12] * 4


def test_what_was_not_measured_is_nan():
    history = history_of(records())
    assert np.isnan(history.column("surviving_fraction")).all()
    assert np.isnan(history.column("hessian_nullity")).tolist() == [True, True, True, False]


def test_moments_are_the_measurements_at_the_start_at_zero_loss_and_at_the_end():
    assert history_of(records(), zero_loss_step=10).moments == {"start": 0, "zero loss": 1, "end": 3}
    assert history_of(records()).moments == {"start": 0, "end": 3}
    # TensorBoard's axis stands one step before the optimizer's.
    assert history_of(records(), zero_loss_step=21).moments["zero loss"] == 2


def test_records_without_steps_are_numbered():
    assert history_of([basin_record(), basin_record()]).steps.tolist() == [0, 1]


def test_layers_that_came_later_have_nan_before():
    history = history_of([basin_record(), basin_record({"new": layer_record(gradient_rank=4)})])
    assert np.isnan(history.column("gradient_rank", "new")[0])
    assert history.column("gradient_rank", "new")[1] == 4


def test_names_of_layers_are_those_of_the_keys_also_in_merged_inputs():
    record = basin_record({"a/[b]": layer_record()}, merged_inputs=(MergedInput(1, 0, "a/[b]"),))
    history = history_of([record])
    assert list(history.layers) == ["a.%5Bb%5D"]
    assert history.merged_inputs[0][0].layer == "a.%5Bb%5D"


def test_history_comes_back_from_json():
    history = history_of(records(), name="a run", zero_loss_step=ZERO_LOSS_STEP)
    again = History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False)))
    assert (again.name, again.zero_loss_step, again.num_inputs) == ("a run", ZERO_LOSS_STEP, 5)
    assert again.steps.tolist() == list(STEPS)
    assert again.merged_inputs == history.merged_inputs
    assert same(again.network, {name: np.float64([f"{v:.6g}" for v in c]) for name, c in history.network.items()})
    assert again.layers.keys() == history.layers.keys()


def test_history_of_a_later_version_is_refused():
    with pytest.raises(ValueError, match="must have the schema 1, got 2"):
        History.from_dict(history_of(records()).to_dict() | {"schema": 2})


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="at least one record"):
        history_of([])
