import pytest

from examples.claims.sweep import check, describe, draw, run


@pytest.mark.slow
def test_lower_ranks_go_with_lower_test_errors():
    result = run(seeds=range(3), widths=(1, 4), max_steps=800, num_processes=1)
    check(result)
    # Algebra: 7 differences at one unit, and 8 distinct activations.
    assert [one.rank for one in result.of(stops=False, width=1)] == [15] * 3
    assert "16-4-16-1" in describe(result)
    assert draw(result).axes
