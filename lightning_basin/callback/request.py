"""What a measurement is asked for: by the monitor's arguments, and by what its first batch showed of the module."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.described_step import KnownStep, step_behavior
from lightning_basin.callback.lightnings import Profiler, Trainer
from lightning_basin.callback.notices import Notices
from lightning_basin.callback.silence import quiet_behavior, quiet_loss
from lightning_basin.callback.training_set import whole_training_set
from lightning_basin.callback.training_step import read_training_step
from lightning_basin.naming import escaped
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.settings import Behavior, LayerSelection, Precision, Settings

LOSS_ATTRIBUTES = ("loss_fn", "criterion")
"""The names under which a module's loss is looked for."""

Loss = Callable[..., Any] | Literal["behavioral"]


@dataclass
class Findings:
    """What a run showed of its module before the first measurement.

    Attributes:
        trained: The names of the parameters that the first training step gives a gradient.
        step_calls: The positions of the calls in ``training_step`` whose outputs are measured; ``None`` where the
            module itself, or the monitor's behavior, is called.
        loss_in_words: What was said last of the loss of the training step.
        unread: Why the training step could not be read; empty where it was, or need not be.
        leaves_out_loss: Whether the loss of the module does not fit the outputs.
        known_step: What the last reading of the training step has shown; ``None`` where it must be read anew.
    """

    trained: frozenset[str] = frozenset()
    step_calls: tuple[int, ...] | None = None
    loss_in_words: str | None = None
    unread: str = ""
    leaves_out_loss: bool = False
    known_step: KnownStep | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """What the next measurement is asked for; there is no trainer outside of a fit."""

    arguments: Arguments
    findings: Findings
    records: Sequence[BasinRecord]
    notices: Notices
    trainer: Trainer | None

    @property
    def batch_fn(self) -> Callable[..., Any] | None:
        """The function that makes a pair of inputs and targets of a batch; a training step takes all of it."""
        return self.arguments.batch_fn if self.findings.step_calls is None else lambda batch: (batch, None)

    @property
    def behavior(self) -> Behavior:
        """The behavior, on a copy of the module that acts on nothing of the run."""
        calls = self.findings.step_calls
        return quiet_behavior(self.arguments.behavior if calls is None else step_behavior(calls), self.trainer)

    def settings(self, loss_fn: Loss | None = None) -> Settings:
        """Return the settings of the next measurement; no loss leaves loss and Hessian out."""
        return Settings(
            loss_fn=loss_fn,
            behavior=self.behavior,
            layers=self._layers,
            hessian=self.arguments.hessian,
            rtol=self.arguments.rtol,
            duplicate_rtol=self.arguments.duplicate_rtol,
            max_outputs=self.arguments.max_outputs,
            spectrum=len(self.records) % self.arguments.every_n_spectra == 0,
            memory_budget=self.arguments.memory_budget,
            dtype=self.arguments.dtype,
            taken_dtype=self._taken_dtype,
            seed=self.arguments.seed,
            trained=self.findings.trained,
        )

    def specify(self, module: nn.Module, probe: Probe) -> tuple[Probe, Settings]:
        """Return what to measure a module with, as it is now: the probe with its targets, and the settings."""
        probe, loss_fn = self.with_loss(module, probe)
        settings = self.settings(loss_fn)
        if trained := _with_gradients(module, self.trainer):
            settings = replace(settings, trained=trained)
        return probe, settings

    def with_loss(self, module: nn.Module, probe: Probe) -> tuple[Probe, Loss | None]:
        """Return the probe with its targets, and the loss; a training step that is read makes both anew each time."""
        loss_fn, findings = self.arguments.loss_fn, self.findings
        if findings.step_calls is None:
            if loss_fn is None and not findings.leaves_out_loss:
                loss_fn = loss_of(module)
            return probe, quiet_loss(loss_fn, self.trainer)
        if loss_fn is None and findings.leaves_out_loss:
            return probe, None
        step = read_training_step(module, probe.inputs, self.trainer, findings.step_calls, known=findings.known_step)
        findings.known_step = step.known
        if loss_fn is not None:
            return Probe(probe.inputs, step.targets), quiet_loss(loss_fn, self.trainer)
        if findings.loss_in_words != step.loss_in_words:  # As by a weight that grows from zero.
            findings.loss_in_words = step.loss_in_words
            self.notices.inform(str(step))
        return Probe(probe.inputs, step.probe.targets), quiet_loss(step.loss, self.trainer)

    def training_set(self) -> Iterable[Probe] | None:
        """Return the training set over which duplicates are counted; ``None`` where only the probe is looked at."""
        return whole_training_set(
            self.arguments.duplicates_over,
            self.trainer,
            batch_fn=self.batch_fn,
            whole_batches=callable(self.arguments.behavior),
        )

    def profiled(self, action: str) -> AbstractContextManager[Any]:
        """Show in the run's profiler how long an action takes."""
        if self.trainer is None:
            return nullcontext()
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        return profiler.profile(f"[BasinMonitor]{escaped(self.arguments.prefix)}.{action}")

    @property
    def _taken_dtype(self) -> Precision | None:
        """The type of the run so far, with which its curves go on; versions that did not say it took float64."""
        return None if not self.records else "float32" if self.records[-1].dtype == "float32" else "float64"

    @property
    def _layers(self) -> LayerSelection:
        """The layers to report: curves that began layer by layer go on so, where freed layers make them many."""
        began_as_layers = bool(self.records) and not self.records[0].blocks
        return "all" if self.arguments.layers == "auto" and began_as_layers else self.arguments.layers


def loss_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the loss that a module keeps under one of the usual names."""
    attributes = (getattr(module, name, None) for name in LOSS_ATTRIBUTES)
    return next((attribute for attribute in attributes if callable(attribute)), None)


def _with_gradients(module: nn.Module, trainer: Trainer | None) -> set[str]:
    """Return the names of the parameters that an optimizer trains, and to which the last step gave a gradient."""
    optimizers = [] if trainer is None else trainer.optimizers
    trained = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    return {
        name for name, parameter in module.named_parameters() if parameter.grad is not None and id(parameter) in trained
    }
