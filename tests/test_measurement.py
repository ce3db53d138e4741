import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_basin import BasinRecord, Probe, measure_basin, verify_null_space
from lightning_basin.measure import check_measurable
from lightning_basin.settings import Settings
from tests.exact import (
    Dual,
    ExactNetwork,
    columns_of,
    count_duplicates,
    exact_rank,
    exact_rank_of_wide,
    half_squared_error_hessian,
    integers,
    jacobian,
    relu_chain_gradients,
)
from tests.models import (
    CASE_NAMES,
    CHAINS,
    BagOfTokens,
    Chain,
    OneNumber,
    Sequence2d,
    evaluated_case,
    half_sum_of_squares,
    integer_case,
    integer_inputs,
    sum_of_squares,
    with_integer_weights,
)
from tests.networks import Composed, built, drawn32, generator_of

SEEDS = (0, 1, 2)
every_case = pytest.mark.parametrize("seed", SEEDS)
every_network = pytest.mark.parametrize("name", CASE_NAMES)


def without_time(record: BasinRecord) -> dict[str, Any]:
    return {name: value for name, value in record.to_dict().items() if name != "measure_seconds"}


def integer_targets(outputs: Dual, seed: int) -> np.ndarray:
    """Targets near the outputs: some residuals are zero, some small, some of either sign."""
    return outputs.value + np.random.default_rng(seed).integers(-2, 3, size=outputs.value.shape)


@cache
def measured(name: str, seed: int) -> BasinRecord:
    case = integer_case(name, seed)
    return measure_basin(case.module, case.inputs)


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


# --- the integers ---------------------------------------------------------------------------------------------------


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


@every_network
@every_case
def test_duplicated_activations_of_each_layer_are_the_exact_counts(name, seed):
    network, _ = evaluated_case(name, seed)
    record = measured(name, seed)
    called = network.duplicates()
    # Whole numbers below 1e6 are equal or further apart than the relative tolerance: both counts agree.
    found = {
        layer: (record.layers[layer].duplicated_activations_exact, record.layers[layer].duplicated_activations)
        for layer in called
        if layer in record.layers
    }
    assert found == {layer: (called[layer], called[layer]) for layer in found}
    assert found


@every_network
@every_case
def test_duplicated_outputs_are_counted_exactly(name, seed):
    _, outputs = evaluated_case(name, seed)
    expected = count_duplicates(outputs.value)
    record = measured(name, seed)
    assert record.output_duplicated_activations_exact == record.output_duplicated_activations == expected


@pytest.mark.parametrize("name", [*CHAINS, "residual", "convolutional", "bag of tokens", "recurrent", "tied layers"])
@every_case
def test_duplicated_activations_of_the_network_are_the_largest_after_the_first_layer(name, seed):
    network, _ = evaluated_case(name, seed)
    _, *later = network.duplicates().values()
    record = measured(name, seed)
    assert record.duplicated_activations == record.duplicated_activations_exact == max(later)


@every_network
@every_case
def test_dead_units_of_each_layer_are_outputs_constant_over_the_probe(name, seed):
    network, _ = evaluated_case(name, seed)
    record = measured(name, seed)
    expected = {layer: count for layer, count in network.dead_units().items() if layer in record.layers}
    assert {layer: record.layers[layer].dead_units for layer in expected} == expected


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


def test_rank_bound_of_merged_categories_follows_the_worked_example():
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


# --- large matrices -------------------------------------------------------------------------------------------------


def large_chain(*, repeated: int, dead: int, seed: int) -> tuple[Chain, Tensor]:
    """An integer ReLU network large enough for the sketch, with repeated inputs and dead units."""
    generator = generator_of(seed)
    module = with_integer_weights(built(lambda: Chain(40, 170, 130, 2)), generator, largest=1)
    with torch.no_grad():
        module.layers[1].bias[:dead] = -10_000.0
    inputs = torch.randint(-2, 3, (160, 40), generator=generator).float()
    inputs[160 - repeated :] = inputs[:repeated]
    return module, inputs


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


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_module_gives_the_record_of_the_same_numbers_in_float64(dtype):
    module = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))).to(dtype)
    same = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)))
    same.to(dtype).double()
    inputs, targets = drawn32(7, 3).to(dtype), drawn32(7, 2, seed=1).to(dtype)
    low = measure_basin(module, inputs, targets, loss_fn=sum_of_squares)
    high = measure_basin(same, inputs.double(), targets.double(), loss_fn=sum_of_squares)
    assert without_time(low) == without_time(high)


def test_forward_that_asks_for_float32_is_evaluated_in_float64():
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).float().softmax(-1, dtype=torch.float32)

    module = built(Rounding)
    # Softmax outputs sum to 1: of 4 outputs per input only 3 are free, unless rounding fills the fourth.
    assert measure_basin(module, drawn32(2, 3)).gradient_rank == 6


def test_same_seed_gives_the_same_record():
    module, inputs = large_chain(repeated=40, dead=0, seed=0)
    assert without_time(measure_basin(module, inputs, seed=5)) == without_time(measure_basin(module, inputs, seed=5))


# --- nothing of the user's is touched -------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Changes itself, its buffers and every random state when it runs; raises if told to."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.cached: Tensor | None = None
        self.history: list[int] = []
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(len(x))
        random.random(), np.random.rand(), torch.rand(1)
        self.cached = self.drop(self.norm(self.inner(x)))
        if self.fails:
            raise KeyError("broken in the middle")
        return self.head(self.cached)


