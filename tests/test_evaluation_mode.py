"""Modules whose evaluation mode cuts gradients off: the numbers are those of the same network without that."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, measure_basin
from tests.exact import ExactNetwork, exact_rank, integers, jacobian
from tests.lightning_packages import LightningModule, MisconfigurationException, Trainer
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
    "merged by eval": (lambda: low_rank(MergedLowRank), lambda: low_rank(LowRank)),
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


def fitted(net, tmp_path, *callbacks):
    data = TensorDataset(drawn(24, 3, seed=3).float(), drawn(24, 2, seed=4).float())
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    module = Lit(net)
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
