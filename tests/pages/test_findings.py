from dataclasses import replace

import pytest

from lightning_basin.history.columns import history_of
from lightning_basin.pages.findings import sentence
from tests.runs import records


@pytest.mark.parametrize(("num_measurements", "is_said"), [(1, True), (4, False)])
def test_a_rank_that_fills_the_probe_at_the_end_is_said_to_be_that_of_the_probe(num_measurements, is_said):
    # The rank is 8 of 8 outputs at first, and 2 at the end; there are 40 parameters.
    said = sentence(history_of(records()[:num_measurements]))
    assert ("all that the probe can show: a larger probe may show more" in said) is is_said


def test_a_rank_of_all_parameters_is_no_matter_of_the_probe():
    assert "probe" not in sentence(history_of([replace(records()[0], num_parameters=8)]))
