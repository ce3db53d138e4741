import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, measure_basin
from tests.lightning_packages import LightningModule, MisconfigurationException
from tests.training import Inline, Regressor, Unmeasurable, loader, make_trainer, regression_data, steps, timeless

pytestmark = pytest.mark.fits


class Autoencoder(Unmeasurable):
    def split(self, batch):
        inputs = batch if isinstance(batch, torch.Tensor) else batch[0]
        return inputs, inputs[:, :2]


class FromDicts(Regressor):
    def split(self, batch):
        return batch["features"], batch["labels"]


class DictDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        inputs, targets = regression_data()[index]
        return {"features": inputs, "labels": targets}


@pytest.mark.parametrize(
    "dataset",
    [regression_data().tensors[0], TensorDataset(regression_data().tensors[0])],
    ids=["tensor", "list of one"],
)
def test_batch_without_targets_is_measured_with_the_loss_of_the_step(tmp_path, dataset):
    monitor = BasinMonitor(probe=30)
    module, inputs = Autoencoder(), regression_data().tensors[0][:30]
    baseline = measure_basin(copy.deepcopy(module), inputs, inputs[:, :2], loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor).fit(module, DataLoader(dataset, 20))
    assert steps(monitor) == [0, 3, 6]
    assert (monitor.records[0].gradient_rank, monitor.records[0].hessian_nullity) == (
        baseline.gradient_rank,
        baseline.hessian_nullity,
    )
    assert monitor.records[0].loss == pytest.approx(baseline.loss, rel=1e-12)


def test_batch_fn_takes_inputs_and_targets_out_of_a_dict(tmp_path):
    monitor = BasinMonitor(probe=30, batch_fn=lambda batch: (batch["features"], batch["labels"]))
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    ordinary = BasinMonitor(probe=30)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_behavior_takes_a_dict_as_it_is(tmp_path):
    monitor = BasinMonitor(probe=30, behavior=lambda module, batch: module(batch["features"]))
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    ordinary = BasinMonitor(probe=30)
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert [r.gradient_rank for r in monitor.records] == [r.gradient_rank for r in ordinary.records]
    assert monitor.records[0].num_inputs == 30


def test_dict_batch_is_measured_by_the_training_step(tmp_path):
    monitor, ordinary = BasinMonitor(probe=30), BasinMonitor(probe=30)
    make_trainer(tmp_path, monitor).fit(FromDicts(), DataLoader(DictDataset(), 20))
    make_trainer(tmp_path, ordinary).fit(Regressor(), loader())
    assert timeless(monitor.records) == timeless(ordinary.records)


def test_dict_batch_whose_loss_is_not_called_raises_before_training(tmp_path):
    class InlineFromDicts(Inline):
        split = FromDicts.split

    module = InlineFromDicts()
    with pytest.raises(MisconfigurationException, match=r"dict with keys \['features', 'labels'\].*batch_fn="):
        make_trainer(tmp_path, BasinMonitor()).fit(module, DataLoader(DictDataset(), 20))
    assert module.num_training_steps == 0


def test_batch_fn_that_returns_no_pair_raises_before_training(tmp_path):
    module = Regressor()
    with pytest.raises(MisconfigurationException, match="batch_fn must return a pair"):
        make_trainer(tmp_path, BasinMonitor(batch_fn=lambda batch: batch[0])).fit(module, loader())
    assert module.num_training_steps == 0


class WithCriterion(Unmeasurable):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.MSELoss()


class WithLossMethod(Unmeasurable):
    def loss_fn(self, outputs, targets):
        return (outputs - targets).square().mean()


@pytest.mark.parametrize("make_module", [Regressor, WithCriterion, WithLossMethod])
def test_loss_of_the_module_is_found(tmp_path, make_module):
    monitor, module = BasinMonitor(probe=20), make_module()
    inputs, targets = (tensor[:20].double() for tensor in regression_data().tensors)
    with torch.no_grad():
        expected = (copy.deepcopy(module).double()(inputs) - targets).square().mean()
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    torch.testing.assert_close(torch.tensor(monitor.records[0].loss, dtype=torch.float64), expected)
    assert monitor.records[0].hessian_nullity is not None


