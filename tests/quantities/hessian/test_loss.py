"""Hessians of losses of all kinds, and refusals of losses and networks that cannot be differentiated twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from tests.networks import Composed, OnceOnly, drawn, filled


def test_an_absolute_error_has_no_gauss_newton_part_and_says_so():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.L1Loss())
    assert any("the loss is piecewise linear in the outputs" in note for note in record.notes)
    assert record.gauss_newton_nullity == record.num_parameters
    # Each layer's weights enter the loss piecewise linearly: no curvature at all.
    assert [layer.hessian_nullity_strict for layer in record.layers.values()] == [16, 10]


def not_convex(outputs, targets):
    return -(outputs - targets).square().sum()


def test_a_loss_that_is_not_convex_proves_nothing_and_is_formed_where_that_is_possible():
    module, inputs, targets = filled(nn.Linear(3, 2)), drawn(5, 3), drawn(5, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=not_convex)
    assert any("the loss is not convex in the outputs" in note and "it is formed" in note for note in record.notes)
    assert (record.hessian_certified, record.hessian_nullity, record.hessian_negative) == (None, 0, 8)
    bracket = measure_basin(module, inputs, targets, loss_fn=not_convex, hessian="bracket")
    assert any("the loss is not convex in the outputs" in note and "it is left out" in note for note in bracket.notes)
    assert (bracket.hessian_method, bracket.gauss_newton_nullity) == (None, None)


class PenalisedClassifier(nn.Linear):
    """A softmax classifier with weight decay inside of its cross-entropy."""

    decay = 0.0

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets) + self.decay * self.weight.square().sum()


@pytest.mark.parametrize("decay", [0.1, 10.0])
def test_weight_decay_beside_a_cross_entropy_is_in_the_hessian(decay):
    module, inputs, targets = filled(PenalisedClassifier(3, 3)), drawn(8, 3), torch.arange(8) % 3
    plain = measure_basin(module, inputs, targets, loss_fn=module.loss, hessian="dense")
    module.decay = decay
    record = measure_basin(module, inputs, targets, loss_fn=module.loss, hessian="dense")
    # The cross-entropy leaves one direction of each input feature and of the biases; decay curves all but the last.
    assert (plain.hessian_nullity_strict, record.hessian_nullity_strict) == (4, 1)
    # H adds 2 decay on the weights: its largest eigenvalue is at least that, and at most that much larger (Weyl).
    assert 2 * decay <= record.hessian_largest <= plain.hessian_largest + 2 * decay


class Penalised(nn.Module):
    """Its loss is a method, which follows the copy that is measured, and so may hold its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(self.first(inputs).tanh())

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum() + 1e-3 * sum(p.square().sum() for p in self.parameters())


def test_weight_decay_inside_of_the_loss_leaves_no_null_space():
    module, inputs = filled(Penalised()), drawn(5, 3)
    targets = module(inputs).detach()
    record = measure_basin(module, inputs, targets, loss_fn=module.loss)
    # At zero residual H = 2 G^T G + 2e-3 I.
    assert (record.hessian_nullity_strict, record.hessian_negative) == (0, 0)
    assert record.residual_curvature * record.hessian_largest == pytest.approx(2e-3, rel=1e-6)
    assert any("the loss holds parameters themselves" in note for note in record.notes)
    assert measure_basin(module, inputs, targets, loss_fn=module.loss, hessian="bracket").hessian_method is None


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda f, y: (f - y).square(), TypeError, "one floating point number as a tensor"),
        (lambda f, y: f.detach().sum(), ValueError, "got the constant"),
        (lambda f, y: torch.tensor(1.5), ValueError, "got the constant 1.5"),
        (lambda f, y: (f - y + torch.randn_like(f)).square().sum(), ValueError, "two evaluations differ"),
        (lambda f, y: F.mse_loss(f, y[:, :1]), TypeError, "targets must have the shape of the outputs"),
        (lambda f, y: F.binary_cross_entropy_with_logits(f, y[:, :1]), TypeError, "loss_fn must take the outputs"),
    ],
    ids=["vector", "detached", "constant", "random", "broadcast", "wrong shape"],
)
def test_a_loss_that_is_no_function_of_outputs_and_targets_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(3, 2), drawn(5, 3), drawn(5, 2, seed=1), loss_fn=loss_fn)


class SilentlyOnce(OnceOnly):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy((2 * ctx.saved_tensors[0] * gradient).detach().numpy())


