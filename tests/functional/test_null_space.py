"""Null spaces of Hessians whose eigenvalues are known on paper."""

import pytest
import torch
from torch.nn import functional as F

from lightning_basin.functional.hessian import hessian_matrix
from lightning_basin.functional.null_space import hessian_null_space, hessian_nullity
from lightning_basin.functional.output_curvature import OutputCurvature, output_curvature
from tests.networks import drawn


def test_nullity_of_a_diagonal_matrix_is_the_number_of_zeros():
    assert hessian_nullity(torch.diag(torch.tensor([3.0, 0.0, -2.0, 0.0]))) == 2


def test_a_hessian_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        hessian_nullity(torch.zeros(0, 0))


@pytest.mark.parametrize("size", [1, 4])
def test_nullity_of_the_zero_matrix_is_its_size(size):
    assert hessian_nullity(torch.zeros(size, size)) == size


def test_null_space_without_gradients_has_no_residual():
    found = hessian_null_space(torch.diag(torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)))
    assert (found.nullity, found.strict, found.negative) == (1, 1, 1)
    assert found.residual_curvature is None
    assert found.gauss_newton_nullity is None
    assert found.rtol == 3 * 2.0**-52


def test_an_eigenvalue_at_the_tolerance_is_zero():
    hessian = torch.diag(torch.tensor([4.0, 1.0, -1.0, 1.5], dtype=torch.float64))
    found = hessian_null_space(hessian, rtol=0.25)
    assert (found.strict, found.negative, found.rtol) == (2, 0, 0.25)


def test_the_tolerance_is_relative_to_the_largest_magnitude_also_of_negative_eigenvalues():
    assert hessian_nullity(torch.diag(torch.tensor([-100.0, 1.0])), rtol=0.02) == 1


def squared_error_at(gradients, residual):
    """Curvature of half the sum of squares, with k inputs of one output."""
    k = gradients.shape[0]
    identity = torch.ones(k, 1, 1, dtype=torch.float64)
    slope = torch.full((k, 1), float(residual), dtype=torch.float64)
    return OutputCurvature(slope=slope, matrices=identity, factors=identity, residual_is_zero=not bool(residual))


def test_at_a_perfect_fit_the_nullity_is_that_of_the_gradients():
    gradients = torch.diag(torch.tensor([1.0, 1e-5, 1e-10], dtype=torch.float64))
    gradients = torch.cat([gradients, gradients.new_zeros(3, 2)], dim=1)
    found = hessian_null_space(
        gradients.mT @ gradients, gradients=gradients, curvature=squared_error_at(gradients, residual=0)
    )
    # Squared, 1e-20 would be rounding: it is read off the unsquared rows.
    assert (found.nullity, found.strict, found.gauss_newton_nullity) == (2, 2, 2)
    assert (found.negative, found.residual_curvature) == (0, 0.0)


@pytest.mark.parametrize("residual", [0, 1])
def test_with_zero_gradients_everything_is_flat_without_residual_curvature(residual):
    gradients, hessian = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    found = hessian_null_space(hessian, gradients=gradients, curvature=squared_error_at(gradients, residual=residual))
    assert (found.nullity, found.strict, found.gauss_newton_nullity) == (4, 4, 4)
    assert (found.negative, found.residual_curvature) == (0, 0.0)


def test_eigenvalues_below_the_residual_curvature_are_not_told_from_zero():
    gradients = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    residual = torch.diag(torch.tensor([0.0, 0.0, 1e-3, -1e-4], dtype=torch.float64))
    found = hessian_null_space(
        gradients.mT @ gradients + residual, gradients=gradients, curvature=squared_error_at(gradients, residual=1)
    )
    assert (found.nullity, found.strict, found.negative, found.gauss_newton_nullity) == (2, 0, 1, 2)
    torch.testing.assert_close(found.residual_curvature, 1e-3 / 4)


