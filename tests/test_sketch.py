import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import StackedGradients, gram_of
from lightning_basin.functional.rank import (
    GRAM_RESOLUTION,
    default_rtol,
    gradient_rank,
    numerical_rank,
    singular_values,
)
from lightning_basin.functional.spectrum import (
    SpectrumAccumulator,
    gradient_spectrum,
    rows_independent_in_few_columns,
    sketched_spectrum,
)
from tests.networks import drawn, generator_of, with_singular_values


def khatri_rao(k=5, c=3, t=1, d_in=4, d_out=2, columns="weight and bias", seed=0):
    activations = drawn(k, t, d_in, seed=seed) if "weight" in columns else drawn(k, t, 0)
    if "bias" in columns:
        activations = torch.cat([activations, activations.new_ones(k, t, 1)], dim=2)
    return KhatriRaoGradients(activations, drawn(k, c, t, d_out, seed=seed + 1))


FLOAT32 = 2.0**-23


def rounded_to_float32(num_rows, num_columns, rank, smallest=1e-2):
    """A matrix of a rank whose singular values fall to ``smallest``, up to the rounding of its entries."""
    left, right = torch.linalg.qr(drawn(num_rows, rank)).Q, torch.linalg.qr(drawn(num_columns, rank, seed=1)).Q
    exact = (left * torch.logspace(0, math.log10(smallest), rank, dtype=torch.float64)) @ right.mT
    return DenseGradients(exact.float().double())


# Small, too large to be decomposed as it stands, and with more rows than columns.
@pytest.mark.parametrize(
    ("shape", "max_waiting", "method"),
    [((300, 700), 2**26, "gram"), ((300, 700), 1000, "gram"), ((700, 300), 2**26, "svd")],
)
@pytest.mark.parametrize("rank", [40, 300])
def test_rounding_to_float32_does_not_count(shape, max_waiting, method, rank):
    matrix = rounded_to_float32(*shape, rank)

    def accumulated(**options):
        accumulator = SpectrumAccumulator(*shape, generator_of(0), max_waiting=max_waiting, **options)
        accumulator.add(matrix)
        return accumulator

    found = gradient_rank(accumulated(epsilon=FLOAT32).spectrum())
    assert (found.rank, found.method) == (rank, method)
    num_columns = min(shape[1], 2 * shape[0])
    assert found.rtol == max(shape[0], num_columns) * FLOAT32
    # The smallest that counts is 1e-2; what follows is below the rounding, which takes its place.
    assert found.gap == pytest.approx(math.log10(1e-2 / FLOAT32), abs=0.1)
    assert set(found.at) == {1e-4, 1e-2}
    assert gradient_rank(accumulated().spectrum()).rank == 300  # In float64 it would.


@pytest.mark.parametrize(
    ("shape", "rank", "method"),
    [((300, 700), 300, "cholesky"), ((700, 300), 300, "cholesky"), ((700, 300), 40, "sketch"), ((300, 700), 40, None)],
)
def test_a_rank_without_the_spectrum_does_not_count_rounding_to_float32(shape, rank, method):
    accumulator = SpectrumAccumulator(*shape, generator_of(0), epsilon=FLOAT32)
    accumulator.add(rounded_to_float32(*shape, rank))
    proved = accumulator.proved_rank()
    if method is None:  # The eigenvalues of the Gram matrix are faster than any proof.
        assert proved is None
        return
    assert (proved.rank, proved.method) == (rank, method)
    assert set(proved.at) <= {1e-4, 1e-2}
    assert proved.gap == pytest.approx(math.log10(1e-2 / FLOAT32), abs=1.0)


def test_no_sketch_is_taken_where_all_below_the_gram_matrix_is_rounding():
    gram = gram_of(rounded_to_float32(50, 200, 10)).whole()
    spectrum = sketched_spectrum(gram, sketch=None, num_columns=100, epsilon=FLOAT32)
    assert (gradient_rank(spectrum).rank, spectrum.method) == (10, "gram")


