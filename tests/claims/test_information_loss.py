import pytest

from examples.claims.information_loss import check, describe, draw, run


@pytest.mark.slow
def test_a_network_that_must_merge_has_the_predicted_basin():
    result = run(seeds=range(6), widths=(8,), steps=1200, every=600)
    check(result)
    # Algebra: 64 - 8 merged inputs, 8 + 1 * 7 independent gradients, 66 - 15 flat directions.
    assert result.narrow[0]["duplicates"] == 56
    assert result.narrow[0]["rank"] == 15
    assert result.narrow[0]["Hessian nullity"] == 51
    assert "16-8-16-1" in describe(result)
    assert draw(result).axes
