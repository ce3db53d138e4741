"""Modules whose evaluation mode cuts gradients off: the numbers are those of the same network without that."""

import copy

import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, measure_basin
from tests.exact import ExactNetwork, exact_rank, integers, jacobian
from tests.network.cut_modules import (
    CUT_BY_FORWARD,
    PAIRS,
    EnabledByTraining,
    Freezing,
    Inference,
    PartWithoutGradient,
    Plain,
    blocks,
    fitted,
    numbers,
    trained,
)
from tests.networks import drawn, filled


class MergedParts(nn.Module):
    """The same with the matrices in layers of their own, that evaluation does not call."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.down, self.up = nn.Linear(d_in, 2, bias=False), nn.Linear(2, d_out, bias=False)
        self.base.requires_grad_(requires_grad=False)
        self.merged = False

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        if mode == self.merged:
            self.base.weight.data += (-1 if mode else 1) * (self.up.weight @ self.down.weight).detach()
            self.merged = not mode
        return self

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("memory_budget", [None, 2**20])
@pytest.mark.parametrize(("build", "build_plain"), PAIRS.values(), ids=PAIRS)
def test_the_record_is_that_of_the_module_without_the_cut(build, build_plain, memory_budget, is_training):
    module, inputs, targets = trained(build()), drawn(9, 3, seed=1), drawn(9, 2, seed=2)
    inputs[4] = inputs[1].clone()
    expected = measure_basin(trained(build_plain()), inputs, targets, loss_fn=nn.MSELoss())
    module.train(is_training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), memory_budget=memory_budget)
    assert numbers(found) == numbers(expected)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert "in training mode" in found.notes[0]
    # And the module is as it was.
    assert {part.training for part in module.modules()} == {is_training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_matrices_in_layers_that_evaluation_does_not_call_are_measured():
    # Of up (down x) 5 x 4 matrices of rank 2 are 2 (5 + 4 - 2) = 14 directions, all seen by 9 inputs.
    module = trained(MergedParts(4, 5))
    record = measure_basin(module, drawn(9, 4))
    assert (record.gradient_rank, record.layers["up"].gradient_rank) == (14, 10)
    assert "['down', 'up']" in record.notes[0]


def test_the_ranks_of_an_integer_network_that_trains_with_gradients_only_are_exact():
    module = EnabledByTraining(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    inputs = torch.randint(-3, 4, (8, 3), generator=generator).double()
    network = ExactNetwork(module)
    hidden = network.linear("first", network.constant(integers(inputs))).relu()
    exact = jacobian(network.linear("rest.1", hidden))
    record = measure_basin(module, inputs)
    assert record.gradient_rank == exact_rank(exact) > 0
    for name, columns in network.columns.items():
        assert record.layers[name].gradient_rank == exact_rank(exact[:, columns])


class FreezingAll(Freezing):
    frozen = ("first", "rest")


@pytest.mark.parametrize("kind", [Freezing, FreezingAll])
def test_what_eval_freezes_is_measured_as_it_trains(kind):
    module, inputs, targets = trained(kind(*blocks())), drawn(9, 3, seed=1), drawn(9, 2, seed=2)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())
    assert numbers(record) == numbers(measure_basin(trained(Plain(*blocks())), inputs, targets, loss_fn=nn.MSELoss()))
    assert record.notes == ()
    assert all(parameter.requires_grad for parameter in module.parameters())


class Routed(nn.Module):
    """Inputs go to an expert by their sign, of which the second takes gradients in training only."""

    def __init__(self):
        super().__init__()
        self.negative, self.positive = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            positive = self.positive(x[x[:, 0] > 0])
        outputs = x.new_zeros(len(x), 2)
        outputs[x[:, 0] <= 0] = self.negative(x[x[:, 0] <= 0])
        outputs[x[:, 0] > 0] = positive
        return outputs


def test_a_cut_that_later_inputs_meet_is_seen():
    inputs = drawn(12, 3)
    inputs[:6, 0], inputs[6:, 0] = -inputs[:6, 0].abs(), inputs[6:, 0].abs()
    record = measure_basin(trained(Routed()), inputs)
    assert [layer.gradient_rank for layer in record.layers.values()] == [8, 8]
    assert "cuts the layers ['positive'] off" in record.notes[0]


class SeveralOutputs(Plain):
    """Training returns what is inside as well, so that outputs cannot be compared."""

    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            h = self.first(x)
        return {"outputs": self.rest(h), "hidden": h} if self.training else self.rest(h)


def test_a_cut_is_refused_where_training_returns_something_else():
    with pytest.raises(ValueError, match=r"reaches the parameters of the layers \['first'\], and the outputs"):
        measure_basin(trained(SeveralOutputs(*blocks())), drawn(9, 3))


class LearnedNoise(Plain):
    """Has a parameter that training alone uses, beside others."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = self.first(x)
        return self.rest(h + self.scale * torch.randn_like(h) if self.training else h)


