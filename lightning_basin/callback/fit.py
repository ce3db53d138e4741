"""One fit: what is done at its start, at its batches and epochs, by all of its processes together."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from weakref import ref

from torch import nn

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.gathering import GatheredModule
from lightning_basin.callback.lightnings import (
    Callback,
    DeepSpeedStrategy,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
    StochasticWeightAveraging,
    Strategy,
    Trainer,
)
from lightning_basin.callback.loggers import batches_that_stepped
from lightning_basin.callback.notices import inform
from lightning_basin.callback.overhead import OverheadLimit, announced
from lightning_basin.callback.processes import PatientBroadcast
from lightning_basin.callback.progress import Progress
from lightning_basin.callback.publish import Publisher
from lightning_basin.callback.request import Request
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord

Listener = Callable[[Trainer, BasinRecord], None]


class Fit:
    """Measures during one fit. Every process makes the same calls, and the first one measures for all.

    Args:
        trainer: The trainer at its set-up.
        module: The module that will be trained.
        arguments: The monitor's arguments.
        progress: What outlives the fit: probe, records and schedule.
        listeners: The functions that are called after every measurement.

    Attributes:
        publisher: Hands the records to loggers, callbacks and the table.

    Raises:
        MisconfigurationException: If the module is sharded and cannot be put together.
    """

    def __init__(
        self, trainer: Trainer, module: nn.Module, arguments: Arguments, progress: Progress, listeners: list[Listener]
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._arguments = arguments
        self._progress = progress
        self._schedule, self._session, self._probing = progress.schedule, progress.session, progress.probing
        self._listeners = listeners
        self.publisher = Publisher(trainer, arguments, progress.session, progress.notices)
        self._overhead: OverheadLimit | None = None
        self._broadcast: PatientBroadcast | None = None  # While training goes on.
        self._gathered: GatheredModule | None = None
        if isinstance(trainer.strategy, ModelParallelStrategy):  # Nothing is sharded before `configure_model`.
            try:
                self._gathered = GatheredModule(module, is_here=trainer.is_global_zero)
            except (TypeError, ValueError) as error:
                raise self._refusal(error) from error

    def begin(self) -> None:
        """Set up all for the first batch.

        Raises:
            MisconfigurationException: If the training set cannot be read, or a callback monitors what is not measured.
        """
        trainer, progress = self._trainer, self._progress
        self._broadcast = PatientBroadcast(trainer.strategy.broadcast)
        self._request().training_set()
        self._session.num_failures = 0
        self._overhead = None if self._arguments.max_overhead is None else OverheadLimit(self._arguments.max_overhead)
        # What was measured goes on only where the same module is trained further, or a checkpoint held it.
        is_resumed, progress.is_loaded = progress.is_loaded, False
        is_same_module, progress.fitted = progress.fitted() is self._module, ref(self._module)
        self._schedule.begin(trainer.global_step, is_resumed=is_resumed)
        if trainer.global_step == 0 or not (is_resumed or is_same_module):
            progress.reset()
        self.publisher.begin(self._module, monitor_prefixes(trainer))

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Take the probe, and measure the baseline; or what a resumed run has left out.

        Args:
            batch: The training batch, as the training step takes it.
            batch_idx: The index of the batch in its epoch.

        Raises:
            MisconfigurationException: If the first batch shows that the module cannot be measured.
        """
        trainer, probing = self._trainer, self._probing
        epoch, step = trainer.current_epoch, trainer.global_step
        is_overdue = self._schedule.is_overdue(epoch, step, batch_idx, at_zero_loss=self._at_zero_loss)
        if probing.probe is not None and self._schedule.measured_step is not None:
            if is_overdue:
                self._measure(step, batches_that_stepped(trainer) - 1)
            return
        is_first, probing.is_checked = not probing.is_checked, True
        # Rank zero decides for all: batches may differ in size from process to process.
        whole = self._whole() if is_first else None
        problem = None
        if trainer.is_global_zero:
            is_before_baseline = self._schedule.measured_step is None
            problem = probing.take(batch, self._request(), whole, keeps_weights=is_before_baseline)
        taken = trainer.strategy.broadcast((problem, probing.probe, probing.findings.step_calls), 0)
        problem, probing.probe, probing.findings.step_calls = taken
        probing.refuse_another()
        if problem is not None:
            raise self._refusal(problem)
        self._measure_baseline()

    def after_batch(self) -> None:
        """Measure if the schedule asks for it."""
        step = self._trainer.global_step
        if self._schedule.is_due_after_batch(step, at_zero_loss=self._at_zero_loss):
            self._measure(step, batches_that_stepped(self._trainer))

    def after_epoch(self) -> None:
        """Measure if the schedule asks for it, and the baseline in an epoch with fewer inputs than were asked for."""
        trainer, probing = self._trainer, self._probing
        if probing.probe is None or self._schedule.measured_step is None:
            probing.take_what_there_is()
            probing.probe = trainer.strategy.broadcast(probing.probe, 0)
            probing.refuse_another()
            self._measure_baseline()
        step = trainer.global_step
        if self._schedule.is_due_after_epoch(trainer.current_epoch, step, at_zero_loss=self._at_zero_loss):
            self._measure(step, batches_that_stepped(trainer) - 1)

    def end(self) -> None:
        """Say how many measurements were skipped."""
        num_skipped = len(self._session.results.skipped_steps)
        if self._arguments.max_overhead is not None and num_skipped:
            num_due = len(self._session.results.records) + num_skipped
            inform(
                f"BasinMonitor(max_overhead={self._arguments.max_overhead:g}) skipped {num_skipped} of {num_due} "
                f"measurements, see skipped_steps"
            )

    def close(self) -> None:
        """Close the connections to the other processes; the listeners of the next fit subscribe at its set-up."""
        self._listeners.clear()
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None

    @property
    def _at_zero_loss(self) -> bool:
        return self._session.results.zero_loss_step is not None

    def _request(self) -> Request:
        return self._probing.request(self._session.results.records, self._trainer)

    def _refusal(self, problem: object) -> MisconfigurationException:
        return MisconfigurationException(f"BasinMonitor cannot measure {type(self._module).__name__}: {problem}")

    def _whole(self) -> Callable[[], nn.Module]:
        """Return what gives the module with all parameters on rank zero; all processes must ask for it together."""
        return (lambda: self._module) if self._gathered is None else self._gathered.gathered(self._module)

    def _measure_baseline(self) -> None:
        trainer, probing = self._trainer, self._probing
        if probing.probe is None or self._schedule.measured_step is not None:
            return
        if unread := probing.findings.unread:
            self._progress.notices.inform(
                f"BasinMonitor measures what forward returns, as training_step cannot be read: {unread}"
            )
        initial, probing.initial = probing.initial, None
        probing.drop_batches()
        module, step, log_step = initial or (self._module, trainer.global_step, batches_that_stepped(trainer))
        # Rank zero alone keeps initial weights: it says to all whether these are measured, and as of when.
        is_kept, step, log_step = trainer.strategy.broadcast((initial is not None, step, log_step), 0)
        self._measure(step, log_step, whole=(lambda: module) if is_kept else None)

    def _measure(self, step: int, log_step: int, *, whole: Callable[[], nn.Module] | None = None) -> None:
        """Measure the module as it is now, or the one that ``whole`` gives, and publish the record."""
        record = self._record(step, whole)
        self._schedule.measured_step = step  # Not before: a resumed run has to make an interrupted measurement.
        if record is not None:
            self._session.keep(record, self._probing.probe)
        self.publisher.show(record)
        if record is None:
            return
        self.publisher.log(record, log_step)
        for listener in self._listeners:
            listener(self._trainer, record)

    def _record(self, step: int, whole: Callable[[], nn.Module] | None) -> BasinRecord | None:
        """Return the record, the same on all processes; ``None`` where none is due or can be made."""
        trainer, session, probing = self._trainer, self._session, self._probing
        has_probe = probing.probe is not None and not probing.is_refused  # None: resumed, and no batch has come by.
        if session.has_given_up or not has_probe or _renews_batch_statistics(trainer):
            return None
        if self._skips():
            session.results.skipped_steps.append(step)
            self._progress.notices.inform(
                f"BasinMonitor(max_overhead={self._arguments.max_overhead:g}) skips measurements"
            )
            return None
        if whole is None:
            whole = self._whole()
        record = self._timed_record(step, whole) if trainer.is_global_zero else None
        assert self._broadcast is not None
        record = self._broadcast(record)
        if record is None:
            session.count_failure(in_training=True)
        return record

    def _skips(self) -> bool:
        """Whether measuring now would take too long; rank zero decides for all, by its own clock."""
        if self._overhead is None:
            return False
        allowed: bool = self._trainer.strategy.broadcast(self._overhead.allows_next(), 0)
        return not allowed

    def _timed_record(self, step: int, whole: Callable[[], nn.Module]) -> BasinRecord | None:
        limited = nullcontext() if self._overhead is None else self._overhead.measuring()
        with limited, announced(f"Measuring {escaped(self._arguments.prefix)} at step {step}"):
            return self._session.measure(self._request(), whole, self._probing.probe, step)