def ready_to_train(*, fails: bool = False) -> Stateful:
    """A module in the middle of training: mixed train flags, some gradients, a hook."""
    module = built(lambda: Stateful(fails=fails))
    module.train()
    module.norm.eval()
    module.inner.weight.grad = torch.ones_like(module.inner.weight)
    module.head.register_forward_hook(lambda *_: None)
    return module


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a measurement might disturb, as comparable values."""
    return {
        "tensors": {name: tensor.tolist() for name, tensor in module.state_dict(keep_vars=True).items()},
        "identities": [id(tensor) for tensor in (*module.parameters(), *module.buffers())],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()],
        "requires": [p.requires_grad for p in module.parameters()],
        "training": [part.training for part in module.modules()],
        "hooks": [
            [list(vars(part)[hooks]) for hooks in vars(part) if hooks.endswith("_hooks")] for part in module.modules()
        ],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "history": list(module.history),
        "cached": module.cached,
    }


def random_states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_module_is_left_as_it_was():
    module = ready_to_train()
    before = state_of(module)
    measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=sum_of_squares)
    assert state_of(module) == before


def test_random_states_are_left_as_they_were():
    module = ready_to_train()
    before = random_states()
    measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=sum_of_squares)
    assert random_states() == before


def test_module_and_random_states_are_left_as_they_were_when_forward_raises():
    module = ready_to_train(fails=True)
    before = state_of(module), random_states()
    with pytest.raises(ValueError, match="KeyError: 'broken in the middle'"):
        measure_basin(module, drawn32(6, 3))
    assert (state_of(module), random_states()) == before


def test_module_and_random_states_are_left_as_they_were_when_the_loss_raises():
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        torch.rand(1)
        raise KeyError("broken loss")

    module = ready_to_train()
    before = state_of(module), random_states()
    with pytest.raises(TypeError, match="KeyError: 'broken loss'"):
        measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=broken)
    assert (state_of(module), random_states()) == before


def test_global_modes_are_left_as_they_were_when_forward_raises():
    with torch.no_grad(), pytest.raises(ValueError, match="broken in the middle"):
        measure_basin(ready_to_train(fails=True), drawn32(6, 3))
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_measurement_works_where_gradients_are_off_and_leaves_them_off(mode):
    case = integer_case("mlp", 0)
    with mode():
        record = measure_basin(case.module, case.inputs)
        assert not torch.is_grad_enabled()
    assert record.gradient_rank == exact_rank(jacobian(evaluated_case("mlp", 0)[1]))


def test_inputs_and_targets_are_left_as_they_were():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            return self.inner(x)

    inputs, targets = drawn32(6, 3), drawn32(6, 2, seed=1)
    inputs_before, targets_before = inputs.clone(), targets.clone()
    with suppress(ValueError):  # Refusing such a module is fine too; writing to the caller's tensors is not.
        measure_basin(built(InPlace), inputs, targets, loss_fn=sum_of_squares)
    assert torch.equal(inputs, inputs_before)
    assert torch.equal(targets, targets_before)


def test_training_module_is_measured_in_evaluation_mode():
    module = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2)))
    inputs = drawn32(6, 3)
    training = measure_basin(module.train(), inputs)
    assert without_time(training) == without_time(measure_basin(module.eval(), inputs))


# --- forms of inputs and outputs ------------------------------------------------------------------------------------


class Product(nn.Module):
    """f = head(a * b): two inputs per example."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(a * b)


class ProductOfDict(Product):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(batch["a"] * batch["b"])


class ProductOfPair(Product):
    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(batch[0] * batch[1])


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (Product, lambda a, b: (a, b)),
        (Product, lambda a, b: [a, b]),
        (Product, lambda a, b: {"b": b, "a": a}),
        (ProductOfDict, lambda a, b: {"b": b, "a": a}),
        (ProductOfPair, lambda a, b: (a, b)),
    ],
    ids=["tuple", "list", "keywords", "one dict", "one tuple"],
)
def test_inputs_may_be_a_collection(module, form):
    a, b = integer_inputs(generator_of(), 6, 3), integer_inputs(generator_of(1), 6, 3)
    # A linear head on vectors v has rank 2 * rank [v, 1].
    vectors = np.concatenate([integers(a * b), np.ones((6, 1), dtype=np.int64)], axis=1)
    assert measure_basin(module(), form(a, b)).gradient_rank == 2 * exact_rank(vectors)


@pytest.mark.parametrize(
    ("build", "shape", "outputs"),
    [(OneNumber, (9, 2), (9,)), (lambda: Chain(2, 3, 2), (9, 2), (9, 2)), (Sequence2d, (5, 3, 2), (5, 3, 2))],
    ids=["(k,)", "(k, c)", "(k, t, c)"],
)
def test_outputs_may_have_any_shape_behind_the_inputs(build, shape, outputs):
    module = with_integer_weights(build(), generator_of(4))
    inputs = integer_inputs(generator_of(5), *shape)
    exact = module.exact(ExactNetwork(module), integers(inputs))
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=sum_of_squares)
    assert tuple(module(inputs).shape) == outputs
    assert record.num_rows == np.prod(outputs)
    assert record.gradient_rank == exact_rank(jacobian(exact))
    assert record.hessian_nullity == record.num_parameters - record.gradient_rank


def test_behavior_chooses_the_outputs_that_count():
    case = integer_case("mlp", 0)
    _, outputs = evaluated_case("mlp", 0)
    record = measure_basin(case.module, case.inputs, behavior=lambda module, x: module(x)[:, :1])
    assert record.num_rows == len(case.inputs)
    assert record.gradient_rank == exact_rank(outputs.gradient[:, 0])


@pytest.mark.parametrize("frozen", [("layers.0.weight",), ("layers.1.weight", "layers.1.bias"), ("layers.2.bias",)])
def test_frozen_parameters_are_left_out(frozen):
    case = integer_case("mlp", 0)
    for name in frozen:
        case.module.get_parameter(name).requires_grad_(requires_grad=False)
    network, outputs = case.evaluated(second=True)
    targets = integer_targets(outputs, 0)
    hessian = half_squared_error_hessian(outputs, targets)
    record = measure_basin(case.module, case.inputs, torch.tensor(targets).double(), loss_fn=sum_of_squares)
    assert record.num_parameters == network.num_parameters
    assert list(record.layers) == list(network.columns)
    assert record.gradient_rank == exact_rank(jacobian(outputs))
    assert record.hessian_nullity_strict == len(hessian) - exact_rank(hessian)


