"""Training steps as people write them: what is read from each is what explicit arguments would say."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_basin import BasinMonitor, measure_basin, measure_checkpoints
from lightning_basin.tensors import tensors_of
from tests.lightning_packages import LightningModule, MisconfigurationException, ModelCheckpoint
from tests.training import Unmeasurable, loader, make_trainer, seeded, steps

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(32, 2, 3, generator=GENERATOR), torch.randint(0, 3, (32,), generator=GENERATOR)
TARGETS, MASK = torch.randn(32, 3, generator=GENERATOR), torch.rand(32, 3, generator=GENERATOR) > 0.3
TOKENS = torch.randint(0, 5, (32, 4), generator=GENERATOR)
ITEMS = [
    {"image": image, "label": label, "target": target, "mask": mask, "tokens": tokens}
    for image, label, target, mask, tokens in zip(IMAGES, LABELS, TARGETS, MASK, TOKENS, strict=True)
]


class Base(LightningModule):
    """A small network over flat images; each subclass trains it in another way."""

    def __init__(self):
        super().__init__()
        with seeded():
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
            self.tokens = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Classifier(Base):
    """Reads the images and labels of a dict."""

    def logits(self, batch):
        return self.net(batch["image"].flatten(1))


def by_net(module, batch):
    return module.net(batch["image"].flatten(1))


class CrossEntropy(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch), batch["label"])


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


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.logits(batch), batch["label"])
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.log("loss", loss)


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


# Losses that are computed past the functions and modules that can be watched.


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


def fitted(root, module, monitor=None, items=ITEMS, collate_fn=None, **options):
    callbacks = [] if monitor is None else [monitor]
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 1} | options)
    with seeded(2):
        trainer.fit(module, DataLoader(items, 8, collate_fn=collate_fn))
    return trainer


def whole_probe(size=20):
    return {name: torch.stack([item[name] for item in ITEMS[:size]]) for name in ITEMS[0]}


def integers(record):
    layers = {
        name: (layer.gradient_rank, layer.duplicated_activations, layer.dead_units, layer.hessian_nullity_strict)
        for name, layer in record.layers.items()
    }
    network = (record.num_rows, record.gradient_rank, record.gradient_rank_bound, record.output_duplicated_activations)
    return (*network, record.hessian_nullity, record.hessian_nullity_lower, record.hessian_nullity_upper, layers)


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


# --- batches of other forms -----------------------------------------------------------------------------------------


@dataclass
class Pictures:
    image: Tensor
    label: Tensor


Named = namedtuple("Named", "image label")


class OfFields(Base):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.image.flatten(1)), batch.label)


class OfTriples(Base):
    def training_step(self, batch, batch_idx):
        image, label, weight = batch
        return (F.cross_entropy(self.net(image.flatten(1)), label, reduction="none") * weight).mean()


def stacked(items):
    return [torch.stack([item[name] for item in items]) for name in ("image", "label")]


@pytest.mark.parametrize(
    ("kind", "collate_fn"),
    [
        (OfFields, lambda items: Pictures(*stacked(items))),
        (OfFields, lambda items: Named(*stacked(items))),
        (OfTriples, lambda items: (*stacked(items), torch.ones(len(items)))),
    ],
    ids=["dataclass", "named tuple", "triple"],
)
def test_batches_of_any_form_are_measured(tmp_path, kind, collate_fn):
    monitor, ordinary = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, kind(), monitor, collate_fn=collate_fn)
    fitted(tmp_path, CrossEntropy(), ordinary)
    assert [integers(record) for record in monitor.records] == [integers(record) for record in ordinary.records]


class TwoLoaders(Base):
    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self.net(image.flatten(1)), label) for image, label in batch)


def test_two_loaders_are_measured_together(tmp_path):
    monitor = BasinMonitor(8)
    loaders = [DataLoader(ITEMS, 8, collate_fn=stacked), DataLoader(ITEMS[::-1], 8, collate_fn=stacked)]
    make_trainer(tmp_path, monitor, max_epochs=1).fit(TwoLoaders(), loaders)
    # For each of 8 pairs of inputs the three outputs of both.
    assert monitor.records[0].num_rows == 8 * 6


class InlineOfTwoLoaders(Base):
    """Its loss cannot be read, and its forward would take a pair of batches."""

    def forward(self, first, second):
        return self.net(first.flatten(1))

    def training_step(self, batch, batch_idx):
        batches = batch.values() if isinstance(batch, dict) else batch
        penalty = sum(parameter.square().sum() for parameter in self.net.parameters())
        return penalty + sum((self.net(image.flatten(1)) - label[:, None]).square().mean() for image, label in batches)


@pytest.mark.parametrize("form", [list, dict])
def test_batches_of_two_loaders_are_no_pair(tmp_path, form):
    loaders = [DataLoader(ITEMS, 8, collate_fn=stacked), DataLoader(ITEMS, 8, collate_fn=stacked)]
    loaders = loaders if form is list else dict(zip("ab", loaders, strict=True))
    key = {list: "0", dict: "'a'"}[form]
    with pytest.raises(
        MisconfigurationException, match=rf"each of 2 loaders: pass batch_fn=lambda batch: batch\[{key}\]"
    ):
        make_trainer(tmp_path, BasinMonitor(8), max_epochs=1).fit(InlineOfTwoLoaders(), loaders)
    monitor = BasinMonitor(
        8, batch_fn=lambda batch: batch[0 if form is list else "a"], behavior=lambda m, x: m.net(x.flatten(1))
    )
    make_trainer(tmp_path, monitor, max_epochs=1).fit(InlineOfTwoLoaders(), loaders)
    assert monitor.records[0].num_rows == 8 * 3


SETS = {
    "pairs": ([(row, row[:2]) for row in torch.eye(8)[:, :3]], "batch[0]"),
    "dicts": ([{"x": row, "y": row[:2]} for row in torch.eye(8)[:, :3]], "(batch[0]['x'], batch[0]['y'])"),
    "inputs": (list(torch.eye(8)[:, :3]), "(batch[0], None)"),
}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("items", "pair"), SETS.values(), ids=SETS)
def test_what_is_proposed_for_several_loaders_helps(tmp_path, items, pair, number):
    class Sum(Unmeasurable):
        def training_step(self, batch, batch_idx):
            penalty = self.hidden.weight.square().sum()  # With which the step cannot be read.
            return penalty + sum(self(tensors_of(part)[0]).square().mean() for part in batch)

    loaders = [DataLoader(items, 8) for _ in range(number)]
    with pytest.raises(MisconfigurationException, match=f"each of {number} loaders: pass ") as refused:
        make_trainer(tmp_path, BasinMonitor(8), max_epochs=1).fit(Sum(), loaders)
    assert f"batch_fn=lambda batch: {pair} for those of the first" in str(refused.value)
    monitor = BasinMonitor(8, batch_fn=eval(f"lambda batch: {pair}"))
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Sum(), loaders)
    assert monitor.records[0].num_inputs == 8


# --- what today's rules say, and what is no function of outputs and targets -------------------------------------------


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


class LearnedWeights(Classifier):
    """Weights that are parameters, zero at first."""

    def __init__(self):
        super().__init__()
        self.log_weights = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        first, second = (-self.log_weights).softmax(0)
        logits = self.logits(batch)
        return first * F.cross_entropy(logits, batch["label"]) + second * F.mse_loss(logits, batch["target"])


class OwnTargets(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.logits(batch), self.net(-batch["image"].flatten(1)).detach())


class OwnTargetsByOperators(Classifier):
    def training_step(self, batch, batch_idx):
        return (self.logits(batch) - self.net(-batch["image"].flatten(1)).detach()).square().mean()


class RandomSmoothing(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch), batch["label"], label_smoothing=float(torch.rand(())))


class OfTheIndex(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        return F.mse_loss(logits, batch["target"]) if batch_idx % 2 else F.cross_entropy(logits, batch["label"])


@pytest.mark.parametrize("kind", [LearnedWeights, OwnTargets, RandomSmoothing, OfTheIndex])
def test_a_loss_that_is_no_function_of_outputs_and_targets_is_left_out(tmp_path, caplog, kind):
    monitor, ordinary = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, kind(), monitor)
    assert {record.loss for record in monitor.records} == {None}
    assert caplog.text.count("no loss, as it is no function of outputs and targets") == 1
    fitted(tmp_path, CrossEntropy(), ordinary)
    assert monitor.records[0].gradient_rank == ordinary.records[0].gradient_rank


class NothingAtFirst(Classifier):
    """Another loss is called than that which is trained from the second batch on."""

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        self.log("mse", F.mse_loss(logits, batch["target"]))
        return F.cross_entropy(logits, batch["label"]) if self.global_step or batch_idx else None


class PenaltyByOperators(Classifier):
    def training_step(self, batch, batch_idx):
        penalty = sum(parameter.square().sum() for parameter in self.net.parameters())
        return (self.logits(batch) - batch["target"]).square().mean() + penalty


class LastLayerByOperators(Classifier):
    def training_step(self, batch, batch_idx):
        hidden = self.net[0](batch["image"].flatten(1))
        return (hidden @ self.net[3].weight.T - batch["target"]).square().mean()


class ProductByOperators(Classifier):
    def training_step(self, batch, batch_idx):
        product = self.logits(batch)[:, 0] * self.tokens(batch["tokens"])[:, 0, 0]
        return (product - batch["target"][:, 0]).square().mean()


class SumByOperators(Classifier):
    """The second call sees what the first has returned."""

    def training_step(self, batch, batch_idx):
        first = self.net[3](self.net[0](batch["image"].flatten(1)))
        second = first + self.net[3](first.repeat(1, 2)[:, :5])
        return (second - batch["target"]).square().mean()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NothingAtFirst, "must return a loss or call a backward pass"),
        (PenaltyByOperators, "parameters otherwise than through modules"),
        (LastLayerByOperators, "parameters otherwise than through modules"),
        (ProductByOperators, "made of what one module returns"),
        (OwnTargetsByOperators, "no function of outputs and targets"),
        (SumByOperators, "must not enter the module that makes the others"),
    ],
)
def test_a_step_that_says_no_outputs_is_refused_with_the_reason(tmp_path, kind, why):
    with pytest.raises(MisconfigurationException, match=f"batch_fn=.*cannot be read from training_step: .*{why}"):
        fitted(tmp_path, kind(), BasinMonitor(20))


class OfTheEpoch(Classifier):
    """A second loss that sets in after the first epoch."""

    def training_step(self, batch, batch_idx):
        logits = self.logits(batch)
        return F.cross_entropy(logits, batch["label"]) + self.current_epoch * F.mse_loss(logits, batch["target"])


class OfABuffer(Classifier):
    """Targets are centred by a mean that moves with the batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        self.mean.lerp_(batch["target"].mean(0), 0.5)
        return F.mse_loss(self.logits(batch), batch["target"] - self.mean)


