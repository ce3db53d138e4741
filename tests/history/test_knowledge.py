from dataclasses import replace

import numpy as np
import pytest

from lightning_basin.history.columns import history_of
from lightning_basin.history.knowledge import counted_nullity, is_nullity_known, nullity_knowledge, rank_knowledge
from tests.runs import records
from tests.whole_records import basin_record


def test_a_rank_is_proved_ill_defined_or_a_lower_bound():
    history = history_of(records())
    assert rank_knowledge(history) == ["proved", "proved", "ill-defined", "proved"]  # The third gap is of one digit.
    assert rank_knowledge(replace(history, is_projected=True)) == ["lower bound"] * 4


def test_a_nullity_is_bracketed_until_its_bracket_meets():
    history = history_of(records())
    assert nullity_knowledge(history) == ["bracketed", "bracketed", "bracketed", "proved"]
    assert np.isnan(counted_nullity(history)).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("residual", "expected"), [(0.25, "ill-defined"), (1e-12, "ill-defined"), (None, "ill-defined"), (0.0, "proved")]
)
def test_a_nullity_that_was_counted_without_a_bracket_is_ill_defined_while_a_residual_is_left(residual, expected):
    history = history_of([basin_record(hessian_nullity=7, residual_curvature=residual)])
    assert nullity_knowledge(history) == [expected]
    assert counted_nullity(history).tolist() == [7]


def test_a_count_inside_of_an_open_bracket_is_bracketed():
    record = basin_record(hessian_nullity=7, hessian_nullity_lower=6, hessian_nullity_upper=9, residual_curvature=0.25)
    assert nullity_knowledge(history_of([record])) == ["bracketed"]


def test_a_nullity_is_known_where_it_was_counted_or_bracketed():
    for measured in ({"hessian_nullity": 7}, {"hessian_nullity_lower": 6, "hessian_nullity_upper": 9}):
        assert is_nullity_known(history_of([basin_record(), basin_record(**measured)]))
    assert not is_nullity_known(history_of([basin_record()]))