def test_unused_layer_has_rank_zero_and_a_flat_direction_for_each_parameter():
    module = with_integer_weights(Chain(2, 3, 1), generator_of(0))
    module.unused = nn.Linear(4, 4)
    inputs = integer_inputs(generator_of(), 5, 2)
    record = measure_basin(module, inputs, module(inputs).detach() + 1, loss_fn=sum_of_squares)
    unused = record.layers["unused"]
    assert (unused.gradient_rank, unused.gradient_rank_gap) == (0, None)
    assert unused.hessian_nullity_strict == unused.gauss_newton_nullity == 20
    assert unused.duplicated_activations is None


def test_scalar_parameter_has_a_hessian():
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(2, 1), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)

    module = with_integer_weights(Temperature(), generator_of(1), largest=3)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0], [3.0, -1.0]])
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=sum_of_squares)
    # Scale and weights say the same twice: 4 parameters of an affine function of 2 numbers.
    assert (record.gradient_rank, record.hessian_nullity) == (3, 1)


def test_single_input_is_measured():
    module = with_integer_weights(Chain(2, 3, 2), generator_of(1))
    inputs = torch.tensor([[1.0, 2.0]])
    exact = module.exact(ExactNetwork(module), integers(inputs))
    record = measure_basin(module, inputs)
    assert (record.gradient_rank, record.duplicated_activations) == (exact_rank(jacobian(exact)), 0)


# --- which layers ---------------------------------------------------------------------------------------------------


def test_chosen_layers_are_the_only_ones_reported():
    case = integer_case("mlp", 0)
    record = measure_basin(case.module, case.inputs, layers=["layers.2", "layers.0"])
    assert list(record.layers) == ["layers.0", "layers.2"]


def test_choice_of_layers_does_not_change_the_network():
    case = integer_case("mlp", 0)
    every = measure_basin(case.module, case.inputs)
    chosen = measure_basin(case.module, case.inputs, layers=["layers.1"])
    assert chosen.quantities() | {"measure_seconds": 0.0} == every.quantities() | {"measure_seconds": 0.0}
    assert chosen.layers["layers.1"] == every.layers["layers.1"]


def test_shared_parameter_belongs_to_the_first_layer():
    case = integer_case("tied embedding", 0)
    record = measure_basin(case.module, case.inputs)
    assert {name: part.num_parameters for name, part in record.layers.items()} == {"embed": 15, "head": 5}


def test_parameters_of_the_root_stand_under_the_empty_name():
    record = measure_basin(integer_case("scaled", 0).module, integer_case("scaled", 0).inputs)
    assert {name: part.num_parameters for name, part in record.layers.items()} == {"": 3, "inner": 9, "head": 8}


def deep_chain() -> tuple[Chain, Tensor]:
    """34 layers, each nearly the identity: integers stay small through all of them."""
    generator = generator_of(0)
    module = Chain(*[3] * 35)
    with torch.no_grad():
        for layer in module.layers:
            layer.weight.copy_(torch.eye(3))
            layer.weight[0, 1] = float(torch.randint(-1, 2, (), generator=generator))
            layer.bias.copy_(torch.randint(-1, 2, (3,), generator=generator))
        module.layers[0].bias.fill_(9.0)
    return module, integer_inputs(generator, 5, 3)


def test_more_than_32_layers_are_reported_by_blocks():
    module, inputs = deep_chain()
    record = measure_basin(module, inputs, layers="auto")
    assert list(record.blocks) == [f"layers.{i}-{i + 1}" for i in range(0, 34, 2)]
    assert len(record.layers) == 34


def test_rank_of_a_block_is_the_exact_rank_of_its_layers_side_by_side():
    module, inputs = deep_chain()
    network = ExactNetwork(module)
    gradients = jacobian(module.exact(network, integers(inputs)))
    record = measure_basin(module, inputs, layers="auto")
    expected = {
        f"layers.{i}-{i + 1}": exact_rank(gradients[:, columns_of(network, [f"layers.{i}", f"layers.{i + 1}"])])
        for i in range(0, 34, 2)
    }
    assert {name: block.gradient_rank for name, block in record.blocks.items()} == expected
    assert record.gradient_rank == exact_rank(gradients)


@pytest.mark.parametrize("layers", ["all", "auto"])
def test_few_layers_have_no_blocks(layers):
    case = integer_case("mlp", 0)
    assert not measure_basin(case.module, case.inputs, layers=layers).blocks


# --- modules of every kind ------------------------------------------------------------------------------------------


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TimeFirst(LastState):
    """The recurrent layer wants time first: inside, the inputs are along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class WeightUsedTwice(nn.Module):
    """A linear layer whose weight the forward also uses on its own: no longer what its type says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh() @ self.inner.weight)