def test_gradients_without_parts_are_where_they_are_said_to_be():
    empty = StackedGradients((), (), num_rows=6, num_columns=4, device=torch.device("meta"))
    assert {
        tensor.device.type for tensor in (empty.rows(), gram_of(empty).whole(), empty.sketch(5, generator_of(0)))
    } == {"meta"}
    assert empty.weighted(torch.zeros(3, 1, 2, device="meta")).rows().device.type == "meta"


def rows_by_loop(gradients):
    """Row (x, j): sum over t of b outer a."""
    activations, signals = gradients.activations.numpy(), gradients.output_gradients.numpy()
    rows = []
    for x in range(signals.shape[0]):
        for j in range(signals.shape[1]):
            outer = sum(np.outer(signals[x, j, t], activations[x, t]) for t in range(signals.shape[2]))
            rows.append(outer.ravel())
    return np.stack(rows)


LAYOUTS = [
    pytest.param({"t": t, "columns": columns}, id=f"t={t}, {columns}")
    for t in (1, 4)
    for columns in ("weight and bias", "weight", "bias")
]


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


def test_singular_values_above_the_resolution_of_the_gram_matrix_are_those_of_the_matrix():
    values = np.logspace(0, -12, 13)
    matrix = with_singular_values(20, 60, values, 0)
    gradients = DenseGradients(matrix)
    spectrum = sketched_spectrum(
        gram_of(gradients).whole(), lambda: gradients.sketch(40, generator_of(0)), num_columns=40
    )
    resolved = values[values > 5 * GRAM_RESOLUTION]
    # An eigenvalue's error of n eps moves a singular value s by n eps / s / 2: at 1e-6 by 2e-3 of it for n = 20.
    np.testing.assert_allclose(spectrum.singular_values.numpy()[: len(resolved)], resolved, rtol=2e-3)


def test_a_spectrum_over_twelve_digits_is_followed_to_its_end():
    values = np.logspace(0, -12, 13)
    matrix = with_singular_values(20, 60, values, 0)
    gradients = DenseGradients(matrix)
    spectrum = sketched_spectrum(
        gram_of(gradients).whole(), lambda: gradients.sketch(40, generator_of(0)), num_columns=40
    )
    assert spectrum.method == "gram+sketch"
    assert spectrum.singular_values.shape == (20,)
    found = spectrum.singular_values.numpy()
    # Below the Gram matrix a sketch with twice the rows is right to a small factor; zeros follow at rounding.
    assert np.abs(np.log10(found[:13] / values)).max() < 0.5
    assert found[13:].max() < spectrum.rtol


def test_the_spectrum_is_descending_across_the_seam_of_gram_and_sketch():
    matrix = with_singular_values(30, 80, np.logspace(-5, -9, 30) * 1e5, 1)
    gradients = DenseGradients(matrix)
    values = sketched_spectrum(
        gram_of(gradients).whole(), lambda: gradients.sketch(60, generator_of(1)), num_columns=60
    ).singular_values
    assert bool((values.diff() <= 0).all())


def test_spectrum_of_the_zero_matrix_is_zero():
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    spectrum = sketched_spectrum(zeros[:, :3], lambda: zeros, num_columns=6)
    assert spectrum.singular_values.tolist() == [0.0, 0.0, 0.0]


def test_default_tolerance_of_a_sketched_spectrum_is_that_of_the_sketch():
    matrix = drawn(3, 6)
    assert sketched_spectrum(matrix @ matrix.mT, lambda: matrix, num_columns=6).rtol == 6 * 2.0**-52


def test_small_matrices_are_decomposed_side_by_side():
    blocks = [khatri_rao(t=2), DenseGradients(drawn(15, 4, seed=5))]
    spectrum = gradient_spectrum(blocks, generator=generator_of(0))
    rows = np.concatenate([rows_by_loop(blocks[0]), blocks[1].matrix.numpy()], axis=1)
    assert spectrum.method == "svd"
    assert spectrum.rtol == 15 * 2.0**-52
    expected = torch.from_numpy(np.linalg.svd(rows, compute_uv=False))
    torch.testing.assert_close(spectrum.singular_values, expected)


