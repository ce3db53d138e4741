"""Modules whose evaluation mode cuts gradients off: the numbers are those of the same network without that."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, measure_basin
from tests.exact import ExactNetwork, exact_rank, integers, jacobian
from tests.lightning_packages import Callback, LightningModule, MisconfigurationException, Trainer
from tests.networks import drawn


class LowRank(nn.Linear):
    """A frozen weight and the product of two small matrices, as in LoRA (Hu et al., 2021)."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight.requires_grad_(requires_grad=False)
        self.down, self.up = nn.Parameter(torch.ones(2, d_in)), nn.Parameter(torch.ones(d_out, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.down.mT @ self.up.mT


class MergedLowRank(LowRank):
    """``eval()`` adds the product to the weight, ``train()`` takes it off again."""

    merged = False

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) if self.merged else super().forward(x)


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


class MergedIntoNewParameter(LowRank):
    """``eval()`` replaces the weight and throws the matrices away, ``train()`` brings them back."""

    kept = None

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        if not mode and self.kept is None:
            self.kept = self.weight, self.down, self.up
            self.weight = nn.Parameter((self.weight + self.up @ self.down).detach())
            del self.down, self.up
        elif mode and self.kept is not None:
            self.weight, self.down, self.up = self.kept
            self.kept = None
        return self

    def forward(self, x):
        return super().forward(x) if self.kept is None else F.linear(x, self.weight, self.bias)


class MergedIntoBuffer(LowRank):
    """With dropout of its own on the way to the small matrices."""

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        if not mode:
            self.register_buffer("whole", (self.weight + self.up @ self.down).detach(), persistent=False)
        return self

    def forward(self, x):
        if not self.training:
            return F.linear(x, self.whole, self.bias)
        return F.linear(x, self.weight, self.bias) + F.dropout(x, 0.5) @ self.down.mT @ self.up.mT


class MergedByForward(LowRank):
    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        vars(self).pop("forward", None)
        if not mode:
            weight = (self.weight + self.up @ self.down).detach()
            self.forward = lambda x: F.linear(x, weight, self.bias)
        return self


class MergedWithOwnDropout(MergedLowRank):
    """Draws by itself in training mode, which its low-rank part needs no more than a flag for."""

    def forward(self, x):
        if self.training:
            x = x + torch.randn_like(x)
        return super().forward(x)


class Plain(nn.Module):
    """Blocks in a line; subclasses cut their gradients off in evaluation mode."""

    def __init__(self, *blocks):
        super().__init__()
        self.first, self.rest = blocks[0], nn.Sequential(*blocks[1:])

    def forward(self, x):
        return self.rest(self.first(x))


class EnabledByTraining(Plain):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class FirstEnabledByTraining(Plain):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            h = self.first(x)
        return self.rest(h)


class DetachedInEvaluation(Plain):
    def forward(self, x):
        h = self.first(x)
        return self.rest(h if self.training else h.detach())


class Residual(Plain):
    """What the first block gives also goes past the others."""

    def forward(self, x):
        h = self.first(x)
        return self.rest(h) + h[:, :2]


class PartlyDetachedInEvaluation(Plain):
    """The parameters of the first block are in the graph of evaluation, with a part of their gradient."""

    def forward(self, x):
        h = self.first(x)
        return self.rest(h) + (h if self.training else h.detach())[:, :2]


class RarelyDropped(PartlyDetachedInEvaluation):
    """Beside a path that training drops, so seldom that a run or two do not show it."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.path = Path()

    def forward(self, x):
        return super().forward(self.path(x))


class Path(nn.Module):
    def forward(self, x):
        return 0 * x if self.training and torch.rand(()) < 0.05 else x


class StraightThrough(Plain):
    """Rounds, with the gradient of the identity."""

    def forward(self, x):
        h = self.first(x)
        return self.rest(h + ((8 * h).round() / 8 - h).detach())


class StraightThroughInTraining(Plain):
    """The graph of evaluation holds all parameters, but a rounding has no gradient."""

    def forward(self, x):
        h = self.first(x)
        rounded = (8 * h).round() / 8
        return self.rest(h + (rounded - h).detach() if self.training else rounded)


class NoGradInEvaluation(Plain):
    def forward(self, x):
        if self.training:
            return super().forward(x)
        with torch.no_grad():
            return super().forward(x)


class RandomBeside(Plain):
    """Noise by code of its own, and functional dropout, in training mode."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.noise = Noise()

    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(self.noise(F.dropout(x, 0.5, training=self.training)))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


def normalised():
    part = nn.BatchNorm1d(4)
    part.running_mean += 0.5
    part.running_var *= 2.0
    return part


def blocks():
    return nn.Linear(3, 4), normalised(), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)