class HookedLinear(nn.Module):
    """A linear layer whose output a hook changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.inner.register_forward_hook(lambda module, args, output: output * output.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh())


class InPlaceActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh_())


def normalised_by_weight() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def normalised_by_spectrum() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def normalised_by_batch() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    module(drawn32(20, 3, seed=9))  # fills the running statistics
    return module


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (LastState, (20, 3, 2)),
    "LSTM time first": (TimeFirst, (20, 3, 2)),
    "attention": (Attention, (20, 3, 4)),
    "encoder": (Encoder, (30, 3, 4)),
    "weight norm": (normalised_by_weight, (20, 3)),
    "spectral norm": (normalised_by_spectrum, (20, 3)),
    "batch norm and dropout": (normalised_by_batch, (20, 3)),
    "convolution 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (20, 2, 4),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)),
        (30, 2, 3, 3),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.SiLU(), nn.Linear(3, 2)), (15, 3)),
    "weight used twice": (WeightUsedTwice, (20, 3)),
    "hooked": (HookedLinear, (20, 3)),
    "in place": (InPlaceActivation, (20, 3)),
}


def plain_jacobian(module: nn.Module, inputs: Tensor) -> np.ndarray:
    """One backward pass through the batch for each output of a float64 module in evaluation mode."""
    outputs, parameters = module.double().eval()(inputs.double()), list(module.parameters())
    gradients = [torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in gradients]).numpy()


def differences(module: nn.Module, inputs: Tensor) -> np.ndarray:
    """The Jacobian by central differences in float64: no derivative rule of anybody is involved.

    Steps of 1e-3 and 2e-3 with Richardson's extrapolation leave an error near 1e-11.
    """
    module, inputs = module.double().eval(), inputs.double()
    columns = []
    with torch.no_grad():
        for parameter in module.parameters():
            for entry in range(parameter.numel()):
                flat, slopes = parameter.view(-1), []
                original = flat[entry].clone()
                for step in (1e-3, 2e-3):
                    ends = []
                    for sign in (1, -1):
                        flat[entry] = original + sign * step
                        ends.append(module(inputs).flatten())
                    slopes.append((ends[0] - ends[1]) / (2 * step))
                flat[entry] = original
                columns.append((4 * slopes[0] - slopes[1]) / 3)
    return torch.stack(columns, dim=1).numpy()


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_gradient_rank_of_any_module_is_that_of_its_differences(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs, rtol=1e-8)
    sigmas = np.linalg.svd(differences(module, inputs), compute_uv=False)
    assert record.gradient_rank == (sigmas > 1e-8 * sigmas[0]).sum()


@every_kind
def test_gradient_rank_of_any_module_is_that_of_its_rows_one_by_one(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs)
    # NumPy's rule for the tolerance is the same.
    assert record.gradient_rank == np.linalg.matrix_rank(plain_jacobian(module, inputs))


@every_kind
def test_layer_ranks_of_any_module_are_those_of_its_rows_one_by_one(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs)
    sizes = [part.num_parameters for part in record.layers.values()]
    blocks = np.split(plain_jacobian(module, inputs), np.cumsum(sizes)[:-1], axis=1)
    expected = dict(zip(record.layers, map(np.linalg.matrix_rank, blocks), strict=True))
    assert {name: part.gradient_rank for name, part in record.layers.items()} == expected


@every_kind
def test_hessian_of_any_module_has_the_rank_of_its_gradients_at_zero_loss(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build).double(), drawn32(*shape, seed=1).double()
    targets = module.eval()(inputs).detach()
    record = measure_basin(module, inputs, targets, loss_fn=sum_of_squares, rtol=1e-10)
    sigmas = np.linalg.svd(plain_jacobian(module, inputs), compute_uv=False)
    # The residual may be rounding instead of zero; the eigenvalues above 1e-10 are the squares of those above 1e-5.
    assert record.loss == pytest.approx(0.0, abs=1e-28)
    assert record.num_parameters - record.hessian_nullity_strict >= (sigmas > 2e-5 * sigmas[0]).sum()
    assert record.num_parameters - record.hessian_nullity_strict <= (sigmas > 0.5e-5 * sigmas[0]).sum()


def test_parametrized_weight_needs_no_note():
    assert measure_basin(WeightUsedTwice(), drawn32(5, 3)).notes == ()


def test_plain_network_has_nothing_to_note():
    assert measure_basin(Chain(2, 3, 1), drawn32(5, 2)).notes == ()


# --- cross-entropy --------------------------------------------------------------------------------------------------


def centred(gradients: np.ndarray, num_outputs: int) -> np.ndarray:
    """c times the gradients of the logits less their mean over the outputs of an input: whole numbers again."""
    rows = gradients.reshape(-1, num_outputs, gradients.shape[-1])
    return (num_outputs * rows - rows.sum(1, keepdims=True)).reshape(gradients.shape)


def classifier(*, margin: int, seed: int) -> tuple[ExactNetwork, np.ndarray, Chain, Tensor]:
    """An integer network with 3 logits, of which the first leads by ``margin``."""
    module = with_integer_weights(Chain(2, 4, 3), generator_of(seed), largest=1)
    with torch.no_grad():
        module.layers[1].bias.copy_(torch.tensor([float(margin), 0.0, 0.0]))
    inputs = torch.randint(-1, 2, (6, 2), generator=generator_of(seed)).float()
    network = ExactNetwork(module)
    return network, jacobian(module.exact(network, integers(inputs))), module, inputs


@pytest.mark.parametrize("margin", [0, 3, 18, 30])
@every_case
def test_gauss_newton_nullity_of_cross_entropy_leaves_the_rank_of_centred_logits(margin, seed):
    network, gradients, module, inputs = classifier(margin=margin, seed=seed)
    targets = torch.zeros(len(inputs), dtype=torch.long)
    record = measure_basin(module, inputs, targets, loss_fn=nn.functional.cross_entropy)
    expected = exact_rank(centred(gradients, 3))
    assert expected < exact_rank(gradients)
    assert record.gauss_newton_nullity == network.num_parameters - expected


def test_probabilities_of_the_margin_18_are_nearly_saturated():
    # What the test above is for: 1 - p near 1e-8, where p - p**2 keeps half of the digits.
    _, _, module, inputs = classifier(margin=18, seed=0)
    rest = 1 - module.double()(inputs.double()).softmax(1)[:, 0].detach()
    assert 1e-10 < float(rest.min()) < 1e-7


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda outputs, targets: nn.functional.nll_loss(outputs.log_softmax(1), targets),
    ],
    ids=["mean", "smoothed sum", "weighted", "written out"],
)
def test_every_spelling_of_cross_entropy_has_the_same_gauss_newton_nullity(loss_fn):
    network, gradients, module, inputs = classifier(margin=18, seed=1)
    targets = torch.tensor([0, 0, 1, 0, 2, 0])
    record = measure_basin(module, inputs, targets, loss_fn=loss_fn)
    assert record.gauss_newton_nullity == network.num_parameters - exact_rank(centred(gradients, 3))


def test_soft_labels_equal_to_the_probabilities_leave_no_residual():
    network, gradients, module, inputs = classifier(margin=1, seed=0)
    targets = module.double()(inputs.double()).softmax(1).detach()
    record = measure_basin(module, inputs, targets, loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    assert record.residual_curvature < 1e-14
    assert record.hessian_nullity == network.num_parameters - exact_rank(centred(gradients, 3))


# --- what cannot be measured ----------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Calls a function on the outputs of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


def frozen_linear() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (frozen_linear, ValueError, "must have at least one trainable parameter, got Linear with none"),
        (nn.Tanh, ValueError, "must have at least one trainable parameter, got Tanh with none"),
        (lambda: nn.LazyLinear(2), ValueError, "has no shape yet: run one forward pass"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, "trainable parameters must be real"),
        (lambda: Returns(lambda h: (h, h)), TypeError, "outputs must be a tensor, got tuple"),
        (lambda: Returns(lambda h: {"logits": h}), TypeError, "outputs must be a tensor, got dict"),
        (lambda: Returns(lambda h: h.argmax(1)), TypeError, "outputs must be floating point numbers, got torch.int64"),
        (lambda: Returns(lambda h: h.mean()), ValueError, r"one row for each of the 4 inputs, got shape \(\)"),
        (lambda: Returns(lambda h: h[1:]), ValueError, r"one row for each of the 4 inputs, got shape \(3, 2\)"),
        (lambda: Returns(lambda h: h / 0.0 * 0.0), ValueError, "outputs must be finite, .* on 4 of the 4 inputs"),
        (lambda: Returns(lambda h: h + torch.rand(2)), ValueError, "two evaluations differ: .* draws random"),
        (lambda: Returns(lambda h: h - h.mean(0)), ValueError, "each output must depend on its own input only"),
        (lambda: Returns(lambda h: h.cumsum(0)), ValueError, "each output must depend on its own input only"),
        (lambda: nn.Linear(3, 2), ValueError, "calling the module on the inputs failed with RuntimeError"),
    ],
    ids=[
        "all frozen",
        "no parameters",
        "lazy",
        "complex",
        "tuple",
        "dict",
        "integers",
        "mean over inputs",
        "too few rows",
        "not finite",
        "random",
        "centred over inputs",
        "summed over inputs",
        "wrong width",
    ],
)
def test_module_that_cannot_be_measured_is_refused(build, error, message):
    module = built(build)
    with pytest.raises(error, match=message):
        measure_basin(module, drawn32(4, 2))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(0, 2), ValueError, "at least one input, got an empty batch"),
        (torch.tensor(1.0), ValueError, "must have the inputs along their first axis"),
        ((torch.zeros(3, 2), torch.zeros(4, 2)), ValueError, r"in the same number, got shapes \[\(3, 2\), \(4, 2\)\]"),
        ([1.0, 2.0], TypeError, "must be a tensor or a tuple, list or dict with tensors"),
        (np.zeros((3, 2)), TypeError, "got ndarray"),
    ],
    ids=["empty", "scalar", "unequal", "plain list", "numpy"],
)
def test_inputs_that_are_no_probe_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(2, 2), inputs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss_fn": sum_of_squares}, ValueError, "loss_fn needs targets to compare the outputs with, got none"),
        ({"rtol": 0.0}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got 0.0"),
        ({"rtol": 1.0}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got 1.0"),
        ({"rtol": -1e-6}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got -1e-06"),
        ({"rtol": float("nan")}, ValueError, r"rtol must be a relative tolerance inside \(0, 1\), got nan"),
        ({"duplicate_rtol": 1.0}, ValueError, r"duplicate_rtol must be inside \[0, 1\), got 1.0"),
        ({"hessian": "lanczos"}, ValueError, r"hessian must be one of \('auto', .* or False, got 'lanczos'"),
        (
            {"loss_fn": "mse"},
            ValueError,
            "loss_fn must be a function of outputs and targets or 'behavioral', got 'mse'",
        ),
        (
            {"behavior": "logits"},
            ValueError,
            "behavior must be a function .*, 'outputs' or 'probabilities', got 'logits'",
        ),
        ({"layers": ["0", "1"]}, ValueError, r"layers must be among \['0', '2'\], got \['1'\]"),
        ({"layers": "some"}, ValueError, "layers must be 'auto', 'all' or a list of names of layers, got 'some'"),
    ],
    ids=[
        "no targets",
        "rtol 0",
        "rtol 1",
        "rtol < 0",
        "rtol nan",
        "duplicate_rtol",
        "hessian",
        "loss",
        "behavior",
        "layer",
        "layers",
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(error, match=message):
        measure_basin(module, drawn32(4, 2), **settings)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda f, y: (f - y).square(), TypeError, r"one floating point number as a tensor, got a tensor of shape"),
        (lambda f, y: 0.5, TypeError, "one floating point number as a tensor, got float"),
        (lambda f, y: (f - y).sum() * float("nan"), ValueError, "loss on the probe must be finite, got nan"),
        (lambda f, y: (f @ y).sum(), TypeError, r"loss_fn must take the outputs, shape \(4, 2\), .* RuntimeError"),
    ],
    ids=["vector", "float", "nan", "raises"],
)
def test_loss_that_is_no_finite_number_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(2, 2), drawn32(4, 2), drawn32(4, 2), loss_fn=loss_fn)


def test_nan_in_one_input_names_how_many_inputs_are_wrong():
    inputs = drawn32(4, 2)
    inputs[2, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite on 1 of the 4 inputs"):
        measure_basin(nn.Linear(2, 2), inputs)


# --- what is left out -----------------------------------------------------------------------------------------------


def test_without_a_loss_nothing_of_it_is_measured():
    record = measure_basin(Chain(2, 3, 1), drawn32(5, 2))
    assert (record.loss, record.hessian_nullity, record.gauss_newton_nullity) == (None, None, None)
    assert not any("hessian" in name or "loss" in name for name in record.quantities())


def test_hessian_is_left_out_on_request_but_not_the_loss():
    module, inputs = Chain(2, 3, 1), drawn32(5, 2)
    record = measure_basin(module, inputs, torch.ones(5, 1), loss_fn=sum_of_squares, hessian=False)
    assert record.loss == pytest.approx(sum_of_squares(module(inputs), torch.ones(5, 1)).item(), rel=1e-5)
    assert record.hessian_nullity is None


def test_step_is_noted():
    assert measure_basin(nn.Linear(2, 1), drawn32(3, 2), step=7).step == 7


def test_saturated_probe_is_marked():
    assert measure_basin(nn.Linear(4, 1), torch.eye(4)[:2]).saturated
    assert not measure_basin(BagOfTokens(), torch.arange(5).unsqueeze(1).repeat(20, 1)).saturated


def test_projected_outputs_count_their_directions():
    # Every direction of the outputs sees the 3 + 1 dimensions of the inputs on its own: 5 x 4 instead of 20 x 4.
    record = measure_basin(nn.Linear(3, 20), drawn32(10, 3), max_outputs=5)
    assert (record.num_rows, record.gradient_rank) == (50, 20)
    assert record.gradient_rank <= measure_basin(nn.Linear(3, 20), drawn32(10, 3)).gradient_rank == 80


def test_a_projection_is_said_in_the_record_and_leaves_the_hessian_out():
    record = measure_basin(nn.Linear(3, 20), drawn32(10, 3), drawn32(10, 20), loss_fn=nn.MSELoss(), max_outputs=5)
    assert any("lower bounds" in note and "20 outputs" in note for note in record.notes)
    assert record.hessian_nullity is None
    assert record.loss is not None


def test_projected_rank_of_layers_with_and_without_formula_is_the_same():
    def network(last):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), last)

    lasts = [nn.Linear(6, 30), nn.utils.parametrizations.weight_norm(nn.Linear(6, 30))]
    ranks = [measure_basin(network(last), drawn32(9, 4), max_outputs=4).layers["0"].gradient_rank for last in lasts]
    assert ranks == [30, 30]  # All of the layer's parameters, with 36 rows of 270.


def test_as_many_directions_as_outputs_change_nothing():
    module = nn.Linear(3, 4)
    plain = replace(measure_basin(module, drawn32(5, 3)), measure_seconds=0.0)
    assert replace(measure_basin(module, drawn32(5, 3), max_outputs=4), measure_seconds=0.0) == plain


def test_fewer_than_one_direction_is_refused():
    with pytest.raises(ValueError, match="max_outputs must be at least 1, got 0"):
        measure_basin(nn.Linear(3, 4), drawn32(5, 3), max_outputs=0)


def test_too_many_outputs_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="pass max_outputs"):
        measure_basin(nn.Linear(2, 1000), drawn32(100, 2))
    assert measure_basin(nn.Linear(2, 1000), drawn32(100, 2), max_outputs=3).gradient_rank == 9


@pytest.mark.parametrize("margin", [1.0, 6.0, 12.0, 18.0, 25.0])
@pytest.mark.parametrize("layout", ["tokens last", "classes second", "flat"])
def test_cross_entropy_of_tokens_sees_the_centred_logits_at_any_margin(layout, margin):
    # 12 tokens of 3 classes: the centred logits have 2 dimensions each, and the 31 parameters see all 24 of them.
    generator = torch.Generator().manual_seed(0)
    body, head = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*body.parameters(), *head.parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        head.bias.copy_(torch.tensor([margin, 0.0, -1.0]))
    module = nn.Sequential(body, nn.Tanh(), head)
    inputs = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    targets = torch.zeros(4, 3, dtype=torch.int64)
    if layout == "flat":
        inputs, targets, loss_fn, behavior = inputs.flatten(0, 1), targets.flatten(), nn.CrossEntropyLoss(), None
    elif layout == "tokens last":
        behavior = None

        def loss_fn(outputs, labels):
            return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())
    else:
        loss_fn = nn.CrossEntropyLoss()

        def behavior(network, tokens):
            return network(tokens).mT

    record = measure_basin(module, inputs, targets, loss_fn=loss_fn, behavior=behavior)
    assert record.num_parameters - record.gauss_newton_nullity == 24
    # Adding one number to all logits changes nothing: 4 directions in the head's weight and 1 in its bias, exactly.
    assert record.hessian_nullity_strict == 5
    plain = measure_basin(module, inputs, behavior=lambda network, x: centred_logits(network(x)))
    assert plain.gradient_rank == 24


def centred_logits(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


class HoldsItself(nn.Module):
    """Keeps a function of itself, as `self.encode = lambda x: ...` does in many modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.encode = lambda inputs: self.linear(inputs).tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs)


