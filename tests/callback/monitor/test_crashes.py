"""Runs that are killed, and runs that are long. As a script, this file is the run that kills itself."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor
from tests.lightning_packages import Callback, ModelCheckpoint, TensorBoardLogger
from tests.training import Regressor, Unmeasurable, make_trainer, repeated_loader, steps, timeless

pytestmark = pytest.mark.fits

ROOT = Path(__file__).parents[3]


def die() -> None:
    """As kill -9 does: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class DiesMeasured(Regressor):
    """Dies in the third measurement, after the one of the baseline and the one at step 3."""

    def forward(self, inputs):
        if not self.training and self.num_training_steps == 6:
            die()
        return super().forward(inputs)


class DiesSaved(Callback):
    """Dies while the checkpoint of step 6 is being written."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step == 6:
            checkpoint["deadly"] = Deadly()


class Deadly:
    def __reduce__(self):
        die()


def fit(root, *callbacks, module=None, ckpt_path=None):
    """Five epochs of four steps; measured every third step, saved every second."""
    monitor = BasinMonitor(probe=20, every_n_train_steps=3)
    saving = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    logger = TensorBoardLogger(root, name="curves", version=0)
    options = {"logger": logger, "max_epochs": 5, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = make_trainer(root, monitor, *callbacks, saving, **options)
    trainer.fit(module or Regressor(), repeated_loader(), ckpt_path=ckpt_path)
    return monitor


SCENARIOS = {
    "measurement": lambda root: fit(root, module=DiesMeasured()),
    "checkpoint": lambda root: fit(root, DiesSaved()),
}


def curve(root, key):
    """Every point of a curve in all event files, oldest first."""
    events = EventAccumulator(str(root / "curves" / "version_0"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "last_saved"), [("measurement", 4), ("checkpoint", 4)])
def test_run_killed_in_the_middle_goes_on_where_it_was_saved(tmp_path, scenario, last_saved):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "tests.callback.monitor.test_crashes", scenario, str(killed)]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-3000:]
    assert sorted(path.name for path in killed.glob("*.ckpt")) == [f"step={step}.ckpt" for step in (2, last_saved)]

    resumed = fit(killed, ckpt_path=killed / f"step={last_saved}.ckpt")
    uninterrupted = fit(whole)
    assert steps(resumed) == [0, 3, 6, 9, 12, 15, 18]
    assert timeless(resumed.records) == timeless(uninterrupted.records)
    for key in ("basin/gradient_rank", "basin/log10_loss", "basin/hessian_nullity"):
        assert sorted(set(curve(killed, key))) == curve(whole, key)


def num_hooks(module: nn.Module) -> int:
    """Of the module, and of all modules in torch's own tables."""
    tables = [table for name, table in vars(torch.nn.modules.module).items() if name.startswith("_global_")]
    own = sum(len(submodule._forward_hooks) + len(submodule._forward_pre_hooks) for submodule in module.modules())
    return own + sum(len(table) for table in tables if isinstance(table, dict))


class Soaked(Unmeasurable):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(3, 2), nn.Linear(2, 1)


class Footprint(Callback):
    """What the process holds at chosen steps."""

    def __init__(self, *at_steps: int) -> None:
        self.at_steps = at_steps
        self.memory: list[int] = []
        self.others: list[tuple[int, ...]] = []  # Open files, hooks, tensors.

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.at_steps:
            gc.collect()
            self.memory.append(resident_bytes())
            tensors = sum(isinstance(item, torch.Tensor) for item in gc.get_objects())
            self.others.append((len(list(Path("/proc/self/fd").iterdir())), num_hooks(pl_module), tensors))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account of the process")
def test_a_thousand_measurements_leave_memory_handles_and_hooks_as_they_were(tmp_path):
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(inputs.repeat(50, 1), torch.zeros(400, 1)), 8)
    monitor = BasinMonitor(probe=8, every_n_train_steps=1, zero_loss_threshold=0.0)  # No value comes late.
    footprint = Footprint(300, 999)
    trainer = make_trainer(tmp_path, monitor, footprint, max_steps=999, max_epochs=None)
    trainer.fit(Soaked(), batches)
    assert len(monitor.records) == 1000
    # Less is left where something of an earlier test goes.
    assert all(after <= before for before, after in zip(*footprint.others, strict=True))
    # 700 records of some 100 numbers take about 7 KiB each; one copy of the module kept each time would take 20 more.
    assert footprint.memory[1] - footprint.memory[0] < 700 * 12 * 2**10


if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
