import pytest

from examples.claims.rank_and_flatness import check, describe, draw, run


@pytest.mark.slow
def test_claims_of_ranks_hold_where_their_conditions_do():
    result = run(exponents=range(0, -17, -4))
    check(result)
    # Algebra: 51 parameters and 8 outputs; spheres touch in a point, though two directions change no distance.
    assert result.gradient_nullity == 43
    touching = next(point for point in result.dimensions if point.where == "two spheres that touch")
    assert (touching.dimension, touching.nullity) == (0, 2)
    assert "soft labels" in describe(result)
    assert draw(result).axes
