"""Networks with integer weights, each with what is exact of it."""

from functools import cache

import pytest

from lightning_basin import BasinRecord, measure_basin
from tests.models import CASE_NAMES, integer_case

every_network = pytest.mark.parametrize("name", CASE_NAMES)


@cache
def measured(name: str, seed: int) -> BasinRecord:
    case = integer_case(name, seed)
    return measure_basin(case.module, case.inputs)
