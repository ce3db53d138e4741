"""Closed forms: what the record must say where mathematics says it first."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.functional import behavioral_gradients, hessian_matrix
from tests.exact import exact_rank, integers
from tests.measure.records import SEEDS, generic
from tests.models import (
    Chain,
    Crossing,
    Parabolas,
    SquaredDistances,
    fourth_powers,
    integer_inputs,
    sum_of_squares,
    with_integer_weights,
)
from tests.networks import drawn, generator_of


def deep_linear(*widths: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)))


ARCHITECTURES = [
    ((4, 3, 5), 12),
    ((5, 2, 4), 12),
    ((3, 6, 2), 12),
    ((3, 5, 1), 10),
    ((4, 3, 3, 4), 12),
    ((3, 3, 3, 3, 3), 10),
    ((5, 4, 2, 4, 3), 14),
    ((6, 4, 3), 3),  # fewer inputs than input dimensions: the rank of the data is 3
    ((4, 1, 4), 9),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("widths", "num_inputs"), ARCHITECTURES)
def test_rank_of_a_deep_linear_network_is_q_times_r_plus_k_minus_q(widths, num_inputs, seed):
    # Singh, Bachmann and Hofmann (2021): q (r + K - q) with r the rank of the data, q the narrowest of all.
    inputs = drawn(num_inputs, widths[0], seed=seed)
    r, k = min(num_inputs, widths[0]), widths[-1]
    q = min(r, *widths[1:])
    assert measure_basin(generic(deep_linear(*widths), seed), inputs).gradient_rank == q * (r + k - q)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("widths", "num_inputs"), ARCHITECTURES)
def test_hessian_of_a_deep_linear_network_has_the_rank_of_the_closed_form(widths, num_inputs, seed):
    # The same: 2 q M + q (r + K) - L q**2 with M the sum of the hidden widths, L layers, generic targets.
    inputs, targets = drawn(num_inputs, widths[0], seed=seed), drawn(num_inputs, widths[-1], seed=seed + 100)
    r, k, hidden, depth = min(num_inputs, widths[0]), widths[-1], sum(widths[1:-1]), len(widths) - 1
    q = min(r, *widths[1:])
    record = measure_basin(generic(deep_linear(*widths), seed), inputs, targets, loss_fn=sum_of_squares)
    assert record.num_parameters - record.hessian_nullity_strict == 2 * q * hidden + q * (r + k) - depth * q**2


@pytest.mark.parametrize(("widths", "num_inputs"), [case for case in ARCHITECTURES if case[0][-1] > 1])
def test_gauss_newton_part_of_cross_entropy_has_one_output_less(widths, num_inputs):
    # Softmax takes out one direction of the outputs: K - 1 in place of K, in q too.
    inputs = drawn(num_inputs, widths[0])
    r, k = min(num_inputs, widths[0]), widths[-1] - 1
    q = min(r, *widths[1:-1], k)
    targets = torch.arange(num_inputs) % widths[-1]
    # Small logits: what is tested is an algebraic identity, not saturation.
    record = measure_basin(
        generic(deep_linear(*widths), 0), 0.05 * inputs, targets, loss_fn=nn.functional.cross_entropy
    )
    assert record.num_parameters - record.gauss_newton_nullity == q * (r + k - q)


def integer_matrix_of_rank(rows: int, columns: int, rank: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(-2, 3, (rows, rank)) @ random.integers(-2, 3, (rank, columns))


def flag_rank(weights: list[np.ndarray], data: np.ndarray) -> int:
    """Sum over layers of (u_l - u_{l-1}) v_l, with u and v the exact ranks of the products above and below.

    The image of a layer is Col(W_L...W_{l+1}) x Row(W_{l-1}...W_1 X); the factors of all layers are nested.
    """
    rank, above_before = 0, 0
    for index in range(len(weights)):
        above = np.eye(len(weights[-1]), dtype=np.int64)
        for weight in reversed(weights[index + 1 :]):
            above = above @ weight
        below = data.T
        for weight in weights[:index]:
            below = weight @ below
        u, v = exact_rank(above), exact_rank(below)
        rank += (u - above_before) * v
        above_before = u
    return rank


DEFICIENT = [
    ((4, 3, 4), (2, 1)),
    ((4, 2, 3), (1, 1)),
    ((3, 4, 4, 3), (2, 3, 1)),
    ((4, 4, 4, 2), (3, 2, 1)),
    ((3, 5, 5, 3), (3, 1, 3)),
    ((3, 3, 3), (2, 0)),
    ((2, 3, 3, 3, 2), (1, 2, 3, 1)),
]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("widths", "ranks"), DEFICIENT)
def test_rank_at_deficient_weights_follows_the_flags(widths, ranks, seed, bias):
    shapes = zip(widths[1:], widths[:-1], ranks, strict=True)
    weights = [integer_matrix_of_rank(*shape, seed=10 * seed + layer) for layer, shape in enumerate(shapes)]
    module = deep_linear(*widths, bias=bias)
    with torch.no_grad():
        for layer, weight in zip(module, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    inputs = integer_inputs(generator_of(seed), 7, widths[0])
    data = integers(inputs)
    if bias:
        # An output bias spans the constants; beside them the data count less their mean, here 7 times that.
        expected = widths[-1] + flag_rank(weights, 7 * data - data.sum(0))
        with_integer_biases(module, seed)
    else:
        expected = flag_rank(weights, data)
    assert measure_basin(module, inputs).gradient_rank == expected


@torch.no_grad()
def with_integer_biases(module: nn.Sequential, seed: int) -> None:
    for layer in module:
        layer.bias.copy_(torch.randint(-2, 3, layer.bias.shape, generator=generator_of(seed)))


def rank_from_masks(module: Chain, inputs: np.ndarray) -> int:
    """The rank of a shallow ReLU network without any derivative.

    Units that fire on the same inputs, pattern p, count together: the gradients span D_p [X, 1] x V_p, beside the
    activations and a constant for each output, the output layer's own.
    """
    inner, head = module.layers
    extended = np.concatenate([inputs, np.ones((len(inputs), 1), dtype=np.int64)], axis=1)
    before = inputs @ integers(inner.weight).T + integers(inner.bias)
    outer = integers(head.weight)
    patterns = {tuple(column) for column in (before > 0).T.tolist()}
    each_output = np.eye(len(outer), dtype=np.int64)
    blocks = [
        np.kron(np.maximum(before, 0), each_output),
        np.kron(np.ones((len(inputs), 1), dtype=np.int64), each_output),
    ]
    for pattern in patterns:
        units = [unit for unit, column in enumerate((before > 0).T.tolist()) if tuple(column) == pattern]
        blocks.append(np.kron(np.array(pattern)[:, None] * extended, outer[:, units]))
    return exact_rank(np.concatenate(blocks, axis=1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("widths", [(2, 3, 1), (2, 6, 1), (3, 4, 2), (1, 8, 3)])
def test_rank_of_a_shallow_relu_network_follows_from_its_masks(widths, seed):
    module = with_integer_weights(Chain(*widths), generator_of(seed))
    inputs = integer_inputs(generator_of(seed + 50), 14, widths[0])
    assert measure_basin(module, inputs).gradient_rank == rank_from_masks(module, integers(inputs))


@pytest.mark.parametrize(
    ("widths", "largest"), [((2, 4, 1), 13), ((2, 3, 3, 1), 19), ((3, 5, 2), 27), ((4, 3, 2, 1), 21)]
)
def test_functional_dimension_of_relu_networks_is_reached_and_never_passed(widths, largest):
    # Grigsby, Lindsey, Meyerhoff and Wu (2022): N less the hidden widths, one rescaling for each unit.
    inputs = 3 * drawn(80, widths[0], seed=7)
    ranks = [measure_basin(generic(Chain(*widths), seed), inputs).gradient_rank for seed in range(12)]
    assert max(ranks) == largest


@pytest.mark.parametrize(("widths", "num_inputs"), [((2, 3, 1), 30), ((2, 3, 2), 5), ((3, 2, 1), 6), ((1, 2, 2), 20)])
def test_generic_tanh_network_has_full_rank(widths, num_inputs):
    layers = deep_linear(*widths, bias=True)
    module = generic(nn.Sequential(layers[0], nn.Tanh(), layers[1]), 3)
    record = measure_basin(module, drawn(num_inputs, widths[0], seed=4))
    assert record.gradient_rank == min(record.num_parameters, record.num_rows)


@pytest.mark.parametrize("powers", [(1, -2, 3, 0, -4), (10, 10, -10, 0, 5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_rescaling_of_relu_units_by_powers_of_two_leaves_the_rank(seed, powers):
    module, inputs = with_integer_weights(Chain(3, 5, 2), generator_of(seed)), integer_inputs(generator_of(seed), 9, 3)
    before = measure_basin(module, inputs).gradient_rank
    outputs = module(inputs)
    with torch.no_grad():
        scale = 2.0 ** torch.tensor(powers)
        module.layers[0].weight.mul_(scale[:, None])
        module.layers[0].bias.mul_(scale)
        module.layers[1].weight.div_(scale)
    assert torch.equal(module(inputs), outputs)
    assert measure_basin(module, inputs).gradient_rank == before


@pytest.mark.parametrize("seed", SEEDS)
def test_permutation_of_units_leaves_every_rank(seed):
    module, inputs = with_integer_weights(Chain(3, 5, 2), generator_of(seed)), integer_inputs(generator_of(seed), 9, 3)
    before = measure_basin(module, inputs)
    with torch.no_grad():
        order = torch.randperm(5, generator=generator_of(seed))
        module.layers[0].weight.copy_(module.layers[0].weight[order])
        module.layers[0].bias.copy_(module.layers[0].bias[order])
        module.layers[1].weight.copy_(module.layers[1].weight[:, order])
    after = measure_basin(module, inputs)
    assert after.gradient_rank == before.gradient_rank
    assert [part.gradient_rank for part in after.layers.values()] == [p.gradient_rank for p in before.layers.values()]


@pytest.mark.parametrize("seed", SEEDS)
def test_order_of_inputs_leaves_the_rank(seed):
    module, inputs = with_integer_weights(Chain(3, 5, 2), generator_of(seed)), integer_inputs(generator_of(seed), 9, 3)
    assert measure_basin(module, inputs.flip(0)).gradient_rank == measure_basin(module, inputs).gradient_rank


@pytest.mark.parametrize("seed", SEEDS)
def test_hessian_of_self_labelled_squared_error_is_twice_the_gram_matrix(seed):
    # At f = y the second derivatives of f drop out: H = 2 Gᵀ G, here with rows as gradients.
    layers = deep_linear(3, 4, 2, bias=True)
    module, inputs = generic(nn.Sequential(layers[0], nn.Tanh(), layers[1]), seed), drawn(5, 3, seed=seed)
    parameters = dict(module.named_parameters())
    gradients = behavioral_gradients(
        lambda values, tensors: torch.func.functional_call(module, dict(values), tensors[0]), parameters, [inputs]
    )
    outputs = module(inputs)
    hessian = hessian_matrix((outputs - outputs.detach()).square().sum(), list(parameters.values()))
    torch.testing.assert_close(hessian, 2 * gradients.mT @ gradients, rtol=1e-10, atol=1e-10)


def test_linear_regression_has_the_rank_of_its_data():
    inputs = drawn(4, 6)
    module = generic(nn.Linear(6, 1, bias=False), 0)
    record = measure_basin(module, inputs, drawn(4, 1, seed=1), loss_fn=sum_of_squares)
    # Its Hessian is 2 Xᵀ X at any residual.
    assert (record.gradient_rank, record.hessian_nullity, record.hessian_nullity_strict) == (4, 2, 2)
    assert record.residual_curvature < 1e-15


def test_touching_spheres_have_one_direction_less_than_their_rank_says_elsewhere():
    centres = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    on_axis = measure_basin(SquaredDistances([0.3, 0.0, 0.0]), centres)
    off_axis = measure_basin(SquaredDistances([0.3, 0.4, 0.0]), centres)
    # The null space of 2 dimensions belongs to a manifold of none: an upper bound, as documented.
    assert (on_axis.gradient_rank, on_axis.gradient_nullity) == (1, 2)
    assert (off_axis.gradient_rank, off_axis.gradient_nullity) == (2, 1)


def test_touching_spheres_at_zero_loss_have_a_hessian_of_rank_one():
    centres = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    module = SquaredDistances([0.25, 0.0, 0.0])  # squared distances that float64 holds: 25/16 and 9/16
    record = measure_basin(module, centres, torch.tensor([[1.5625], [0.5625]]).double(), loss_fn=sum_of_squares)
    assert (record.loss, record.hessian_nullity, record.hessian_nullity_strict) == (0.0, 2, 2)


@pytest.mark.parametrize(("theta", "rank"), [((0.0, 0.0), 0), ((0.0, 2.0), 1), ((3.0, 0.0), 1)])
def test_crossing_lines_have_rank_zero_only_where_they_cross(theta, rank):
    record = measure_basin(Crossing(theta), torch.ones(2, 1), torch.zeros(2, 1), loss_fn=sum_of_squares)
    assert (record.loss, record.gradient_rank, record.hessian_nullity) == (0.0, rank, 2 - rank)


def test_rank_zero_has_no_gap():
    record = measure_basin(Crossing((0.0, 0.0)), torch.ones(2, 1))
    assert (record.gradient_rank, record.gradient_rank_gap, record.ill_defined) == (0, None, False)


def test_fourth_powers_are_flat_at_a_perfect_fit_whatever_the_rank():
    module, inputs = with_integer_weights(nn.Linear(2, 1), generator_of()), torch.eye(2)
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=fourth_powers)
    assert record.gradient_rank == 2
    assert record.hessian_nullity == record.hessian_nullity_strict == record.gauss_newton_nullity == 3
    assert record.residual_curvature == 0.0


def test_minimum_with_residual_may_have_a_hessian_of_higher_rank_than_its_gradients():
    # f = theta**2 + 1 with y = 0: the gradient is 0, but the residual of 1 bends the loss.
    record = measure_basin(Parabolas(), torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 1), loss_fn=sum_of_squares)
    assert record.gradient_rank == 0
    assert (record.hessian_nullity_strict, record.gauss_newton_nullity) == (0, 1)
    # H is all residual, whose norm resolves nothing of it.
    assert (record.residual_curvature, record.hessian_nullity, record.hessian_certified) == (1.0, None, None)


def test_minimum_with_residual_may_have_a_hessian_of_lower_rank_than_its_gradients():
    # f = (theta - theta**2 / 2, -theta - theta**2 / 2) with y = (-1, -1): 2 (1 + 1) - 2 (1 + 1) = 0.
    inputs = torch.tensor([[0.0, 1.0, -0.5], [0.0, -1.0, -0.5]])
    record = measure_basin(Parabolas(), inputs, torch.tensor([[-1.0], [-1.0]]), loss_fn=sum_of_squares)
    assert record.gradient_rank == 1
    assert (record.hessian_nullity_strict, record.gauss_newton_nullity, record.hessian_nullity) == (1, 0, 1)


@pytest.mark.parametrize("residual", [1e-8, 1e-6, 1e-4])
def test_small_residual_does_not_hide_the_null_space(residual):
    # theory: a 3-10-1 tanh network on 8 inputs at residual 1e-8 has 51 - 8 flat directions, of which the plain
    # tolerance sees none.
    layers = deep_linear(3, 10, 1, bias=True)
    module = generic(nn.Sequential(layers[0], nn.Tanh(), layers[1]), 1)
    inputs = drawn(8, 3, seed=2)
    targets = module(inputs).detach() + residual * drawn(8, 1, seed=3).sign()
    record = measure_basin(module, inputs, targets, loss_fn=sum_of_squares)
    assert (record.gradient_rank, record.hessian_nullity) == (8, 43)
    assert record.hessian_nullity_strict < 43


def test_hard_labels_leave_a_residual_that_bends_the_loss():
    # With hard labels the gradient of the loss by the logits never vanishes: H and its Gauss-Newton part differ.
    layers = deep_linear(2, 4, 3, bias=True)
    module = generic(nn.Sequential(layers[0], nn.Tanh(), layers[1]), 0)
    inputs = drawn(3, 2, seed=1)
    record = measure_basin(module, inputs, torch.tensor([0, 1, 2]), loss_fn=nn.CrossEntropyLoss())
    assert record.num_parameters - record.gauss_newton_nullity == 6
    assert record.num_parameters - record.hessian_nullity_strict > 6
    assert record.residual_curvature > 1e-3


def test_gradient_rank_at_follows_a_spectrum_of_known_decades():
    # f = D x with inputs e_i: the gradients are orthogonal, of lengths 1, 1e-3, 1e-7 and 1e-11.
    lengths = torch.tensor([1.0, 1e-3, 1e-7, 1e-11], dtype=torch.float64)
    record = measure_basin(nn.Linear(4, 1, bias=False), torch.diag(lengths))
    assert dict(record.gradient_rank_at) == {1e-12: 4, 1e-8: 3, 1e-6: 2, 1e-4: 2, 1e-2: 1}
    energies = [length**2 for length in lengths.tolist()]
    shares = [energy / sum(energies) for energy in energies]
    assert record.gradient_effective_rank == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-9)
