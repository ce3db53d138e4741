from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_basin import BasinRecord, measure_basin
from tests.exact import (
    exact_rank,
    exact_rank_of_wide,
    half_squared_error_hessian,
    integers,
    jacobian,
    relu_chain_gradients,
)
from tests.measure.exact_cases import every_network, measured
from tests.measure.records import every_case, integer_targets, large_chain
from tests.models import CHAINS, Chain, evaluated_case, half_sum_of_squares, integer_case, sum_of_squares


@cache
def measured_with_residual(name: str, seed: int) -> BasinRecord:
    case = integer_case(name, seed)
    targets = torch.tensor(integer_targets(evaluated_case(name, seed)[1], seed)).double()
    return measure_basin(case.module, case.inputs, targets, loss_fn=half_sum_of_squares)


@cache
def measured_at_zero_loss(name: str, seed: int) -> BasinRecord:
    case = integer_case(name, seed)
    targets = torch.tensor(evaluated_case(name, seed)[1].value).double()
    return measure_basin(case.module, case.inputs, targets, loss_fn=sum_of_squares)


@every_network
@every_case
def test_exact_network_is_the_very_network_of_the_module(name, seed):
    case = integer_case(name, seed)
    _, outputs = evaluated_case(name, seed)
    assert np.array_equal(integers(case.module(case.inputs)), outputs.value)


@every_network
@every_case
def test_gradient_rank_is_the_exact_rank(name, seed):
    _, outputs = evaluated_case(name, seed)
    assert measured(name, seed).gradient_rank == exact_rank(jacobian(outputs))


@every_network
@every_case
def test_gradient_rank_of_each_layer_is_the_exact_rank_of_its_columns(name, seed):
    network, outputs = evaluated_case(name, seed)
    expected = {layer: exact_rank(jacobian(outputs)[:, columns]) for layer, columns in network.columns.items()}
    record = measured(name, seed)
    assert {layer: part.gradient_rank for layer, part in record.layers.items()} == expected


@every_network
@every_case
def test_numbers_of_parameters_and_rows_are_those_of_the_jacobian(name, seed):
    _, outputs = evaluated_case(name, seed)
    record = measured(name, seed)
    assert (record.num_rows, record.num_parameters) == jacobian(outputs).shape


@every_network
@every_case
def test_strict_hessian_nullity_is_exact_at_integer_residuals(name, seed):
    _, outputs = evaluated_case(name, seed, second=True)
    targets = integer_targets(outputs, seed)
    hessian = half_squared_error_hessian(outputs, targets)
    record = measured_with_residual(name, seed)
    assert record.hessian_nullity_strict == len(hessian) - exact_rank(hessian)


@every_network
@every_case
def test_strict_hessian_nullity_of_each_layer_is_that_of_its_diagonal_block(name, seed):
    network, outputs = evaluated_case(name, seed, second=True)
    targets = integer_targets(outputs, seed)
    hessian = half_squared_error_hessian(outputs, targets)
    expected = {
        layer: len(columns) - exact_rank(hessian[np.ix_(columns, columns)])
        for layer, columns in network.columns.items()
    }
    record = measured_with_residual(name, seed)
    assert {layer: part.hessian_nullity_strict for layer, part in record.layers.items()} == expected


@every_network
@every_case
def test_gauss_newton_nullity_of_squared_error_leaves_the_rank_at_any_residual(name, seed):
    network, outputs = evaluated_case(name, seed)
    record = measured_with_residual(name, seed)
    assert record.gauss_newton_nullity == network.num_parameters - exact_rank(jacobian(outputs))


@every_network
@every_case
def test_all_nullities_leave_the_rank_at_zero_loss(name, seed):
    network, outputs = evaluated_case(name, seed)
    expected = network.num_parameters - exact_rank(jacobian(outputs))
    record = measured_at_zero_loss(name, seed)
    assert record.loss == 0.0
    assert record.hessian_nullity == record.hessian_nullity_strict == record.gauss_newton_nullity == expected
    assert (record.residual_curvature, record.hessian_negative) == (0.0, 0)


@every_network
@every_case
def test_all_nullities_of_each_layer_leave_its_rank_at_zero_loss(name, seed):
    network, outputs = evaluated_case(name, seed)
    expected = {layer: len(c) - exact_rank(jacobian(outputs)[:, c]) for layer, c in network.columns.items()}
    record = measured_at_zero_loss(name, seed)
    found = ("hessian_nullity", "hessian_nullity_strict", "gauss_newton_nullity")
    measured = {layer: {getattr(part, which) for which in found} for layer, part in record.layers.items()}
    assert measured == {layer: {nullity} for layer, nullity in expected.items()}


