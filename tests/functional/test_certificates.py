import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.certificates import certified_rank, independent_rows, rows_independent_in_few_columns
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import StackedGradients, gram_of
from lightning_basin.functional.rank import gradient_rank
from lightning_basin.functional.spectrum import SpectrumAccumulator
from tests.functional.matrices import FLOAT32, khatri_rao, rounded_to_float32
from tests.networks import drawn, generator_of, with_singular_values


def certified(gradients, *, rtol, seed=0):
    return certified_rank([gradients], generator_of(seed), default_rtol=rtol)


def independent(matrix, **options):
    return independent_rows(gram_of(DenseGradients(matrix)), **options)


@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-6])
@pytest.mark.parametrize("size", [40, 300])
def test_full_rank_is_proved_with_its_gap(size, smallest):
    matrix = with_singular_values(size, 2 * size, np.geomspace(1.0, smallest, size), seed=0)
    found = independent(matrix)
    assert found.least < smallest
    # Powers converge from below.
    assert 0.9 < found.largest <= 1.0 + 1e-12
    assert 1.0 - 1e-3 < found.smallest / smallest < 1.3
    proved = found.rank(rtol=1e-12)
    assert (proved.rank, proved.method, proved.effective_rank) == (size, "cholesky", None)
    # The Gram matrix holds smallest**2 to eps.
    assert proved.gap == pytest.approx(math.log10(smallest / 2.0**-52), abs=0.2)
    assert set(proved.at) == {1e-12, 1e-8}


@pytest.mark.parametrize("smallest", [3e-8, 1e-10, 1e-14, 0.0])
@pytest.mark.parametrize("size", [40, 200])
def test_what_the_gram_matrix_cannot_resolve_is_never_called_full(size, smallest):
    values = np.append(np.geomspace(1.0, 1e-3, size - 1), smallest)
    for seed in range(20):
        assert independent(with_singular_values(size, 2 * size, values, seed=seed)) is None


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**-530, 2.0**-540, 2.0**-900])
def test_rounding_of_squares_to_denormal_numbers_is_never_called_full(scale):
    matrix = with_singular_values(40, 90, np.append(np.geomspace(1.0, 1e-3, 39), 0.0), seed=0)
    assert independent(scale * matrix) is None


@pytest.mark.parametrize(("resolution", "is_proved"), [(1e-5, True), (1e-3, False)])
def test_a_coarser_resolution_is_asked_of_every_singular_value(resolution, is_proved):
    matrix = with_singular_values(40, 90, np.geomspace(1.0, 1e-4, 40), seed=0)
    assert (independent(matrix, resolution=resolution) is not None) == is_proved


def test_the_zero_matrix_is_not_of_full_rank():
    assert independent(torch.zeros(3, 3, dtype=torch.float64)) is None


def test_independence_in_some_columns_counts_where_the_others_are_not_too_large():
    found = independent(with_singular_values(40, 90, np.geomspace(1.0, 1e-3, 40), seed=0))
    # The least is shown to be above 1e-7 or so: a norm of 1e5 then leaves open what 1e-12 of it hides.
    assert found.rank(rtol=1e-12, norm=10.0).rank == 40
    assert found.rank(rtol=1e-12, norm=1e5) is None
    # What is said of the whole is on the safe side.
    alone, among_others = found.rank(rtol=1e-12), found.rank(rtol=1e-12, norm=10.0)
    assert among_others.gap == pytest.approx(alone.gap - 1, abs=0.1)
    assert set(among_others.at) == {1e-12}


@pytest.mark.parametrize("seed", range(40))
def test_no_wrong_rank_in_large_spectra(seed):
    generator = np.random.default_rng(seed)
    rank = int(generator.integers(220, 301))
    values = 10.0 ** -generator.uniform(0, generator.uniform(1, 12), 300)
    values[rank:] *= 10.0 ** -generator.uniform(2, 14)
    values = np.sort(values)[::-1] / values.max()
    rtol = 10.0 ** -generator.uniform(8, 12)
    matrix = with_singular_values(300, 700, values, seed=seed)
    found = certified(DenseGradients(matrix), rtol=rtol, seed=seed)
    if found is not None:
        assert found.rank == (values > rtol).sum()
        assert all(count == (values > tolerance).sum() for tolerance, count in found.at.items())