def test_given_loss_goes_before_that_of_the_module(tmp_path):
    monitor = BasinMonitor(probe=20, loss_fn=lambda outputs, targets: outputs.square().mean() + 0 * targets.sum() + 5)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert monitor.records[0].loss > 5


def test_module_without_loss_warns_once_and_leaves_the_hessian_out(tmp_path):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    with pytest.warns(UserWarning, match=r"no callable 'loss_fn' or 'criterion'") as warned:
        trainer.fit(Inline(), loader())
    assert sum("Loss and Hessian" in str(warning.message) for warning in warned) == 1
    assert not [key for key in trainer.callback_metrics if "hessian" in key or key == "basin/loss"]
    assert "basin/gradient_rank" in trainer.callback_metrics


def test_found_loss_that_does_not_fit_warns_and_is_left_out(tmp_path):
    class LossOfBatches(Inline):
        def loss_fn(self, batch):
            return batch

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match=r"not measured with the loss of LossOfBatches.*loss_fn="):
        make_trainer(tmp_path, monitor).fit(LossOfBatches(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert monitor.records[-1].loss is None


def test_found_loss_that_draws_random_numbers_warns_and_is_left_out(tmp_path):
    class Noisy(Inline):
        def loss_fn(self, outputs, targets):
            return (outputs - targets + torch.randn_like(outputs)).square().mean()

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="two evaluations differ"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Noisy(), loader())
    assert monitor.records[-1].loss is None


def test_given_loss_that_draws_random_numbers_raises_before_training(tmp_path):
    module, monitor = Regressor(), BasinMonitor(probe=20, loss_fn=lambda f, y: (f - y + torch.randn_like(f)).sum())
    with pytest.raises(MisconfigurationException, match="two evaluations differ"):
        make_trainer(tmp_path, monitor).fit(module, loader())
    assert module.num_training_steps == 0


def test_probabilities_are_measured_on_logits(tmp_path):
    class Classes(Unmeasurable):
        def loss_fn(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, (targets[:, 0] > 0).long())

    module, monitor = Classes(), BasinMonitor(probe=20, behavior="probabilities", hessian="gauss-newton")
    make_trainer(tmp_path, monitor, max_epochs=1).fit(module, loader())
    assert all(record.gauss_newton_nullity == record.gradient_nullity for record in monitor.records)


def test_duplicates_over_the_training_set_are_counted_with_probabilities_too(tmp_path):
    monitor = BasinMonitor(probe=20, behavior="probabilities", duplicates_over="train")
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader())
    assert [record.train_num_inputs for record in monitor.records] == [60, 60]


def test_forward_may_log_and_ask_for_its_trainer(tmp_path):
    class Talkative(Regressor):
        def forward(self, inputs):
            self.log("forward_epoch", float(self.trainer.current_epoch), on_step=True)
            return super().forward(inputs)

    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor)
    trainer.fit(Talkative(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert trainer.callback_metrics["forward_epoch"] == 1.0


class Headless(LightningModule):
    """Has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_module_without_forward_and_without_a_loss_asks_for_a_behavior(tmp_path):
    class HeadlessInline(Headless):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean() + self.net.weight.square().sum()

    with pytest.raises(MisconfigurationException, match=r"behavior=.* the loss takes parameters otherwise than"):
        make_trainer(tmp_path, BasinMonitor()).fit(HeadlessInline(), loader())


@pytest.mark.parametrize(
    "settings",
    [{}, {"behavior": lambda module, inputs: module.net(inputs), "loss_fn": nn.MSELoss()}],
    ids=["by its training step", "by its behavior"],
)
def test_module_without_forward_is_measured(tmp_path, settings):
    monitor = BasinMonitor(probe=20, **settings)
    make_trainer(tmp_path, monitor).fit(Headless(), loader())
    # One linear layer: 20 inputs and the constant span 4 dimensions, for each of 2 outputs.
    assert [record.gradient_rank for record in monitor.records] == [8, 8, 8]


def test_a_found_loss_that_runs_the_module_is_left_out(tmp_path):
    class Autoencoder(Inline):
        def loss_fn(self, inputs, _):
            return self(torch.zeros(len(inputs), 3)).square().mean()

    monitor = BasinMonitor(probe=20)
    with pytest.warns(UserWarning, match="loss_fn must compute the loss from outputs and targets"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Autoencoder(), loader())
    assert {record.loss for record in monitor.records} == {None}
