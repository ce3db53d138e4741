import pytest

from examples.claims.width import check, describe, draw, run


@pytest.mark.slow
def test_wider_networks_find_deficient_solutions_less_often():
    result = run(seeds=range(30), widths=(2, 16), steps=2500)
    check(result)
    assert "XOR, 16" in describe(result)
    assert draw(result).axes
