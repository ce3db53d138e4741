"""Training steps as people write them: what is read from each is what explicit arguments would say."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import BasinMonitor, measure_basin
from tests.callback.training_step.steps import (
    Base,
    Classifier,
    CrossEntropy,
    Manual,
    by_net,
    fitted,
    integers,
    stacked,
    whole_probe,
)
from tests.lightning_packages import MisconfigurationException
from tests.training import seeded, steps

pytestmark = pytest.mark.fits


class OfAModule(Classifier):
    def __init__(self):
        super().__init__()
        self.loss_module = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 3.0]))

    def training_step(self, batch):
        loss = self.loss_module(self.logits(batch), batch["label"])
        self.log("loss", loss, prog_bar=True)
        return {"loss": loss, "other": 1}


class OneHot(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.logits(batch).softmax(1), F.one_hot(batch["label"], 3).float())


class LogProbabilities(Classifier):
    def training_step(self, batch, batch_idx):
        return F.nll_loss(self.logits(batch).log_softmax(1), batch["label"])


class Scaled(Classifier):
    def training_step(self, batch, batch_idx):
        return 3 * F.mse_loss(self.logits(batch), batch["target"], reduction="sum") / len(batch["target"])


class Masked(Classifier):
    def training_step(self, batch, batch_idx):
        each = F.mse_loss(self.logits(batch), batch["target"], reduction="none")
        return (each * batch["mask"]).sum() / 7


class TwoTasks(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        classes = F.cross_entropy(logits, batch["label"])
        return classes + 0.5 * F.mse_loss(logits, batch["target"])


class TwoHeads(Classifier):
    def training_step(self, batch, batch_idx):
        hidden = self.net[1](self.net[0](batch["image"].flatten(1)))
        first, second = self.net[3](hidden), self.net[3](2 * hidden)
        return F.mse_loss(first, batch["target"]) + 0.5 * F.l1_loss(second, batch["target"])


class Metrics(Classifier):
    """A second loss is only looked at."""

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        with torch.no_grad():
            self.log("accuracy", (logits.argmax(1) == batch["label"]).float().mean())
            self.log("nll", F.nll_loss(logits, batch["label"]))
        self.log("mse", F.mse_loss(logits, batch["target"]))
        return F.cross_entropy(logits, batch["label"])


class OwnLoss(nn.Module):
    def forward(self, outputs, targets):
        return (outputs - targets).abs().pow(3).mean()


class OfOwnModule(Classifier):
    def __init__(self):
        super().__init__()
        self.loss = OwnLoss()

    def training_step(self, batch, batch_idx):
        return self.loss(self.logits(batch), batch["target"])


class LanguageModel(Base):
    """Rows of all positions of all inputs."""

    def training_step(self, batch, batch_idx):
        logits = self.tokens(batch["tokens"][:, :-1])
        return F.cross_entropy(logits.reshape(-1, 5), batch["tokens"][:, 1:].reshape(-1))


class LossInForward(Base):
    def forward(self, tokens, labels):
        logits = self.tokens(tokens)
        return namedtuple("Out", "loss logits")(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    def training_step(self, batch, batch_idx):
        return self(batch["tokens"][:, :-1], batch["tokens"][:, 1:]).loss


class Autoencoder(Base):
    def __init__(self):
        super().__init__()
        with seeded(1):
            self.decoder = nn.Linear(3, 6)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch["image"].view(len(batch["image"]), -1)
        return F.mse_loss(self.decoder(self(x)), x)


class DirectBackward(Manual):
    """Calls the backward pass of the tensor, behind a loss that is only looked at."""

    def training_step(self, batch, batch_idx):
        optimizer, logits = self.optimizers(), self.logits(batch)
        self.log("mse", F.mse_loss(logits, batch["target"]))
        optimizer.zero_grad()
        F.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()


class Keywords(Classifier):
    def training_step(self, *args, **kwargs):
        batch, _ = args
        return F.mse_loss(target=self.logits(batch), input=batch["target"])


class InPlace(Classifier):
    """Writes into its batch, at every run."""

    def training_step(self, batch, batch_idx=0):
        batch["image"].mul_(2)
        return F.mse_loss(self.logits(batch), batch["target"])


class Operators(Classifier):
    def training_step(self, batch, batch_idx):
        return ((self.logits(batch) - batch["target"]) ** 2).mean()


class Gathered(Classifier):
    def training_step(self, batch, batch_idx):
        return -self.logits(batch).log_softmax(1).gather(1, batch["label"][:, None]).mean()


class Distribution(Classifier):
    def training_step(self, batch, batch_idx):
        normal = torch.distributions.Normal(self.logits(batch)[:, 0], 1 + self.logits(batch)[:, 1] ** 2)
        return -normal.log_prob(batch["target"][:, 0]).mean()


class PlainObject:
    def between(self, y, y_hat):
        return (y - y_hat).pow(4).sum(1)


class OfAnObject(Classifier):
    def __init__(self):
        super().__init__()
        self.compared = PlainObject()

    def training_step(self, batch, batch_idx):
        return self.compared.between(y=batch["target"], y_hat=self.logits(batch)).mean()


class AddedByOperators(Classifier):
    def forward(self, x):
        hidden = self.net[1](self.net[0](x))
        return {"logits": self.net[3](hidden), "hidden": hidden, "size": torch.tensor(3)}

    def training_step(self, batch, batch_idx):
        logits = self.forward(batch["image"].flatten(1))["logits"]  # As many call it.
        return F.cross_entropy(logits, batch["label"]) + 0.1 * logits.square().mean()


class Focal(Classifier):
    """The weight of each loss is a function of the outputs."""

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        return ((1 - logits.softmax(1)[:, 0]) ** 2 * F.cross_entropy(logits, batch["label"], reduction="none")).mean()


class ByLayers(Classifier):
    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.net[0](batch["image"].flatten(1)))
        return (self.net[3](hidden) - batch["target"]).square().mean().sqrt()


class Pairs(Classifier):
    def training_step(self, batch, batch_idx):
        first, second = self.net(batch["image"].flatten(1)), self.net(-batch["image"].flatten(1))
        return ((first - second).square().sum(1) - batch["target"][:, 0]).square().mean()


class MaskedWords(Base):
    def training_step(self, batch, batch_idx):
        mask = batch["tokens"][:, 1:] > 0
        logits = self.tokens(batch["tokens"][:, :-1])
        return F.cross_entropy(logits[mask], batch["tokens"][:, 1:][mask])


def of_masked_words(outputs, tokens):
    mask = tokens[:, 1:] > 0
    return F.cross_entropy(outputs.reshape(*mask.shape, 5)[mask], tokens[:, 1:][mask])


def of_normal(outputs, targets):
    return -torch.distributions.Normal(outputs[:, 0], 1 + outputs[:, 1] ** 2).log_prob(targets).mean()


def tokens_loss(outputs, targets):
    return F.cross_entropy(outputs.reshape(-1, 5), targets.reshape(-1))


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 2.0, 3.0]).double(), label_smoothing=0.1)


SHAPES = {
    # The behavior and the loss that say the same, from a dict of the whole probe.
    "in the step": (CrossEntropy, by_net, lambda b: lambda f, _: F.cross_entropy(f, b["label"])),
    "a module under any name": (OfAModule, by_net, lambda b: lambda f, _: weighted(f, b["label"])),
    "one-hot": (
        OneHot,
        lambda m, b: by_net(m, b).softmax(1),
        lambda b: lambda f, _: F.mse_loss(f, F.one_hot(b["label"], 3).double()),
    ),
    "log-probabilities": (
        LogProbabilities,
        lambda m, b: by_net(m, b).log_softmax(1),
        lambda b: lambda f, _: F.nll_loss(f, b["label"]),
    ),
    "scaled": (Scaled, by_net, lambda b: lambda f, _: 3 * (f - b["target"]).square().sum() / len(f)),
    "masked": (Masked, by_net, lambda b: lambda f, _: ((f - b["target"]).square() * b["mask"]).sum() / 7),
    "two losses of one output": (
        TwoTasks,
        by_net,
        lambda b: lambda f, _: F.cross_entropy(f, b["label"]) + 0.5 * F.mse_loss(f, b["target"]),
    ),
    "two heads": (
        TwoHeads,
        lambda m, b: torch.cat([m.net[3](s * m.net[1](m.net[0](b["image"].flatten(1)))) for s in (1, 2)], 1),
        lambda b: lambda f, _: F.mse_loss(f[:, :3], b["target"]) + 0.5 * F.l1_loss(f[:, 3:], b["target"]),
    ),
    "metrics beside": (Metrics, by_net, lambda b: lambda f, _: F.cross_entropy(f, b["label"])),
    "a loss of one's own": (OfOwnModule, by_net, lambda b: lambda f, _: (f - b["target"]).abs().pow(3).mean()),
    "language model": (
        LanguageModel,
        lambda m, b: m.tokens(b["tokens"][:, :-1]),
        lambda b: lambda f, _: tokens_loss(f, b["tokens"][:, 1:]),
    ),
    "loss inside forward": (
        LossInForward,
        lambda m, b: m.tokens(b["tokens"][:, :-1]),
        lambda b: lambda f, _: tokens_loss(f, b["tokens"][:, 1:]),
    ),
    "autoencoder": (
        Autoencoder,
        lambda m, b: m.decoder(by_net(m, b)),
        lambda b: lambda f, _: F.mse_loss(f, b["image"].flatten(1)),
    ),
    "manual optimization": (Manual, by_net, lambda b: lambda f, _: F.cross_entropy(f, b["label"])),
    "backward of a tensor": (DirectBackward, by_net, lambda b: lambda f, _: F.cross_entropy(f, b["label"])),
    "keywords": (Keywords, by_net, lambda b: lambda f, _: F.mse_loss(f, b["target"])),
    "writes into its batch": (
        InPlace,
        lambda m, b: m.net(2 * b["image"].flatten(1)),
        lambda b: lambda f, _: F.mse_loss(f, b["target"]),
    ),
    "operators": (Operators, by_net, lambda b: lambda f, _: F.mse_loss(f, b["target"])),
    "gathered": (Gathered, by_net, lambda b: lambda f, _: F.cross_entropy(f, b["label"])),
    "a distribution": (
        Distribution,
        lambda m, b: torch.cat([by_net(m, b)] * 2, 1),
        lambda b: lambda f, _: of_normal(f[:, [0, 4]], b["target"][:, 0]),
    ),
    "an object": (OfAnObject, by_net, lambda b: lambda f, _: (f - b["target"]).pow(4).sum(1).mean()),
    "added by operators": (
        AddedByOperators,
        by_net,
        lambda b: lambda f, _: F.cross_entropy(f, b["label"]) + 0.1 * f.square().mean(),
    ),
    "focal": (
        Focal,
        by_net,
        lambda b: (
            lambda f, _: ((1 - f.softmax(1)[:, 0]) ** 2 * F.cross_entropy(f, b["label"], reduction="none")).mean()
        ),
    ),
    "layers in the step": (ByLayers, by_net, lambda b: lambda f, _: F.mse_loss(f, b["target"]).sqrt()),
    "pairs": (
        Pairs,
        lambda m, b: torch.cat([m.net(s * b["image"].flatten(1)) for s in (1, -1)], 1),
        lambda b: lambda f, _: F.mse_loss((f[:, :3] - f[:, 3:]).square().sum(1), b["target"][:, 0]),
    ),
    "masked words": (
        MaskedWords,
        lambda m, b: m.tokens(b["tokens"][:, :-1]),
        lambda b: lambda f, _: of_masked_words(f, b["tokens"]),
    ),
}


@pytest.mark.parametrize(("kind", "behavior", "loss_of"), SHAPES.values(), ids=SHAPES)
def test_a_step_is_measured_as_explicit_arguments_say(tmp_path, kind, behavior, loss_of):
    module, monitor = kind(), BasinMonitor(20)
    batch = whole_probe()
    doubled = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    expected = measure_basin(
        copy.deepcopy(module), batch, batch["label"], behavior=behavior, loss_fn=loss_of(doubled), layers="auto"
    )
    fitted(tmp_path, module, monitor)
    found = monitor.records[0]
    assert steps(monitor) == [0, 4]
    assert integers(found) == integers(expected)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.loss is not None


@pytest.mark.parametrize("kind", [kind for kind, *_ in SHAPES.values()])
def test_training_is_bit_identical_where_the_step_is_read(tmp_path, kind):
    watched, plain = kind(), kind()
    fitted(tmp_path, watched, BasinMonitor(20))
    fitted(tmp_path, plain)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))


def test_a_pair_with_a_loss_on_the_module_needs_no_step(tmp_path, caplog):
    class Ordinary(Base):
        def __init__(self):
            super().__init__()
            self.loss_fn = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.net(x.flatten(1))

        def training_step(self, batch, batch_idx):
            return self.loss_fn(self(batch[0]), batch[1])

    monitor, other = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, Ordinary(), monitor, collate_fn=stacked)
    assert "reads training_step" not in caplog.text
    fitted(tmp_path, CrossEntropy(), other)
    assert "BasinMonitor reads training_step: outputs (8, 3), targets (8,), loss: all of what" in caplog.text
    assert [integers(record) for record in monitor.records] == [integers(record) for record in other.records]


def test_what_is_trained_is_measured_where_forward_returns_something_else(tmp_path):
    class Predicts(CrossEntropy):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.net(x.flatten(1)).softmax(1)

        def training_step(self, batch, batch_idx):
            return self.criterion(self.net(batch[0].flatten(1)), batch[1])

    monitor, other = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, Predicts(), monitor, collate_fn=stacked)
    fitted(tmp_path, CrossEntropy(), other)
    assert [integers(record) for record in monitor.records] == [integers(record) for record in other.records]


class Contrastive(Base):
    """Every input is compared with all others."""

    def training_step(self, batch, batch_idx):
        z = F.normalize(self.net(batch["image"].flatten(1)) - self.net(batch["image"].flatten(1)).mean(0))
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def test_a_step_whose_outputs_couple_the_inputs_is_refused_with_a_line_to_copy(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"batch_fn=lambda batch: \(batch\['image'\], batch\['label'\]\)"
    ):
        fitted(tmp_path, Contrastive(), BasinMonitor(20))