def test_a_function_of_itself_that_a_module_holds_is_that_of_the_copy():
    # Two units, each with a bias and weights of three inputs in general position.
    record = measure_basin(HoldsItself(), drawn32(5, 3).double())
    assert record.gradient_rank == 8


def test_a_loss_that_closes_over_the_module_gets_the_copy():
    module = nn.Linear(3, 2, dtype=torch.float64)
    inputs, targets = drawn32(5, 3).double(), drawn32(5, 2).double()

    def penalised(outputs, targets):
        return (outputs - targets).square().sum() + sum(p.square().sum() for p in module.parameters())

    record = measure_basin(module, inputs, targets, loss_fn=penalised, hessian="dense")
    assert record.loss == pytest.approx(float(penalised(module(inputs), targets)), rel=1e-12)


KEPT: dict[str, nn.Module] = {}


def kept_behavior(module, inputs):
    return KEPT["module"](inputs)


def kept_parameters(module, inputs):
    return nn.functional.linear(inputs, KEPT["module"].weight)


def test_a_behavior_that_runs_the_module_itself_is_refused(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))
    monkeypatch.setitem(KEPT, "module", module[0])
    with pytest.raises(ValueError, match="a copy of the module is measured, but its part '0' itself is run"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_behavior)


def test_a_behavior_that_uses_the_parameters_themselves_is_refused(monkeypatch):
    module = nn.Linear(3, 2, dtype=torch.float64)
    monkeypatch.setitem(KEPT, "module", module)
    with pytest.raises(ValueError, match="but its parameters themselves are used: the module, or the behavior, finds"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_parameters)


