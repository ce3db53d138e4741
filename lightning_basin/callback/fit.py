"""One fit: what is done at its start, at its batches and epochs, by all of its processes together."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.joint import JointMeasurement
from lightning_basin.callback.lightnings import (
    DeepSpeedStrategy,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    Strategy,
    Trainer,
    callbacks_of,
)
from lightning_basin.callback.loggers import batches_that_stepped
from lightning_basin.callback.probing import ModuleGetter
from lightning_basin.callback.progress import Progress, unmeasurable
from lightning_basin.callback.publish import Publisher
from lightning_basin.callback.request import Request
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord

Listener = Callable[[Trainer, BasinRecord], None]


class Fit:
    """Decides at the batches and epochs of one fit what to do; every process makes the same calls.

    Attributes:
        publisher: Hands the records to loggers, callbacks and the table.
    """

    def __init__(self, trainer: Trainer, module: nn.Module, progress: Progress, listeners: list[Listener]) -> None:
        check_trainer(trainer, progress.session.arguments.prefix)
        self._trainer = trainer
        self._module = module
        self._progress = progress
        self._schedule, self._session, self._probing = progress.schedule, progress.session, progress.probing
        self._listeners = listeners
        self._joint = JointMeasurement(trainer, module, progress)
        self.publisher = Publisher(trainer, progress.session)

    def begin(self) -> None:
        """Set up all for the first batch."""
        self._joint.open()
        self._progress.begin(self._module, self._trainer.global_step)
        self._request().training_set()
        self.publisher.begin(self._module, monitor_prefixes(self._trainer))

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Take the probe, and measure the baseline; or what a resumed run has left out."""
        trainer, probing = self._trainer, self._probing
        step, is_overdue = trainer.global_step, self._is_overdue(batch_idx)
        if probing.probe is not None and self._schedule.measured_step is not None:
            if is_overdue:
                self._measure(step, batches_that_stepped(trainer) - 1)
            return
        is_first, probing.is_checked = not probing.is_checked, True
        # Rank zero decides for all: batches may differ in size from process to process.
        whole = self._joint.whole() if is_first else None
        problem = None
        if trainer.is_global_zero:
            is_before_baseline = self._schedule.measured_step is None
            problem = probing.take(batch, self._request(), whole, keeps_weights=is_before_baseline)
        taken = trainer.strategy.broadcast((problem, probing.probe, probing.findings.step_calls, probing.is_checked), 0)
        problem, probing.probe, probing.findings.step_calls, probing.is_checked = taken
        probing.refuse_another()
        if problem is not None:
            raise unmeasurable(self._module, problem)
        self._measure_baseline()

    def after_batch(self) -> None:
        """Measure if the schedule asks for it."""
        step = self._trainer.global_step
        if self._schedule.is_due_after_batch(
            step, at_zero_loss=self._at_zero_loss, sparse_since=self._session.sparse_since
        ):
            self._measure(step, batches_that_stepped(self._trainer))

    def after_epoch(self) -> None:
        """Measure if the schedule asks for it, and the baseline in an epoch with fewer inputs than were asked for."""
        trainer, probing = self._trainer, self._probing
        if probing.probe is None or self._schedule.measured_step is None:
            probing.end_collection()
            probing.probe = trainer.strategy.broadcast(probing.probe, 0)
            probing.refuse_another()
            self._measure_baseline()
        step = trainer.global_step
        if step == 0:
            self._session.notices.warn(
                "BasinMonitor measures nothing after the baseline as long as the trainer counts no optimizer steps. "
                "HINT: return the optimizers from configure_optimizers, and step those that self.optimizers() returns"
            )
        if self._schedule.measured_step is not None and self._schedule.is_due_after_epoch(
            trainer.current_epoch, step, at_zero_loss=self._at_zero_loss, sparse_since=self._session.sparse_since
        ):
            self._measure(step, batches_that_stepped(trainer) - 1)

    def end(self) -> None:
        """Measure what a resumed run has left out, where no batch was left to train on."""
        if self._is_overdue(0):
            self._measure(self._trainer.global_step, batches_that_stepped(self._trainer) - 1)

    def close(self) -> None:
        """Say how many measurements were skipped, and end all connections."""
        self._session.inform_of_skipped()
        self.publisher.end()
        self._listeners.clear()  # They subscribe at the set-up of the next fit.
        self._joint.close()

    def _is_overdue(self, batch_idx: int) -> bool:
        epoch, step, since = self._trainer.current_epoch, self._trainer.global_step, self._session.sparse_since
        return self._schedule.is_overdue(epoch, step, batch_idx, at_zero_loss=self._at_zero_loss, sparse_since=since)

    @property
    def _at_zero_loss(self) -> bool:
        return self._session.results.zero_loss_step is not None

    def _request(self) -> Request:
        return self._probing.request(self._session.results.records, self._trainer)

    def _measure_baseline(self) -> None:
        trainer, probing = self._trainer, self._probing
        if probing.probe is None or self._schedule.measured_step is not None:
            return
        if unread := probing.findings.unread:
            self._session.notices.inform(
                f"BasinMonitor measures what forward returns, as training_step cannot be read: {unread}"
            )
        initial, probing.initial = probing.initial, None
        probing.drop_batches()
        module, step, log_step = initial or (self._module, trainer.global_step, batches_that_stepped(trainer))
        # Rank zero alone keeps initial weights: it says to all whether these are measured, and as of when.
        is_kept, step, log_step = trainer.strategy.broadcast((initial is not None, step, log_step), 0)
        self._measure(step, log_step, (lambda: module) if is_kept else None)

    def _measure(self, step: int, log_step: int, whole: ModuleGetter | None = None) -> None:
        """Measure the module as it is now, or the one that ``whole`` gives, and publish the record."""
        record = self._joint.record(step, whole)
        self._schedule.measured_step = step  # Not before: a resumed run has to make an interrupted measurement.
        if record is not None:
            self._session.keep(record, self._probing.probe)
        self.publisher.show(record)
        if record is None:
            return
        self.publisher.log(record, log_step)
        self._joint.advise(self._schedule.cadence(at_zero_loss=self._at_zero_loss))
        for listener in self._listeners:
            listener(self._trainer, record)


