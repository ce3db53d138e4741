import pytest

from examples.claims.depth import check, describe, draw, run


@pytest.mark.slow
def test_depth_and_relu_lose_inputs_as_often_as_predicted():
    result = run(seeds=range(96), shapes=((2, 2), (4, 4)), depths=(4,), steps=1500)
    check(result)
    # Algebra: an input survives a layer with probability 3/4 at width 2, and 15/16 at width 4.
    assert result.untrained[0].predicted == 0.4375
    assert round(result.untrained[1].predicted, 4) == 0.2275
    assert "dead inputs" in describe(result)
    assert draw(result).axes
