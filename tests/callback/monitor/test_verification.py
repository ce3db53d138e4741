import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor
from tests.callback.monitor.modules import events_of
from tests.lightning_packages import LightningModule, TensorBoardLogger
from tests.networks import drawn
from tests.training import (
    Regressor,
    Scripted,
    make_trainer,
    scripted_loader,
    witnessed,
)

pytestmark = pytest.mark.fits


class WithRedundantScale(Scripted):
    """Two outputs a theta_1 x_1 and a theta_2 x_2, ...: scaling a up and theta down is free, and nothing else is."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return super().forward(inputs * self.scale)


def fractions(monitor):
    return [record.surviving_fraction for record in monitor.records]


@pytest.mark.parametrize(
    ("every_n", "measured"),
    [(None, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (5, [0]), ("zero_loss", [3])],
)
def test_null_space_is_verified_at_chosen_measurements(tmp_path, every_n, measured):
    monitor = BasinMonitor(verify_null_space=every_n)
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, monitor, logger=logger, max_epochs=4)
    trainer.fit(WithRedundantScale(losses=(1.0, 1.0, 1.0, 0.0)), scripted_loader())
    assert [record.step for record in monitor.records if record.surviving_fraction is not None] == measured
    # The manifold is the curve a theta = const: what a step of 1e-3 loses to its curvature is of order 1e-6.
    assert all(fraction is None or fraction > 1 - 1e-4 for fraction in fractions(monitor))
    if measured:
        assert len(events_of(logger).Scalars("basin_more/surviving_fraction")) == len(measured)


class Touching(Regressor):
    """Squared distances to (-1, 0, 0) and (1, 0, 0), on the axis: two spheres touch, and no null direction is free."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = self.readout = None
        self.point = nn.Parameter(torch.tensor([0.3, 0.0, 0.0]))

    def forward(self, inputs):
        return (inputs - self.point).square().sum(1, keepdim=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_null_space_that_is_not_free_is_seen(tmp_path):
    centres = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    monitor = BasinMonitor((centres, torch.zeros(2, 1)), verify_null_space=1)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(
        Touching(), DataLoader(TensorDataset(centres, torch.zeros(2, 1)), 2)
    )
    assert [record.gradient_nullity for record in monitor.records] == [2, 2]
    assert max(fractions(monitor)) < 0.01


def test_training_is_bit_identical_with_verification(tmp_path):
    monitor = BasinMonitor(probe=10, verify_null_space=1)
    with_monitor = witnessed(tmp_path, monitor)
    assert with_monitor == witnessed(tmp_path)
    assert None not in fractions(monitor)


class WithLossInStep(LightningModule):
    """A linear layer of 5 features and 2 outputs, whose inputs and targets stand in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_null_space_of_outputs_that_are_read_from_the_training_step_is_verified(tmp_path):
    items = [{"x": x, "y": y} for x, y in zip(drawn(8, 5).float(), drawn(8, 2).float(), strict=True)]
    monitor = BasinMonitor(probe=3, verify_null_space=1)
    make_trainer(tmp_path, monitor, max_epochs=1).fit(WithLossInStep(), DataLoader(items, batch_size=4))
    # Three inputs see three of the six directions of each output: the others are free, however far.
    assert [record.gradient_nullity for record in monitor.records] == [6, 6]
    assert fractions(monitor) == pytest.approx([1.0, 1.0])
