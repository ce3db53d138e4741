import pytest
import torch

from lightning_basin import BasinMonitor
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    regression_data,
    steps,
)

pytestmark = pytest.mark.fits


def test_a_monitor_finds_its_state_under_the_same_key_in_another_process(tmp_path):
    first = make_trainer(tmp_path, BasinMonitor(20), BasinMonitor(20, prefix="other"), max_epochs=1)
    first.fit(Regressor(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].keys()
    monitors = BasinMonitor(20), BasinMonitor(20, prefix="other")
    assert {monitor.checkpoint_key for monitor in monitors} <= keys
    make_trainer(tmp_path, *monitors).fit(Regressor(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert [steps(monitor) for monitor in monitors] == [[0, 3, 6]] * 2


def test_two_monitors_with_two_prefixes_measure_side_by_side(tmp_path):
    train = BasinMonitor(probe=20)
    other = BasinMonitor(regression_data(10, seed=9).tensors, prefix="held_out", every_n_epochs=2)
    trainer = make_trainer(tmp_path, train, other)
    trainer.fit(Regressor(), loader())
    assert (steps(train), steps(other)) == ([0, 3, 6], [0, 6])
    assert {"basin/gradient_rank", "held_out/gradient_rank"} <= trainer.callback_metrics.keys()
    assert other.records[0].num_inputs == 10
