import re
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, RankEarlyStopping, measure_basin
from lightning_basin.callback.reliability import unreliable_because
from tests.callback.stopping import WithoutLoss, batches_of, rank_stopping
from tests.lightning_packages import LightningModule
from tests.training import Scripted, make_trainer, scripted_loader, seeded

pytestmark = pytest.mark.fits

# Each has a rank that stays as it is: that of a probe of 5 inputs, 10 singular values two digits apart with a tolerance
# in their midst, and 2 of 4 outputs.
IN_DOUBT = {
    "saturated": (torch.eye(8)[:5], 1, {"probe": 5}),
    "ill-defined": (torch.diag(10.0 ** -torch.arange(0, 16, 2)), 1, {"probe": 8, "rtol": 1e-5}),
    "lower bounds": (torch.eye(8)[:3].repeat(3, 1), 4, {"probe": 9, "max_outputs": 2}),
}


@pytest.mark.parametrize("kind", IN_DOUBT)
@pytest.mark.parametrize(
    "stopping",
    [
        {},
        {"mode": "min"},
        {"mode": "max", "stopping_threshold": 0.5},
        {"monitor": "basin/gradient_nullity"},
        {"monitor": "basin/gradient_rank_deficit"},
        {"monitor": "basin_layer_gradient_rank/map"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.filterwarnings("ignore:(Loss and Hessian|The probe is too small)")
def test_a_rank_that_is_not_the_networks_own_never_stops_a_run(tmp_path, kind, stopping):
    inputs, outputs, options = IN_DOUBT[kind]
    monitor = BasinMonitor(**options)
    trainer = make_trainer(tmp_path, monitor, rank_stopping(patience=1, **stopping), max_epochs=4)
    with pytest.warns(UserWarning, match=f"passes over ranks that are {kind}") as said:
        trainer.fit(WithoutLoss(outputs), batches_of(inputs, outputs))
    assert trainer.current_epoch == 4
    assert len({record.gradient_rank for record in monitor.records}) == 1
    assert sum("passes over" in str(warning.message) for warning in said) == 1


@pytest.mark.parametrize(
    ("quantity", "reasons"),
    [
        ("gradient_rank_deficit", ["lower bounds", "saturated", "ill-defined"]),
        ("gradient_nullity", ["lower bounds", "saturated", "ill-defined"]),
        ("gradient_effective_rank", ["lower bounds", "saturated", None]),
        # The tolerance says which singular values are multiplied; their product moves on a saturated probe too.
        ("log_det_gram", ["lower bounds", None, "ill-defined"]),
        ("gradient_rank_gap", [None, None, None]),
        ("hessian_nullity", [None, None, None]),
    ],
)
def test_what_makes_a_quantity_unreliable(quantity, reasons):
    saturated = measure_basin(nn.Linear(3, 1), torch.eye(3)[:2])
    ill_defined = measure_basin(nn.Linear(8, 1, bias=False), torch.diag(10.0 ** -torch.arange(0, 16, 2)), rtol=1e-5)
    for record, projected, reason in zip(
        [ill_defined, saturated, ill_defined], [True, False, False], reasons, strict=True
    ):
        said = unreliable_because(quantity, [record], projected=projected)
        assert said is None if reason is None else said.startswith(reason)


def test_what_is_no_rank_stops_a_run_on_any_probe(tmp_path):
    stopping = rank_stopping("basin/dead_units", patience=1)
    trainer = make_trainer(tmp_path, BasinMonitor(probe=5), stopping, max_epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(WithoutLoss(), batches_of(torch.eye(8)[:5]))
    assert trainer.current_epoch == 1


def test_measurements_in_doubt_are_passed_over_and_the_others_counted(tmp_path):
    # Rank 4 of 4 inputs is saturated: what counts is 3 (twice), and no 4 between them makes a move.
    stopping = rank_stopping(patience=2)
    monitor = BasinMonitor(probe=4, hessian=False)
    trainer = make_trainer(tmp_path, monitor, stopping, max_epochs=20)
    with pytest.warns(UserWarning, match="saturated"):
        trainer.fit(Scripted((4, 4, 4, 3, 4, 3, 4, 3, 2)), scripted_loader())
    assert [record.gradient_rank for record in monitor.records] == [4, 4, 4, 3, 4, 3, 4, 3]
    assert trainer.global_step == 7


def readme_snippet():
    """The callbacks of the first snippet of the README."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"L\.Trainer\(callbacks=(\[BasinMonitor.*\])\)", text)
    return eval(arguments, {"BasinMonitor": BasinMonitor, "RankEarlyStopping": RankEarlyStopping})


class Digits(LightningModule):
    """A classifier of which the default probe shows a rank that is the probe's own, for many epochs."""

    def __init__(self):
        super().__init__()
        with seeded():
            self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_snippet_of_the_readme_does_not_end_a_digits_run_before_zero_loss(tmp_path):
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    monitor, stopping = readme_snippet()
    monitor.every_n_epochs = 1  # As on a fast machine: else the clock decides.
    trainer = make_trainer(tmp_path, monitor, stopping, max_epochs=6)
    trainer.fit(Digits(), DataLoader(data, 32))
    ranks = [record.gradient_rank for record in monitor.records]
    assert monitor.zero_loss_step is None
    assert trainer.current_epoch == 6
    # It would have been a plateau: every measurement shows the rank of 64 inputs with 10 outputs.
    assert ranks == [640] * 7