def test_a_module_can_run_again_after_a_measurement(monkeypatch):
    module = nn.Linear(3, 2, dtype=torch.float64)
    monkeypatch.setitem(KEPT, "module", module)
    with pytest.raises(ValueError, match="the module itself is run"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_behavior)
    assert module(drawn32(5, 3).double()).shape == (5, 2)


def test_rank_bound_is_not_below_the_rank_where_one_feature_is_huge():
    inputs = drawn32(30, 3).double()
    inputs[0, 0] = 1e7
    record = measure_basin(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), inputs)
    assert record.gradient_rank <= record.gradient_rank_bound


def test_a_parameter_without_effect_behind_a_softmax_is_measured():
    class ShiftedSoftmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.linear(inputs) + self.shift).softmax(1)

    # Three logits of four count; each sees the 3 + 1 dimensions of its input.
    assert measure_basin(ShiftedSoftmax(), drawn32(9, 3)).gradient_rank == 12


def test_ranks_stay_where_the_loss_cannot_be_differentiated_twice():
    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            ctx.save_for_backward(inputs)
            return inputs.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return OnceOnly.apply(self.linear(inputs))

    with pytest.warns(UserWarning, match="the Hessian is left out") as warned:
        record = measure_basin(Squares(), drawn32(9, 3), drawn32(9, 2), loss_fn=nn.MSELoss())
    assert warned[0].filename == __file__  # The line that asked for it.
    assert (record.gradient_rank, record.hessian_nullity) == (8, None)