def check_trainer(trainer: Trainer, prefix: str) -> None:
    """Refuse a trainer in which a module cannot be measured."""
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"BasinMonitor needs the Trainer of an installed Lightning package, got {type(trainer).__module__}."
            f"{type(trainer).__name__}. HINT: `from lightning.pytorch import Trainer`"
        )
    prefixes = [escaped(other) for other in monitor_prefixes(trainer)]
    if prefixes.count(escaped(prefix)) > 1:
        raise MisconfigurationException(
            f"each BasinMonitor of a trainer needs another prefix, with which its keys begin, got {prefixes}: "
            f"pass BasinMonitor(prefix=...) with another one"
        )
    if _cannot_be_gathered(trainer.strategy):
        raise MisconfigurationException(
            f"BasinMonitor needs whole parameters, but {type(trainer.strategy).__name__} shards them in a way that "
            f"cannot be undone. HINT: train with DDP or with ModelParallelStrategy (FSDP2), or measure the "
            f"checkpoints: `lightning_basin.measure_checkpoints`"
        )


def monitor_prefixes(trainer: Trainer) -> list[str]:
    """Return the prefixes of all monitors of a trainer."""
    return [callback.prefix for callback in callbacks_of(trainer) if isinstance(callback, Arguments)]


def _cannot_be_gathered(strategy: Strategy) -> bool:
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3  # Below, each process holds all parameters, as with DDP.
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["tensor_parallel"].size() > 1
    return isinstance(strategy, FSDPStrategy)
