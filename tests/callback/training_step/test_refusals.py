"""Training steps that are read in part or not at all: what the user is told."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, measure_basin, measure_checkpoints
from lightning_basin.callback.training_step import read_training_step
from tests.callback.training_step.steps import (
    ITEMS,
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
from tests.lightning_packages import MisconfigurationException, ModelCheckpoint
from tests.training import make_trainer, steps

pytestmark = pytest.mark.fits


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


class OfItselfLater(Classifier):
    """Imitates its own outputs on the negative after the first epoch, and counts the runs of its step."""

    runs = 0

    def training_step(self, batch, batch_idx):
        OfItselfLater.runs += 1
        logits = self.logits(batch)
        if self.current_epoch == 0:
            return F.mse_loss(logits, batch["target"])
        return F.mse_loss(logits, self.net(-batch["image"].flatten(1)).detach())


def test_a_step_is_read_by_one_run_until_it_does_something_else():
    module, batch = OfItselfLater(), whole_probe()

    def runs_of_reading(known):
        before = OfItselfLater.runs
        step = read_training_step(module, batch, None, known=known)
        return step, OfItselfLater.runs - before

    first, num_first = runs_of_reading(None)
    again, num_again = runs_of_reading(first.known)
    assert (num_first, num_again) == (3, 1)
    assert torch.equal(again.outputs, first.outputs)
    assert again.value == first.value
    assert again.known is not None
    OfItselfLater.current_epoch = 1
    later, num_later = runs_of_reading(first.known)
    assert (later.loss, later.known) == (None, None)
    assert num_later >= 3


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
    assert "loss: cross_entropy, not all of what it returns" in caplog.text


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
    assert "loss: cross_entropy, not all of what it returns" in caplog.text
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


class Draws(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self.net(batch["image"].flatten(1) + torch.randn(len(batch["image"]), 6))
        return F.cross_entropy(logits, batch["label"])


def test_a_step_that_draws_random_numbers_is_not_read(tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_fn="):
        fitted(tmp_path, Draws(), BasinMonitor(20))


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
