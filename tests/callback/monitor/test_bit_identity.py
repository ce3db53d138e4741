"""A run is the same to the last bit with and without the monitor, in whatever way it is trained."""

import csv
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_basin import BasinMonitor
from tests.lightning_packages import (
    CombinedLoader,
    CSVLogger,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from tests.training import (
    Eventful,
    EventfulManual,
    EventfulTwoOptimizers,
    fingerprint,
    loader,
    regression_data,
    steps,
    witnessed,
)

pytestmark = pytest.mark.fits


class CompiledPart(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.readout = torch.compile(self.readout, backend="eager")


class CompiledInPlace(Eventful):
    def __init__(self) -> None:
        super().__init__()
        self.readout.compile(backend="eager")


class LogsUncompiled(Eventful):
    # torch 2.13 cannot compile the `log` of lightning 2.6.
    training_step = torch.compiler.disable(Eventful.training_step)
    validation_step = torch.compiler.disable(Eventful.validation_step)


def compiled_whole():
    return torch.compile(LogsUncompiled(), backend="eager")


class Hooked(Eventful):
    """Hooks of every kind, which change what they see and draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        self.hidden.register_forward_hook(lambda module, args, output: output + 0.1 * torch.rand(1) * module.training)
        self.readout.register_full_backward_hook(lambda module, inwards, outwards: (inwards[0] * random.random(),))
        self.readout.register_full_backward_pre_hook(lambda module, outwards: (outwards[0] * 2.0,))
        self.readout.weight.register_hook(lambda gradient: gradient * 0.5)


class EverySecondBatchIsSkipped(Eventful):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else None


class Stream(IterableDataset):
    """Random inputs in random order."""

    def __iter__(self):
        inputs, targets = regression_data().tensors
        for index in torch.randperm(len(inputs)).tolist():
            yield inputs[index] + 0.1 * torch.rand(3), targets[index]


class Augmented(Dataset):
    """Inputs with noise from every global generator, as dicts."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index):
        inputs, targets = regression_data()[index]
        return {"inputs": inputs + torch.rand(3) * random.random(), "targets": targets}


class OfDicts(Eventful):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["inputs"], batch["targets"]), batch_idx)


class OfTwoLoaders(Eventful):
    def training_step(self, batch, batch_idx):
        return sum(super(OfTwoLoaders, self).training_step(part, batch_idx) for part in batch.values())


def streamed(size, batch_size, *, shuffle, generator, drop_last, **options):
    return DataLoader(Stream(), batch_size, drop_last=drop_last, **options)


def of_dicts(size, batch_size, **options):
    return DataLoader(Augmented(), batch_size, **options)


def of_two_loaders(size, batch_size, **options):
    return CombinedLoader({name: loader(size, batch_size, **options) for name in ("first", "second")}, "max_size_cycle")


def monitor_of(options):
    """A monitor for the batches of a run, that measures every fourth step with a probe of two batches."""
    batch_fn = {
        of_dicts: lambda batch: (batch["inputs"], batch["targets"]),
        of_two_loaders: lambda batch: batch["first"],
    }.get(options.get("make_batches"))
    return BasinMonitor(probe=14, every_n_train_steps=4, batch_fn=batch_fn, dtype=options.get("dtype", "float64"))