def test_a_residual_above_the_smallest_curvature_hides_it():
    gradients = torch.diag(torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64))
    residual = torch.diag(torch.tensor([0.0, 0.0, 0.02], dtype=torch.float64))
    found = hessian_null_space(
        gradients.mT @ gradients + residual, gradients=gradients, curvature=squared_error_at(gradients, residual=1)
    )
    assert (found.nullity, found.strict, found.gauss_newton_nullity) == (2, 0, 1)


def test_curvature_without_factors_is_judged_by_the_eigenvalues_of_the_gauss_newton_matrix():
    gradients = torch.eye(3, 4, dtype=torch.float64)
    matrices = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64).view(3, 1, 1)
    slope = torch.zeros(3, 1, dtype=torch.float64)
    curvature = OutputCurvature(slope=slope, matrices=matrices, factors=None, residual_is_zero=True)
    found = hessian_null_space(
        torch.diag(torch.tensor([1.0, -2.0, 0.0, 0.0], dtype=torch.float64)), gradients=gradients, curvature=curvature
    )
    assert (found.nullity, found.strict, found.negative, found.gauss_newton_nullity) == (2, 2, 1, 2)
    assert found.residual_curvature == 0.0


def test_hard_labels_leave_the_centred_directions_in_the_gauss_newton_part():
    logits = drawn(2, 3).requires_grad_()  # The outputs themselves are the parameters.
    targets = torch.tensor([0, 2])
    hessian = hessian_matrix(F.cross_entropy(logits, targets), [logits])
    curvature = output_curvature(lambda f: F.cross_entropy(f, targets), logits)
    found = hessian_null_space(hessian, gradients=torch.eye(6, dtype=torch.float64), curvature=curvature)
    # Outputs are linear in the parameters: H = P, of rank c - 1 per input.
    assert (found.gauss_newton_nullity, found.nullity, found.negative) == (2, 2, 0)


def test_a_quartic_minimum_is_flat_to_second_order():
    point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    hessian = hessian_matrix(point.square().sum().square(), [point])
    assert hessian_nullity(hessian) == 3


def test_beside_a_quartic_minimum_every_direction_is_curved():
    # r^4 has the Hessian 4 r^2 I + 8 x x^T: eigenvalues 12 r^2 and 4 r^2.
    point = torch.tensor([1e-4, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    hessian = hessian_matrix(point.square().sum().square(), [point])
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian) / 1e-8, torch.tensor([4.0, 4.0, 12.0]).double())
    assert hessian_nullity(hessian) == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_a_hessian_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="hessian must be a square matrix, got shape"):
        hessian_null_space(torch.zeros(shape))


@pytest.mark.parametrize("rtol", [0.0, 1.0, -0.5])
def test_a_tolerance_outside_of_the_unit_interval_is_refused(rtol):
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        hessian_nullity(torch.eye(2), rtol=rtol)


def test_gradients_without_curvature_are_refused():
    with pytest.raises(ValueError, match="gradients and curvature are needed together, got only one"):
        hessian_null_space(torch.eye(2), gradients=torch.eye(2))


def test_curvature_without_gradients_is_refused():
    curvature = output_curvature(lambda outputs: outputs.square().sum(), torch.ones(1, 1))
    with pytest.raises(ValueError, match="gradients and curvature are needed together, got only one"):
        hessian_null_space(torch.eye(2), curvature=curvature)


def test_eigenvalues_below_the_asymmetry_that_rounding_leaves_are_zero():
    # Eigenvalues 1, 1e-9 and 0; an antisymmetric part of norm 1e-8 shows rounding, of which 1e-9 is a part.
    hessian = torch.diag(torch.tensor([1.0, 1e-9, 0.0], dtype=torch.float64))
    assert hessian_null_space(hessian).strict == 1
    hessian[1, 2], hessian[2, 1] = 5e-9, -5e-9
    found = hessian_null_space(hessian)
    assert (found.strict, found.negative) == (2, 0)