def check_trainer(trainer: Trainer, prefix: str) -> None:
    """Refuse a trainer in which a module cannot be measured.

    Args:
        trainer: The trainer at its set-up.
        prefix: The monitor's prefix.

    Raises:
        MisconfigurationException: If the trainer is of no installed package, another monitor has the same prefix, or
            the strategy shards parameters in a way that cannot be undone.
    """
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"BasinMonitor needs the Trainer of an installed Lightning package, got {type(trainer).__module__}."
            f"{type(trainer).__name__}. HINT: `from lightning.pytorch import Trainer`"
        )
    prefixes = [escaped(other) for other in monitor_prefixes(trainer)]
    if prefixes.count(escaped(prefix)) > 1:
        raise MisconfigurationException(
            f"each BasinMonitor of a trainer needs a prefix of its own, which its keys begin with, got {prefixes}: "
            f"pass BasinMonitor(prefix=...) with another one"
        )
    if _cannot_be_gathered(trainer.strategy):
        raise MisconfigurationException(
            f"BasinMonitor needs whole parameters, but {type(trainer.strategy).__name__} shards them in a way that "
            f"it cannot put together. HINT: train with DDP or with ModelParallelStrategy (FSDP2), or measure the "
            f"checkpoints: `lightning_basin.measure_checkpoints`"
        )


def monitor_prefixes(trainer: Trainer) -> list[str]:
    """Return the prefixes of all monitors of a trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    return [callback.prefix for callback in callbacks if isinstance(callback, Arguments)]


def present_listeners(listeners: Iterable[Listener], trainer: Trainer) -> list[Listener]:
    """Return the listeners without those of callbacks of another trainer, which a run that raised leaves behind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    return [
        listener
        for listener in listeners
        if not isinstance(owner := getattr(listener, "__self__", None), Callback)
        or any(owner is callback for callback in callbacks)
    ]


def _cannot_be_gathered(strategy: Strategy) -> bool:
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3  # Below, each process holds all parameters, as with DDP.
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["tensor_parallel"].size() > 1
    return isinstance(strategy, FSDPStrategy)


def _renews_batch_statistics(trainer: Trainer) -> bool:
    """Whether this is the extra epoch, after those of training, in which the module holds averaged weights."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    averaging = (callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging))
    return any(0 <= callback.swa_end < trainer.current_epoch for callback in averaging)
