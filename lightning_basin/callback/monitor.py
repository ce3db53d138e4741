"""The callback: when to measure during a fit, and where the results go."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import ref

from torch import Tensor, nn
from typing_extensions import override

from lightning_basin.batches import ProbeCollector
from lightning_basin.callback.advice import misunderstandings
from lightning_basin.callback.arguments import Arguments, as_builtin, check_arguments, probe_or_size
from lightning_basin.callback.gathering import GatheredModule
from lightning_basin.callback.history import HistoryFile, unused
from lightning_basin.callback.keys import Key
from lightning_basin.callback.lightnings import (
    BaseCallback,
    Callback,
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    Profiler,
    StochasticWeightAveraging,
    Strategy,
    Trainer,
)
from lightning_basin.callback.loggers import batches_that_stepped, log_scalars, set_callback_metrics
from lightning_basin.callback.module import LOSS_ATTRIBUTES, found_loss
from lightning_basin.callback.notices import inform
from lightning_basin.callback.notices import warn as _warn
from lightning_basin.callback.overhead import OverheadLimit, announced
from lightning_basin.callback.processes import PatientBroadcast
from lightning_basin.callback.results import Latest, Results
from lightning_basin.callback.resuming import read_state
from lightning_basin.callback.schedule import Schedule
from lightning_basin.callback.silence import quiet_behavior, quiet_loss
from lightning_basin.callback.state import fingerprint, probe_state
from lightning_basin.callback.step_run import trained_parameters
from lightning_basin.callback.training_set import check_one_loader, whole_training_set
from lightning_basin.callback.training_step import agrees_with, read_training_step, step_behavior
from lightning_basin.callback.watching import Lenience, check_watchers, watchers
from lightning_basin.layer_names import tag
from lightning_basin.measure import check_measurable, measure
from lightning_basin.memory import MemoryBudgetError
from lightning_basin.naming import escaped
from lightning_basin.network.copying import is_out_of_memory
from lightning_basin.network.network import LossFunction
from lightning_basin.network.replica import replicas
from lightning_basin.null_space import verify_null_space as verified_null_space
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.settings import DTYPES, Behavior, HessianMode, Precision, Probabilities, Settings

_COMPARED_ON_RESUME = ("rtol", "duplicate_rtol", "max_outputs", "dtype", "seed")
"""They change the numbers, not only which there are."""

_PAIR_HINT = (
    ". The behavior got the first part of the batch, which is a pair of inputs and targets. HINT: where it takes the "
    "whole batch, pass BasinMonitor(batch_fn=lambda batch: (batch, None))"
)


class BasinMonitor(Arguments, BaseCallback):
    """Measure rank, null space and duplicated activations while a module trains, also after its loss reached zero.

    Results go to every logger of the trainer, to ``trainer.callback_metrics`` (for ``EarlyStopping`` and
    ``ModelCheckpoint``) and to ``records``. Training is not changed: a copy of the module is measured, in float64, and
    every random state is put back. A measurement that fails costs one warning and nothing else.

    A baseline is measured at the first training step, so that a monitored key exists from then on. With a probe that
    needs more than one batch, the initial weights are kept until enough batches have come by; what monitors a key
    passes over its checks until there is a value. A key that no measurement can have is refused before the first step.

    Logged keys, with ``basin`` for ``prefix``: ``basin/<quantity>`` for the network,
    ``basin_layer_<quantity>/<layer>`` for each layer (``basin_block_<quantity>/<range>`` above 32 layers),
    ``basin_stats/<quantity>_{p10,median,p90}`` over layers. The quantities are those of `BasinRecord.quantities`, and
    once ``basin/zero_loss_step``.

    Args:
        probe: How many inputs to take from the first training batches; or a `Probe`, or a pair of inputs and targets.
        loss_fn: From outputs and targets to a scalar. ``None`` takes the module's ``loss_fn`` or ``criterion``;
            without either, loss and Hessian are left out. ``"behavioral"`` compares the outputs with themselves, see
            `measure_basin`; there is then no loss that could reach zero.
        behavior: From the module and the inputs to the outputs whose gradients count, one row per input. ``None`` or
            ``"outputs"`` calls the module, ``"probabilities"`` takes the softmax over the second axis of that.
        batch_fn: From a training batch to a pair of inputs and targets (``None`` for no targets). ``None``
            takes a pair as it is, and a tensor, or with a function as ``behavior`` anything else, as inputs without
            targets.
        every_n_epochs: Measure at the end of every n-th epoch.
        every_n_train_steps: Measure every n optimizer steps instead.
        every_n_epochs_after_zero_loss: The cadence after the loss has reached zero; ``None`` keeps the one before.
        every_n_spectra: Take singular values at every n-th measurement only. At the others, a rank that is full is
            proved without them, several times as fast, and effective ranks are absent.
        layers: ``"auto"`` (blocks above 32 layers), ``"all"``, or names of layers.
        hessian: ``"auto"`` brackets its nullity, and up to 500 parameters forms it; ``"dense"`` always, ``"bracket"``
            never; ``"gauss-newton"`` looks at its Gauss-Newton part only, ``False`` at nothing of it.
        zero_loss_threshold: The loss on the probe counts as zero at or below this magnitude.
        zero_loss_patience: For so many measurements in a row.
        rtol: Relative tolerance of ranks; ``None`` means ``max(shape) * eps`` of the matrix that is decomposed.
        duplicate_rtol: Relative tolerance within which two activations are the same.
        duplicates_over: ``"train"`` counts duplicated activations over the whole training set too, at the price of two
            or more passes over it at each measurement. They read the data set of the run's loader, not the loader.
            Where that is no map-style data set, pass one, or batches, as `measure_basin` takes them.
        max_outputs: Where a module has more outputs per input, measure so many random combinations of them; ranks are
            then lower bounds. ``"auto"`` does so only where there are too many, and says it; ``None`` refuses these.
        memory_budget: Bytes that a measurement may use beside what the process holds; ``None`` means half of what is
            free then. What cannot be cut to it is not measured, and training goes on.
        dtype: ``"float32"`` runs and differentiates the copy in float32, which is faster on many accelerators, and
            cannot tell small singular values from zero: see `measure_basin`. The Hessian is left out.
        verify_null_space: Also log ``surviving_fraction``, by the function of this name: 1 where random null directions
            of the gradients are really free. ``"zero_loss"`` does so once, where the loss reaches zero; a number n at
            every n-th measurement, from the baseline on.
        seed: Of the random vectors of the sketch, the same at every measurement.
        max_overhead: Measure less often where measuring would take more than this share of the wall time of the fit.
            Which measurements are skipped then depends on the speed of the machine.
        max_failures: Stop measuring after so many failures in a row; ``None`` tries again every time.
        history: Also write every measurement to ``<prefix>.csv`` or ``<prefix>.jsonl`` in the log directory, or to
            ``<prefix>-1.csv`` where another run has left one. ``prefix`` must then make the name of a file.
        on_other_probe: Whether to ``"raise"`` on resuming with another ``probe`` than that of the run so far, whose
            curves would mean something else from there on; or to ``"replace"`` it.
        prefix: First part of every key; two monitors in one trainer need two. Control characters and markup, in it and
            in names of layers, are percent-encoded in keys, files and messages.

    Raises:
        MisconfigurationException: At construction for values out of range; at the start of the fit, before the first
            training step, for a probe, behavior or loss that cannot be measured, and for another probe on resuming.

    Example:
        >>> monitor = BasinMonitor(probe=64, every_n_epochs=5)
        >>> monitor.records
        []
    """

    def __init__(
        self,
        probe: int | Probe | tuple[Any, Any] = 128,
        *,
        loss_fn: Callable[..., Any] | Literal["behavioral"] | None = None,
        behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None = None,
        batch_fn: Callable[..., Any] | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        every_n_epochs_after_zero_loss: int | None = None,
        every_n_spectra: int = 1,
        layers: Literal["auto", "all"] | Sequence[str] = "auto",
        hessian: HessianMode = "auto",
        zero_loss_threshold: float = 1e-6,
        zero_loss_patience: int = 1,
        rtol: float | None = None,
        duplicate_rtol: float = 1e-6,
        duplicates_over: Any = None,
        max_outputs: int | Literal["auto"] | None = "auto",
        memory_budget: int | None = None,
        dtype: Precision = "float64",
        verify_null_space: int | Literal["zero_loss"] | None = None,
        seed: int = 0,
        max_overhead: float | None = None,
        max_failures: int | None = 3,
        history: Literal["csv", "jsonl"] | None = None,
        on_other_probe: Literal["raise", "replace"] = "raise",
        prefix: str = "basin",
    ) -> None:
        given = {name: as_builtin(value) for name, value in locals().items() if name in Arguments.__annotations__}
        super().__init__()
        self._probe, self._probe_size = probe_or_size(as_builtin(probe))
        check_arguments(given)
        vars(self).update(given)
        self._explicit_probe = self._probe is not None
        self._schedule = Schedule(self)
        self._own = Results()
        self._latest = Latest()  # The same for all copies.
        self._is_set_up = False
        self._has_begun = False
        self._num_zero_losses = 0
        self._num_failures = 0  # In a row.
        self._overhead: OverheadLimit | None = None
        self._trained: frozenset[str] = frozenset()  # Names of parameters that the first step gives a gradient.
        self._step_calls: tuple[int, ...] | None = None  # Calls in the training step from which outputs are read.
        self._read_loss: str | None = None  # What was said of their loss.
        self._unread = ""  # Why nothing was read.
        self._collector = self._new_collector()
        self._initial: tuple[nn.Module, int, int] | None = None  # for the baseline: its step and x axis beside it
        self._gathered: GatheredModule | None = None  # where a strategy shards the module
        self._broadcast: PatientBroadcast | None = None  # While a fit runs.
        self._lenience: Lenience | None = None  # Of those who look for a value that there is not yet.
        self._is_checked = False
        self._leave_out_loss = False
        self._history_file: HistoryFile | None = None
        self._history_path: str | None = None  # Of the run, which goes on with it when it is resumed.
        self._said: set[str] = set()
        self._loads_state = True
        self._is_loaded = False  # For the fit that begins.
        self._fitted: Callable[[], nn.Module | None] = _nothing
        self._expected_probe: str | None = None  # The fingerprint of the one to be taken again on resuming.
        self._is_probe_refused = False
        self._listeners: list[Callable[[Trainer, BasinRecord], None]] = []

    @property
    @override
    def state_key(self) -> str:
        # A trainer refuses equal keys when it is made, in words that name no remedy; `setup` finds them too.
        return self.checkpoint_key if self._is_set_up else f"{self.checkpoint_key}, not set up: {id(self)}"

    @property
    def checkpoint_key(self) -> str:
        """The key of the state in a checkpoint."""
        return self._generate_state_key(prefix=self.prefix)

    @property
    def _results(self) -> Results:
        """Those of a copy where this monitor itself was in no fit: a package has copied it, and fits with the copy."""
        return self._own if self._has_begun or self._latest.results is None else self._latest.results

    @property
    def records(self) -> list[BasinRecord]:
        """Every record of the run, oldest first."""
        return self._results.records

    @property
    def zero_loss_step(self) -> int | None:
        """Optimizer steps taken when the loss had been zero for ``zero_loss_patience`` measurements."""
        return self._results.zero_loss_step

    @property
    def skipped_steps(self) -> list[int]:
        """Steps at which a measurement was due that ``max_overhead`` did not allow."""
        return self._results.skipped_steps

    @property
    def probe(self) -> Probe | None:
        """The inputs that are measured; ``None`` until enough training batches have come by."""
        return self._probe or self._results.probe

    def start(self, module: nn.Module, probe: Probe | None = None, step_calls: Sequence[int] | None = None) -> None:
        """Begin to measure outside of a fit: forget what was measured, and see whether a module can be.

        Args:
            module: One of those that will be measured.
            probe: Taken where the monitor has none of its own.
            step_calls: Of such a probe, the calls in ``training_step`` whose outputs were measured.

        Raises:
            MisconfigurationException: If there is no probe, or the module cannot be measured on it.
        """
        self._has_begun = True
        self._reset()
        self._num_failures = 0
        if self._probe is None:
            self._probe, self._step_calls = probe, None if step_calls is None else tuple(step_calls)
        try:
            if self._probe is None:
                raise ValueError("there is no probe; pass BasinMonitor(probe=(inputs, targets))")
            self._check(module, self._probe)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"BasinMonitor cannot measure {type(module).__name__}: {error}") from error

    def observe(self, module: nn.Module, step: int) -> BasinRecord | None:
        """Measure outside of a fit, as at a step of one, and add it to the records.

        Args:
            module: Stays as it is.
            step: Optimizer steps that it was trained for.

        Returns:
            The record; ``None``, after a warning, where measuring failed.
        """
        record = None if self._has_given_up else self._record(None, lambda: module, step)
        if record is not None:
            self._keep(record)
        elif not self._has_given_up:
            self._count_failure(None)
        return record

    def subscribe(self, listener: Callable[[Trainer, BasinRecord], None]) -> None:
        """Call ``listener(trainer, record)`` after every measurement, on every process."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def logged(self, record: BasinRecord) -> dict[str, float]:
        """The values of a record of this monitor by key; ``zero_loss_step`` is in one record only."""
        is_first_zero = record.step is not None and record.step == self.zero_loss_step
        return record.scalars(self.prefix) | (self._zero_loss_scalar() if is_first_zero else {})

    def monitored(self, record: BasinRecord) -> dict[str, float]:
        """What callbacks find: the step of zero loss stays, so that a strict EarlyStopping does not miss it."""
        return self.logged(record) | self._zero_loss_scalar()

    def row(self, record: BasinRecord) -> dict[str, float]:
        """The same as a row of a table, which begins with the step."""
        return ({} if record.step is None else {"step": record.step}) | self.logged(record)

    def logs(self, key: str) -> bool:
        """Whether a metric's key is one of this monitor's."""
        return Key.of(key, self.prefix) is not None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True
        if stage != "fit":
            return
        if not isinstance(trainer, Trainer):
            raise MisconfigurationException(
                f"BasinMonitor needs the Trainer of an installed Lightning package, got {type(trainer).__module__}."
                f"{type(trainer).__name__}. HINT: `from lightning.pytorch import Trainer`"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        prefixes = [escaped(callback.prefix) for callback in callbacks if isinstance(callback, BasinMonitor)]
        if prefixes.count(escaped(self.prefix)) > 1:
            raise MisconfigurationException(
                f"each BasinMonitor of a trainer needs a prefix of its own, which its keys begin with, got {prefixes}: "
                f"pass BasinMonitor(prefix=...) with another one"
            )
        self._listeners = [  # A run that raised leaves its own behind.
            listener
            for listener in self._listeners
            if not isinstance(owner := getattr(listener, "__self__", None), Callback)
            or any(owner is callback for callback in callbacks)
        ]
        self._gathered = None
        if _cannot_be_gathered(trainer.strategy):
            raise MisconfigurationException(
                f"BasinMonitor needs whole parameters, but {type(trainer.strategy).__name__} shards them in a way that "
                f"it cannot put together. HINT: train with DDP or with ModelParallelStrategy (FSDP2), or measure the "
                f"checkpoints: `lightning_basin.measure_checkpoints`"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):  # Nothing is sharded before `configure_model`.
            try:
                self._gathered = GatheredModule(pl_module, is_here=trainer.is_global_zero)
            except (TypeError, ValueError) as error:
                name = type(pl_module).__name__
                raise MisconfigurationException(f"BasinMonitor cannot measure {name}: {error}") from error

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_lenience()
        if stage == "fit":  # The listeners of the next fit subscribe at its set-up.
            self._listeners.clear()
            if self._broadcast is not None:
                self._broadcast.close()
                self._broadcast = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_lenience()  # There is no teardown.

    def _end_lenience(self) -> None:
        if self._lenience is not None:
            self._lenience.end()
            self._lenience = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._broadcast = PatientBroadcast(trainer.strategy.broadcast)
        self._whole_training_set(trainer)
        self._num_failures = 0
        self._overhead = None if self.max_overhead is None else OverheadLimit(self.max_overhead)
        # What was measured goes on only where the same module is trained further, or a checkpoint held it.
        goes_on = self._is_loaded or (self._fitted() is pl_module)
        self._schedule.begin(trainer.global_step, is_resumed=self._is_loaded)
        self._is_loaded, self._fitted = False, ref(pl_module)
        self._has_begun, self._latest.results = True, self._own
        if trainer.global_step == 0 or not goes_on:
            self._reset()
        # Resumed: checkpoints do not hold callback_metrics, but a strict EarlyStopping asks for it.
        values = self._newest_values(trainer)
        set_callback_metrics(trainer, values, self.logs)
        self._start_history(trainer)
        self._look_at_watchers(trainer, pl_module, values)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        is_overdue = self._schedule.is_overdue(
            trainer.current_epoch, step, batch_idx, at_zero_loss=self.zero_loss_step is not None
        )
        if self._probe is not None and self._schedule.measured_step is not None:
            if is_overdue:
                self._measure(trainer, pl_module, step, batches_that_stepped(trainer) - 1)
            return
        is_first, self._is_checked = not self._is_checked, True
        # Rank zero decides for all: batches may differ in size from process to process.
        whole = self._whole(pl_module) if is_first else None
        problem = self._take_probe(trainer, whole, batch) if trainer.is_global_zero else None
        found = trainer.strategy.broadcast((problem, self._probe, self._step_calls), 0)
        problem, self._probe, self._step_calls = found
        self._refuse_another_probe()
        if problem is not None:
            raise MisconfigurationException(f"BasinMonitor cannot measure {type(pl_module).__name__}: {problem}")
        self._measure_baseline(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._schedule.is_due_after_batch(step, at_zero_loss=self.zero_loss_step is not None):
            self._measure(trainer, pl_module, step, batches_that_stepped(trainer))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            self._probe is None or self._schedule.measured_step is None
        ):  # An epoch with fewer inputs than were asked for.
            if self._probe is None and self._collector.num_inputs:
                self._probe = self._collector.probe()
                self._say(
                    f"The probe has {self._probe.size} inputs, not {self._probe_size}: an epoch has no more. HINT: for "
                    f"more, pass BasinMonitor(probe=(inputs, targets))"
                )
            self._probe = trainer.strategy.broadcast(self._probe, 0)
            self._refuse_another_probe()
            self._measure_baseline(trainer, pl_module)
        step = trainer.global_step
        if self._schedule.is_due_after_epoch(trainer.current_epoch, step, at_zero_loss=self.zero_loss_step is not None):
            self._measure(trainer, pl_module, step, batches_that_stepped(trainer) - 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.max_overhead is not None and self.skipped_steps:
            num_due = len(self.records) + len(self.skipped_steps)
            inform(
                f"BasinMonitor(max_overhead={self.max_overhead:g}) skipped {len(self.skipped_steps)} of {num_due} "
                f"measurements, see skipped_steps"
            )

    def _reset(self) -> None:
        """Forget another run, so that a monitor can be used for two fits."""
        self._own.clear()
        self._num_zero_losses = 0
        self._schedule.measured_step = None
        self._expected_probe = None
        self._is_probe_refused = False
        self._initial = None
        self._is_checked = False
        self._leave_out_loss = False
        self._history_path = None
        self._trained, self._step_calls, self._read_loss, self._unread = frozenset(), None, None, ""
        self._collector = self._new_collector()
        if not self._explicit_probe:
            self._probe = None

    def _new_collector(self) -> ProbeCollector:
        return ProbeCollector(self._probe_size, batch_fn=self._batch_fn, whole_batches=callable(self.behavior))

    def _whole(self, pl_module: nn.Module) -> Callable[[], nn.Module]:
        """Gives the module with all of its parameters on rank zero; all processes must ask for it together."""
        return (lambda: pl_module) if self._gathered is None else self._gathered.gathered(pl_module)

    def _take_probe(self, trainer: Trainer, whole: Callable[[], nn.Module] | None, batch: Any) -> str | None:
        """Collect inputs until there are enough; the first time, with the module, say what cannot be measured."""
        try:
            module = None if whole is None else whole()
            if module is not None:
                self._trained = trained_parameters(module, batch, trainer, DTYPES[self.dtype])
                self._read_step(module, batch, trainer)
            if self._probe is None:
                if self._batch_fn is None and not callable(self.behavior):
                    check_one_loader(trainer, batch)
                self._collector.add(batch)
                if self._collector.complete:
                    self._probe = self._collector.probe()
            if module is not None:
                self._check(module, self._probe or self._collector.probe(), trainer)
                # Some training steps will pass before there are enough inputs: the baseline is that of the weights now.
                if self._probe is None and self._schedule.measured_step is None:
                    (initial,) = replicas(module)
                    self._initial = (initial, trainer.global_step, batches_that_stepped(trainer))
        except (TypeError, ValueError) as error:
            if whole is not None:
                return f"{error}{self._hint(batch)}"
            self._probe = self._collector.probe()
            self._say(f"The probe has {self._probe.size} inputs, not {self._probe_size}: {error}", warn=True)
        except Exception as error:  # Not the configuration. The measurements will say whether they succeed.
            name = type(trainer.lightning_module).__name__
            _warn(f"BasinMonitor could not check {name}. {type(error).__name__}: {error}{_memory_hint(error)}")
        return None

    def _hint(self, batch: Any) -> str:
        """What else to say where the first batch cannot be measured."""
        is_pair = callable(self.behavior) and self.batch_fn is None and not self._explicit_probe
        if is_pair and isinstance(batch, tuple | list) and len(batch) == 2:  # noqa: PLR2004
            return _PAIR_HINT
        return self._unread and f". It cannot be read from training_step: {self._unread}"

    def _read_step(self, module: nn.Module, batch: Any, trainer: Trainer) -> None:
        """Read outputs, targets and loss from the training step, unless arguments say them or it trains just those."""
        is_told = self.behavior not in (None, "outputs") or self.batch_fn is not None or self._explicit_probe
        if is_told or self._probe is not None or not hasattr(module, "training_step"):
            return
        try:
            step = read_training_step(module, batch, trainer)
        except Exception as error:  # Whatever a step raises that is run alone: then the batch has to say it.
            self._unread = str(error)
            return
        loss_fn = None if self.loss_fn is not None else quiet_loss(found_loss(module), trainer)
        if agrees_with(step, module, batch, quiet_behavior(None, trainer), loss_fn, with_loss=self.loss_fn is None):
            return
        try:
            behavior = quiet_behavior(step_behavior(step.calls), trainer)
            check_measurable(module, Probe(batch), replace(self._settings(behavior), layers="auto", memory_budget=None))
        except (TypeError, ValueError) as error:  # Inputs that a loss couples, say.
            self._unread = str(error)
            return
        self._step_calls = step.calls
        self._collector = self._new_collector()
        self._read_loss = step.loss_in_words
        self._say(str(step))

    @property
    def _batch_fn(self) -> Callable[..., Any] | None:
        return self.batch_fn if self._step_calls is None else _whole_batch

    @property
    def _behavior(self) -> Callable[..., Any] | Literal["outputs", "probabilities"] | None:
        return self.behavior if self._step_calls is None else step_behavior(self._step_calls)

    def _with_loss(
        self, module: nn.Module, probe: Probe, trainer: Trainer | None
    ) -> tuple[Probe, Callable[..., Any] | Literal["behavioral"] | None]:
        """The probe with its targets, and the loss; both are those of the training step now where this is read."""
        if self._step_calls is None:
            loss_fn = self.loss_fn
            if loss_fn is None and not self._leave_out_loss:
                loss_fn = found_loss(module)
            return probe, quiet_loss(loss_fn, trainer)
        if self.loss_fn is None and self._leave_out_loss:
            return probe, None
        step = read_training_step(module, probe.inputs, trainer, self._step_calls)
        if self.loss_fn is not None:
            return Probe(probe.inputs, step.targets), quiet_loss(self.loss_fn, trainer)
        if self._read_loss != step.loss_in_words:  # As by a weight that grows from zero.
            self._read_loss = step.loss_in_words
            self._say(str(step))
        return Probe(probe.inputs, step.probe.targets), quiet_loss(step.loss, trainer)

    def _fingerprint(self, probe: Probe) -> str:
        """By what the probe is known again; targets that a training step makes may be made again."""
        return fingerprint(probe if self._step_calls is None else Probe(probe.inputs))

    def _refuse_another_probe(self) -> None:
        """On resuming with a probe that had to be taken again and is not the same: measure nothing instead."""
        if self._probe is None or self._expected_probe is None:
            return
        self._is_probe_refused = self._fingerprint(self._probe) != self._expected_probe
        if self._is_probe_refused:
            self._say(
                "BasinMonitor does not go on measuring: the probe had to be taken anew, and is not that of the run so "
                "far. HINT: pass BasinMonitor(on_other_probe='replace')",
                warn=True,
            )

    def _check(self, pl_module: nn.Module, probe: Probe, trainer: Trainer | None = None) -> None:
        """Evaluate once, without and with the loss, so that what cannot be measured is said before training."""
        behavior = quiet_behavior(self._behavior, trainer)
        for _ in self._whole_training_set(trainer) or ():  # Whether its first batch can be told apart.
            break
        size = self._probe_size or probe.size
        if self._probe is None and trainer is not None:  # Fewer, where an epoch has no more.
            size = int(min(size, probe.size * trainer.num_training_batches))
        try:
            plan = check_measurable(pl_module, probe, self._settings(behavior), num_inputs=size)
            self._say(f"BasinMonitor measures {plan}")
            if plan.unseen:
                self._say(
                    f"The measured outputs do not depend on the layers {list(plan.unseen)}, which training trains "
                    f"otherwise (by a penalty, or through other outputs): their ranks are 0. HINT: pass "
                    f"BasinMonitor(behavior=...)",
                    warn=True,
                )
        except MemoryBudgetError as error:  # The measurements will say so; training goes on.
            self._say(f"BasinMonitor will not be able to measure: {error}", warn=True)
            return
        self._check_loss(pl_module, probe, trainer, num_inputs=size)

    def _check_loss(self, pl_module: nn.Module, probe: Probe, trainer: Trainer | None, *, num_inputs: int) -> None:
        """Evaluate the loss once; one that was found and not given is left out where it does not fit."""
        behavior = quiet_behavior(self._behavior, trainer)
        is_given = self.loss_fn is not None or self._step_calls is not None
        probe, loss_fn = self._with_loss(pl_module, probe, trainer)
        if loss_fn is None and self._step_calls is not None:  # It was said of what was read.
            return
        if loss_fn is None:
            self._say(
                f"Loss and Hessian are not measured: {type(pl_module).__name__} has no callable "
                f"{' or '.join(map(repr, LOSS_ATTRIBUTES))}. HINT: pass BasinMonitor(loss_fn=...)",
                warn=True,
            )
            return
        try:
            if callable(loss_fn) and probe.targets is None:
                raise TypeError("it needs targets, and the batches hold none: pass batch_fn or probe=(inputs, targets)")
            settings = self._settings(behavior, loss_fn)
            check_measurable(pl_module, probe, settings, num_inputs=num_inputs, is_loss_given=is_given)
        except MemoryBudgetError as error:
            self._say(f"BasinMonitor will not be able to measure: {error}", warn=True)
        except (TypeError, ValueError) as error:
            if self.loss_fn is not None:
                raise
            self._leave_out_loss = True
            self._say(
                f"Loss and Hessian are not measured with the loss found on {type(pl_module).__name__}: {error}. "
                f"HINT: pass BasinMonitor(loss_fn=...)",
                warn=True,
            )

    def _settings(self, behavior: Behavior, loss_fn: LossFunction | Literal["behavioral"] | None = None) -> Settings:
        """What the next measurement is asked for.

        Args:
            behavior: The behavior, on a copy of the module.
            loss_fn: The loss; ``None`` leaves loss and Hessian out.
        """
        return Settings(
            loss_fn=loss_fn,
            behavior=behavior,
            layers=self._layers,
            hessian=self.hessian,
            rtol=self.rtol,
            duplicate_rtol=self.duplicate_rtol,
            max_outputs=self.max_outputs,
            spectrum=len(self.records) % self.every_n_spectra == 0,
            memory_budget=self.memory_budget,
            dtype=self.dtype,
            seed=self.seed,
            trained=self._trained,
        )

    @property
    def _layers(self) -> Literal["auto", "all"] | Sequence[str]:
        """Curves that began as those of layers stay so, where freed layers make them more than 32."""
        return "all" if self.layers == "auto" and self.records and not self.records[0].blocks else self.layers

    def _whole_training_set(self, trainer: Trainer | None) -> Iterable[Probe] | None:
        return whole_training_set(
            self.duplicates_over,
            trainer,
            batch_fn=self._batch_fn,
            whole_batches=callable(self.behavior),
        )

    def _measure_baseline(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._probe is None or self._schedule.measured_step is not None:
            return
        if self._unread:
            self._say(f"BasinMonitor measures what forward returns, as training_step cannot be read: {self._unread}")
        initial, self._initial = self._initial, None
        self._collector = self._new_collector()
        module, step, log_step = initial or (pl_module, trainer.global_step, batches_that_stepped(trainer))
        # Rank zero alone keeps initial weights: it says to all whether these are measured, and as of when.
        is_kept, step, log_step = trainer.strategy.broadcast((initial is not None, step, log_step), 0)
        self._measure(trainer, pl_module, step, log_step, whole=(lambda: module) if is_kept else None)

    def _measure(
        self,
        trainer: Trainer,
        pl_module: nn.Module,
        step: int,
        log_step: int,
        *,
        whole: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Measure a module as it is now, or the one that ``whole`` gives."""
        record = self._measured(trainer, pl_module, step, whole)
        self._schedule.measured_step = (
            step  # Not before: an interrupted measurement is one that a resumed run has to make.
        )
        values = {}
        if record is not None:
            self._keep(record)
            values = self.monitored(record)
            set_callback_metrics(trainer, values, self.logs)
        self._let_check(values)
        if record is None:
            return
        self._publish(trainer, record, log_step)
        for listener in self._listeners:
            listener(trainer, record)

    def _let_check(self, values: Mapping[str, float]) -> None:
        """Let those who monitor a value look at it from now on, and say who still finds none."""
        if self._lenience is not None:
            self._lenience.end(values)
            for problem in self._lenience.unmet(values):
                self._say(problem, warn=True)

    def _measured(
        self, trainer: Trainer, pl_module: nn.Module, step: int, whole: Callable[[], nn.Module] | None
    ) -> BasinRecord | None:
        """The record, the same on all processes, where one is due and can be made."""
        has_probe = self._probe is not None and not self._is_probe_refused  # None: resumed, and no batch has come by.
        if self._has_given_up or not has_probe or _renews_batch_statistics(trainer):
            return None
        if self._skips(trainer):
            self.skipped_steps.append(step)
            self._say(f"BasinMonitor(max_overhead={self.max_overhead:g}) skips measurements")
            return None
        if whole is None:
            whole = self._whole(pl_module)
        record = None
        if trainer.is_global_zero:
            record = self._timed(trainer, whole, step)
        assert self._broadcast is not None
        record = self._broadcast(record)
        if record is None:
            self._count_failure(trainer)
        return record

    def _skips(self, trainer: Trainer) -> bool:
        """Whether measuring now would take too long; rank zero decides for all, by its own clock."""
        if self._overhead is None:
            return False
        allowed: bool = trainer.strategy.broadcast(self._overhead.allows_next(), 0)
        return not allowed

    def _timed(self, trainer: Trainer, whole: Callable[[], nn.Module], step: int) -> BasinRecord | None:
        limited = nullcontext() if self._overhead is None else self._overhead.measuring()
        with limited, announced(f"Measuring {escaped(self.prefix)} at step {step}"):
            return self._record(trainer, whole, step)

    def _publish(self, trainer: Trainer, record: BasinRecord, log_step: int) -> None:
        skipped = (
            {} if self._overhead is None else {f"{escaped(self.prefix)}/skipped_measurements": len(self.skipped_steps)}
        )
        for problem in log_scalars(trainer.loggers, self.logged(record) | skipped, step=log_step):
            self._say(problem, warn=True)
        self._write_history(lambda file: file.append(self.row(record)))
        for note in record.notes:
            self._say(note)
        if record.saturated:
            self._say(
                f"The probe is too small to see the network: the rank of the behavioral gradients is that of the "
                f"probe, {record.num_rows}. HINT: pass a larger BasinMonitor(probe=...)",
                warn=True,
            )

    def _record(self, trainer: Trainer | None, whole: Callable[[], nn.Module], step: int) -> BasinRecord | None:
        try:
            with self._profiled(trainer, "measure"):
                module = whole()
                assert self._probe is not None
                probe, loss_fn = self._with_loss(module, self._probe, trainer)
                settings = self._settings(quiet_behavior(self._behavior, trainer), loss_fn)
                if trained := _with_gradients(module, trainer):
                    settings = replace(settings, trained=trained)
                training_set = self._whole_training_set(trainer)
                record = measure(module, probe, settings, duplicates_over=training_set, step=step)
        except Exception as error:  # A measurement must never end a training run.
            _warn(
                f"BasinMonitor could not measure at step {step}{_goes_on(trainer)}. "
                f"{type(error).__name__}: {error}{_memory_hint(error)}"
            )
            return None
        return self._verified(trainer, module, record)

    def _profiled(self, trainer: Trainer | None, action: str) -> AbstractContextManager[Any]:
        if trainer is None:
            return nullcontext()
        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        return profiler.profile(f"[BasinMonitor]{escaped(self.prefix)}.{action}")

    def _verified(self, trainer: Trainer | None, module: nn.Module, record: BasinRecord) -> BasinRecord:
        """The record, with what survives of steps along null directions where that was asked for."""
        every_n = self.verify_null_space
        is_due = (
            self._reaches_zero_loss(record) if every_n == "zero_loss" else every_n and not len(self.records) % every_n
        )
        if not is_due:
            return record
        started = time.perf_counter()
        behavior = quiet_behavior(self._behavior, trainer)
        if isinstance(behavior, Probabilities):
            behavior = partial(_probabilities, behavior.outputs)
        assert not isinstance(behavior, str)
        try:
            with self._profiled(trainer, "verify_null_space"):
                found = verified_null_space(module, self._probe, behavior=behavior, rtol=self.rtol, seed=self.seed)
        except Exception as error:  # The rest of the record is as it would be without.
            self._say(f"The null space could not be verified. {type(error).__name__}: {error}", warn=True)
            return record
        if not found.converged:
            self._say("The null space could not be verified at every step: no way back to the same outputs was found")
            return record
        seconds = record.measure_seconds + time.perf_counter() - started
        return replace(record, surviving_fraction=found.surviving_fraction, measure_seconds=seconds)

    @property
    def _has_given_up(self) -> bool:
        return self.max_failures is not None and self._num_failures >= self.max_failures

    def _count_failure(self, trainer: Trainer | None) -> None:
        self._num_failures += 1
        if self._has_given_up:
            _warn(
                f"BasinMonitor stops measuring after {self._num_failures} failures in a row{_goes_on(trainer)}. "
                f"HINT: BasinMonitor(max_failures=None) keeps trying"
            )

    def _keep(self, record: BasinRecord) -> None:
        self._num_failures = 0
        if self._reaches_zero_loss(record):
            self._own.zero_loss_step = record.step
        self._num_zero_losses = self._num_zero_losses_with(record)
        records = self._own.records
        if records:  # Names of the inputs of a whole training set are kept of the newest record only.
            records[-1] = replace(records[-1], train_merged_inputs=())
        records.append(record)
        self._own.probe = self._probe

    def _reaches_zero_loss(self, record: BasinRecord) -> bool:
        return self._own.zero_loss_step is None and self._num_zero_losses_with(record) >= self.zero_loss_patience

    def _num_zero_losses_with(self, record: BasinRecord) -> int:
        """Measurements in a row without a loss, this one included."""
        # A loss that goes below zero has no minimum there: its sign is no sign of a perfect fit.
        is_zero = record.loss is not None and abs(record.loss) <= self.zero_loss_threshold
        return self._num_zero_losses + 1 if is_zero else 0

    def _zero_loss_scalar(self) -> dict[str, float]:
        return (
            {}
            if self.zero_loss_step is None
            else {f"{escaped(self.prefix)}/zero_loss_step": float(self.zero_loss_step)}
        )

    def _newest_values(self, trainer: Trainer) -> dict[str, float]:
        """What callbacks find after the newest measurement: what is monitored stays from earlier ones."""
        values = self.monitored(self.records[-1]) if self.records else {}
        missing = {watcher.key for watcher in watchers(trainer) if self.logs(watcher.key)} - values.keys()
        for record in self.records if missing else ():
            values |= {key: value for key, value in self.logged(record).items() if key in missing}
        return values

    def _look_at_watchers(self, trainer: Trainer, pl_module: nn.Module, values: Mapping[str, float]) -> None:
        """Refuse or warn of what cannot work, and let nobody end the run for a value that there is not yet."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        prefixes = [callback.prefix for callback in callbacks if isinstance(callback, BasinMonitor)]
        problems = [
            *misunderstandings(trainer, self.logs, self),
            *check_watchers(trainer, vars(self), pl_module, prefixes),
        ]
        for problem in problems:
            self._say(problem, warn=True)
        self._lenience = Lenience(trainer, vars(self), values)

    def _start_history(self, trainer: Trainer) -> None:
        """Begin the file with the records of the run that is resumed."""
        self._history_file = None
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        if self.history is None or fast_dev_run:
            return
        folder = trainer.log_dir or trainer.default_root_dir  # Asked for on all processes: it is a broadcast.
        if "://" in folder:
            self._say(
                f"`BasinMonitor(history={self.history!r})` writes to a local disk, and is left out in {folder}. HINT: "
                f"pass a local default_root_dir, or a logger",
                warn=True,
            )
        elif trainer.is_global_zero:
            path = Path(folder) / f"{tag(self.prefix)}.{self.history}"
            self._history_file = HistoryFile(path)
            self._write_history(self._begin_history)

    def _begin_history(self, file: HistoryFile) -> None:
        own = None if self._history_path is None else Path(self._history_path)
        # One that an earlier run has left is not written over.
        is_own = own is not None and own.parent == file.path.parent and own.suffix == file.path.suffix
        file.path = own if own is not None and is_own else unused(file.path)
        self._history_path = str(file.path)
        file.write(map(self.row, self.records))

    def _write_history(self, write: Callable[[HistoryFile], None]) -> None:
        if self._history_file is not None:
            try:
                write(self._history_file)
            except OSError as error:  # A full disk, say.
                self._say(f"{self._history_file.path} could not be written. {type(error).__name__}: {error}", warn=True)

    def _say(self, message: str, *, warn: bool = False) -> None:
        if message not in self._said:
            self._said.add(message)
            (_warn if warn else inform)(message)

    @override
    def state_dict(self) -> dict[str, Any]:
        probe = None if self._probe is None else probe_state(self._probe)
        if self._probe is not None and probe is None:
            self._say(
                "The probe holds objects that a checkpoint cannot hold: a resumed run must be able to take it again. "
                "HINT: pass BasinMonitor(batch_fn=...) that returns tensors, or tuples and dicts of tensors",
                warn=True,
            )
        return {
            "probe": probe,
            "probe_size": self._probe_size,
            "probe_fingerprint": self._expected_probe or (self._probe and self._fingerprint(self._probe)),
            "settings": {name: getattr(self, name) for name in _COMPARED_ON_RESUME},
            "records": [record.to_dict() for record in self._own.records],
            "measured_step": self._schedule.measured_step,
            "zero_loss_step": self._own.zero_loss_step,
            "num_zero_losses": self._num_zero_losses,
            "skipped_steps": list(self._own.skipped_steps),
            "leave_out_loss": self._leave_out_loss,
            "history_path": self._history_path,
            "step_calls": None if self._step_calls is None else list(self._step_calls),
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `trainer.test(ckpt_path="best")` loads callbacks too, and would take the history back to the best epoch.
        self._loads_state = trainer.state.fn == "fit"
        states = checkpoint.get("callbacks") or {}
        if (
            self._loads_state and self.state_key in states and not states[self.state_key]
        ):  # Not loaded by lightning 2.6.
            self.load_state_dict(states[self.state_key])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._loads_state:
            return
        own = fingerprint(self._probe) if self._explicit_probe and self._probe is not None else None
        state, problems = read_state(state_dict, _COMPARED_ON_RESUME, own)
        self._reset()
        if problems:
            same = ", on the same probe" if state is not None and state["probe"] is not None else ""
            done = "goes on with the rest" if state is not None and "records" in state else f"measures anew{same}"
            self._say(
                f"BasinMonitor {done}: its state in the checkpoint is damaged, or of another version, with "
                f"{'; '.join(problems)}",
                warn=True,
            )
        if state is None:
            return
        self._step_calls = None if state["step_calls"] is None else tuple(state["step_calls"])
        self._load_probe(state)
        self._is_loaded = True
        for name, before in state.get("settings", {}).items():
            if before != getattr(self, name):
                self._say(
                    f"The run so far was measured with {name}={before!r}, it goes on with {getattr(self, name)!r}: its "
                    f"curves may jump here",
                    warn=True,
                )
        self._load_history(state)

    def _load_history(self, state: Mapping[str, Any]) -> None:
        """Go on with the records; what is missing beside them follows from them."""
        records: list[BasinRecord] = state.get("records", [])
        for record in records:
            self._keep(record)
        self._schedule.measured_step = state.get("measured_step", records[-1].step if records else None)
        self._own.zero_loss_step = state.get("zero_loss_step", self._own.zero_loss_step)
        self._num_zero_losses = state.get("num_zero_losses", self._num_zero_losses)
        self._own.skipped_steps[:] = state.get("skipped_steps", ())
        without_loss = bool(records) and all(record.loss is None for record in records)
        self._leave_out_loss = state.get("leave_out_loss", without_loss)
        self._history_path = state.get("history_path")

    def _load_probe(self, state: Mapping[str, Any]) -> None:
        """Go on with the probe of the run so far, or refuse another one."""
        before, size = state["probe_fingerprint"], state.get("probe_size", self._probe_size)
        self._expected_probe, self._is_probe_refused = None, False
        if before is None:  # No probe was full yet.
            return
        is_other = (
            fingerprint(self._probe) != before
            if self._explicit_probe and self._probe is not None
            else self._probe_size != size
        )
        if is_other and self.on_other_probe == "raise":
            raise MisconfigurationException(
                f"`BasinMonitor(probe=...)` is not the one of the run so far: that was "
                f"{_described(size)}, this is {_described(self._probe_size)}. HINT: pass the same, "
                f"or BasinMonitor(on_other_probe='replace')"
            )
        if self._explicit_probe:
            return
        self._collector, self._probe = self._new_collector(), None
        if state["probe"] is not None and not is_other:
            self._probe = state["probe"]
        elif self.on_other_probe == "raise":
            self._expected_probe = before

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs `log` and `log_dict` of the module onto every callback.
        dropped = ("log", "log_dict", "_initial", "_gathered", "_broadcast", "_lenience")
        kept = {name: value for name, value in vars(self).items() if name not in dropped}
        nothing = dict.fromkeys(("_initial", "_gathered", "_broadcast", "_lenience"))
        # A weak reference has no state. Two copies never fill one list.
        own = {"_own": copy.copy(self._own), "_schedule": copy.copy(self._schedule)}
        return kept | nothing | own | {"_fitted": _nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._schedule.arguments = self  # A shallow copy has made it for the original.


def _described(probe_size: int) -> str:
    return f"probe={probe_size}" if probe_size else "a given batch"


def _nothing() -> None:
    """A reference to no module."""


def _memory_hint(error: Exception) -> str:
    return ". HINT: pass a smaller BasinMonitor(probe=...)" if is_out_of_memory(error) else ""


def _goes_on(trainer: Trainer | None) -> str:
    return "" if trainer is None else ", training goes on"


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


def _with_gradients(module: nn.Module, trainer: Trainer | None) -> set[str]:
    """Names of the parameters that an optimizer of the run trains, and to which the last step gave a gradient."""
    optimizers = [] if trainer is None else trainer.optimizers
    trained = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    return {
        name for name, parameter in module.named_parameters() if parameter.grad is not None and id(parameter) in trained
    }


def _whole_batch(batch: Any) -> tuple[Any, None]:
    return batch, None


def _probabilities(outputs: Callable[[nn.Module, Any], Tensor], module: nn.Module, inputs: Any) -> Tensor:
    return outputs(module, inputs).softmax(1)