class OfTheHardest(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch), batch["label"], reduction="none").topk(4).values.mean()


def of_the_epoch(module, batch, epoch):
    return lambda f, _: F.cross_entropy(f, batch["label"]) + epoch * F.mse_loss(f, batch["target"])


def of_a_buffer(module, batch, epoch):
    mean = module.mean.double().lerp(batch["target"].mean(0), 0.5)
    return lambda f, _: F.mse_loss(f, batch["target"] - mean)


def of_the_hardest(module, batch, epoch):
    return lambda f, _: F.cross_entropy(f, batch["label"], reduction="none").topk(4).values.mean()


@pytest.mark.parametrize(
    ("kind", "loss_of"), [(OfTheEpoch, of_the_epoch), (OfABuffer, of_a_buffer), (OfTheHardest, of_the_hardest)]
)
def test_a_loss_that_changes_in_training_is_that_of_the_step_at_the_time(tmp_path, kind, loss_of):
    module, monitor = kind(), BasinMonitor(20)
    fitted(tmp_path, module, monitor, max_epochs=3)
    batch = whole_probe()
    doubled = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    loss_fn = loss_of(module, doubled, 2)
    expected = measure_basin(module, batch, batch["label"], behavior=by_net, loss_fn=loss_fn, layers="auto")
    assert integers(monitor.records[-1]) == integers(expected)
    assert monitor.records[-1].loss == pytest.approx(expected.loss, rel=1e-12)