def test_packed_sequences_between_layers_are_measured():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(2, 3, batch_first=True)
            self.head = nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            lengths = torch.full((inputs.shape[0],), inputs.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True)
            return self.head(self.recurrent(packed)[1][-1])

    assert measure_basin(Packed(), drawn32(6, 4, 2)).gradient_rank == 6


def test_a_float32_constant_that_is_no_attribute_is_raised_to_float64():
    constant = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs) @ constant

    assert measure_basin(Mixing(), drawn32(9, 3)).gradient_rank == 8


def test_a_scripted_module_is_refused():
    with pytest.raises(TypeError, match="holds a scripted module"):
        measure_basin(nn.Sequential(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))), drawn32(4, 3))


def test_sparse_embeddings_are_measured_like_dense_ones():
    tokens = torch.tensor([[0, 1], [2, 2], [1, 0], [3, 1]])
    ranks = []
    for sparse in (False, True):
        torch_generator = torch.Generator().manual_seed(0)
        table = nn.EmbeddingBag(5, 2, mode="sum", sparse=sparse)
        with torch.no_grad():
            table.weight.copy_(torch.randn(5, 2, generator=torch_generator))
        ranks.append(measure_basin(table, tokens).gradient_rank)
    # Counts of tokens (1,1,0,0), (0,0,2,0), (1,1,0,0), (0,1,0,1): three independent ones, for each of two outputs.
    assert ranks == [6, 6]


class WithLength(nn.Linear):
    """A module that is false, as an empty memory bank would be."""

    def __len__(self) -> int:
        return 0

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(inputs, training=self.training))


def test_a_module_of_length_zero_is_evaluated_like_any_other():
    assert measure_basin(WithLength(3, 1), drawn32(6, 3)).gradient_rank == 4


def test_activations_that_differ_in_their_imaginary_part_are_distinct():
    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Linear(1, 1)
            self.scale = Scale()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale(torch.complex(torch.ones_like(inputs), self.shift(inputs))).imag

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.factor * inputs

    inputs = torch.arange(5.0).unsqueeze(1)
    assert measure_basin(Phases(), inputs).layers["scale"].duplicated_activations == 0


def test_channels_are_the_units_of_a_prelu():
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.PReLU(2), nn.Flatten())
    with torch.no_grad():
        module[0].weight[1] = 0
    assert measure_basin(module, drawn32(5, 1, 3, 3)).layers["1"].dead_units == 1


class Coupled(nn.Module):
    """Outputs that depend on other inputs, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.norm, self.way = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), way

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.way == "batch statistics":
            return self.norm(hidden)
        if self.way == "inner inputs":
            return torch.cat([hidden[:1], hidden[1:-1] + hidden[1:-1].roll(1, 0), hidden[-1:]])
        if self.way == "batch size":
            return hidden * len(x)
        return hidden


@pytest.mark.parametrize(
    ("way", "num_inputs"),
    [("batch statistics", 2), ("batch statistics", 3), ("batch statistics", 8), ("inner inputs", 8), ("batch size", 3)],
)
def test_outputs_that_depend_on_other_inputs_are_refused(way, num_inputs):
    module, inputs = Coupled(way), drawn32(num_inputs, 3)
    for refusing in (measure_basin, verify_null_space):
        with pytest.raises(ValueError, match="each output must depend on its own input only"):
            refusing(module, inputs)


@pytest.mark.parametrize("seed", range(10))
def test_random_numbers_are_noticed_whichever_are_drawn(seed):
    torch.manual_seed(seed)
    module = Composed(lambda m, x: F.dropout(m.linear(x), 0.5, training=True), linear=nn.Linear(4, 1))
    with pytest.raises(ValueError, match="draws random numbers in evaluation mode, or keeps a state"):
        measure_basin(module, drawn32(16, 4))


class Experts(nn.Module):
    """Each input goes to the expert of its largest feature; experts with no input are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.shift = nn.ModuleList(nn.Linear(4, 2) for _ in range(3)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :3].argmax(1)
        outputs = torch.zeros(len(x), 2, dtype=x.dtype)
        for index, expert in enumerate(self.experts):
            members = (chosen == index).nonzero().squeeze(1)
            if members.numel():
                outputs = outputs.index_add(0, members, expert(x[members]))
        return outputs + self.shift