def low_rank(kind):
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), kind(4, 5), nn.Tanh(), nn.Linear(5, 2))


PAIRS = {
    "enabled by training": (lambda: EnabledByTraining(*blocks()), lambda: Plain(*blocks())),
    "a part enabled by training": (lambda: FirstEnabledByTraining(*blocks()), lambda: Plain(*blocks())),
    "detached in evaluation": (lambda: DetachedInEvaluation(*blocks()), lambda: Plain(*blocks())),
    "no_grad in evaluation": (lambda: NoGradInEvaluation(*blocks()), lambda: Plain(*blocks())),
    "noise in training": (lambda: RandomBeside(*blocks()), lambda: Plain(*blocks())),
    "inside another module": (
        lambda: nn.Sequential(nn.Linear(3, 3), EnabledByTraining(*blocks())),
        lambda: nn.Sequential(nn.Linear(3, 3), Plain(*blocks())),
    ),
    "detached in part": (lambda: PartlyDetachedInEvaluation(*blocks()), lambda: Residual(*blocks())),
    "detached in part beside a dropped path": (lambda: RarelyDropped(*blocks()), lambda: Residual(*blocks())),
    "straight through in training": (
        lambda: StraightThroughInTraining(*blocks()),
        lambda: StraightThrough(*blocks()),
    ),
    "merged by eval": (lambda: low_rank(MergedLowRank), lambda: low_rank(LowRank)),
    "merged into a new parameter": (lambda: low_rank(MergedIntoNewParameter), lambda: low_rank(LowRank)),
    "merged into a buffer": (lambda: low_rank(MergedIntoBuffer), lambda: low_rank(LowRank)),
    "merged by another forward": (lambda: low_rank(MergedByForward), lambda: low_rank(LowRank)),
    "merged with dropout of its own": (lambda: low_rank(MergedWithOwnDropout), lambda: low_rank(LowRank)),
}


def numbers(record):
    layers = {
        name: (layer.gradient_rank, layer.hessian_nullity, layer.duplicated_activations, layer.dead_units)
        for name, layer in record.layers.items()
    }
    return record.gradient_rank, record.hessian_nullity, record.gradient_rank_bound, layers


def trained(module):
    """In training mode, with reproducible weights; buffers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


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


class Freezing(Plain):
    """Freezes some or all of its blocks in evaluation mode."""

    frozen = ("first",)

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).requires_grad_(mode)
        return self


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


class PartWithoutGradient(Plain):
    """In both modes."""

    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.rest(h)


def test_a_part_without_gradient_in_both_modes_is_said_to_be():
    record = measure_basin(trained(PartWithoutGradient(*blocks())), drawn(9, 3))
    assert record.layers["first"].gradient_rank == 0
    assert "depend on the layers ['first'], but have no gradient there" in record.notes[0]


class Inference(Plain):
    """For predictions only: training calls the parts."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


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
        measure_basin(OtherOutputs(*blocks()), drawn(5, 3))


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