def wide_blocks(num_rows=200, rank=None, seed=0):
    """Two layers with 250 x 160 and 250 x 101 entries: 200**2 * 65250 is above what is decomposed as it stands."""
    activations = drawn(num_rows, 1, 250, seed=seed)
    signals = [drawn(num_rows, 1, 1, width, seed=seed + width) for width in (160, 101)]
    if rank is not None:  # Inputs beyond the first ``rank`` repeat them.
        repeated = torch.arange(num_rows) % rank
        activations, signals = activations[repeated], [signal[repeated] for signal in signals]
    return [KhatriRaoGradients(activations, signal) for signal in signals]


def test_wide_matrices_of_full_rank_are_judged_by_the_gram_matrix():
    values = np.linspace(1, 2, 200)
    activations = with_singular_values(200, 250, np.ones(200), 0) * torch.from_numpy(values).unsqueeze(1)
    signal = torch.zeros(200, 1, 1, 261, dtype=torch.float64)
    signal[..., :2] = torch.tensor([3.0, 4.0])
    signal[::2] *= -1
    block = KhatriRaoGradients(activations.unsqueeze(1), signal)
    spectrum = gradient_spectrum([block], generator=generator_of(0))
    assert spectrum.method == "gram"
    # Orthogonal rows of activations with these norms, times a signal of norm 5.
    torch.testing.assert_close(spectrum.singular_values, torch.from_numpy(5 * values[::-1].copy()))


@pytest.mark.parametrize(("k", "c", "t"), [(100, 7, 1), (90, 7, 2), (3, 211, 1), (1, 640, 1), (640, 1, 1)])
def test_large_gram_matrices_are_symmetric_products(k, c, t):
    parts = (khatri_rao(k=k, c=c, t=t), DenseGradients(drawn(k * c, 5)))
    columns = (torch.arange(10), torch.arange(10, 15))
    stacked = StackedGradients(parts, columns, num_rows=k * c, num_columns=15, device=torch.device("cpu"))
    for gradients in (*parts, stacked):
        rows = gradients.rows().numpy()
        np.testing.assert_allclose(gram_of(gradients).whole().numpy(), rows @ rows.T, rtol=1e-12, atol=1e-12)
    accumulator = SpectrumAccumulator(k * c, 30, generator_of(0))
    accumulator.add(stacked)
    accumulator.add(stacked, lambda: gram_of(stacked))
    assert accumulator.proved_rank() is None or accumulator.proved_rank().rank == 15


