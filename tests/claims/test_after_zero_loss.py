import pytest

from examples.claims.after_zero_loss import check, describe, draw, run


@pytest.mark.slow
def test_noise_in_the_labels_lowers_the_rank():
    result = run(seeds=range(5), third=4000, every=2000, steps=2400)
    check(result)
    # Singh, Bachmann and Hofmann (2021): 72 parameters, of which 8 are flat before the fit and 40 after it.
    assert [result.linear[index].hessian_nullity for index in (0, -1)] == [8, 40]
    assert "label noise" in describe(result)
    assert draw(result).axes