class Lit(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.loss_fn = net, nn.MSELoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def fitted(net, tmp_path, *callbacks, kind=Lit):
    data = TensorDataset(drawn(24, 3, seed=3).float(), drawn(24, 2, seed=4).float())
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    module = kind(net)
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module


@pytest.mark.parametrize("name", ["merged by eval", "enabled by training", "noise in training"])
def test_a_fit_with_a_monitor_trains_the_same_weights_and_measures_the_uncut_rank(tmp_path, name):
    build, build_plain = PAIRS[name]
    net = trained(build()).float()
    monitor = BasinMonitor(16)
    watched, plain = fitted(copy.deepcopy(net), tmp_path, monitor), fitted(copy.deepcopy(net), tmp_path)
    for key, tensor in watched.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
    assert len(monitor.records) == 3
    uncut = build_plain().train()
    uncut.load_state_dict(watched.net.state_dict())
    assert monitor.records[-1].gradient_rank == measure_basin(uncut, monitor.probe).gradient_rank > 4


def test_a_fit_whose_forward_takes_no_gradients_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="runs under no_grad or inference_mode"):
        fitted(Inference(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), tmp_path, BasinMonitor(8))


class Inline(Lit):
    """Calls the blocks one by one and computes its loss from tensors: no loss of torch is seen."""

    def training_step(self, batch, _):
        return (self.net.rest(self.net.first(batch[0])) - batch[1]).square().mean()


class InlineManually(Inline):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, _))
        optimizer.step()
        optimizer.zero_grad()


class InlineThroughForward(Lit):
    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean()


class InlineWithPenalty(Lit):
    """The first block is trained by a loss of its own."""

    def training_step(self, batch, _):
        return (self(batch[0]) - batch[1]).square().mean() + self.net.first(batch[0]).square().mean()


class DetachedHead(Plain):
    def forward(self, x):
        return self.rest(self.first(x).detach())


class PartInInferenceMode(Plain):
    def forward(self, x):
        with torch.inference_mode():
            h = self.first(x)
        return self.rest(h.clone())


CUT_BY_FORWARD = [
    (PartWithoutGradient, Inline),
    (PartWithoutGradient, InlineManually),
    (PartInInferenceMode, Inline),
    (DetachedHead, Inline),
]


@pytest.mark.parametrize(("net", "kind"), CUT_BY_FORWARD)
def test_a_part_which_only_forward_cuts_off_is_measured_through_the_step(tmp_path, net, kind):
    parts, monitors = blocks(), [BasinMonitor(8), BasinMonitor(8)]
    for module, monitor in zip((net, Plain), monitors, strict=True):
        fitted(module(*copy.deepcopy(parts)), tmp_path, monitor, kind=kind)
    cut, plain = ([layer.gradient_rank for layer in monitor.records[0].layers.values()] for monitor in monitors)
    assert cut == plain
    assert min(cut) > 0


@pytest.mark.parametrize(
    ("net", "kind", "behavior"),
    [
        *((net, kind, lambda module, inputs: module(inputs)) for net, kind in CUT_BY_FORWARD),
        (DetachedHead, InlineWithPenalty, None),
    ],
)
def test_a_fit_that_trains_a_part_which_forward_cuts_off_is_refused(tmp_path, net, kind, behavior):
    with pytest.raises(MisconfigurationException, match=r"reaches the parameters of the layers \['net.first'\], and"):
        fitted(net(*blocks()), tmp_path, BasinMonitor(8, behavior=behavior), kind=kind)


