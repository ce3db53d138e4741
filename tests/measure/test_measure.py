import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_basin import measure_basin
from tests.exact import ExactNetwork, exact_rank, half_squared_error_hessian, integers, jacobian
from tests.measure.records import integer_targets, large_chain, without_time
from tests.models import (
    BagOfTokens,
    Chain,
    OneNumber,
    Sequence2d,
    evaluated_case,
    integer_case,
    integer_inputs,
    sum_of_squares,
    with_integer_weights,
)
from tests.networks import built, drawn32, generator_of


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


@pytest.mark.parametrize("loss_fn", [None, nn.MSELoss()])
def test_stages_add_up_to_the_time_of_the_measurement(loss_fn):
    record = measure_basin(built(lambda: Chain(3, 4, 2)), drawn32(5, 3), drawn32(5, 2), loss_fn=loss_fn)
    assert set(record.seconds) == {"copy", "trace", "gradients", "ranks", "hessian", "duplicates"}
    assert min(record.seconds.values()) >= 0.0
    assert sum(record.seconds.values()) == record.measure_seconds


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
    plain, projected = (measure_basin(module, drawn32(5, 3), max_outputs=number) for number in (None, 4))
    assert without_time(projected) == without_time(plain)
