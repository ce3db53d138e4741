import math
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_basin.functional.rank import (
    EPSILON,
    RANK_TOLERANCES,
    Spectrum,
    count_by_magnitude,
    default_rtol,
    effective_rank,
    gradient_rank,
    log_det_gram,
    numerical_rank,
    rank_gap,
    singular_values,
)
from tests.exact import exact_pseudodeterminant, integers
from tests.functional.matrices import integer_product


def spectrum_of(*values, rtol=1e-14, method="svd"):
    return Spectrum(singular_values=torch.tensor(values, dtype=torch.float64), rtol=rtol, method=method)


def test_rank_of_an_empty_spectrum_is_zero():
    assert numerical_rank(torch.zeros(0), rtol=1e-6) == 0


def test_a_singular_value_at_the_tolerance_does_not_count():
    assert numerical_rank(torch.tensor([4.0, 1.0], dtype=torch.float64), rtol=0.25) == 1


def test_a_singular_value_just_above_the_tolerance_counts():
    above = math.nextafter(1.0, 2.0)
    assert numerical_rank(torch.tensor([4.0, above], dtype=torch.float64), rtol=0.25) == 2


def test_the_order_of_singular_values_does_not_change_the_rank():
    assert numerical_rank(torch.tensor([1e-9, 2.0, 1e-3], dtype=torch.float64), rtol=1e-6) == 2


def test_default_tolerance_is_the_larger_side_times_the_rounding_of_float64():
    assert default_rtol(3, 700) == 700 * 2.0**-52


@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3, 2.0, math.nan])
def test_a_tolerance_outside_of_the_open_unit_interval_is_refused(rtol):
    with pytest.raises(ValueError, match=r"rtol must be a relative tolerance inside \(0, 1\)"):
        numerical_rank(torch.ones(2), rtol=rtol)


def test_gradient_rank_refuses_a_tolerance_of_zero():
    with pytest.raises(ValueError, match=r"inside \(0, 1\), got 0.0"):
        gradient_rank(spectrum_of(1.0), rtol=0.0)


@pytest.mark.parametrize("shape", [(6, 6), (6, 7), (6, 30), (30, 6), (1, 9), (9, 1)])
def test_singular_values_are_those_of_numpy(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False))
    torch.testing.assert_close(singular_values(matrix), expected)


def test_singular_values_keep_their_dtype():
    assert singular_values(torch.eye(3)).dtype == torch.float32


def test_singular_values_leave_the_matrix_as_it_was():
    matrix = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = matrix.clone()
    singular_values(matrix)
    assert torch.equal(matrix, before)


def test_gap_is_the_number_of_digits_between_neighbours():
    spectrum = torch.tensor([8.0, 2.0, 2e-7], dtype=torch.float64)
    torch.testing.assert_close(rank_gap(spectrum, 2), 7.0)


def test_gap_may_lie_inside_the_spectrum():
    spectrum = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rank_gap(spectrum, 1), 1.0)


def test_gap_of_rank_zero_does_not_exist():
    assert rank_gap(torch.zeros(3), 0) is None


def test_gap_at_full_rank_is_the_distance_to_rounding():
    spectrum = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(rank_gap(spectrum, 2), math.log10(1e-3 / 2.0**-52))


def test_gap_to_an_exactly_zero_tail_is_the_distance_to_rounding():
    spectrum = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rank_gap(spectrum, 2), math.log10(0.5 / 2.0**-52))


