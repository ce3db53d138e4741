import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, Probe
from tests.callback.monitor.modules import Wide
from tests.lightning_packages import (
    MisconfigurationException,
)
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    regression_data,
)

pytestmark = pytest.mark.fits


class Frozen(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))

    def configure_optimizers(self):
        self.scale.requires_grad_(requires_grad=False)
        return torch.optim.SGD([self.scale], lr=0.1)

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1


class TwoOutputs(Regressor):
    def forward(self, inputs):
        return super().forward(inputs), inputs


class NotANumber(Regressor):
    def forward(self, inputs):
        return super().forward(inputs) / 0.0


def not_a_number(outputs, targets):
    return outputs.sum() * targets.sum() * torch.nan


@pytest.mark.parametrize(
    ("make_module", "make_monitor", "message"),
    [
        pytest.param(Frozen, BasinMonitor, "at least one trainable parameter", id="no trainable parameters"),
        pytest.param(TwoOutputs, BasinMonitor, "outputs must be a tensor, got tuple.*behavior=", id="two outputs"),
        pytest.param(NotANumber, BasinMonitor, "outputs must be finite", id="outputs not finite"),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=not_a_number),
            "loss on the probe must be finite",
            id="loss not finite",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(Probe(regression_data().tensors[0]), loss_fn=nn.MSELoss()),
            "needs targets",
            id="explicit probe without targets",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(batch_fn=lambda batch: (batch[0], None), loss_fn=nn.MSELoss()),
            "needs targets.*batch_fn",
            id="batches without targets",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=lambda outputs: outputs),
            "loss_fn must take the outputs",
            id="loss of one argument",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(loss_fn=nn.MSELoss(reduction="none")),
            "loss_fn must return one floating point number",
            id="loss that is no scalar",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor((torch.zeros(4, 9), None)),
            "bring the inputs into the shape",
            id="probe of another shape",
        ),
        pytest.param(
            Regressor,
            lambda: BasinMonitor(layers=["readout", "no_such_layer"]),
            "layers must be among.*no_such_layer",
            id="unknown layer",
        ),
        pytest.param(Regressor, lambda: BasinMonitor(layers="x"), "layers must be 'auto', 'all'", id="layers"),
        pytest.param(
            Wide,
            lambda: BasinMonitor(max_outputs=None),
            "outputs can be measured at once",
            id="too many outputs on the whole probe",
        ),
    ],
)
def test_what_cannot_be_measured_raises_before_the_first_training_step(tmp_path, make_module, make_monitor, message):
    module = make_module()
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, make_monitor()).fit(module, loader(160))
    assert module.num_training_steps == 0


@pytest.mark.parametrize("place", ["trainer", "module"])
def test_two_monitors_with_one_prefix_are_refused_with_what_helps(tmp_path, place):
    class Configured(Regressor):
        def configure_callbacks(self):
            return [BasinMonitor(20), BasinMonitor(20)] if place == "module" else []

    monitors = [BasinMonitor(20), BasinMonitor(20)] if place == "trainer" else []
    with pytest.raises(
        MisconfigurationException, match=r"needs another prefix, .*got \['basin', 'basin'\]: pass BasinMonitor\(prefix="
    ):
        make_trainer(tmp_path, *monitors).fit(Configured(), loader())