@pytest.mark.parametrize("operation", [OnceOnly, SilentlyOnce])
@pytest.mark.parametrize("place", ["network", "loss"])
def test_what_cannot_be_differentiated_twice_leaves_the_bracket_out(operation, place):
    inputs, targets = drawn(5, 3), drawn(5, 2, seed=1)
    if place == "network":
        module = Composed(lambda m, x: m.last(operation.apply(m.first(x))), first=nn.Linear(3, 2), last=nn.Linear(2, 2))
        loss_fn = nn.MSELoss()
    else:
        module = filled(nn.Linear(3, 2))

        def loss_fn(outputs, labels):
            return operation.apply(outputs - labels).sum()

    with pytest.warns(UserWarning, match="the Hessian is left out") as warned:
        record = measure_basin(filled(module), inputs, targets, loss_fn=loss_fn, hessian="bracket")
    assert warned[0].filename == __file__  # The line that asked for it.
    assert record.gradient_rank > 0
    assert record.hessian_method is None


class Lopsided(torch.autograd.Function):
    """x -> x_0 x_1 with a first derivative that forgets that the factors depend on each other."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x[:, :1] * x[:, 1:]

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.cat([x[:, 1:], x[:, :1].detach()], dim=1)


def test_a_wrong_second_derivative_leaves_the_bracket_out():
    module = filled(Composed(lambda m, x: Lopsided.apply(m.first(x)), first=nn.Linear(3, 2)))
    with pytest.warns(
        UserWarning, match="do not agree with differences of its outputs and gradients, in layer 'first'"
    ):
        record = measure_basin(module, drawn(5, 3), drawn(5, 1, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.hessian_method is None


def one_number(function=lambda outputs: outputs):
    return filled(Composed(lambda m, x: function(m.linear(x).squeeze(1)), linear=nn.Linear(3, 1)))


@pytest.mark.parametrize("hessian", ["dense", "bracket"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: (outputs - outputs.mean() - targets).square().sum(),
        lambda outputs, targets: F.cross_entropy(outputs.unsqueeze(0), targets.softmax(0).unsqueeze(0)),
    ],
    ids=["contrast", "softmax over the inputs"],
)
def test_a_loss_that_couples_single_outputs_is_blind_to_what_they_share(loss_fn, hessian):
    # The bias moves all six outputs alike.
    record = measure_basin(one_number(), drawn(6, 3, seed=1), drawn(6, seed=2), loss_fn=loss_fn, hessian=hessian)
    assert (record.gradient_rank, record.hessian_nullity) == (4, 1)


def test_single_outputs_that_depend_on_other_inputs_are_refused():
    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure_basin(one_number(lambda outputs: outputs - outputs.mean()), drawn(6, 3, seed=1))


@pytest.mark.parametrize("hessian", ["dense", "bracket"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_parameter_without_elements_changes_no_nullity(shape, hessian):
    # Two outputs of a linear layer on four inputs in general position: all ten parameters are seen, H has full rank.
    module = nn.Linear(4, 2)
    module.dummy = nn.Parameter(torch.empty(shape))
    inputs = torch.cat([torch.zeros(1, 4), torch.eye(4)])
    record = measure_basin(module, inputs, torch.zeros(5, 2), loss_fn=nn.MSELoss(), hessian=hessian)
    assert (record.num_parameters, record.gradient_rank, record.hessian_nullity) == (10, 10, 0)


def weight_normed(*, old):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
    if not old:
        return nn.utils.parametrizations.weight_norm(layer)
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "hook"])
def test_the_hessian_of_weight_norm_is_that_of_its_formula(old):
    # f = g (v x) / |v| at g = 1, v = (1, 0), x = (1, 1). By (g, v1, v2) its second derivative is
    # [[0, 0, 1], [0, 0, -1], [1, -1, -1]], with eigenvalues 0, 1 and -2.
    record = measure_basin(
        weight_normed(old=old),
        torch.ones(1, 2),
        torch.zeros(1),
        loss_fn=lambda outputs, _: outputs.sum(),
        hessian="dense",
    )
    assert (record.hessian_nullity_strict, record.hessian_negative) == (1, 1)
    assert record.hessian_largest == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_of_a_convolution_has_a_certified_nullity(dim):
    # Of each norm g and direction v one combination is never seen: moving v along itself.
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 2).double(), dim=dim)
    inputs = drawn(40, 2, 3, 3, seed=3)
    targets = layer(inputs).detach()
    record = measure_basin(layer, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    unseen = {0: 3, 1: 2, None: 1}[dim]
    assert (record.hessian_nullity, record.hessian_certified) == (unseen, True)
