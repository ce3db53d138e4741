"""Small modules, loaders and trainers, and what of a training run can be compared."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_basin import BasinRecord
from tests.lightning_packages import Callback, LightningModule, Trainer


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed every global generator inside, and put all of them back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def regression_data(num_inputs: int = 60, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(num_inputs, 3, generator=generator), torch.randn(num_inputs, 2, generator=generator)
    )


def loader(num_inputs: int = 60, batch_size: int = 20, **options) -> DataLoader:
    return DataLoader(regression_data(num_inputs), batch_size, **options)


def repeated_loader(num_batches: int = 4) -> DataLoader:
    """The same batch of 20 over and over: where in an epoch a run resumes makes no difference."""
    inputs, targets = regression_data(20).tensors
    return DataLoader(TensorDataset(inputs.repeat(num_batches, 1), targets.repeat(num_batches, 1)), 20)


def make_trainer(root, *callbacks: Callback, **options) -> Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


class Unmeasurable(LightningModule):
    """Three inputs, four tanh units, two outputs; has no loss that could be found."""

    def __init__(self) -> None:
        super().__init__()
        with seeded():
            self.hidden, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)
        self.num_training_steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(inputs)))

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        inputs, targets = self.split(batch)
        loss = nn.functional.mse_loss(self(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = self.split(batch)
        self.log("val_loss", nn.functional.mse_loss(self(inputs), targets))

    test_step = validation_step

    def split(self, batch):
        return batch

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Regressor(Unmeasurable):
    """The same with a loss that is found."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_fn = nn.MSELoss()


class Inline(Unmeasurable):
    """Computes its loss from tensors and its own weights: nothing can be read from its step."""

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        inputs, targets = self.split(batch)
        return (self(inputs) - targets).square().mean() + 1e-3 * self.hidden.weight.square().sum()


class TwoOptimizers(Regressor):
    """Manual optimization: the hidden layer and the readout have an optimizer each, and take a step each per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.loss_fn(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.hidden.parameters(), lr=0.1), torch.optim.SGD(self.readout.parameters(), lr=0.1)]


class Scripted(LightningModule):
    """Has at every optimizer step exactly the rank and the loss that are asked for, and learns nothing.

    The output is ``offset + sum_i gate_i theta_i x_i``. A closed gate makes a zero column in the behavioral gradients,
    so the rank on six or more inputs in general position is the number of open gates. With all six open and
    ``theta = 1`` the output misses the target, the sum of the entries of the input, by the offset.
    """

    def __init__(self, ranks=(6,), losses=(1.0,)) -> None:
        super().__init__()
        self.ranks, self.losses = ranks, losses
        self.theta = nn.Parameter(torch.ones(6))
        self.register_buffer("gates", torch.zeros(6))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float64))
        self.training_offset = 0.0
        self.follow_script(0)

    def follow_script(self, step: int) -> None:
        rank = self.ranks[min(step, len(self.ranks) - 1)]
        self.gates.copy_(torch.arange(6) < rank)
        self.offset.fill_(self.losses[min(step, len(self.losses) - 1)] ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        offset = self.offset + self.training_offset if self.training else self.offset
        return (inputs * self.gates * self.theta).sum(1, keepdim=True) + offset.to(inputs.dtype)

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    def training_step(self, batch, batch_idx):
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.follow_script(self.global_step + 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss_fn(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def scripted_loader(num_batches: int = 1) -> DataLoader:
    """Batches of eight small integers in six entries, of rank six; a batch is the whole probe."""
    inputs = torch.cat([torch.eye(6), torch.eye(6)[:2] + 1.0]).repeat(num_batches, 1)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8)


class Eventful(LightningModule):
    """Holds everything that a careless measurement changes, and draws from every global generator as it trains."""

    def __init__(self) -> None:
        super().__init__()
        with seeded():
            self.hidden, self.readout, self.frozen = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)
        self.frozen.requires_grad_(requires_grad=False)
        self.norm, self.frozen_norm = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.2)
        self.mean_output = MeanMetric()
        self.loss_fn = nn.MSELoss()
        self.num_calls = 0
        self.last_activation: Tensor | None = None
        self.calls: list[int] = []

    def train(self, mode: bool = True):  # noqa: FBT001, FBT002 - as in nn.Module
        super().train(mode)
        self.frozen_norm.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        self.num_calls += 1
        self.calls.append(len(inputs))
        self.last_activation = torch.tanh(self.frozen_norm(self.norm(self.hidden(inputs))))
        outputs = self.readout(self.dropout(self.last_activation))
        self.mean_output.update(outputs.detach().mean())
        return outputs

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.rand()
        loss = self.loss_fn(self(batch[0]) + 0.1 * noise, batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("mean_output", self.mean_output, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss_fn(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class EventfulTwoOptimizers(Eventful):
    """The same with manual optimization and an optimizer for each layer, of which one waits for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (self.hidden, self.readout)]