CASES = {
    "32-true": {"precision": "32-true"},
    "32-true, measured in float32": {"precision": "32-true", "dtype": "float32"},
    "bf16-mixed, measured in float32": {"precision": "bf16-mixed", "dtype": "float32"},
    "64-true": {"precision": "64-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},  # On a CPU, Lightning turns it into bf16-mixed.
    "bf16-true": {"precision": "bf16-true"},
    "accumulation of 2": {"accumulate_grad_batches": 2},
    "accumulation of 3": {"accumulate_grad_batches": 3},
    "accumulation that changes": {"make_callbacks": lambda: [GradientAccumulationScheduler({1: 3})]},
    "manual optimization": {"make_module": EventfulManual},
    "manual optimization with two optimizers": {"make_module": EventfulTwoOptimizers},
    "validation inside the epoch": {"val_check_interval": 0.5},
    "own generator": {"own_generator": True},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "gradient clipping by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "deterministic": {"deterministic": True},
    "anomaly detection": {"detect_anomaly": True},
    "stochastic weight averaging": {"make_callbacks": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
    "exponential weight averaging": {"make_callbacks": lambda: [EMAWeightAveraging(decay=0.9)]},
    "compiled part": {"make_module": CompiledPart},
    "compiled in place": {"make_module": CompiledInPlace},
    "hooks": {"make_module": Hooked},
    "skipped batches": {"make_module": EverySecondBatchIsSkipped},
    "iterable dataset": {"make_batches": streamed},
    "dicts": {"make_batches": of_dicts, "make_module": OfDicts},
    "two loaders": {"make_batches": of_two_loaders, "make_module": OfTwoLoaders},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "overfitting two batches": {"overfit_batches": 2, "max_epochs": 4},
}


SLOW_CASES = {
    "compiled as a whole": {"make_module": compiled_whole},
    "workers": {"num_workers": 2},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
    "persistent workers and own generator": {"num_workers": 2, "persistent_workers": True, "own_generator": True},
}


def trained(root, *callbacks, make_callbacks=list, dtype=None, **options):
    return witnessed(root, *callbacks, *make_callbacks(), **options)


@pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU")
@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in CASES.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW_CASES.items()),
    ],
)
def test_training_is_bit_identical_with_and_without_monitor(tmp_path, options):
    monitor = monitor_of(options)
    with_monitor = trained(tmp_path, monitor, **options)
    assert with_monitor == trained(tmp_path, **options)
    assert len(monitor.records) > 1


@pytest.mark.parametrize(
    ("cadence", "expected"), [({"every_n_epochs": 2}, [0, 12]), ({"every_n_train_steps": 1}, list(range(19)))]
)
def test_extra_epoch_of_weight_averaging_is_not_measured(tmp_path, cadence, expected):
    # Epochs 0 to 2 train; the fourth runs the averaged weights, to renew the statistics of batch normalization.
    monitor = BasinMonitor(probe=10, hessian=False, **cadence)
    witnessed(tmp_path, monitor, StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3)
    assert steps(monitor) == expected


def run_with_checkpoints(root, *callbacks):
    saving = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    witnessed(root, *callbacks, saving, enable_checkpointing=True)
    checkpoints = {}
    for path in sorted(root.glob("*.ckpt")):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"].pop("BasinMonitor{'prefix': 'basin'}", None)
        checkpoint["callbacks"] = list(checkpoint["callbacks"])
        checkpoints[path.name] = {name: fingerprint(value) for name, value in checkpoint.items()}
    return checkpoints


def test_checkpoints_differ_by_the_state_of_the_monitor_only(tmp_path):
    with_monitor = run_with_checkpoints(tmp_path / "with", BasinMonitor(probe=10))
    assert len(with_monitor) == 3
    assert with_monitor == run_with_checkpoints(tmp_path / "without")


def points(logger, key):
    """The x axis of a curve in a CSV file."""
    logger.save()
    with Path(logger.experiment.metrics_file_path).open() as file:
        rows = list(csv.DictReader(file))
    return [int(row["step"]) for row in rows if row.get(key)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"make_callbacks": lambda: [GradientAccumulationScheduler({1: 3})]},
        {"val_check_interval": 0.5},
        {"make_module": EventfulManual},
        {"make_module": EventfulTwoOptimizers},
        {"make_module": EverySecondBatchIsSkipped},
        {"overfit_batches": 2},
    ],
    ids=[
        "plain",
        "accumulation",
        "accumulation that changes",
        "validation",
        "manual",
        "two optimizers",
        "skipped",
        "overfit",
    ],
)
@pytest.mark.parametrize("cadence", [{"every_n_train_steps": 2}, {}], ids=["steps", "epochs"])
def test_points_stand_where_those_of_the_training_loss_do(tmp_path, options, cadence):
    logger = CSVLogger(tmp_path)
    monitor = BasinMonitor(probe=10, hessian=False, **cadence)
    trained(tmp_path, monitor, logger=logger, log_every_n_steps=1, **options)
    measured, of_loss = points(logger, "basin/gradient_rank"), points(logger, "train_loss_step")
    assert len(measured) == len(monitor.records) > 1
    assert set(measured) <= set(of_loss)
    if not cadence:
        assert set(measured[1:]) <= set(points(logger, "train_loss_epoch"))
