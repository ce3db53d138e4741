"""Fits on real processes over gloo: this file is run as a script in each of them."""

import gc
import os
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.metrics import BehavioralGradientRank, DuplicatedActivations, HessianNullity
from tests.lightning_packages import (
    Callback,
    DDPStrategy,
    EarlyStopping,
    MisconfigurationException,
    ModelCheckpoint,
    ModelParallelStrategy,
)
from tests.training import (
    Eventful,
    Scripted,
    Witness,
    loader,
    make_trainer,
    regression_data,
    scripted_loader,
    seeded,
    steps,
)

ROOT = Path(__file__).parents[2]
TIMEOUT = timedelta(seconds=60)


def fit(root, *callbacks, module=None, batches=None, timeout=TIMEOUT, **options):
    module = Eventful() if module is None else module
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timeout)
    trainer = make_trainer(root, *callbacks, strategy=strategy, devices=2, **options)
    with seeded(trainer.global_rank):
        trainer.fit(module, batches or loader(80, 10))
    return trainer, module


def basin_metrics(trainer):
    return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("basin")}


def measured(rank, root):
    """A run with the monitor and one without."""
    monitor, with_monitor, without = BasinMonitor(probe=25), Witness(), Witness()
    trainer, _ = fit(root, monitor, with_monitor)
    fit(root, without)
    return {
        "records": [record.to_dict() for record in monitor.records],
        "probe": (monitor.probe.inputs, monitor.probe.targets),
        "metrics": basin_metrics(trainer),
        "with_monitor": with_monitor.seen,
        "without": without.seen,
    }