@pytest.mark.parametrize(("k", "c", "d_in", "d_out"), [(60, 3, 20, 3), (20, 3, 60, 3), (30, 4, 12, 9), (1, 1, 1, 1)])
def test_singular_values_of_a_linear_layer_at_the_end_are_products(k, c, d_in, d_out):
    activations, signal = drawn(k, 1, d_in), drawn(1, c, 1, d_out, seed=1)
    activations[: k // 3] = activations[0]
    block = KhatriRaoGradients(activations, signal.expand(k, c, 1, d_out).contiguous())
    rows = rows_by_loop(block)
    np.testing.assert_allclose(block.kronecker_spectrum(), np.linalg.svd(rows, compute_uv=False), atol=1e-12)
    judged = gradient_rank(gradient_spectrum([block], generator=generator_of(0)))
    assert judged.rank == min(k - max(0, k // 3 - 1), d_in) * min(c, d_out)


def test_derivatives_that_differ_make_no_product():
    signals = drawn(1, 3, 1, 4).repeat(5, 1, 1, 1)
    signals[4, 0, 0, 0] += 2.0**-50
    assert KhatriRaoGradients(drawn(5, 1, 6), signals).kronecker_spectrum() is None
    assert KhatriRaoGradients(drawn(5, 2, 6), drawn(1, 3, 2, 4).repeat(5, 1, 1, 1)).kronecker_spectrum() is None


def test_wide_deficient_matrices_are_judged_by_the_sketch():
    spectrum = gradient_spectrum(wide_blocks(rank=120), generator=generator_of(0))
    assert spectrum.method == "gram+sketch"
    # 200 rows, 120 of them different.
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 120


def test_the_same_seed_gives_the_same_spectrum_of_wide_matrices():
    spectra = [gradient_spectrum(wide_blocks(rank=120), generator=generator_of(7)) for _ in range(2)]
    assert torch.equal(spectra[0].singular_values, spectra[1].singular_values)


def test_wide_dense_and_factored_matrices_are_added():
    blocks = wide_blocks(rank=90)
    mixed = [blocks[0], DenseGradients(blocks[1].rows())]
    spectrum = gradient_spectrum(mixed, generator=generator_of(0))
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 90


def test_accumulating_leaves_the_gram_matrices_of_the_parts_as_they_were():
    blocks = wide_blocks(rank=90)
    before = gram_of(blocks[0]).whole().clone()
    gradient_spectrum(blocks, generator=generator_of(0))
    assert torch.equal(gram_of(blocks[0]).whole(), before)


def test_spectra_are_float64():
    assert gradient_spectrum(wide_blocks(rank=90), generator=generator_of(0)).singular_values.dtype == torch.float64


def test_integers_of_a_wide_gram_matrix_are_exact():
    # Entries 0 and 1: all products are integers below 2**53, the singular values sqrt(250 * 261) and zeros.
    ones = torch.ones(200, 1, 250, dtype=torch.float64)
    blocks = [KhatriRaoGradients(ones, ones.new_ones(200, 1, 1, width)) for width in (160, 101)]
    spectrum = gradient_spectrum(blocks, generator=generator_of(0))
    torch.testing.assert_close(float(spectrum.singular_values[0]), math.sqrt(200 * 250 * 261))
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 1


def test_matrices_with_different_numbers_of_rows_are_refused():
    blocks = [DenseGradients(torch.zeros(2, 3)), DenseGradients(torch.zeros(3, 3))]
    with pytest.raises(ValueError, match=r"must share one number of rows, got \[2, 3\]"):
        gradient_spectrum(blocks, generator=generator_of(0))


def test_no_matrix_at_all_is_refused():
    with pytest.raises(ValueError, match=r"must share one number of rows, got \[\]"):
        gradient_spectrum([], generator=generator_of(0))


@pytest.mark.parametrize("num_columns", [4, 100_000_000])
def test_a_spectrum_of_nothing_is_refused(num_columns):
    with pytest.raises(RuntimeError, match="columns must be added to be judged, got 0"):
        SpectrumAccumulator(2, num_columns, generator_of(0)).spectrum()


# Ranks that are proved without singular values.


@pytest.mark.parametrize(("num_rows", "num_columns"), [(200, 90000), (100, 900), (400, 600), (600, 400)])
@pytest.mark.parametrize("deficit", [0, 1, 30])
@pytest.mark.parametrize("is_postponed", [False, True])
def test_the_rank_that_is_proved_is_that_of_the_spectrum(num_rows, num_columns, deficit, is_postponed):
    size = min(num_rows, num_columns)
    values = np.append(np.geomspace(1.0, 1e-3, size - deficit), np.full(deficit, 0.0))
    matrix = with_singular_values(size, max(num_rows, num_columns), values, seed=1)
    accumulator = SpectrumAccumulator(num_rows, num_columns, generator_of(0), is_postponed=is_postponed)
    accumulator.add(DenseGradients(matrix if num_rows == size else matrix.mT.contiguous()))
    proved, spectrum = accumulator.proved_rank(), accumulator.spectrum()
    assert gradient_rank(spectrum).rank == size - deficit
    is_tiny = num_rows == 100  # Where singular values are as fast.
    # Without a Gram matrix of the rows, a sketch shows full rank as well.
    method = "sketch" if deficit or (is_postponed and num_rows < num_columns) else "cholesky"
    assert proved is None if is_tiny else proved.method == method
    assert proved is None or (proved.rank, proved.rtol) == (size - deficit, spectrum.rtol)


@pytest.mark.parametrize("is_postponed", [False, True])
def test_a_rank_is_proved_from_sketches_that_could_not_wait(is_postponed):
    matrix = with_singular_values(300, 40000, np.append(np.ones(250), np.zeros(50)), seed=2)
    accumulator = SpectrumAccumulator(300, 40000, generator_of(0), max_waiting=300 * 15000, is_postponed=is_postponed)
    for block in matrix.split(10000, dim=1):
        accumulator.add(DenseGradients(block))
    assert accumulator.proved_rank().rank == gradient_rank(accumulator.spectrum()).rank == 250


# Independent rows in few columns.


def narrow_parts():
    return {
        "sequence": khatri_rao(k=6, c=4, t=9, d_in=40, d_out=30),
        "single": khatri_rao(k=6, c=4, t=1, d_in=40, d_out=30),
        "dense": DenseGradients(drawn(24, 1201)),
    }


@pytest.mark.parametrize("kind", narrow_parts())
def test_few_columns_are_the_whole_times_orthonormal_vectors(kind):
    gradients = narrow_parts()[kind]
    narrow = gradients.narrowed(48, generator_of(0))
    assert 48 <= narrow.num_columns < gradients.num_columns
    assert narrow.gram_work < gradients.gram_work / 2
    # narrow = rows @ S: S from as many rows of a full set, and at right angles.
    left_out = gram_of(gradients).whole() - gram_of(narrow).whole()
    assert float(torch.linalg.eigvalsh(left_out).min()) > -1e-9
    assert int((torch.linalg.eigvalsh(gram_of(narrow).whole()) > 1e-9).sum()) == 24


@pytest.mark.parametrize("kind", narrow_parts())
def test_narrowed_gradients_mix_columns_as_one_orthonormal_matrix(kind):
    """Narrowing is linear in the rows: what it makes of the unit matrix is the matrix it multiplies by."""
    if kind == "dense":
        mixing = DenseGradients(torch.eye(100, dtype=torch.float64)).narrowed(8, generator_of(1)).matrix[:96]
    else:
        # One input whose only activations and signals are unit vectors gives the units of the matrix.
        d_in, d_out = 6, 5
        activations = torch.eye(d_in, dtype=torch.float64).repeat_interleave(d_out, 0).view(d_in * d_out, 1, d_in)
        signals = torch.eye(d_out, dtype=torch.float64).repeat(d_in, 1).view(d_in * d_out, 1, 1, d_out)
        if kind == "sequence":  # A position without effect.
            activations, signals = (torch.cat([part, torch.zeros_like(part)], -2) for part in (activations, signals))
        mixing = KhatriRaoGradients(activations, signals).narrowed(8, generator_of(1)).rows()
    torch.testing.assert_close(mixing.mT @ mixing, torch.eye(mixing.shape[1], dtype=torch.float64))


def test_independent_rows_are_found_in_few_columns_of_each_part():
    parts = narrow_parts()
    columns = torch.split(torch.arange(2431), [1230, 1201])
    stacked = StackedGradients(
        (parts["sequence"], parts["dense"]), columns, num_rows=24, num_columns=2431, device=torch.device("cpu")
    )
    for gradients in (*parts.values(), stacked):
        found = rows_independent_in_few_columns(gradients, generator_of(0))
        exact = torch.linalg.svdvals(gradients.rows())
        assert found.num_rows == 24
        assert found.least < found.smallest < float(exact[-1]) < float(exact[0])
        assert found.largest < float(exact[0])


def test_rows_that_depend_on_each_other_are_not_independent_in_few_columns():
    whole = narrow_parts()["sequence"]
    activations, signals = whole.activations.clone(), whole.output_gradients.clone()
    activations[-1], signals[-1] = activations[0], signals[0]
    assert rows_independent_in_few_columns(KhatriRaoGradients(activations, signals), generator_of(0)) is None


def test_few_columns_are_not_looked_at_where_all_cost_no_more():
    assert rows_independent_in_few_columns(DenseGradients(drawn(24, 60)), generator_of(0)) is None


def test_a_kronecker_product_shows_independent_rows_by_its_factors():
    activations = drawn(30, 40).view(30, 1, 40)
    signals = drawn(4, 6).view(1, 4, 1, 6).expand(30, 4, 1, 6)
    found = rows_independent_in_few_columns(KhatriRaoGradients(activations, signals), generator_of(0))
    exact = torch.linalg.svdvals(KhatriRaoGradients(activations, signals).rows())
    assert found.least < found.smallest == pytest.approx(float(exact[-1]), rel=1e-9)
    assert found.largest == pytest.approx(float(exact[0]), rel=1e-9)
    activations = torch.cat([activations[:-1], activations[:1]])
    assert rows_independent_in_few_columns(KhatriRaoGradients(activations, signals), generator_of(0)) is None
