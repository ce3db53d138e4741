import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import StackedGradients, gram_of, kronecker_spectrum
from lightning_basin.functional.rank import (
    GRAM_RESOLUTION,
    gradient_rank,
    numerical_rank,
)
from lightning_basin.functional.spectrum import (
    SpectrumAccumulator,
    behavioral_gradient_rank,
    sketched_spectrum,
)
from tests.functional.matrices import (
    FLOAT32,
    integer_product,
    khatri_rao,
    rounded_to_float32,
    rows_by_loop,
    spectrum_of,
    wide_blocks,
)
from tests.networks import drawn, generator_of, with_singular_values


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


def test_gradients_without_parts_are_where_they_are_said_to_be():
    empty = StackedGradients((), (), num_rows=6, num_columns=4, device=torch.device("meta"))
    assert {
        tensor.device.type for tensor in (empty.rows(), gram_of(empty).whole(), empty.sketch(5, generator_of(0)))
    } == {"meta"}
    assert empty.weighted(torch.zeros(3, 1, 2, device="meta")).rows().device.type == "meta"


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


def test_spectrum_of_the_zero_matrix_is_zero():
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    spectrum = sketched_spectrum(zeros[:, :3], lambda: zeros, num_columns=6)
    assert spectrum.singular_values.tolist() == [0.0, 0.0, 0.0]


def test_small_matrices_are_decomposed_side_by_side():
    blocks = [khatri_rao(t=2), DenseGradients(drawn(15, 4, seed=5))]
    spectrum = spectrum_of(blocks)
    rows = np.concatenate([rows_by_loop(blocks[0]), blocks[1].matrix.numpy()], axis=1)
    assert spectrum.method == "svd"
    assert spectrum.rtol == 15 * 2.0**-52
    expected = torch.from_numpy(np.linalg.svd(rows, compute_uv=False))
    torch.testing.assert_close(spectrum.singular_values, expected)


def test_wide_matrices_of_full_rank_are_judged_by_the_gram_matrix():
    values = np.linspace(1, 2, 200)
    activations = with_singular_values(200, 250, np.ones(200), 0) * torch.from_numpy(values).unsqueeze(1)
    signal = torch.zeros(200, 1, 1, 261, dtype=torch.float64)
    signal[..., :2] = torch.tensor([3.0, 4.0])
    signal[::2] *= -1
    block = KhatriRaoGradients(activations.unsqueeze(1), signal)
    spectrum = spectrum_of([block])
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
    assert gradient_rank(accumulator.spectrum()).rank == np.linalg.matrix_rank(stacked.rows().numpy())


