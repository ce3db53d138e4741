"""The callback: its arguments, what it shows, and its hooks."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from lightning_basin.callback.arguments import Arguments, as_builtin, check_arguments, probe_or_size
from lightning_basin.callback.fit import Fit, Listener, check_trainer, present_listeners
from lightning_basin.callback.lightnings import BaseCallback, LightningModule, Trainer
from lightning_basin.callback.progress import Progress
from lightning_basin.callback.publish import callback_values, log_values, owns_key, table_row
from lightning_basin.callback.results import Latest, Results
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.settings import HessianMode, Precision


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
        passed, size = probe_or_size(as_builtin(probe))
        check_arguments(given)
        vars(self).update(given)
        self._progress = Progress(self, passed, size)
        self._latest = Latest()  # The same for all copies.
        self._fit: Fit | None = None
        self._listeners: list[Listener] = []
        self._is_set_up, self._has_begun, self._loads_state = False, False, True

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
        latest = self._latest.results
        return self._progress.session.results if self._has_begun or latest is None else latest

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
        return self._progress.probing.probe or self._results.probe

    def start(self, module: nn.Module, probe: Probe | None = None, step_calls: Sequence[int] | None = None) -> None:
        """Begin to measure outside of a fit: forget what was measured, and see whether a module can be.

        Args:
            module: A module like those that will be measured.
            probe: The probe to take where none was passed to the monitor.
            step_calls: The calls in ``training_step`` whose outputs were measured with this probe.

        Raises:
            MisconfigurationException: If there is no probe, or the module cannot be measured on it.
        """
        self._has_begun = True
        self._progress.start(module, probe, step_calls)

    def observe(self, module: nn.Module, step: int) -> BasinRecord | None:
        """Measure outside of a fit, as at a step of one, and add the record to the others.

        Args:
            module: The module to measure, which stays as it is.
            step: The number of optimizer steps for which it was trained.

        Returns:
            The record; ``None``, after a warning, where measuring failed.
        """
        return self._progress.observe(module, step)

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener(trainer, record)`` after every measurement, on every process."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def logged(self, record: BasinRecord) -> dict[str, float]:
        """The values of a record of this monitor by key; ``zero_loss_step`` is in one record only."""
        return log_values(record, self.prefix, self.zero_loss_step)

    def monitored(self, record: BasinRecord) -> dict[str, float]:
        """What callbacks find: the step of zero loss stays, so that a strict EarlyStopping does not miss it."""
        return callback_values(record, self.prefix, self.zero_loss_step)

    def row(self, record: BasinRecord) -> dict[str, float]:
        """The same as a row of a table, which begins with the step."""
        return table_row(record, self.prefix, self.zero_loss_step)

    def logs(self, key: str) -> bool:
        """Whether a metric's key is one of this monitor's."""
        return owns_key(key, self.prefix)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True
        if stage == "fit":
            check_trainer(trainer, self.prefix)
            self._listeners = present_listeners(self._listeners, trainer)
            self._fit = Fit(trainer, pl_module, self, self._progress, self._listeners)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fit is not None:
            self._fit.publisher.end()
        if self._fit is not None and stage == "fit":
            self._fit.close()
            self._fit = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._fit is not None:  # There is no teardown.
            self._fit.publisher.end()

    @property
    def _running_fit(self) -> Fit:
        assert self._fit is not None, "set up before it trains"
        return self._fit

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun, self._latest.results = True, self._progress.session.results
        self._running_fit.begin()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._running_fit.before_batch(batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running_fit.after_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running_fit.after_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running_fit.end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._progress.state_dict()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `trainer.test(ckpt_path="best")` loads callbacks too, and would take the history back to the best epoch.
        self._loads_state = trainer.state.fn == "fit"
        states = checkpoint.get("callbacks") or {}
        if not states.get(self.state_key, True):  # An empty state, which lightning 2.6 does not load.
            self.load_state_dict(states[self.state_key])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._loads_state:
            self._progress.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs `log` and `log_dict` of the module onto every callback.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return kept | {"_fit": None, "_progress": copy.copy(self._progress)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._progress.belong_to(self)
