"""Hessians of whole measurements: losses that couple inputs, scales, tolerances."""

import pytest
import torch
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.quantities.hessian import quadratic_model
from tests.functional.curvatures import linear
from tests.measure.records import without_time
from tests.networks import drawn, filled


def interaction(outputs, _):
    return (outputs[0] - outputs[1] - outputs[2] + outputs[3]).square().sum()


def test_a_contrast_of_inputs_couples_them():
    module, inputs = linear([[1.0]], [0.0])[0], torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    # w (0 - 1 - 3 + 7) squared: 18 along the weight, nothing along the bias.
    record = measure_basin(module, inputs, torch.zeros(4, 1), loss_fn=interaction)
    assert (record.hessian_nullity, record.hessian_certified) == (1, True)
    assert record.hessian_largest == pytest.approx(18.0)
    assert not record.notes


def all_pairs(outputs, _):
    return (outputs[:, None] - outputs[None]).square().sum()


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_of_differences_between_inputs_does_not_see_the_bias(seed):
    module = nn.Linear(1, 1).double()
    inputs = 1 + 0.05 * drawn(7, 1, seed=seed)
    record = measure_basin(module, inputs, torch.zeros(7, 1), loss_fn=all_pairs)
    assert (record.hessian_nullity, record.gauss_newton_nullity, record.hessian_certified) == (1, 1, True)


class Padded(nn.Module):
    """Looks up tokens, of which the first stands for padding; a head reads their mean, with the same table if tied."""

    def __init__(self, *, tied):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight
        filled(self)

    def vectors(self, tokens):
        return self.table(tokens)

    def forward(self, tokens):
        return self.head(self.vectors(tokens).tanh().mean(1))


class ConstantPadding(Padded):
    """The same written out: the vector of the padding is no parameter."""

    def __init__(self, *, tied):
        super().__init__(tied=tied)
        self.register_buffer("padding", self.table.weight[0].detach().clone())
        self.table.padding_idx = None

    def vectors(self, tokens):
        return torch.where((tokens == 0).unsqueeze(-1), self.padding, self.table(tokens))


@pytest.mark.parametrize("mode", ["dense", "bracket"])
@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_an_embedding_is_a_constant_for_the_hessian(tied, mode):
    tokens, targets = torch.arange(60).view(12, 5) ** 2 % 6, drawn(12, 6)
    padded, constant = (
        measure_basin(kind(tied=tied), tokens, targets, loss_fn=nn.MSELoss(), hessian=mode)
        for kind in (Padded, ConstantPadding)
    )
    assert padded.hessian_nullity_lower is not None
    assert without_time(padded) == without_time(constant)


def products_of_outputs(outputs, _):
    return (outputs[:, 0] * outputs[:, 1]).sum()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-14, 1.0, 1e100, 1e250])
@pytest.mark.parametrize("mode", ["dense", "bracket"])
def test_what_is_known_of_a_hessian_does_not_depend_on_the_scale_of_the_loss(scale, mode):
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, targets = drawn(4, 2), drawn(4, 2, seed=1)

    def measured(factor):
        def loss_fn(f, y):
            return (f - y).square().mean() * factor

        return measure_basin(module, inputs, targets, loss_fn=loss_fn, hessian=mode)

    found, expected = measured(scale), measured(1.0)
    names = ["hessian_nullity", "hessian_nullity_lower", "hessian_nullity_upper", "hessian_nullity_strict"]
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert found.hessian_largest == pytest.approx(scale * expected.hessian_largest, rel=1e-3, abs=0)
    # The bound takes more or fewer products where rounding differs: it is one within a factor of two.
    assert 0.5 <= found.residual_curvature / expected.residual_curvature <= 2.0


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_a_saddle_is_none_at_no_scale(scale):
    module, inputs = linear([[1.0, 2.0], [0.5, 1.0]], [0.0, 0.0])
    record = measure_basin(module, inputs, torch.zeros(3), loss_fn=lambda f, y: scale * products_of_outputs(f, y))
    assert (record.hessian_nullity, record.hessian_negative, record.hessian_certified) == (0, 3, None)


def test_a_tolerance_that_keeps_the_bracket_open_is_named_and_no_training_advised():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = drawn(5, 3)
    targets = module(inputs).detach() + 1e-9 * drawn(5, 3, seed=1)
    smallest = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket").smallest_curvature
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket", rtol=2 * smallest)
    assert record.hessian_certified is False
    assert record.hessian_resolving_loss is None
    assert f"against the tolerance {2 * smallest:.1e}" in str(record)


def test_at_a_perfect_fit_a_tolerance_counts_the_same_in_the_hessian_and_its_gauss_newton_part():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = drawn(5, 3)
    exact = measure_basin(module, inputs, module(inputs).detach(), loss_fn=nn.MSELoss(), hessian="bracket")
    rtol = 1.5 * exact.smallest_curvature  # Above the smallest curvature, below the next.
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=nn.MSELoss(), rtol=rtol)
    assert record.hessian_nullity == record.gauss_newton_nullity > exact.hessian_nullity
    assert record.smallest_curvature > rtol


@pytest.mark.filterwarnings("ignore:the Hessian is left out")
def test_slopes_that_are_not_finite_leave_the_hessian_out():
    module, inputs = linear([[1.0]], [0.0], num_inputs=4)
    targets = torch.tensor([[float("nan")], [1.0], [2.0], [3.0]])
    with pytest.warns(UserWarning, match="derivative of the loss by the outputs must be finite"):
        record = measure_basin(module, inputs, targets, loss_fn=lambda f, y: (f - y).square().nanmean())
    assert record.loss is not None
    assert record.hessian_nullity is None


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = inputs.new_zeros(len(inputs), 4)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            chosen = (sign * inputs[:, 0] > 0).nonzero().squeeze(1)
            if len(chosen):
                hidden = hidden.index_copy(0, chosen, expert(inputs[chosen]).tanh())
        return self.head(hidden)


def test_an_expert_that_some_inputs_do_not_use_is_no_lost_derivative(monkeypatch):
    module = filled(Experts())
    inputs = drawn(20, 3)
    inputs = inputs[inputs[:, 0].argsort()]
    targets = module(inputs).detach() + 1e-9 * drawn(20, 2, seed=1)
    expected = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    monkeypatch.setattr(quadratic_model, "_GRAPH_ELEMENTS", 100)  # Chunks of few inputs.
    found = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert found.hessian_nullity == expected.hessian_nullity
    assert found.hessian_certified


class ScaledError(nn.Module):
    """A loss with a parameter of its own, which is not one of the network."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs, targets):
        return self.scale * (outputs - targets).square().mean() + self.scale**2


def test_parameters_of_the_loss_are_not_those_of_the_network():
    module, inputs = linear([[1.0], [2.0]], [0.0, 1.0])
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=ScaledError(), hessian="bracket")
    assert (record.hessian_nullity, record.hessian_certified, record.notes) == (0, True, ())
