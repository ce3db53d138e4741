import pytest

from examples.claims.volume import check, describe, draw, run


@pytest.mark.slow
def test_volumes_shrink_as_ranks_and_paper_say():
    result = run(num_points=3_000_000)
    check(result)
    # Paper: a point, a curve and a plane have 0, 1 and 2 dimensions.
    assert [point.num_parameters - point.codimension for point in result.points] == [2, 1, 1, 0, 1]
    # 4t (1 + log(1 / t)), of |xy| < t in the square of side 2, at t = 0.179 and a quarter of it.
    assert result.points[-1].share_predicted == pytest.approx(0.0447 * 4.107 / (0.1789 * 2.721), rel=1e-3)
    assert "spheres" in describe(result)
    assert draw(result).axes
