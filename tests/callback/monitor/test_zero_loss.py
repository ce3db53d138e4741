import pytest
import torch

from lightning_basin import BasinMonitor
from tests.training import (
    Scripted,
    Unmeasurable,
    loader,
    make_trainer,
    scripted_loader,
    steps,
)

pytestmark = pytest.mark.fits


def test_behavioral_loss_measures_a_hessian_and_never_reaches_zero_loss(tmp_path):
    monitor = BasinMonitor(probe=20, loss_fn="behavioral")
    make_trainer(tmp_path, monitor, max_epochs=2).fit(Unmeasurable(), loader())
    assert [record.loss for record in monitor.records] == [None] * 3
    assert monitor.zero_loss_step is None
    assert all(record.hessian_nullity == record.gradient_nullity for record in monitor.records)


@pytest.mark.parametrize(
    ("patience", "threshold", "expected"), [(1, 1e-6, 2), (2, 1e-6, 6), (1, 0.2, 1), (3, 1e-6, 7), (4, 1e-6, None)]
)
def test_zero_loss_is_reached_after_patience_many_measurements_in_a_row(tmp_path, patience, threshold, expected):
    module = Scripted(losses=(1.0, 0.1, 0.0, 1.0, 1.0, 1e-7, 1e-7, 0.0, 1.0))
    monitor = BasinMonitor(zero_loss_threshold=threshold, zero_loss_patience=patience)
    make_trainer(tmp_path, monitor, max_epochs=8).fit(module, scripted_loader())
    assert monitor.zero_loss_step == expected


def test_measuring_goes_on_after_zero_loss(tmp_path):
    monitor = BasinMonitor()
    make_trainer(tmp_path, monitor, max_epochs=5).fit(Scripted(losses=(1.0, 0.0)), scripted_loader())
    assert steps(monitor) == [0, 1, 2, 3, 4, 5]
    assert monitor.zero_loss_step == 1


def test_zero_loss_is_not_found_from_the_scaled_loss_of_accumulated_batches(tmp_path):
    # What training_step returns is divided by 4 and would be below the threshold.
    monitor = BasinMonitor(zero_loss_threshold=1e-6)
    trainer = make_trainer(tmp_path, monitor, max_epochs=3, accumulate_grad_batches=4)
    trainer.fit(Scripted(losses=(1.0, 3e-6)), scripted_loader(4))
    assert steps(monitor) == [0, 1, 2, 3]
    torch.testing.assert_close(monitor.records[-1].loss, 3e-6)
    assert monitor.zero_loss_step is None


def test_zero_loss_is_found_in_evaluation_mode(tmp_path):
    module, monitor = Scripted(losses=(1.0, 0.0)), BasinMonitor()
    module.training_offset = 10.0
    trainer = make_trainer(tmp_path, monitor, max_epochs=3)
    trainer.fit(module, scripted_loader())
    assert trainer.callback_metrics["train_loss"] >= 100.0
    assert monitor.zero_loss_step == 1


def test_loss_below_zero_is_no_zero_loss(tmp_path):
    monitor = BasinMonitor(loss_fn=lambda outputs, targets: -(outputs - targets).square().mean() - 1.0)
    make_trainer(tmp_path, monitor).fit(Scripted(), scripted_loader())
    assert monitor.zero_loss_step is None


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        ({"every_n_epochs": 1}, [0, 1, 2, 5, 10]),
        ({"every_n_epochs": 2}, [0, 2, 5, 10]),
        ({"every_n_train_steps": 1}, [0, 1, 2, 5, 10]),
    ],
)
def test_cadence_changes_after_zero_loss(tmp_path, cadence, expected):
    monitor = BasinMonitor(probe=8, every_n_epochs_after_zero_loss=5, **cadence)
    make_trainer(tmp_path, monitor, max_epochs=11).fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader())
    assert steps(monitor) == expected


def test_ever_rarer_measurements_are_dense_again_around_zero_loss(tmp_path):
    """Near zero from step 20, zero from step 40 on."""
    module = Scripted(losses=(1.0,) * 20 + (5e-5,) * 20 + (0.0,))
    monitor = BasinMonitor(probe=8, every_n_train_steps=1, max_overhead="auto", zero_loss_patience=3)
    make_trainer(tmp_path, monitor, max_epochs=60).fit(module, scripted_loader())
    from_the_start = [0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 19]
    # Seen at 24 and counted from there: 1, 2, 3, 4, 5, 7, 9, 12 and 15 further, then at zero each until three are.
    from_near_zero = [24, 25, 26, 27, 28, 29, 31, 33, 36, 39, 43, 44]
    from_zero = [45, 46, 47, 48, 49, 50, 52, 54, 57, 60]
    assert steps(monitor) == from_the_start + from_near_zero + from_zero
    assert monitor.zero_loss_step == 45
    assert monitor.skipped_steps == []


def test_zero_loss_survives_resuming(tmp_path):
    options = {"zero_loss_patience": 2, "every_n_epochs_after_zero_loss": 4}
    checkpoint = tmp_path / "middle.ckpt"
    trainer = make_trainer(tmp_path, BasinMonitor(**options), max_epochs=3)
    trainer.fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader())
    trainer.save_checkpoint(checkpoint)
    monitor = BasinMonitor(**options)
    trainer = make_trainer(tmp_path, monitor, max_epochs=9)
    trainer.fit(Scripted(losses=(1.0, 1.0, 0.0)), scripted_loader(), ckpt_path=checkpoint)
    assert monitor.zero_loss_step == 3
    assert steps(monitor) == [0, 1, 2, 3, 4, 8]
    assert trainer.callback_metrics["basin/zero_loss_step"] == 3.0