@pytest.mark.parametrize(("loss_fn", "memory_budget"), [(None, None), (None, 320_000), (nn.MSELoss(), 460_000)])
def test_experts_that_are_not_called_in_a_chunk_add_nothing_there(loss_fn, memory_budget):
    module, inputs, targets = Experts(), drawn32(24, 4), torch.zeros(24, 2)
    inputs = inputs[inputs[:, :3].argmax(1).argsort()]
    settings = {"loss_fn": loss_fn, "hessian": "bracket", "memory_budget": memory_budget}
    plan = check_measurable(module, Probe(inputs, targets), Settings(**settings))
    assert (plan.chunk_size < 24) == (memory_budget is not None)
    record = measure_basin(module, inputs, targets, **settings)
    # [x, 1] has rank min(n, 5) for the n inputs of an expert, twice; the common shift is the sum of theirs.
    counts = inputs[:, :3].argmax(1).bincount(minlength=3)
    assert record.gradient_rank == 2 * int(counts.clamp(max=5).sum())
    assert record.gradient_rank_bound >= record.gradient_rank
    if loss_fn is not None:  # Outputs are linear in the parameters: H = 2 GᵀG / m.
        assert record.hessian_nullity == record.gradient_nullity


def test_gradients_scaled_by_frequency_are_measured_as_derivatives():
    plain = Composed(
        lambda m, x: m.readout(m.table(x).sum(1)).relu(), table=nn.Embedding(6, 2), readout=nn.Linear(2, 1)
    )
    tokens = torch.randint(0, 6, (40, 3), generator=torch.Generator().manual_seed(5))
    expected = measure_basin(plain, tokens)
    plain.table.scale_grad_by_freq = True
    for memory_budget in (None, 250_000):
        record = measure_basin(plain, tokens, memory_budget=memory_budget)
        assert record.gradient_rank == expected.gradient_rank
        assert record.gradient_effective_rank == pytest.approx(expected.gradient_effective_rank)


def test_table_with_a_largest_norm_that_is_tied_to_the_output_head_is_measured():
    module = Composed(lambda m, x: m.table(x).squeeze(1) @ m.table.weight.T, table=nn.Embedding(3, 2, max_norm=1.0))
    with torch.no_grad():
        module.table.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5], [1.0, 0.0]]))
    record = measure_basin(module, torch.arange(3).unsqueeze(1))
    # Outputs are the entries of W Wᵀ: symmetric, and of rank 2, which leaves 3 * 2 - 1 rotations of W.
    assert record.gradient_rank == 6 - 1
    assert record.notes == ()
    assert module.table.weight[0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize(
    ("module", "num_features", "rank"),
    [
        (nn.Linear(0, 2), 0, 2),
        (Composed(lambda m, x: torch.cat([m.a(x), m.b(x)], dim=1), a=nn.Linear(4, 0), b=nn.Linear(4, 2)), 4, 2 * 5),
        (nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)), 4, 2),
    ],
    ids=["no inputs", "no outputs of a layer", "nothing in between"],
)
def test_layers_without_entries_are_measured(module, num_features, rank, spectrum):
    # [x, 1] of five inputs in general position has rank 5, and only the bias acts on nothing.
    assert measure_basin(module, drawn32(5, num_features), spectrum=spectrum).gradient_rank == rank


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": None}, TypeError, "layers must be 'auto', 'all' or a list of names of layers, got None"),
        ({"layers": 5}, TypeError, "layers must be 'auto', 'all' or a list of names of layers, got 5"),
        ({"layers": ["", ""]}, ValueError, r"layers must be named once each, got \['', ''\]"),
        ({"rtol": "a"}, TypeError, "rtol must be a number or None, got 'a'"),
        ({"duplicate_rtol": "a"}, TypeError, "duplicate_rtol must be a number, got 'a'"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget must be a number of bytes or None, got '1GB'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"max_outputs": 2.5}, TypeError, "max_outputs must be an integer, 'auto' or None, got 2.5"),
        ({"max_outputs": True}, TypeError, "max_outputs must be an integer, 'auto' or None, got True"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(4, 2), torch.ones(5, 4), **arguments)


def test_inputs_without_numbers_are_refused():
    with pytest.raises(ValueError, match="inputs must hold numbers to be measured"):
        measure_basin(nn.Linear(4, 2), torch.ones(5, 4, device="meta"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_module_without_outputs_is_refused():
    with pytest.raises(ValueError, match=r"outputs must hold at least one number per input, got shape \(5, 0\)"):
        measure_basin(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 0)), torch.ones(5, 4))


SIZES: list[int] = []


def noting_its_size(module, inputs):
    SIZES.append(len(inputs))
    return module(inputs)


@pytest.mark.parametrize("layers", [[], "all"])
def test_a_measurement_runs_the_network_on_few_inputs_on_all_and_once_on_each_half(layers):
    SIZES.clear()
    measure_basin(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)),
        drawn32(9, 3),
        behavior=noting_its_size,
        layers=layers,
    )
    # Two inputs also show, a few times, whether training gives the same outputs and gradients.
    assert [size for size in SIZES if size > 2] == [9, 5, 4]
    assert SIZES.index(9) == SIZES.count(2) <= 5


def test_outputs_that_compare_all_inputs_are_refused():
    # As many outputs for each input as there are inputs: a batch of half of them has other shapes.
    class Similarities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ self.net(x).mT

    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure_basin(Similarities(), drawn32(6, 3))
