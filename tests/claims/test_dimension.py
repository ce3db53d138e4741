import pytest

from examples.claims.dimension import check, describe, draw, model_rank, run


@pytest.mark.slow
def test_dimension_is_a_floor_of_recovery():
    result = run(
        seeds=range(24),
        nums_measurements=(6, 7, 11, 12, 16),
        descent_steps=6000,
        networks=range(20),
        widths=(2, 8),
        steps=2000,
        num_guesses=50_000,
    )
    check(result)
    # Algebra: matrices of rank r have 2 * 4 r - r^2 dimensions.
    assert (model_rank(1), model_rank(2)) == (7, 12)
    assert "measurements" in describe(result)
    assert draw(result).axes
