import math

import pytest
import torch

from lightning_basin.functional import activation_rank, numerical_rank, singular_values
from lightning_basin.functional.activations import activation_ranks
from lightning_basin.functional.rank import EPSILON
from tests.exact import exact_rank
from tests.functional.matrices import INFINITE
from tests.networks import drawn, with_singular_values

every_shape = pytest.mark.parametrize("shape", [(12, 12), (12, 90), (90, 12), (13, 15)])


def integer_activations(rows, columns, rank, seed=0):
    """Products of small integers, of at most this rank; the last input repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (rows, rank), generator=generator)
    left[-1] = left[0]
    return left @ torch.randint(-3, 4, (rank, columns), generator=generator)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(drawn(rows, columns, seed=seed)).Q


@every_shape
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_rank_of_integers_is_exact(shape, rank):
    activations = integer_activations(*shape, rank)
    assert activation_rank(activations)[0] == exact_rank(activations.numpy())


@every_shape
def test_rank_is_that_of_all_singular_values(shape):
    activations = drawn(*shape)
    activations[-1] = activations[0]
    assert activation_rank(activations)[0] == numerical_rank(singular_values(activations), rtol=1e-13)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 1e-12])
def test_gap_is_the_distance_to_rounding_whether_or_not_the_gram_matrix_resolves_it(smallest):
    rank, gap = activation_rank(with_singular_values(3, 60, [1.0, 0.1, smallest]))
    # The smallest singular value is off by some epsilon of the largest: 0.1 % at 1e-12, which is 4e-4 digits.
    assert (rank, gap) == (3, pytest.approx(math.log10(smallest / EPSILON), abs=1e-3))


def test_a_singular_value_that_a_gram_matrix_cannot_hold_counts():
    # Their squares differ by 1e-22, far below the epsilon of float64.
    activations = with_singular_values(2, 60, [1.0, 1e-11])
    assert [activation_rank(activations)[0], activation_rank(activations, rtol=1e-10)[0]] == [2, 1]


def test_gap_lies_between_the_last_singular_value_that_counts_and_the_next():
    rank, gap = activation_rank(with_singular_values(3, 60, [1.0, 1e-2, 1e-5]), rtol=1e-3)
    assert (rank, gap) == (2, pytest.approx(3.0, abs=1e-6))


def test_further_axes_belong_to_the_activation():
    assert activation_rank(torch.eye(6).reshape(6, 2, 3))[0] == 6


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (5, 0)])
def test_zero_activations_have_rank_zero_and_no_gap(shape):
    assert activation_rank(torch.zeros(shape)) == (0, None)


@pytest.mark.parametrize("value", [INFINITE, -INFINITE, float("nan"), 1e200])
def test_activations_that_cannot_be_squared_have_no_rank(value):
    activations = drawn(4, 9)
    activations[1, 2] = value
    assert activation_rank(activations) == (None, None)


@pytest.mark.parametrize("scale", [1e-200, 2.0**-540, 1e-20, 1e100])  # Squares are 0, or hold few digits.
def test_rank_does_not_depend_on_the_scale(scale):
    assert activation_rank(scale * integer_activations(9, 30, 4).double())[0] == 4
    assert activation_rank(scale * integer_activations(60, 300, 20).double())[0] == 20


def test_the_gap_of_denormal_numbers_is_their_distance_to_the_smallest_one():
    rank, gap = activation_rank(2.0**-1060 * torch.eye(3, 5, dtype=torch.float64))
    assert (rank, gap) == (3, pytest.approx(14 * math.log10(2.0)))  # Down to 2**-1074.


def test_in_float32_what_lies_below_its_rounding_does_not_count():
    activations = with_singular_values(2, 60, [1.0, 1e-9])
    assert activation_rank(activations, epsilon=torch.finfo(torch.float32).eps)[0] == 1


def test_activations_without_an_axis_of_inputs_are_refused():
    with pytest.raises(ValueError, match="one row per input"):
        activation_rank(torch.tensor(1.0))


@pytest.mark.parametrize("rtol", [0.0, 1.0])
def test_a_tolerance_outside_of_the_open_unit_interval_is_refused(rtol):
    with pytest.raises(ValueError, match="rtol must be a relative tolerance"):
        activation_rank(torch.eye(3), rtol=rtol)


def test_layers_of_different_sizes_have_the_ranks_of_each_alone():
    layers = [integer_activations(*shape) for shape in [(9, 30, 4), (9, 5, 3), (9, 30, 9), (9, 5, 5), (9, 9, 1)]]
    ranks = [rank for rank, _ in activation_ranks([layer.double() for layer in layers])]
    assert ranks == [exact_rank(layer.numpy()) for layer in layers] == [4, 3, 8, 5, 1]


def test_a_layer_that_is_not_finite_leaves_the_others_their_ranks():
    infinite = torch.tensor([[1.0, INFINITE], [0.0, 1.0], [0.0, 0.0]])
    layers = [
        torch.eye(3).double(),
        infinite.double(),
        torch.full((3, 4), 1e200, dtype=torch.float64),
        torch.eye(3).double(),
    ]
    assert [rank for rank, _ in activation_ranks(layers)] == [3, None, None, 3]


def test_no_layers_have_no_ranks():
    assert activation_ranks([]) == []
