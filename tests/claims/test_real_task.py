import pytest

from examples.claims.real_task import check, describe, draw, run


@pytest.mark.slow
def test_no_input_sees_the_rescaling_of_units():
    result = run(seeds=range(6), steps=500, num_moments=1)
    check(result)
    # Algebra: 16 * 10 + 10, 10 * 10 + 10 twice; 20 hidden units can be rescaled.
    assert (result.num_parameters, result.ceiling) == (390, 370)
    assert "ceiling" in describe(result)
    assert draw(result).axes