@pytest.mark.parametrize("shape", [(60, 300), (60, 60), (60, 61), (300, 60)])
@pytest.mark.parametrize("rank", [1, 2, 30, 59, 60])
@pytest.mark.parametrize("smallest", [1.0, 1e-5, 1e-9])
def test_rank_and_gap_where_the_singular_values_leave_no_doubt(shape, rank, smallest):
    matrix = with_singular_values(*shape, np.geomspace(1.0, smallest, rank) if rank > 1 else [1.0], seed=rank)
    found = certified(DenseGradients(matrix), rtol=300 * 2.0**-52)
    last = smallest if rank > 1 else 1.0
    is_full = shape == (300, 60) and rank == 60 and smallest > 1e-7  # The Gram matrix of the columns proves this.
    assert (found.rank, found.method) == (rank, "cholesky" if is_full else "sketch")
    # What follows is rounding at eps, or some of it; the sketch may be off by 30.
    assert math.log10(last / 2.0**-52) - 3.5 < found.gap < math.log10(last / 2.0**-52) + math.log10(30)
    values = np.geomspace(1.0, smallest, rank) if rank > 1 else np.ones(1)
    assert all(count == (values > tolerance).sum() for tolerance, count in found.at.items())
    assert 1e-12 in found.at


def test_no_wrong_rank_in_two_hundred_spectra():
    generator = np.random.default_rng(0)
    proved = 0
    for seed in range(200):
        size, num_columns = 40, int(generator.integers(40, 200))
        rank = int(generator.integers(1, size + 1))
        values = 10.0 ** -generator.uniform(0, generator.uniform(1, 14), size)
        values[rank:] *= 10.0 ** -generator.uniform(2, 14)
        values = np.sort(values)[::-1] / values.max()
        rtol = 10.0 ** -generator.uniform(3, 12)
        matrix = with_singular_values(size, num_columns, values, seed=seed)
        found = certified(DenseGradients(matrix), rtol=rtol, seed=seed)
        if found is not None:
            proved += 1
            assert found.rank == (values > rtol).sum()
            assert all(count == (values > tolerance).sum() for tolerance, count in found.at.items())
    assert proved > 20  # Most of these spectra have no gap: it is the others that matter.


@pytest.mark.parametrize("gap", [1.0, 2.0])
def test_singular_values_near_the_tolerance_leave_doubt(gap):
    values = np.append(np.ones(30), np.full(10, 10.0**-6))
    for seed in range(10):
        matrix = with_singular_values(40, 90, values, seed=seed)
        assert certified(DenseGradients(matrix), rtol=1e-6 * gap, seed=seed) is None


@pytest.mark.parametrize("deficit", [0, 1, 7])
def test_rank_of_factored_gradients(deficit):
    generator = torch.Generator().manual_seed(3)
    activations = torch.randn(20, 1, 12, generator=generator, dtype=torch.float64)
    signals = torch.randn(20, 4, 1, 9, generator=generator, dtype=torch.float64)
    if deficit:  # Inputs that are the same have the same rows.
        activations[-deficit:], signals[-deficit:] = activations[0], signals[0]
    found = certified(KhatriRaoGradients(activations, signals), rtol=1e-12)
    assert found.rank == 80 - 4 * deficit  # 12 * 9 columns hold 80 generic rows.


def test_scale_changes_nothing():
    matrix = with_singular_values(40, 90, np.append(np.ones(30), np.zeros(10)), seed=0)
    found = [certified(DenseGradients(scale * matrix), rtol=1e-12) for scale in (1.0, 2.0**300, 2.0**-300)]
    assert {judged.rank for judged in found} == {30}
    assert found[0].gap == pytest.approx(found[1].gap) == pytest.approx(found[2].gap)


