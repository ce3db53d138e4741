import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import gram_of
from tests.functional.matrices import LAYOUTS, khatri_rao, rows_by_loop
from tests.networks import drawn


@pytest.mark.parametrize("layout", LAYOUTS)
def test_khatri_rao_rows_are_sums_of_outer_products(layout):
    gradients = khatri_rao(**layout)
    torch.testing.assert_close(gradients.rows(), torch.from_numpy(rows_by_loop(gradients)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_khatri_rao_shape_is_that_of_its_rows(layout):
    gradients = khatri_rao(**layout)
    assert (gradients.num_rows, gradients.num_columns) == rows_by_loop(gradients).shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_khatri_rao_gram_holds_the_products_of_rows(layout):
    gradients = khatri_rao(**layout)
    rows = rows_by_loop(gradients)
    torch.testing.assert_close(gram_of(gradients).whole(), torch.from_numpy(rows @ rows.T))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_khatri_rao_combination_weighs_the_rows(layout):
    gradients = khatri_rao(**layout)
    weights = drawn(15, seed=9)
    expected = torch.from_numpy(weights.numpy() @ rows_by_loop(gradients))
    torch.testing.assert_close(gradients.combination(weights), expected)


def test_dense_gradients_are_their_matrix():
    matrix = drawn(3, 5)
    gradients = DenseGradients(matrix)
    assert (gradients.num_rows, gradients.num_columns) == (3, 5)
    assert torch.equal(gradients.rows(), matrix)
    np.testing.assert_allclose(
        gram_of(gradients).whole().numpy(), matrix.numpy() @ matrix.numpy().T, rtol=1e-13, atol=1e-13
    )
    weights = drawn(3, seed=1)
    np.testing.assert_allclose(gradients.combination(weights).numpy(), weights.numpy() @ matrix.numpy(), rtol=1e-13)
