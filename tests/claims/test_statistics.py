import math

import pytest

from examples.claims.statistics import mean, share, spearman


def test_no_success_has_the_exact_interval_of_clopper_and_pearson():
    # Of n failures the upper limit solves (1 - p)^n = 0.025.
    interval = share(0, 20)
    assert interval.lower == 0.0
    assert interval.upper == pytest.approx(1 - 0.025 ** (1 / 20), rel=1e-9)


def test_a_mean_has_the_interval_of_student():
    # Two values at distance 2: the standard error is 1, and the quantile of one degree of freedom tan(0.475 pi).
    interval = mean([-1.0, 1.0])
    assert interval.upper == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)


def test_equal_orders_have_correlation_one():
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 8.0, 16.0]) == (1.0, 1.0, 1.0)


def test_an_interval_is_printed_with_its_ends():
    assert str(share(10, 20)) == "0.50 (0.27 to 0.73)"