@pytest.mark.parametrize("shape", [(4, 5), (5, 4)])
def test_nothing_is_proved_of_zeros(shape):
    assert certified(DenseGradients(torch.zeros(shape, dtype=torch.float64)), rtol=1e-12) is None


@pytest.mark.parametrize(
    ("shape", "rank", "method"),
    [((300, 700), 300, "cholesky"), ((700, 300), 300, "cholesky"), ((700, 300), 40, "sketch"), ((300, 700), 40, None)],
)
def test_a_rank_without_the_spectrum_does_not_count_rounding_to_float32(shape, rank, method):
    accumulator = SpectrumAccumulator(*shape, generator_of(0), epsilon=FLOAT32)
    accumulator.add(rounded_to_float32(*shape, rank))
    proved = certified_rank(
        accumulator.matrices(),
        generator_of(0),
        default_rtol=accumulator.default_rtol,
        epsilon=FLOAT32,
        gram=accumulator.gram(),
    )
    if method is None:  # The eigenvalues of the Gram matrix are faster than any proof.
        assert proved is None
        return
    assert (proved.rank, proved.method) == (rank, method)
    assert set(proved.at) <= {1e-4, 1e-2}
    assert proved.gap == pytest.approx(math.log10(1e-2 / FLOAT32), abs=1.0)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(200, 9000), (100, 900), (400, 600), (600, 400)])
@pytest.mark.parametrize("deficit", [0, 1, 30])
@pytest.mark.parametrize("has_gram", [False, True])
def test_the_rank_that_is_proved_is_that_of_the_spectrum(num_rows, num_columns, deficit, has_gram):
    size = min(num_rows, num_columns)
    values = np.append(np.geomspace(1.0, 1e-3, size - deficit), np.full(deficit, 0.0))
    matrix = with_singular_values(size, max(num_rows, num_columns), values, seed=1)
    gradients = DenseGradients(matrix if num_rows == size else matrix.mT.contiguous())
    accumulator = SpectrumAccumulator(num_rows, num_columns, generator_of(0))
    accumulator.add(gradients)
    gram = gram_of(gradients) if has_gram else None
    proved = certified_rank([gradients], generator_of(0), default_rtol=accumulator.default_rtol, gram=gram)
    spectrum = accumulator.spectrum()
    assert gradient_rank(spectrum).rank == size - deficit
    # Without a Gram matrix of the rows, a sketch shows full rank as well.
    method = "sketch" if deficit or (not has_gram and num_rows < num_columns) else "cholesky"
    assert (proved.rank, proved.rtol, proved.method) == (size - deficit, spectrum.rtol, method)


def narrow_parts():
    return {
        "sequence": khatri_rao(k=6, c=4, t=9, d_in=40, d_out=30),
        "single": khatri_rao(k=6, c=4, t=1, d_in=40, d_out=30),
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
    columns = torch.split(torch.arange(1235), [1230, 5])
    stacked = StackedGradients(
        (parts["sequence"], DenseGradients(drawn(24, 5))),
        columns,
        num_rows=24,
        num_columns=1235,
        device=torch.device("cpu"),
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


def test_the_gap_of_denormal_numbers_is_their_distance_to_the_smallest_one():
    # The rows are 30 different unit vectors, times two outputs: all singular values are 2**-1060.
    activations = 2.0**-1060 * torch.eye(30, 40, dtype=torch.float64).view(30, 1, 40)
    signals = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2).expand(30, 2, 1, 2)
    found = rows_independent_in_few_columns(KhatriRaoGradients(activations, signals), generator_of(0))
    judged = found.rank(rtol=1e-12)
    assert (judged.rank, judged.largest) == (60, 2.0**-1060)
    assert judged.gap == pytest.approx(14 * math.log10(2.0))  # Down to 2**-1074.


@pytest.mark.parametrize("shapes", [[], [(2, 3), (3, 3)]], ids=["none", "unequal"])
def test_matrices_without_one_number_of_rows_are_refused(shapes):
    with pytest.raises(ValueError, match=r"matrices must have one number of rows, got \["):
        certified_rank([DenseGradients(drawn(*shape)) for shape in shapes], generator_of(0), default_rtol=1e-12)
