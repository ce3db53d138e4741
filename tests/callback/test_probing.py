import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, Probe
from tests.callback.monitor.modules import measured_at_start
from tests.lightning_packages import LightningModule
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    regression_data,
    steps,
    timeless,
)

pytestmark = pytest.mark.fits


def test_probe_is_the_first_inputs_in_the_order_of_the_loader(tmp_path):
    monitor = BasinMonitor(probe=30)
    make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    torch.testing.assert_close(monitor.probe.inputs, regression_data().tensors[0][:30], rtol=0, atol=0)
    torch.testing.assert_close(monitor.probe.targets, regression_data().tensors[1][:30], rtol=0, atol=0)


def test_every_n_train_steps_keeps_to_multiples_when_the_probe_fills_in_between(tmp_path):
    monitor = BasinMonitor(probe=100, every_n_train_steps=4)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(240))
    assert steps(monitor) == [0, 8, 12]


def test_probe_is_all_of_a_dataset_that_is_smaller(tmp_path):
    module, monitor = Regressor(), BasinMonitor()
    inputs, targets = regression_data(50).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs, targets, loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor).fit(module, loader(50))
    assert steps(monitor) == [0, 3, 6]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_probe_larger_than_a_batch_is_filled_with_every_n_train_steps_and_a_small_dataset(tmp_path):
    monitor = BasinMonitor(every_n_train_steps=4)
    make_trainer(tmp_path, monitor, max_epochs=3).fit(Regressor(), loader(50))
    assert steps(monitor) == [0, 4, 8]


def test_probe_of_256_inputs_is_collected_over_thirteen_batches(tmp_path):
    monitor = BasinMonitor(probe=256)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(300))
    assert monitor.probe.size == 256
    assert steps(monitor) == [0, 15]


@pytest.mark.parametrize("as_pair", [True, False], ids=["pair", "Probe"])
def test_explicit_probe_is_measured_instead_of_training_batches(tmp_path, as_pair):
    module = Regressor()
    inputs, targets = regression_data(40, seed=5).tensors
    baseline = measured_at_start(copy.deepcopy(module), inputs, targets, loss_fn=nn.MSELoss())
    monitor = BasinMonitor((inputs, targets) if as_pair else Probe(inputs, targets))
    make_trainer(tmp_path, monitor).fit(module, loader())
    assert steps(monitor) == [0, 3, 6]
    assert timeless(monitor.records[:1]) == timeless([baseline])


def test_training_step_that_writes_into_its_batch_does_not_change_the_probe(tmp_path):
    class Overwriting(Regressor):
        def training_step(self, batch, batch_idx):
            loss = super().training_step([tensor.clone() for tensor in batch], batch_idx)
            batch[0].zero_()
            batch[1].fill_(7.0)
            return loss

    monitor = BasinMonitor(probe=50)
    batches = [[tensor.clone() for tensor in batch] for batch in loader()]
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Overwriting(), loader())
    torch.testing.assert_close(monitor.probe.inputs, torch.cat([inputs for inputs, _ in batches])[:50], rtol=0, atol=0)
    torch.testing.assert_close(
        monitor.probe.targets, torch.cat([targets for _, targets in batches])[:50], rtol=0, atol=0
    )


def test_batches_without_inputs_are_passed_over_until_there_is_one_with_some(tmp_path):
    inputs, targets = regression_data().tensors
    ends = [(0, 0), (0, 0), (0, 20), (20, 20), (20, 40)]
    batches = [(inputs[start:end], targets[start:end]) for start, end in ends]

    class Skipping(Regressor):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if len(batch[0]) else None

    module, monitor = Skipping(), BasinMonitor(probe=30)
    baseline = measured_at_start(copy.deepcopy(module), inputs[:30], targets[:30], loss_fn=nn.MSELoss())
    make_trainer(tmp_path, monitor).fit(module, DataLoader(batches, batch_size=None))
    assert steps(monitor) == [2, 5, 10]  # Lightning counts a step without a loss, too.
    assert timeless([replace(monitor.records[0], step=0)]) == timeless([baseline])


def test_an_epoch_without_inputs_leaves_the_baseline_to_the_next_one(tmp_path):
    class Late(Regressor):
        def train_dataloader(self):
            batch = regression_data(20 * self.current_epoch).tensors
            return DataLoader([batch], batch_size=None)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if len(batch[0]) else None

    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor, reload_dataloaders_every_n_epochs=1).fit(Late())
    assert steps(monitor) == [1, 2]


@pytest.mark.parametrize(("num_inputs", "said"), [(60, 60), (200, 128)])
def test_what_is_said_before_the_first_measurement_counts_the_inputs_that_there_are(tmp_path, caplog, num_inputs, said):
    monitor = BasinMonitor()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Regressor(), loader(num_inputs))
    (message,) = [message for message in caplog.messages if message.startswith("BasinMonitor measures")]
    assert message.startswith(f"BasinMonitor measures {said} inputs x ")
    assert monitor.records[0].num_inputs == said


class Wide(LightningModule):
    """A linear map to any number of outputs."""

    def __init__(self, num_outputs) -> None:
        super().__init__()
        self.readout = nn.Linear(3, num_outputs)
        self.loss_fn = nn.MSELoss()

    def forward(self, inputs):
        return self.readout(inputs)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[0].sum(1, keepdim=True).expand(-1, self.readout.out_features))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("num_outputs", "arguments", "expected"),
    [
        pytest.param(1, {}, 128, id="one output"),
        pytest.param(5, {}, 128, id="640 outputs in all"),
        pytest.param(10, {}, 64, id="ten classes"),
        pytest.param(64, {}, 32, id="many classes"),
        pytest.param(100, {}, 128, id="so many that they are combined"),
        pytest.param(100, {"max_outputs": None}, 32, id="so many that are not combined"),
        pytest.param(100, {"max_outputs": 8}, 80, id="combinations"),
        pytest.param(10, {"probe": 100}, 100, id="a number that was passed"),
    ],
)
def test_the_number_of_inputs_follows_from_the_number_of_outputs(tmp_path, caplog, num_outputs, arguments, expected):
    monitor = BasinMonitor(hessian=False, **arguments)
    for batch_size in (200, 30):  # Another fit takes another probe.
        with caplog.at_level("INFO"):
            make_trainer(tmp_path, monitor, max_epochs=1).fit(Wide(num_outputs), loader(200, batch_size))
        assert monitor.records[0].num_inputs == monitor.probe.size == expected
        assert monitor.records[0].step == 0
    torch.testing.assert_close(monitor.probe.inputs[0], regression_data(200).tensors[0][:expected], rtol=0, atol=0)
    (said,) = [message for message in caplog.messages if message.startswith("BasinMonitor measures")]
    assert said.startswith(f"BasinMonitor measures {expected} inputs x ")