@pytest.mark.parametrize("name", CHAINS)
@every_case
def test_rank_bound_of_a_chain_is_at_most_the_smallest_over_its_layers(name, seed):
    network, outputs = evaluated_case(name, seed)
    num_inputs, num_outputs = outputs.value.shape
    bounds, before = [network.num_parameters], 0
    for layer, duplicates in network.duplicates().items():
        bounds.append(before + num_outputs * (num_inputs - duplicates))
        before += len(network.columns[layer])
    assert measured(name, seed).gradient_rank_bound <= min(bounds)


@every_network
@every_case
def test_exact_rank_is_within_the_rank_bound(name, seed):
    _, outputs = evaluated_case(name, seed)
    assert exact_rank(jacobian(outputs)) <= measured(name, seed).gradient_rank_bound


@pytest.mark.parametrize("seed", [0, 25, 30, 40])  # Rounding is large in the last three.
def test_rank_bound_of_merged_categories_follows_the_worked_example(seed):
    torch.manual_seed(seed)
    # 64 pairs of categories, of which the first layer keeps the first only. Behind it are 8 codes; before it, the
    # differences between the merged inputs have rank 7, and one unit (B4). From its 17 parameters it would be 25 (B2).
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    inputs = torch.cat([torch.eye(8)[pairs[:, 0]], torch.eye(8)[pairs[:, 1]]], dim=1)
    module = Chain(16, 1, 16, 1)
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.cat([torch.arange(8.0), torch.zeros(8)]).unsqueeze(0))
        module.layers[0].bias.fill_(1.0)
    record = measure_basin(module, inputs)
    assert record.layers["layers.1"].duplicated_activations == 56
    assert record.gradient_rank_bound == 8 + 1 * 7


def large_chain_gradients(module: Chain, inputs: Tensor) -> list[np.ndarray]:
    weights = [integers(layer.weight) for layer in module.layers]
    return relu_chain_gradients(weights, [integers(layer.bias) for layer in module.layers], integers(inputs))


def test_backpropagated_oracle_agrees_with_the_dual_numbers():
    case = integer_case("mlp", 0)
    _, outputs = evaluated_case("mlp", 0)
    blocks = large_chain_gradients(case.module, case.inputs)
    # The columns stand in another order: compare what does not depend on it.
    expected = jacobian(outputs) @ jacobian(outputs).T
    assert np.array_equal(sum(block @ block.T for block in blocks), expected)


def test_rank_of_a_wide_matrix_survives_its_random_projection():
    left = np.random.default_rng(0).integers(-3, 4, size=(30, 7))
    right = np.random.default_rng(1).integers(-3, 4, size=(7, 500))
    assert exact_rank_of_wide(left @ right) == exact_rank(left @ right) == 7


@pytest.mark.long
@pytest.mark.parametrize(("repeated", "dead"), [(40, 0), (25, 60), (0, 128)])
def test_rank_by_sketch_is_the_exact_rank(repeated, dead):
    module, inputs = large_chain(repeated=repeated, dead=dead, seed=repeated)
    record = measure_basin(module, inputs, layers=[])
    expected = exact_rank_of_wide(np.concatenate(large_chain_gradients(module, inputs), axis=1))
    assert record.gradient_method == "gram+sketch"
    assert record.gradient_rank == expected < record.num_rows


def test_rank_by_sketch_of_a_single_layer_is_exact():
    module, inputs = large_chain(repeated=30, dead=0, seed=3)
    layer = measure_basin(module, inputs, layers=["layers.1"]).layers["layers.1"]
    assert layer.gradient_method == "gram+sketch"
    assert layer.gradient_rank == exact_rank_of_wide(large_chain_gradients(module, inputs)[1])


@pytest.mark.long
def test_full_rank_is_proved_by_the_gram_matrix():
    module, inputs = large_chain(repeated=0, dead=0, seed=0)
    record = measure_basin(module, inputs, layers=[])
    assert record.gradient_method == "gram"
    assert record.gradient_rank == exact_rank_of_wide(np.concatenate(large_chain_gradients(module, inputs), axis=1))
    assert record.saturated


def test_rank_by_sketch_does_not_depend_on_its_seed():
    module, inputs = large_chain(repeated=40, dead=60, seed=0)
    first, second = (measure_basin(module, inputs, layers=[], seed=seed) for seed in (1, 2))
    assert first.gradient_effective_rank == pytest.approx(second.gradient_effective_rank)
    assert first.gradient_rank == second.gradient_rank
