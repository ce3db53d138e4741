"""Brackets of nullities whose eigenvalues are known on paper."""

import pytest
import torch

from lightning_basin.functional.bracket import SKETCH_FACTOR, gauss_newton_eigenvalues, null_space_bracket
from lightning_basin.functional.rank import Spectrum


def spectrum(*values, method="svd", rtol=1e-15):
    return Spectrum(singular_values=torch.tensor(values, dtype=torch.float64), rtol=rtol, method=method)


def test_eigenvalues_above_twice_the_residual_are_curved():
    # Squares 16, 4, 1 and 0.25, less what rounding may have added.
    found = gauss_newton_eigenvalues(9, spectrum(4.0, 2.0, 1.0, 0.5, 0.0))
    assert [found.num_curved(residual) for residual in (0.0, 0.12, 0.13, 0.49, 0.51, 1.9, 2.1, 7.9, 8.1)] == [
        *(4, 4, 3, 3, 2, 2, 1, 1, 0)
    ]
    assert (found.rank, found.largest, found.second) == (4, 16.0, 4.0)
    assert found.smallest == pytest.approx(0.25, rel=1e-12)


def test_a_tolerance_of_the_user_counts_beside_the_residual():
    found = gauss_newton_eigenvalues(9, spectrum(4.0, 2.0, 1.0, 0.5), rtol=0.1)
    # 0.1 (16 + 0.5) = 1.65 is above 1, and with the residual below 4.
    assert found.num_curved(0.5) == 2
    null_space = found.bracket(0.5)
    assert (null_space.lower, null_space.upper, null_space.gauss_newton_nullity) == (9 - 4, 9 - 2, 9 - 2)


def test_small_values_of_a_sketch_count_at_a_fraction():
    found = gauss_newton_eigenvalues(9, spectrum(1.0, 1e-8, method="gram+sketch", rtol=1e-13))
    assert found.values[1] == pytest.approx(1e-16, rel=1e-12)
    assert found.smallest == pytest.approx((1e-8 / SKETCH_FACTOR) ** 2, rel=1e-4)


def test_a_scale_multiplies_all_eigenvalues():
    found = gauss_newton_eigenvalues(3, spectrum(2.0, 1.0), scale=0.5)
    assert (found.largest, found.second) == (2.0, 0.5)


def test_without_gradients_a_residual_resolves_nothing():
    for rows in (spectrum(0.0, 0.0), spectrum()):
        found = gauss_newton_eigenvalues(5, rows)
        assert (found.rank, found.largest, found.second, found.smallest) == (0, 0.0, 0.0, None)
        null_space = found.bracket(1e-3)
        assert (null_space.nullity, null_space.lower, null_space.upper) == (None, None, None)
        assert found.bracket(0.0).nullity == 5


def test_a_bracket_whose_ends_meet_is_a_nullity():
    null_space = null_space_bracket(9, spectrum(2.0, 1.0), residual=0.49)
    assert (null_space.nullity, null_space.lower, null_space.upper) == (7, 7, 7)
    null_space = null_space_bracket(9, spectrum(2.0, 1.0), residual=0.51)
    assert (null_space.nullity, null_space.lower, null_space.upper) == (None, 7, 8)
