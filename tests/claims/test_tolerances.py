import pytest

from examples.claims.tolerances import check, describe, draw, run


@pytest.mark.slow
def test_weight_decay_merges_approximately():
    result = run(seeds=range(6), steps=2000)
    check(result)
    # Algebra: 8 distinct activations, and 7 differences at one unit.
    assert all(staircase[1e-2] == 15 for staircase in result.trained[1e-3].staircases)
    assert result.trained[1e-3].equal == [0] * 6
    assert "channel" in describe(result)
    assert draw(result).axes