def test_gap_to_a_tail_below_rounding_is_the_distance_to_rounding():
    spectrum = torch.tensor([1.0, 1e-30], dtype=torch.float64)
    torch.testing.assert_close(rank_gap(spectrum, 1), math.log10(1 / EPSILON))


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_effective_rank_of_equal_singular_values_is_their_number(count):
    spectrum = torch.cat([torch.full((count,), 3.0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(effective_rank(spectrum), float(count))


def test_effective_rank_weighs_squared_singular_values():
    # Squares 4 and 1: shares of four fifths and one fifth.
    expected = math.exp(0.8 * math.log(5 / 4) + 0.2 * math.log(5))
    torch.testing.assert_close(effective_rank(torch.tensor([2.0, 1.0])), expected)


@pytest.mark.parametrize("size", [0, 3])
def test_effective_rank_of_nothing_is_zero(size):
    assert effective_rank(torch.zeros(size)) == 0.0


def test_effective_rank_ignores_shares_that_underflow():
    # The square of the last one is the smallest number of float64, and a third of that is zero.
    assert effective_rank(torch.tensor([1.0, 1.0, 1.0, 2e-162], dtype=torch.float64)) == pytest.approx(3.0, rel=1e-15)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e20, 1e200])
def test_effective_rank_does_not_depend_on_the_scale(scale):
    spectrum = scale * torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(effective_rank(spectrum), 3.0)


def test_log_det_of_a_diagonal_matrix_is_the_sum_of_the_logarithms_of_its_squares():
    spectrum = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    assert log_det_gram(spectrum, 3) == pytest.approx(math.log(25 * 9 * 4), rel=1e-15)


def test_log_det_of_a_lower_rank_leaves_out_what_does_not_count():
    spectrum = torch.tensor([5.0, 3.0, 1e-15], dtype=torch.float64)
    assert log_det_gram(spectrum, 2) == pytest.approx(math.log(25 * 9), rel=1e-15)


def test_log_det_of_small_singular_values_is_negative():
    assert log_det_gram(torch.tensor([0.5], dtype=torch.float64), 1) == pytest.approx(-math.log(4), rel=1e-15)


def test_log_det_does_not_leave_the_range_of_float64_as_the_product_does():
    spectrum = torch.full((100,), 1e200, dtype=torch.float64)
    assert log_det_gram(spectrum, 100) == pytest.approx(200 * 200 * math.log(10), rel=1e-14)


def test_log_det_of_rank_zero_does_not_exist():
    assert log_det_gram(torch.zeros(3), 0) is None


@pytest.mark.parametrize("rank", [1, 2, 7, 12])
@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12), (13, 15)])
def test_log_det_of_an_integer_matrix_is_that_of_the_exact_product(shape, rank):
    matrix = integer_product(*shape, rank, seed=rank)
    expected = math.log(exact_pseudodeterminant(integers(matrix)))
    # Rounding moves each singular value by less than 40 epsilon of the largest, which is below 40 times the smallest.
    assert log_det_gram(singular_values(matrix), rank) == pytest.approx(expected, abs=2 * rank * 40 * EPSILON * 40)


def test_ranks_at_all_tolerances_count_the_steps_of_a_staircase():
    # Two singular values between each pair of neighbouring tolerances 1e-2, 1e-4, 1e-6, 1e-8, 1e-12.
    steps = [1.0, 0.5, 5e-3, 2e-3, 5e-5, 2e-5, 5e-7, 2e-7, 5e-10, 2e-10, 5e-13, 2e-13]
    assert gradient_rank(spectrum_of(*steps)).at == {1e-12: 10, 1e-8: 8, 1e-6: 6, 1e-4: 4, 1e-2: 2}


def test_reported_tolerances_are_the_documented_ones():
    assert RANK_TOLERANCES == (1e-12, 1e-8, 1e-6, 1e-4, 1e-2)


def test_gradient_rank_decides_at_the_tolerance_of_the_spectrum():
    judged = gradient_rank(spectrum_of(1.0, 1e-3, 1e-5, rtol=1e-4, method="gram"))
    assert (judged.rank, judged.rtol, judged.method) == (2, 1e-4, "gram")


def test_gradient_rank_prefers_the_given_tolerance():
    judged = gradient_rank(spectrum_of(1.0, 1e-3, 1e-5, rtol=1e-4), rtol=1e-2)
    assert (judged.rank, judged.rtol) == (1, 1e-2)


def test_gradient_rank_reports_the_gap_at_its_rank():
    torch.testing.assert_close(gradient_rank(spectrum_of(1.0, 1e-3, 1e-5, rtol=1e-4)).gap, 2.0)


def test_gradient_rank_of_the_zero_matrix_has_no_gap():
    judged = gradient_rank(spectrum_of(0.0, 0.0))
    assert (judged.rank, judged.gap, judged.effective_rank) == (0, None, 0.0)


def test_whole_numbers_stand_in_the_quarter_of_a_decade_that_integer_arithmetic_says():
    values = range(2000, 0, -1)
    # n lies in the quarter b where 10**b <= n**4 < 10**(b + 1), and so where n**4 has b + 1 digits.
    expected = Counter(len(str(n**4)) - 1 for n in values)
    assert count_by_magnitude(torch.tensor(values, dtype=torch.float64), rtol=1e-9) == expected


@pytest.mark.parametrize("exponent", range(-12, 13))
def test_a_power_of_ten_is_the_lower_edge_of_its_quarter(exponent):
    assert count_by_magnitude(torch.tensor([10.0**exponent], dtype=torch.float64), rtol=1e-9) == {4 * exponent: 1}


def test_singular_values_that_are_rounding_are_not_counted_by_magnitude():
    values = torch.tensor([3.0, 2e-5, 2e-16, 0.0], dtype=torch.float64)
    assert count_by_magnitude(values, rtol=1e-14) == {1: 1, -19: 1}  # 4 log10(3) = 1.9, 4 log10(2e-5) = -18.8
    assert count_by_magnitude(torch.zeros(3), rtol=1e-14) == count_by_magnitude(torch.zeros(0), rtol=1e-14) == {}
