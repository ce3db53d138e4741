"""Wrong second derivatives, of which differences of gradients know; and right ones, of which they have no doubt."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional.differences import contradicted_blocks
from tests.networks import drawn, filled


class ForgottenOutput(Function):
    """tanh, whose saved result is taken for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y.detach().square())


class ForgottenTerm(Function):
    """x sigmoid(x): one of two terms of its derivative is taken for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        share = x.sigmoid()
        return gradient * (share + (x * share * (1 - share)).detach())


class _Cosine(Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(x, gradient)
        return gradient * x.cos()

    @staticmethod
    def backward(ctx, again):
        x, gradient = ctx.saved_tensors
        return -2 * again * gradient * x.sin(), again * x.cos()


class WrongFactor(Function):
    """sin, with twice its second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return _Cosine.apply(ctx.saved_tensors[0], gradient)


class ConstantStatistics(Function):
    """A layer norm, whose mean and deviation are taken for constants."""

    @staticmethod
    def forward(ctx, x):
        mean, scale = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 1e-5).rsqrt()
        ctx.save_for_backward(x, mean, scale)
        return (x - mean) * scale

    @staticmethod
    def backward(ctx, gradient):
        x, mean, scale = (saved if i == 0 else saved.detach() for i, saved in enumerate(ctx.saved_tensors))
        normed = (x - mean) * scale
        inner = (gradient * normed).mean(1, keepdim=True)
        return scale * (gradient - gradient.mean(1, keepdim=True) - normed * inner)


class ConstantShares(Function):
    """softmax, whose saved probabilities are taken for constants."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(shares := x.softmax(1))
        return shares

    @staticmethod
    def backward(ctx, gradient):
        shares = ctx.saved_tensors[0].detach()
        return shares * (gradient - (shares * gradient).sum(1, keepdim=True))


class SavedOutput(Function):
    """softplus, whose formula is given its output where it needs the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := F.softplus(x))
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].sigmoid()


class DetachedPiece(Function):
    """softplus, of whose inputs one is detached."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.cat([x[:1].detach(), x[1:]]).sigmoid()


class WithoutGraph(Function):
    """x + x^2 / 4, with a part of its derivative computed without a graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x.square() / 4

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            part = ctx.saved_tensors[0] / 2
        return gradient + gradient * part


class FusedLinear(Function):
    """A linear map, whose derivative by the input forgets that it depends on the weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.detach(), gradient.T @ x


class FusedLinearTanh(Function):
    """A linear map and tanh at once, whose inner value is kept without its graph."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.inner = (x @ weight.T).detach()
        ctx.save_for_backward(x, weight)
        return ctx.inner.tanh()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        inner = gradient * (1 - ctx.inner.tanh().square())
        return inner @ weight, inner.T @ x


class FusedGate(Function):
    """A product, one of whose factors is taken for a constant."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y.detach(), gradient * x


class Network(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(3, 4), nn.Parameter(torch.empty(4, 4)), nn.Linear(4, 2)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.first(x), self.weight))


MIDDLES = {
    "forgotten output": lambda h, w: ForgottenOutput.apply(h) @ w,
    "forgotten term": lambda h, w: ForgottenTerm.apply(h) @ w,
    "wrong factor": lambda h, w: WrongFactor.apply(h) @ w,
    "constant statistics": lambda h, w: ConstantStatistics.apply(h) @ w,
    "constant shares": lambda h, w: ConstantShares.apply(h) @ w,
    "saved output": lambda h, w: SavedOutput.apply(h) @ w,
    "detached piece": lambda h, w: DetachedPiece.apply(h) @ w,
    "without graph": lambda h, w: WithoutGraph.apply(h) @ w,
    "fused linear": lambda h, w: FusedLinear.apply(h.tanh(), w).tanh(),
    "fused linear and tanh": lambda h, w: FusedLinearTanh.apply(h, w),
    "fused gate": lambda h, w: FusedGate.apply(h @ w, (h @ w).tanh()),
}


@pytest.mark.filterwarnings("ignore:the Hessian is left out")
@pytest.mark.parametrize(("mode", "noise"), [("bracket", 1e-9), ("dense", 1.0)], ids=["fitted", "not fitted"])
@pytest.mark.parametrize("kind", MIDDLES)
def test_a_wrong_second_derivative_of_the_network_leaves_the_hessian_out(kind, mode, noise):
    module, inputs = filled(Network(MIDDLES[kind])), drawn(5, 3)
    targets = module(inputs).detach() + noise * drawn(5, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian=mode)
    assert (record.hessian_method, record.hessian_certified) == (None, None)
    assert any("do not agree with differences of its outputs and gradients" in note for note in record.notes)
    assert record.gradient_rank > 0


class Rooted(Function):
    """sqrt(1 + x^2), with its root taken for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (1 + x.square()).sqrt()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x / (1 + x.detach().square()).sqrt()


@pytest.mark.filterwarnings("ignore:the Hessian is left out")
def test_a_wrong_second_derivative_of_the_loss_leaves_the_hessian_out():
    module, inputs, targets = filled(nn.Linear(3, 2)), drawn(5, 3), drawn(5, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=lambda f, y: Rooted.apply(f - y).sum())
    assert record.hessian_method is None
    assert any("the second derivative of the loss" in note for note in record.notes)


RIGHT = {
    "rectifiers at zero": (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), 0.0),
    "rectifiers": (nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2)), 1.0),
    "saturated": (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)), 30.0),
    "badly scaled": (nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.LayerNorm(8), nn.Linear(8, 2)), 1e5),
    "hard": (nn.Sequential(nn.Linear(3, 8), nn.Hardtanh(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 2)), 5.0),
    "tiny": (nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2)), 1e-6),
}


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1.0], ids=["exact fit", "fitted", "not fitted"])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_derivatives_are_not_doubted(kind, noise):
    module, scale = RIGHT[kind]
    module = filled(module)
    with torch.no_grad():
        module[0].weight.mul_(scale)
        if scale == 0.0:  # Every unit is given an exact zero.
            module[0].bias.zero_()
            module[2].bias.zero_()
    inputs = drawn(12, 3)
    outputs = module(inputs).detach()
    targets = outputs + noise * outputs.abs().mean() * drawn(12, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.hessian_method == "bracket"
    assert not any("differences" in note for note in record.notes)


def test_a_derivative_of_a_smooth_function_is_confirmed_at_any_scale():
    for scale in (1e-30, 1e-8, 1.0, 1e8):
        point = scale * drawn(5)
        assert contradicted_blocks([3 * point**3], lambda step, p=point: [(p * (1 + step)) ** 3]) == []


@pytest.mark.parametrize("error", [1e-4, 0.1, 1.0, 1e3])
def test_an_error_is_seen_from_a_fraction_of_it_on(error):
    point = drawn(5)
    right = 3 * point**3
    wrong = right + error * right.norm() * F.normalize(drawn(5, seed=1), dim=0)
    assert contradicted_blocks([right, wrong], lambda step: [(point * (1 + step)) ** 3] * 2) == [1]


def test_kinks_within_reach_of_large_steps_prove_nothing():
    # Every step above 3e-7 crosses one.
    point = torch.tensor([1.0, 1.0 - 3e-7, 1.0 + 3e-7], dtype=torch.float64)
    slope = torch.where(point > 1, 2.0, 1.0) * point
    slope[0] = 2.0  # At the kink itself both sides are right.

    def function(step):
        moved = point * (1 + step)
        return [torch.where(moved > 1, 2 * moved - 1, moved)]

    assert contradicted_blocks([slope], function) == []
