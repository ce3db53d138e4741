import numpy as np
import pytest
import torch

from lightning_basin.functional import gram as gram_module
from lightning_basin.functional.certificates import independent_rows
from lightning_basin.functional.gram import GramMatrix, leading_eigenvector

SIZES = [1, 2, 63, 64, 65, 127, 128, 129, 513, 700]


def integers(rows, columns, *, seed=0):
    """Small integers: their products are exact."""
    return np.random.default_rng(seed).integers(-4, 5, (rows, columns))


def as_tensor(matrix):
    return torch.from_numpy(matrix.astype(np.float64))


def gram_of_integers(size):
    rows = integers(size, size + 3)
    gram = GramMatrix(size)
    gram.add_products(as_tensor(rows))
    return gram, rows @ rows.T


@pytest.mark.parametrize("size", SIZES)
def test_products_of_all_pairs_of_rows_add_up(size):
    first, second = integers(size, 3), integers(size, 5, seed=1)
    exact = first @ first.T + second @ second.T
    gram, other = GramMatrix(size), GramMatrix(size)
    gram.add_products(as_tensor(first))
    other.add_products(as_tensor(second))
    gram.add(other)
    assert np.array_equal(gram.whole().numpy(), exact)
    other.add_products(as_tensor(first))
    assert np.array_equal(other.whole().numpy(), exact)
    into_nothing = GramMatrix(size)
    into_nothing.add(other)
    assert np.array_equal(into_nothing.whole().numpy(), exact)
    into_nothing.add(GramMatrix(size))
    assert np.array_equal(into_nothing.whole().numpy(), exact)


@pytest.mark.parametrize(("k", "c"), [(1, 1), (1, 200), (7, 3), (70, 7), (640, 1), (3, 211), (100, 13)])
def test_scaled_products_are_products_times_the_number_of_their_inputs(k, c):
    first, second = integers(k * c, 3), integers(k * c, 2, seed=1)
    scales = integers(k, k, seed=2)
    scales = scales + scales.T
    exact = (first @ first.T) * np.kron(scales, np.ones((c, c), dtype=int))
    gram = GramMatrix(k * c)
    gram.add_scaled_products(as_tensor(first), as_tensor(scales))
    assert np.array_equal(gram.whole().numpy(), exact)
    # Blocks of whole inputs and of any rows are not the same blocks.
    mixed = GramMatrix(k * c)
    mixed.add_products(as_tensor(second))
    mixed.add_scaled_products(as_tensor(first), as_tensor(scales))
    assert np.array_equal(mixed.whole().numpy(), exact + second @ second.T)


@pytest.mark.parametrize("size", SIZES)
def test_norm_and_products_with_vectors(size):
    gram, exact = gram_of_integers(size)
    vectors = integers(size, 3, seed=2)
    assert float(gram.norm) == pytest.approx(np.linalg.norm(exact), rel=1e-14)
    assert np.array_equal(gram.times(as_tensor(vectors)).numpy(), exact @ vectors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_the_factor_inverts_the_shifted_matrix(size, shift):
    gram, exact = gram_of_integers(size)
    shifted = exact - shift * np.eye(size)
    vectors = integers(size, 2, seed=2)
    found = gram.factor(shift=shift).solve(as_tensor(vectors)).numpy()
    residual = np.abs(shifted @ found - vectors).max()
    assert residual <= 1e-13 * np.abs(shifted).sum(1).max() * np.abs(found).max()
    assert np.array_equal(gram.whole().numpy(), exact)  # It is as it was.


@pytest.mark.parametrize("size", SIZES)
def test_there_is_no_factor_of_what_is_not_positive(size):
    gram, exact = gram_of_integers(size)
    smallest, largest = np.linalg.eigvalsh(exact)[[0, -1]]
    assert gram.factor(shift=smallest + 1e-12 * largest).failed
    assert gram.factor(shift=2.0 * largest).failed
    assert not gram.factor(shift=smallest - 1e-11 * largest).failed


def test_nothing_is_the_zero_matrix():
    gram = GramMatrix(3)
    assert (float(gram.norm), bool(gram.factor().failed)) == (0.0, True)
    assert not gram.times(torch.ones(3, 2, dtype=torch.float64)).any()
    assert not gram.whole().any()
    gram = GramMatrix(0)
    gram.add_products(torch.zeros(0, 4, dtype=torch.float64))
    assert gram.whole().shape == (0, 0)


@pytest.mark.parametrize("size", [1, 129, 300])
def test_one_product_is_that_of_all_tiles(size, monkeypatch):
    monkeypatch.setattr(gram_module, "is_cached", lambda device: False)  # As on an accelerator.
    gram, exact = gram_of_integers(size)
    vectors = integers(size, 3, seed=2)
    assert np.array_equal(gram.times(as_tensor(vectors)).numpy(), exact @ vectors)
    signals, scales = integers(size, 4, seed=3), np.full((1, 1), 2)
    gram.add_scaled_products(as_tensor(signals), as_tensor(scales))
    assert np.array_equal(gram.whole().numpy(), exact + 2 * signals @ signals.T)


@pytest.mark.parametrize("is_cached", [True, False])
def test_rows_that_depend_on_each_other_are_not_proved_independent_on_any_device(is_cached, monkeypatch):
    monkeypatch.setattr(gram_module, "is_cached", lambda device: is_cached)
    rows = integers(40, 60)
    for matrix, is_independent in ((rows, True), (np.concatenate([rows[:-1], rows[:1]]), False), (0 * rows, False)):
        gram = GramMatrix(40)
        gram.add_products(as_tensor(matrix))
        assert (independent_rows(gram) is not None) == is_independent


@pytest.mark.parametrize("size", [1, 3, 40, 300])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_the_leading_eigenvector_has_the_largest_product(size, scale):
    rows = np.random.default_rng(size).normal(size=(size, size + 5)) / np.arange(1, size + 1)[:, None]
    gram = GramMatrix(size)
    gram.add_products(as_tensor(np.sqrt(scale) * rows))
    vector = leading_eigenvector(gram).numpy()
    largest = np.linalg.svd(rows, compute_uv=False)[0]
    assert np.linalg.norm(vector) == pytest.approx(1.0)
    assert np.linalg.norm(vector @ rows) == pytest.approx(largest, rel=1e-4)


def test_a_gram_matrix_of_zeros_has_some_leading_vector():
    assert float(leading_eigenvector(GramMatrix(30)).norm()) == pytest.approx(1.0)