def test_a_loss_of_the_module_that_is_not_trained_is_not_taken(tmp_path):
    class Misleading(Base):
        def __init__(self):
            super().__init__()
            self.loss_fn = nn.MSELoss()

        def forward(self, x):
            return self.net(x.flatten(1))

        def training_step(self, batch, batch_idx):
            return -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    monitor, other = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, Misleading(), monitor, collate_fn=stacked)
    fitted(tmp_path, CrossEntropy(), other)
    assert integers(monitor.records[0]) == integers(other.records[0])


def test_a_step_with_other_losses_for_other_optimizers_is_said_to_be_measured_in_part(tmp_path, caplog):
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer, loss in (
                (first, F.cross_entropy(self.logits(batch), batch["label"])),
                (second, self.tokens(batch["tokens"]).square().mean()),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.tokens)]

    monitor = BasinMonitor(20)
    with pytest.warns(UserWarning, match=r"do not depend on the layers \['tokens.0', 'tokens.1'\], which training"):
        fitted(tmp_path, Two(), monitor)
    assert "loss: cross_entropy, part of the whole" in caplog.text


@pytest.mark.parametrize("partner", [lambda x: x.flip(0), lambda x: x.roll(len(x) // 2, 0)], ids=["mirror", "half"])
@pytest.mark.parametrize("size", [8, 20])
def test_inputs_that_a_step_mixes_in_pairs_are_refused(tmp_path, partner, size):
    class Mixed(Classifier):
        def training_step(self, batch, batch_idx):
            image = 0.7 * batch["image"] + 0.3 * partner(batch["image"])
            return F.cross_entropy(self.net(image.flatten(1)), batch["label"])

    with pytest.raises(MisconfigurationException, match="changes with the other inputs of the batch"):
        fitted(tmp_path, Mixed(), BasinMonitor(size))


def test_a_penalty_is_said_to_be_missing(tmp_path, caplog):
    class Penalised(Classifier):
        def training_step(self, batch, batch_idx):
            penalty = sum(parameter.square().sum() for parameter in self.net.parameters())
            return F.cross_entropy(self.logits(batch), batch["label"]) + 0.01 * penalty

    monitor, other = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, Penalised(), monitor)
    assert "loss: cross_entropy, part of the whole" in caplog.text
    fitted(tmp_path, CrossEntropy(), other)
    assert integers(monitor.records[0]) == integers(other.records[0])


def test_layers_that_are_trained_otherwise_are_said_to_be_unseen(tmp_path):
    class Regularised(Classifier):
        def training_step(self, batch, batch_idx):
            beside = self.tokens(batch["tokens"]).square().mean()
            return F.cross_entropy(self.logits(batch), batch["label"]) + 0.1 * beside

    monitor = BasinMonitor(20)
    with pytest.warns(UserWarning, match=r"do not depend on the layers \['tokens.0', 'tokens.1'\], which training"):
        fitted(tmp_path, Regularised(), monitor)
    assert [monitor.records[0].layers[f"tokens.{index}"].gradient_rank for index in (0, 1)] == [0, 0]


def test_a_loss_that_is_passed_takes_outputs_and_targets_of_the_step(tmp_path):
    monitor = BasinMonitor(20, loss_fn=lambda outputs, targets: outputs.square().sum() + 0 * targets.sum())
    fitted(tmp_path, CrossEntropy(), monitor)
    batch = whole_probe()
    expected = measure_basin(CrossEntropy(), batch, behavior=by_net, loss_fn="behavioral")
    assert monitor.records[0].gradient_rank == expected.gradient_rank
    with torch.no_grad():
        outputs = by_net(CrossEntropy().double().eval(), {"image": batch["image"].double()})
    assert monitor.records[0].loss == pytest.approx(float(outputs.square().sum()), rel=1e-12)


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


class Draws(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self.net(batch["image"].flatten(1) + torch.randn(len(batch["image"]), 6))
        return F.cross_entropy(logits, batch["label"])


def test_a_step_that_draws_random_numbers_is_not_read(tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_fn="):
        fitted(tmp_path, Draws(), BasinMonitor(20))


# --- goes on, offline, several --------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_the_step(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="saved", save_weights_only=False)
    first = BasinMonitor(20)
    trainer = make_trainer(tmp_path, first, saving, enable_checkpointing=True, max_epochs=1)
    trainer.fit(CrossEntropy(), DataLoader(ITEMS, 8))
    monitor, whole = BasinMonitor(20), BasinMonitor(20)
    resumed = make_trainer(tmp_path, monitor, max_epochs=2)
    resumed.fit(CrossEntropy(), DataLoader(ITEMS, 8), ckpt_path=str(tmp_path / "saved.ckpt"))
    assert steps(monitor) == [0, 4, 8]
    assert [record.loss is None for record in monitor.records] == [False, False, False]
    # Offline, on the probe in the checkpoint.
    (offline,) = measure_checkpoints(tmp_path / "saved.ckpt", CrossEntropy, BasinMonitor(), progress=False)
    assert integers(offline) == integers(monitor.records[1])
    assert offline.loss == pytest.approx(monitor.records[1].loss, rel=1e-12)
    del whole


def test_noise_in_a_step_leaves_forward_and_the_loss_of_the_module(tmp_path, caplog):
    class Noisy(Base):
        def __init__(self):
            super().__init__()
            self.loss_fn = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.net(x.flatten(1))

        def training_step(self, batch, batch_idx):
            return self.loss_fn(self(batch[0]) + torch.randn(len(batch[1]), 3), batch[1])

    monitor, other = BasinMonitor(20), BasinMonitor(20)
    fitted(tmp_path, Noisy(), monitor, collate_fn=stacked)
    assert "measures what forward returns, as training_step cannot be read: training_step draws random" in caplog.text
    fitted(tmp_path, CrossEntropy(), other)
    assert integers(monitor.records[0]) == integers(other.records[0])


def test_the_whole_training_set_is_read_in_the_form_of_the_step(tmp_path):
    class Items(Dataset):
        def __len__(self):
            return 37

        def __getitem__(self, index):
            return ITEMS[index % 32]

    items = Items()
    monitor = BasinMonitor(20, duplicates_over="train")
    fitted(tmp_path, CrossEntropy(), monitor, items=items)
    assert monitor.records[0].train_num_inputs == 37
    assert monitor.records[0].train_output_duplicated_activations == 5


def test_pairs_of_a_regression_are_measured_as_before(tmp_path):
    class LossInStep(Base):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1])

    monitor = BasinMonitor(20)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(LossInStep(), loader())
    record = monitor.records[0]
    assert (record.gradient_rank, record.hessian_nullity) == (8, record.num_parameters - 8)
