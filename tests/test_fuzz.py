"""Some of the random cases that `tests.fuzz` looks at for as long as one likes."""

import pytest

from tests.fuzz_ranks import check_ranks

pytestmark = pytest.mark.fits

RANK_SEEDS = range(80)


def test_random_integer_networks_have_their_exact_ranks():
    assert sum(map(check_ranks, RANK_SEEDS)) > 0.9 * len(RANK_SEEDS)
