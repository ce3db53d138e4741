import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import gram_of
from lightning_basin.functional.rank import default_rtol, gradient_rank, numerical_rank, singular_values
from lightning_basin.functional.spectrum import sketched_spectrum
from tests.functional.matrices import (
    FLOAT32,
    LAYOUTS,
    khatri_rao,
    rounded_to_float32,
    rows_by_loop,
    spectrum_of,
    wide_blocks,
)
from tests.networks import drawn, generator_of, with_singular_values


def test_no_sketch_is_taken_where_all_below_the_gram_matrix_is_rounding():
    gram = gram_of(rounded_to_float32(50, 200, 10)).whole()
    spectrum = sketched_spectrum(gram, sketch=None, num_columns=100, epsilon=FLOAT32)
    assert (gradient_rank(spectrum).rank, spectrum.method) == (10, "gram")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_khatri_rao_sketch_applies_the_rows_to_rank_one_vectors(layout):
    gradients = khatri_rao(**layout)
    sketch = gradients.sketch(40, generator_of(3)).numpy()
    rows = rows_by_loop(gradients)
    # Whatever the vectors were, the columns of the sketch lie in the column space of the rows.
    projector = rows @ np.linalg.pinv(rows)
    np.testing.assert_allclose(projector @ sketch, sketch, atol=1e-12 * np.abs(sketch).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_khatri_rao_sketch_products_is_the_gram_matrix(layout):
    gradients = khatri_rao(**layout, k=3, c=2)
    seeds = 800
    sketches = torch.stack([gradients.sketch(50, generator_of(seed)) for seed in range(seeds)])
    products = sketches @ sketches.mT
    rows = torch.from_numpy(rows_by_loop(gradients))
    error = products.std(0) / math.sqrt(seeds)
    # Five standard errors of the mean, estimated from the spread over seeds.
    assert bool(((products.mean(0) - rows @ rows.mT).abs() <= 5 * error).all())


def test_mean_of_dense_sketch_products_is_the_gram_matrix():
    matrix = drawn(4, 11)
    seeds = 400
    sketches = torch.stack([DenseGradients(matrix).sketch(6, generator_of(seed)) for seed in range(seeds)])
    products = sketches @ sketches.mT
    error = products.std(0) / math.sqrt(seeds)
    # Five standard errors of the mean, estimated from the spread over seeds.
    assert bool(((products.mean(0) - matrix @ matrix.mT).abs() <= 5 * error).all())


def test_mean_of_many_khatri_rao_sketches_is_the_gram_matrix_off_the_diagonal_too():
    gradients = khatri_rao(k=2, c=2, t=2)
    seeds = 400
    sketches = torch.stack([gradients.sketch(6, generator_of(seed)) for seed in range(seeds)])
    products = sketches @ sketches.mT
    rows = torch.from_numpy(rows_by_loop(gradients))
    error = products.std(0) / math.sqrt(seeds)
    # Five standard errors of the mean, estimated from the spread over seeds.
    assert bool(((products.mean(0) - rows @ rows.mT).abs() <= 5 * error).all())


@pytest.mark.parametrize("gradients", [khatri_rao(), DenseGradients(drawn(6, 10))], ids=["khatri-rao", "dense"])
def test_same_seed_gives_the_same_sketch(gradients):
    assert torch.equal(gradients.sketch(5, generator_of(1)), gradients.sketch(5, generator_of(1)))


@pytest.mark.parametrize("gradients", [khatri_rao(), DenseGradients(drawn(6, 10))], ids=["khatri-rao", "dense"])
def test_another_seed_gives_another_sketch(gradients):
    assert not torch.equal(gradients.sketch(5, generator_of(1)), gradients.sketch(5, generator_of(2)))


@pytest.mark.parametrize("gradients", [khatri_rao(t=3), DenseGradients(drawn(6, 10))], ids=["khatri-rao", "dense"])
def test_a_sketch_draws_from_its_generator_only(gradients):
    before = torch.random.get_rng_state()
    gradients.sketch(5, generator_of(1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("num_columns", [1, 2, 3, 6, 7, 8, 9, 30])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 9])
def test_dense_sketch_has_the_smaller_of_its_width_and_the_rank(width, num_columns):
    sketch = DenseGradients(drawn(10, width)).sketch(num_columns, generator_of(0))
    assert sketch.shape == (10, num_columns)
    assert np.linalg.matrix_rank(sketch.numpy()) == min(num_columns, width)


def test_dense_sketch_of_the_identity_keeps_full_rank():
    sketch = DenseGradients(torch.eye(16, dtype=torch.float64)).sketch(32, generator_of(0))
    assert np.linalg.matrix_rank(sketch.numpy()) == 16


def deficient_matrix(seed):
    """Random size, rank and spectrum, down to 1e-11 of the largest singular value; exact zeros after."""
    random = np.random.default_rng(seed)
    rows, columns = (int(size) for size in random.integers(4, 40, 2))
    rank = int(random.integers(1, min(rows, columns) + 1))
    smallest = random.uniform(-11, 0)
    values = np.sort(10.0 ** random.uniform(smallest, 0, rank))[::-1].copy()
    values[0], values[-1] = 1.0, 1.0 if rank == 1 else 10.0**smallest
    return with_singular_values(rows, columns, values, seed)


@pytest.mark.parametrize("seed", range(100))
def test_rank_of_a_dense_sketch_is_the_rank_of_the_matrix(seed):
    matrix = deficient_matrix(seed)
    sketch = DenseGradients(matrix).sketch(2 * matrix.shape[0], generator_of(seed))
    found = numerical_rank(singular_values(sketch), rtol=default_rtol(*sketch.shape))
    assert found == np.linalg.matrix_rank(matrix.numpy())


@pytest.mark.parametrize("seed", range(100))
def test_rank_of_a_khatri_rao_sketch_is_the_rank_of_the_matrix(seed):
    random = np.random.default_rng(1000 + seed)
    k, c, t, d_in, d_out = (int(size) for size in random.integers([4, 1, 1, 2, 2], [16, 4, 4, 9, 9]))
    smallest = random.uniform(-11, 0)
    inner = int(random.integers(1, min(k, d_in) + 1))
    values = np.concatenate([[1.0], 10.0 ** random.uniform(smallest, 0, inner - 1)])
    # One position with a deficient matrix of activations, and further ones that repeat it.
    activations = with_singular_values(k, d_in, values, 1000 + seed).unsqueeze(1).expand(k, t, d_in)
    gradients = KhatriRaoGradients(activations, drawn(k, c, t, d_out, seed=seed))
    sketch = gradients.sketch(2 * gradients.num_rows, generator_of(seed))
    found = numerical_rank(singular_values(sketch), rtol=default_rtol(*sketch.shape))
    assert found == np.linalg.matrix_rank(rows_by_loop(gradients))


# Frequencies repeat on columns at equal distances: without a random order 432 of 500 are left of the first, 692 of 1000
# of the last one.
@pytest.mark.parametrize(("num_rows", "num_columns", "distance"), [(500, 4096, 4), (1000, 8192, 2), (1000, 8192, 8)])
def test_a_dense_sketch_keeps_the_rank_of_columns_at_equal_distances(num_rows, num_columns, distance):
    matrix = torch.zeros(num_rows, num_columns, dtype=torch.float64)
    matrix[:, ::distance] = drawn(num_rows, num_columns // distance)
    sketch = DenseGradients(matrix).sketch(num_rows + num_rows // 20, generator_of(1))
    assert numerical_rank(singular_values(sketch), rtol=1e-10) == num_rows


@pytest.mark.parametrize("num_columns", [1, 3, 5, 8])
def test_a_narrow_khatri_rao_sketch_has_full_column_rank(num_columns):
    gradients = khatri_rao(k=10, c=1, d_in=4, d_out=2)
    sketch = gradients.sketch(num_columns, generator_of(0))
    assert np.linalg.matrix_rank(sketch.numpy()) == num_columns


def test_a_full_rank_gram_matrix_needs_no_sketch():
    matrix = drawn(6, 20)
    sketch = torch.full((6, 12), math.nan, dtype=torch.float64)
    spectrum = sketched_spectrum(matrix @ matrix.mT, lambda: sketch, num_columns=sketch.shape[1])
    assert spectrum.method == "gram"
    expected = torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False))
    torch.testing.assert_close(spectrum.singular_values, expected)


def test_the_spectrum_is_descending_across_the_seam_of_gram_and_sketch():
    matrix = with_singular_values(30, 80, np.logspace(-5, -9, 30) * 1e5, 1)
    gradients = DenseGradients(matrix)
    values = sketched_spectrum(
        gram_of(gradients).whole(), lambda: gradients.sketch(60, generator_of(1)), num_columns=60
    ).singular_values
    assert bool((values.diff() <= 0).all())


def test_default_tolerance_of_a_sketched_spectrum_is_that_of_the_sketch():
    matrix = drawn(3, 6)
    assert sketched_spectrum(matrix @ matrix.mT, lambda: matrix, num_columns=6).rtol == 6 * 2.0**-52


def test_wide_deficient_matrices_are_judged_by_the_sketch():
    spectrum = spectrum_of(wide_blocks(rank=120))
    assert spectrum.method == "gram+sketch"
    # 200 rows, 120 of them different.
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 120


def test_the_same_seed_gives_the_same_spectrum_of_wide_matrices():
    spectra = [spectrum_of(wide_blocks(rank=120), seed=7) for _ in range(2)]
    assert torch.equal(spectra[0].singular_values, spectra[1].singular_values)
