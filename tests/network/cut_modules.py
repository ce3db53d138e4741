"""Modules whose evaluation mode cuts gradients off."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.lightning_packages import LightningModule, Trainer
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
    "straight through in training": (lambda: StraightThroughInTraining(*blocks()), lambda: StraightThrough(*blocks())),
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


class Freezing(Plain):
    """Freezes some or all of its blocks in evaluation mode."""

    frozen = ("first",)

    def train(self, mode=True):  # noqa: FBT002 - as its base has it
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).requires_grad_(mode)
        return self


class PartWithoutGradient(Plain):
    """In both modes."""

    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.rest(h)


class Inference(Plain):
    """For predictions only: training calls the parts."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


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


def frozen(net):
    net.first.requires_grad_(requires_grad=False)
    return net