class Sharded(Eventful):
    """Each layer in two halves, one on each process; an attribute and a buffer that no state dict holds change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(2), persistent=False)
        self.scale = 1.0

    def configure_model(self):
        for part in (self.hidden, self.readout, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, inputs):
        return self.scale * super().forward(inputs) + self.shift

    def on_train_epoch_end(self):
        self.scale += 0.5
        self.shift += 1.0


class MadeLate(Sharded):
    """Has another layer once it is sharded."""

    def configure_model(self):
        self.late = nn.Linear(2, 2)
        super().configure_model()


def fit_sharded(root, *callbacks, module=None, tensor_parallel_size=1, ckpt_path=None, **options):
    sizes = {"data_parallel_size": 2 // tensor_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo", timeout=TIMEOUT)
    trainer = make_trainer(root, *callbacks, strategy=strategy, devices=2, **options)
    with seeded(trainer.global_rank):
        trainer.fit(module or Sharded(), loader(80, 10), ckpt_path=ckpt_path)
    return trainer


class Whole(Callback):
    """All weights at the end of each epoch, before the module changes its scale and shift."""

    def __init__(self) -> None:
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(pl_module, options=options)  # Buffers in it are those of the module.
        self.states.append({name: tensor.clone() for name, tensor in state.items()})


def sharded(rank, root):
    """Parameters sharded over both processes, with and without monitor; and one whose probe takes several batches."""
    monitor, late, whole, with_monitor, without = (
        BasinMonitor(probe=8),
        BasinMonitor(probe=25, prefix="basin_late"),
        Whole(),
        Witness(),
        Witness(),
    )
    trainer = fit_sharded(root, monitor, late, whole, with_monitor)
    fit_sharded(root, without)
    return {
        "records": [record.to_dict() for record in monitor.records],
        "late": [record.to_dict() for record in late.records],
        "probes": [(m.probe.inputs, m.probe.targets) for m in (monitor, late)],
        "metrics": basin_metrics(trainer),
        "states": whole.states,
        "with_monitor": with_monitor.seen,
        "without": without.seen,
    }


def resumed(rank, root):
    """One epoch, and one more from its checkpoint; the same in one go."""
    uninterrupted, first, second = (BasinMonitor(probe=8) for _ in range(3))
    fit_sharded(root, uninterrupted)
    fit_sharded(root, first, max_epochs=1).save_checkpoint(root / "sharded.ckpt")
    fit_sharded(root, second, ckpt_path=root / "sharded.ckpt")
    return {name: [r.to_dict() for r in m.records] for name, m in {"whole": uninterrupted, "resumed": second}.items()}


def refused(rank, root):
    """What is said where a sharded module cannot be put together again."""
    messages = []
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    without_numbers = Sharded()
    without_numbers.empty = empty
    late, tensor_parallel = {"module": MadeLate()}, {"module": Eventful(), "tensor_parallel_size": 2}
    for options in (late, tensor_parallel, {"module": without_numbers}):
        with pytest.raises(MisconfigurationException) as raised:
            fit_sharded(root, BasinMonitor(probe=8), **options)
        messages.append(str(raised.value))
    return messages


def stopped(rank, root):
    """Early stopping by both callbacks, before and after the monitor in the list."""
    last_steps = []
    for make_stopping in (
        lambda: EarlyStopping("basin/gradient_rank", mode="min", patience=2, strict=True),
        lambda: RankEarlyStopping(patience=2, after_zero_loss=False),
    ):
        for order in (1, -1):
            callbacks = [BasinMonitor(probe=8), make_stopping()][::order]
            options = {"module": Scripted((6, 5)), "batches": scripted_loader(2), "max_epochs": 9}
            last_steps.append(fit(root, *callbacks, **options)[0].global_step)
    return {"last_steps": last_steps}


def watched(rank, root):
    """Strict callbacks that check after each batch, before the probe is full; then where nothing can be measured."""

    def behavior(module, inputs):
        if rank == 0 and len(inputs) == 25:  # The check before training has seen the first batch of 10 only.
            raise torch.linalg.LinAlgError("did not converge")
        return module(inputs)

    found = []
    for option in ({}, {"behavior": behavior}):
        monitor = BasinMonitor(25, hessian=False, **option)
        stopping = EarlyStopping("basin/gradient_rank", patience=99, check_on_train_epoch_end=False)
        saving = ModelCheckpoint(root / f"watched{len(found)}", monitor="basin/gradient_rank")
        trainer = make_trainer(
            *(root, saving, stopping, monitor),
            strategy=DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT),
            devices=2,
            val_check_interval=1,
            enable_checkpointing=True,
        )
        trainer.fit(Eventful(), loader(80, 10), loader(10, 10))
        found.append((steps(monitor), trainer.global_step, stopping.wait_count, stopping.strict, saving.save_top_k))
    return found


def failing(rank, root):
    """A loss that fails on the process that measures, in the middle of the second measurement only."""
    calls = []

    def loss_fn(outputs, targets):
        calls.append(0)
        if armed and len(calls) == 3 and rank == 0:  # The loss is evaluated twice, to see whether it is a function.
            raise RuntimeError("out of order")
        return nn.functional.mse_loss(outputs, targets)

    armed = []

    class Arming(Eventful):
        def on_train_epoch_start(self):
            calls.clear()
            armed[:] = [1] if self.current_epoch == 1 else []

    monitor = BasinMonitor(probe=10, loss_fn=loss_fn)
    trainer, _ = fit(root, monitor, module=Arming(), max_epochs=3)
    return {"steps": steps(monitor), "metrics": basin_metrics(trainer), "last_step": trainer.global_step}


def patient(rank, root):
    """A measurement that takes longer than the process group lets its members wait."""

    def behavior(module, inputs):
        if len(inputs) == 15:  # The check before training has seen the first batch of 10 only.
            time.sleep(6)
        return module(inputs)

    monitor = BasinMonitor(probe=15, behavior=behavior, every_n_train_steps=100)
    trainer, _ = fit(root, monitor, max_steps=2, timeout=timedelta(seconds=5))
    torch.distributed.destroy_process_group()  # The fits that follow have another timeout.
    return {"steps": steps(monitor), "last_step": trainer.global_step}


def giving_up(rank, root):
    """A behavior that always fails on the process that measures, and would not on the other."""

    def behavior(module, inputs):
        if rank == 0 and len(inputs) == 15:  # The check before training has seen the first batch of 10 only.
            raise torch.linalg.LinAlgError("did not converge")
        return module(inputs)

    monitor = BasinMonitor(probe=15, behavior=behavior, max_failures=2)
    trainer, _ = fit(root, monitor, RankEarlyStopping(patience=1, after_zero_loss=False), max_epochs=4)
    return {
        "steps": steps(monitor),
        "last_step": trainer.global_step,
        "given_up": monitor.progress.session.has_given_up,
    }


def limited(rank, root):
    """The second process has another clock: it is slower by what it sleeps."""
    monitor = BasinMonitor(probe=10, every_n_train_steps=1, max_overhead=0.2)

    class Sleeping(Eventful):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01 * rank)
            return super().training_step(batch, batch_idx)

    fit(root, monitor, module=Sleeping(), max_epochs=5)
    return {"steps": steps(monitor), "skipped": monitor.skipped_steps}


def ever_rarer(rank, root):
    """Steps alone decide, so that the processes need not agree on a clock."""
    monitor = BasinMonitor(probe=10, every_n_train_steps=1, max_overhead="auto")
    fit(root, monitor, max_epochs=5)
    return steps(monitor)


def uneven(rank, root):
    """Batches of 20 on one process, of 5 on the other: their probes are not full at the same time."""
    monitor = BasinMonitor(probe=40)
    batches = DataLoader(regression_data(160 if rank == 0 else 40, seed=rank), 20 if rank == 0 else 5)
    trainer, _ = fit(root, monitor, batches=batches, use_distributed_sampler=False)
    return {"steps": steps(monitor), "last_step": trainer.global_step, "metrics": basin_metrics(trainer)}


class Gathering(Eventful):
    """Asks the other processes something in its forward pass."""

    def forward(self, inputs):
        self.all_gather(inputs)
        return super().forward(inputs)


class Reducing(Eventful):
    """The same without Lightning, which has no part in it."""

    def forward(self, inputs):
        torch.distributed.all_reduce(inputs.detach().mean())
        return super().forward(inputs)


def gathering(rank, root):
    messages = []
    for module in (Gathering(), Reducing()):
        with pytest.raises(MisconfigurationException) as raised:
            fit(root, BasinMonitor(probe=10), module=module)
        messages.append(str(raised.value))
    return messages


class GatheringLoss(nn.MSELoss):
    """Compares with the outputs on all processes."""

    def forward(self, outputs, targets):
        everywhere = [torch.zeros_like(outputs) for _ in range(2)]
        torch.distributed.all_gather(everywhere, outputs.detach().contiguous())
        return super().forward(outputs, targets)


def gathering_loss(rank, root):
    """A loss that was found, and not given, is left out."""
    module, monitor = Eventful(), BasinMonitor(probe=10)
    module.loss_fn = GatheringLoss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(root, monitor, module=module)
    said = [str(warning.message) for warning in caught if "Loss and Hessian" in str(warning.message)]
    return {"steps": steps(monitor), "losses": [record.loss for record in monitor.records], "said": said}


def never_full(rank, root):
    """A probe larger than the epoch: its baseline is measured at the end of it, and dated by its weights."""
    monitor = BasinMonitor(probe=500)
    trainer, _ = fit(root, monitor)
    return {
        "steps": steps(monitor),
        "last_step": trainer.global_step,
        "metrics": basin_metrics(trainer),
        "records": [record.to_dict() for record in monitor.records],
        "probe": (monitor.probe.inputs, monitor.probe.targets),
    }


def synchronized(rank, root):
    """The three metrics with other numbers of rows on the two processes, down to none."""
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    found = {}
    identity = torch.eye(6, dtype=torch.float64)
    for name, mine in {
        "uneven": [range(4), range(3, 6)],
        "none on one": [[], range(5)],
        "none on zero": [range(5), []],
    }.items():
        rows = identity[list(mine[rank])]
        gradients, duplicates, nullity = BehavioralGradientRank(6), DuplicatedActivations(6), HessianNullity(6)
        if len(rows):
            gradients.update(rows)
            duplicates.update(rows)
            nullity.update(rows.mT @ rows, num_inputs=len(rows))
        found[name] = [metric.compute().item() for metric in (gradients, duplicates, nullity)]
        # Synchronizing must not have left the rows of the other process behind.
        gradients.update(identity[5:])
        found[f"{name}, then more"] = gradients.compute().item()
        gradients.reset()
        gradients.update(identity[rank : rank + 1])
        found[f"{name}, then anew"] = gradients.compute().item()
    torch.distributed.destroy_process_group()
    return found


def run_processes(root, *scenarios, count=2):
    """What each scenario returned, by process."""
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    processes = []
    for rank in range(count):
        # As torchrun would start them.
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.callback.process_runs", str(root), *scenarios]
        with (root / f"log{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((root / f"log{rank}.txt").read_text()[-3000:] for rank in range(count))
    assert codes == [0] * count, logs
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    this_rank, directory = int(os.environ["RANK"]), Path(sys.argv[1])
    results = {}
    for scenario in sys.argv[2:]:
        results[scenario] = globals()[scenario](this_rank, directory)
        # Tracebacks of what failed in it hold its process group, whose store would take the place of that of the next.
        gc.collect()
    torch.save(results, directory / f"rank{this_rank}.pt")