def test_a_parameter_that_only_training_uses_has_rank_zero():
    plain, module = trained(Plain(*blocks())), trained(LearnedNoise(*blocks()))
    module.load_state_dict(plain.state_dict(), strict=False)
    record, expected = (measure_basin(part, drawn(9, 3)) for part in (module, plain))
    assert (record.layers[""].gradient_rank, record.gradient_rank) == (0, expected.gradient_rank)
    assert record.notes == ()


def test_a_part_without_gradient_in_both_modes_is_said_to_be():
    record = measure_basin(trained(PartWithoutGradient(*blocks())), drawn(9, 3))
    assert record.layers["first"].gradient_rank == 0
    assert "depend on the layers ['first'], but have no gradient there" in record.notes[0]


class InferenceMode(Plain):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


class Detached(Plain):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize("kind", [Inference, InferenceMode, Detached])
def test_outputs_without_any_gradient_are_refused(kind):
    with pytest.raises(ValueError, match=rf"none of these is in their graph: {kind.__name__} runs under no_grad or"):
        measure_basin(kind(*blocks()), drawn(5, 3))


class OtherOutputs(Plain):
    """Training computes something else than evaluation, which takes no gradients."""

    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(2 * x if self.training else x)


def test_what_training_computes_otherwise_is_refused_with_its_layers():
    with pytest.raises(ValueError, match=r"reaches the parameters of the layers \['first', 'rest\.0', 'rest\.3'\]"):
        measure_basin(filled(OtherOutputs(*blocks())), drawn(5, 3))


class ByPosition(nn.Module):
    """Each input goes to one expert by its numbers; in training by chance."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

    def forward(self, x):
        chosen = torch.randint(4, (len(x),)) if self.training else (x[:, 0] > 0).long()
        outputs = torch.zeros(len(x), 2, dtype=x.dtype)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                outputs = torch.where((chosen == index)[:, None], expert(x), outputs)
        return outputs


def test_an_expert_that_evaluation_does_not_choose_has_rank_zero():
    inputs = drawn(12, 3)
    inputs[:6, 0], inputs[6:, 0] = -inputs[:6, 0].abs(), inputs[6:, 0].abs()
    record = measure_basin(trained(ByPosition()), inputs)
    assert [layer.gradient_rank for layer in record.layers.values()] == [8, 8, 0, 0]
    assert record.notes == ()


@pytest.mark.fits
@pytest.mark.parametrize(("net", "kind"), CUT_BY_FORWARD)
def test_a_part_which_only_forward_cuts_off_is_measured_through_the_step(tmp_path, net, kind):
    parts, monitors = blocks(), [BasinMonitor(8), BasinMonitor(8)]
    for module, monitor in zip((net, Plain), monitors, strict=True):
        fitted(module(*copy.deepcopy(parts)), tmp_path, monitor, kind=kind)
    cut, plain = ([layer.gradient_rank for layer in monitor.records[0].layers.values()] for monitor in monitors)
    assert cut == plain
    assert min(cut) > 0