class EventfulManual(Eventful):
    """The same with manual optimization that accumulates two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Witness(Callback):
    """Takes down the whole state of a run at every batch and every epoch, after all callbacks before it."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self.seen: list[dict[str, str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._look(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._look(trainer, pl_module, batch)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._look(trainer, pl_module, None)

    def on_train_end(self, trainer, pl_module) -> None:
        self._look(trainer, pl_module, None)

    def _look(self, trainer, pl_module, batch) -> None:
        state = {
            "weights and buffers": pl_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "python": repr(random.getstate()),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "loader": None if self.generator is None else self.generator.get_state(),
            "train flags": {name: part.training for name, part in pl_module.named_modules()},
            "gradients": {name: parameter.grad for name, parameter in pl_module.named_parameters()},
            "attributes": [
                getattr(pl_module, name, None) for name in ("num_calls", "calls", "last_activation", "noted")
            ],
            "metric": dict(pl_module.mean_output.metric_state),
            "metric updates": pl_module.mean_output.update_count,
            "batch": batch,
            "hooks": [len(part._forward_hooks) + len(part._backward_hooks) for part in pl_module.modules()],
            "trainable": [parameter.requires_grad for parameter in pl_module.parameters()],
            "metrics": {
                name: value for name, value in trainer.callback_metrics.items() if not name.startswith("basin")
            },
            "global settings": global_settings(),
        }
        self.seen.append({name: fingerprint(value) for name, value in state.items()})


def global_settings() -> dict[str, object]:
    """Every switch of torch's that a measurement turns."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "attention": (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "checkpoints": checkpoint.CheckpointFunction,
        "compiler": torch._dynamo.eval_frame._stance.stance,
    }


def witnessed(root, *callbacks: Callback, make_module=Eventful, own_generator=False, make_batches=loader, **options):
    """Train on shuffled, random batches; return everything that was seen of the run."""
    trainer_options = {name: value for name, value in options.items() if name not in LOADER_OPTIONS}
    loader_options = {name: value for name, value in options.items() if name in LOADER_OPTIONS}
    generator = torch.Generator().manual_seed(1) if own_generator else None
    witness = Witness(generator)
    with seeded(3):
        batches = make_batches(60, 10, shuffle=True, generator=generator, drop_last=True, **loader_options)
        make_trainer(root, *callbacks, witness, **trainer_options).fit(make_module(), batches, loader(20))
    return witness.seen


LOADER_OPTIONS = ("num_workers", "persistent_workers")


def fingerprint(item) -> str:
    """The same for two nested collections if and only if all numbers and types in them are the same."""
    digest = hashlib.sha256()
    for part in _parts(item):
        digest.update(part)
        digest.update(b"|")
    return digest.hexdigest()


def _parts(item) -> Iterator[bytes]:
    if isinstance(item, DTensor):
        item = item.to_local()
    if isinstance(item, Tensor):
        yield f"{item.dtype}{tuple(item.shape)}{item.requires_grad}".encode()
        yield item.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if item.numel() else b""
    elif isinstance(item, np.ndarray):
        yield item.tobytes()
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(item, list | tuple):
        yield str(len(item)).encode()
        for value in item:
            yield from _parts(value)
    elif is_dataclass(item):
        for field in fields(item):
            yield from _parts(getattr(item, field.name))
    else:
        yield repr(item).encode()


def timeless(records: list[BasinRecord]) -> list[BasinRecord]:
    """Records without the time that they took, which no two measurements share."""
    return [replace(record, measure_seconds=0.0, seconds={}) for record in records]


def steps(monitor) -> list[int | None]:
    return [record.step for record in monitor.records]