def test_a_fit_that_passes_its_forward_by_is_measured_in_training_mode(tmp_path):
    net, monitor = FirstEnabledByTraining(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    fitted(net, tmp_path, monitor, kind=Inline)
    assert [record.gradient_rank for record in monitor.records] == [26, 26, 26]


def frozen(net):
    net.first.requires_grad_(requires_grad=False)
    return net


@pytest.mark.parametrize("kind", [Inline, InlineThroughForward])
@pytest.mark.parametrize("net", [Plain, PartWithoutGradient])
def test_a_frozen_part_costs_no_word(tmp_path, recwarn, caplog, net, kind):
    monitor = BasinMonitor(16)
    fitted(frozen(net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), tmp_path, monitor, kind=kind)
    assert [record.gradient_rank for record in monitor.records] == [10, 10, 10]
    assert "layers [" not in caplog.text + "".join(str(warning.message) for warning in recwarn)


def test_a_part_that_neither_training_nor_forward_gives_gradients_costs_no_word(tmp_path, recwarn, caplog):
    net, monitor = PartWithoutGradient(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    fitted(net, tmp_path, monitor, kind=InlineThroughForward)
    assert [record.gradient_rank for record in monitor.records] == [10, 10, 10]
    assert "layers [" not in caplog.text + "".join(str(warning.message) for warning in recwarn)


class Averaged(Plain):
    """Evaluation uses a frozen copy of the first block."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.average = copy.deepcopy(self.first).requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.rest((self.first if self.training else self.average)(x))


def test_layers_that_are_trained_and_that_evaluation_does_not_use_are_said_to_be_unseen(tmp_path):
    net, monitor = Averaged(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    with pytest.warns(UserWarning, match=r"do not depend on the layers \['net.first'\], which training trains"):
        fitted(net, tmp_path, monitor, kind=InlineThroughForward)
    assert [record.layers["net.first"].gradient_rank for record in monitor.records] == [0, 0, 0]


class Switch(Callback):
    """Does something to the net at the beginning of the second epoch."""

    def __init__(self, change):
        self.change = change

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.change(pl_module.net)


class InlineForAll(Inline):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_part_that_is_trained_from_some_epoch_on_is_not_measured_with_rank_zero(tmp_path):
    net, monitor = frozen(PartWithoutGradient(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), BasinMonitor(16)
    unfreeze = Switch(lambda net: net.first.requires_grad_(requires_grad=True))
    with pytest.warns(UserWarning, match=r"could not measure at step 6.*layers \['net.first'\]"):
        fitted(net, tmp_path, monitor, unfreeze, kind=InlineForAll)
    assert [(record.step, record.gradient_rank) for record in monitor.records] == [(0, 10), (3, 10)]


class FirstEnabledByFlag(Plain):
    is_enabled = True

    def forward(self, x):
        with torch.set_grad_enabled(self.is_enabled):
            h = self.first(x)
        return self.rest(h)


class ThroughForwardForAll(InlineThroughForward, InlineForAll):
    """All parameters are in the optimizer, whatever becomes of them."""


def test_a_part_that_is_no_longer_trained_from_some_epoch_on_has_rank_zero(tmp_path):
    net, monitor = FirstEnabledByFlag(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), BasinMonitor(16)
    disable = Switch(lambda net: setattr(net, "is_enabled", False))
    fitted(net, tmp_path, monitor, disable, kind=ThroughForwardForAll)
    assert [record.gradient_rank for record in monitor.records] == [26, 26, 10]


class Stream(Plain):
    """Draws from a generator of Python's, that no copy can have."""

    numbers = None

    def forward(self, x):
        if self.training:
            self.numbers = self.numbers or (generator for generator in map(float, range(100)))
            x = x + 0.01 * next(self.numbers)
        return super().forward(x)


@pytest.mark.parametrize("net", [PartlyDetachedInEvaluation, Freezing, StraightThroughInTraining, Stream])
@pytest.mark.parametrize("behavior", [None, lambda module, inputs: module(inputs)])
def test_training_is_the_same_with_a_monitor(tmp_path, net, behavior):
    net = trained(net(*blocks())).float()
    modes = [
        fitted(copy.deepcopy(net), tmp_path, *monitors, kind=InlineThroughForward)
        for monitors in ([], [BasinMonitor(16, behavior=behavior)])
    ]
    alone, watched = (
        [*module.state_dict().values(), *(torch.tensor(part.training) for part in module.modules())] for module in modes
    )
    assert all(map(torch.equal, alone, watched))


class ForPredictions(Plain):
    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        if mode:
            raise NotImplementedError("this module is for predictions")
        return super().train(mode)


def test_a_module_that_cannot_be_trained_is_measured_as_it_is():
    inputs = drawn(9, 3)
    plain = Plain(*blocks()).double().eval()
    module = ForPredictions(plain.first, *plain.rest).double().eval()
    assert measure_basin(module, inputs).gradient_rank == measure_basin(plain, inputs).gradient_rank