@pytest.mark.parametrize(("k", "c", "d_in", "d_out"), [(60, 3, 20, 3), (20, 3, 60, 3), (30, 4, 12, 9), (1, 1, 1, 1)])
def test_singular_values_of_a_linear_layer_at_the_end_are_products(k, c, d_in, d_out):
    activations, signal = drawn(k, 1, d_in), drawn(1, c, 1, d_out, seed=1)
    activations[: k // 3] = activations[0]
    block = KhatriRaoGradients(activations, signal.expand(k, c, 1, d_out).contiguous())
    rows = rows_by_loop(block)
    np.testing.assert_allclose(kronecker_spectrum(block), np.linalg.svd(rows, compute_uv=False), atol=1e-12)
    judged = gradient_rank(spectrum_of([block]))
    assert judged.rank == min(k - max(0, k // 3 - 1), d_in) * min(c, d_out)


def test_derivatives_that_differ_make_no_product():
    signals = drawn(1, 3, 1, 4).repeat(5, 1, 1, 1)
    signals[4, 0, 0, 0] += 2.0**-50
    assert kronecker_spectrum(KhatriRaoGradients(drawn(5, 1, 6), signals)) is None
    assert kronecker_spectrum(KhatriRaoGradients(drawn(5, 2, 6), drawn(1, 3, 2, 4).repeat(5, 1, 1, 1))) is None


def test_wide_dense_and_factored_matrices_are_added():
    blocks = wide_blocks(rank=90)
    mixed = [blocks[0], DenseGradients(blocks[1].rows())]
    spectrum = spectrum_of(mixed)
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 90


def test_accumulating_leaves_the_gram_matrices_of_the_parts_as_they_were():
    blocks = wide_blocks(rank=90)
    before = gram_of(blocks[0]).whole().clone()
    spectrum_of(blocks)
    assert torch.equal(gram_of(blocks[0]).whole(), before)


def test_the_leading_vector_is_found_where_it_is_asked_for_and_there_is_a_gram_matrix():
    def leading(rows, *, finds_leading):
        accumulator = SpectrumAccumulator(*rows.shape, generator_of(0), finds_leading=finds_leading)
        accumulator.add(DenseGradients(rows))
        return accumulator.spectrum().leading

    rows = drawn(120, 3000) / torch.arange(1, 121).view(-1, 1)
    vector = leading(rows, finds_leading=True)
    assert float((vector @ rows).norm()) == pytest.approx(np.linalg.svd(rows.numpy(), compute_uv=False)[0], rel=1e-4)
    assert leading(rows, finds_leading=False) is None
    assert leading(rows[:5], finds_leading=True) is None  # Decomposed as it stands.


def test_spectra_are_float64():
    assert spectrum_of(wide_blocks(rank=90)).singular_values.dtype == torch.float64


def test_integers_of_a_wide_gram_matrix_are_exact():
    # Entries 0 and 1: all products are integers below 2**53, the singular values sqrt(250 * 261) and zeros.
    ones = torch.ones(200, 1, 250, dtype=torch.float64)
    blocks = [KhatriRaoGradients(ones, ones.new_ones(200, 1, 1, width)) for width in (160, 101)]
    spectrum = spectrum_of(blocks)
    torch.testing.assert_close(float(spectrum.singular_values[0]), math.sqrt(200 * 250 * 261))
    assert numerical_rank(spectrum.singular_values, rtol=spectrum.rtol) == 1


@pytest.mark.parametrize("num_columns", [4, 100_000_000])
def test_a_spectrum_of_nothing_is_refused(num_columns):
    with pytest.raises(RuntimeError, match="columns must be added to be judged, got 0"):
        SpectrumAccumulator(2, num_columns, generator_of(0)).spectrum()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3)])
def test_rank_of_the_zero_matrix_is_zero(shape):
    assert behavioral_gradient_rank(torch.zeros(shape)) == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
def test_rank_of_an_empty_matrix_is_zero(shape):
    assert behavioral_gradient_rank(torch.zeros(shape)) == 0


@pytest.mark.parametrize("rank", [1, 2, 7, 12])
@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12), (13, 15)])
def test_rank_of_an_integer_product_is_its_inner_dimension(shape, rank):
    assert behavioral_gradient_rank(integer_product(*shape, rank, seed=rank)) == rank


@pytest.mark.parametrize("scale", [1.0, 2.0**-500, 2.0**-530, 2.0**-540, 2.0**-900])
def test_rank_does_not_depend_on_the_scale_whatever_squares_hold(scale):
    matrix = scale * integer_product(60, 300, 20, seed=1)
    assert gradient_rank(sketched_spectrum(matrix @ matrix.mT, lambda: matrix, num_columns=300)).rank == 20


def test_rank_of_a_float32_matrix_is_taken_in_float64():
    matrix = integer_product(30, 50, 11, seed=0).to(torch.float32)
    assert behavioral_gradient_rank(matrix) == 11


def test_behavioral_gradient_rank_uses_the_given_tolerance():
    assert behavioral_gradient_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-6])), rtol=1e-4) == 2


def test_gradients_with_another_number_of_rows_are_refused():
    accumulator = SpectrumAccumulator(3, 4, generator_of(0))
    with pytest.raises(ValueError, match="gradients must have 3 rows, got 2"):
        accumulator.add(DenseGradients(drawn(2, 4)))


def test_behavioral_gradient_rank_refuses_a_tolerance_of_one():
    with pytest.raises(ValueError, match=r"inside \(0, 1\), got 1.0"):
        behavioral_gradient_rank(torch.eye(2), rtol=1.0)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_gradients_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match=r"gradients must be a matrix \(rows, parameters\), got shape"):
        behavioral_gradient_rank(torch.zeros(shape))
