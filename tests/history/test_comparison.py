from dataclasses import replace

import numpy as np
import pytest

from lightning_basin.history.columns import History, Logged, history_of
from lightning_basin.history.comparison import band_of, final_values
from tests.runs import records


def run(name, steps, ranks):
    return History(name=name, steps=np.array(steps), network={"gradient_rank": np.array(ranks, dtype=float)})


def test_final_values_are_the_last_that_were_measured():
    history = replace(history_of(records()), logged={"val_loss": Logged(np.array([3, 9]), np.array([0.5, 0.25]))})
    assert final_values(history, ["gradient_rank", "hessian_nullity", "val_loss"]) == {
        "gradient_rank": 2,
        "hessian_nullity": 38,
        "val_loss": 0.25,
    }
    assert np.isnan(final_values(run("a", [0], [3]), ["hessian_nullity_lower"])["hessian_nullity_lower"])


def test_a_value_that_a_run_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"no values of 'val_los', but of \['gradient_rank'\]"):
        final_values(run("a", [0], [3]), ["val_los"])


def test_a_band_of_what_no_run_has_is_refused():
    with pytest.raises(ValueError, match="quantity must be one that a run has values of, got 'loss'"):
        band_of([run("a", [0], [3])], "loss")


def test_band_holds_each_run_at_its_last_value_from_its_first_step_to_its_last():
    band = band_of(
        [run("a", [0, 10, 20], [8, 6, 4]), run("b", [0, 15], [8, 2]), run("c", [5, 20], [0, 0])], "gradient_rank"
    )
    assert band.steps.tolist() == [0, 5, 10, 15, 20]
    # a: 8 8 6 6 4, b: 8 8 8 2 and no more, c: 0 from step 5 on.
    assert band.median.tolist() == [8, 8, 6, 2, 2]
    assert np.allclose(band.high, [8, 8, 7.6, 5.2, 3.6])
    assert np.allclose(band.low, [8, 1.6, 1.2, 0.4, 0.4])
