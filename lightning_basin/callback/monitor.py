"""The callback: its arguments, what it shows, and its hooks."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from typing_extensions import override

from lightning_basin.callback.arguments import Arguments, as_builtin, check_arguments, probe_or_size
from lightning_basin.callback.fit import Fit, Listener
from lightning_basin.callback.lightnings import BaseCallback, LightningModule, Trainer, plain_state
from lightning_basin.callback.progress import Progress
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.settings import DType, HessianMode


class BasinMonitor(Arguments, BaseCallback):
    """Measure rank, null space and duplicated activations while a module trains, also after its loss reached zero.

    Results go to every logger of the trainer, to ``trainer.callback_metrics`` and to ``records``. Training is not
    changed: a copy of the module is measured, and every random state is put back. A failure costs one warning.

    A baseline is measured at the first training step. With a probe of more than one batch, the initial weights are kept
    until it is full, and whatever monitors a key passes over its checks until there is a value. A key that no
    measurement can have is refused before the first step.

    Logged keys: those of `BasinRecord.scalars`, and once ``basin/zero_loss_step``. `BasinRecord.quantities` names the
    quantities; `measure_basin` says more of the arguments that it takes too.

    Args:
        probe: The number of inputs to take from the first training batches; or a `Probe`, or inputs and targets.
            ``"auto"`` takes 128; where each has 6 to 64 outputs, as many as have 640 together, 32 at least.
        loss_fn: The loss, from outputs and targets to a scalar, or ``"behavioral"``. ``None`` takes the module's own;
            without any, loss and Hessian are left out.
        behavior: The outputs whose gradients count, as a function of module and inputs, or ``"probabilities"``.
            ``None`` or ``"outputs"`` calls the module.
        batch_fn: A function from a training batch to a pair of inputs and targets (``None`` for no targets). ``None``
            takes a pair as it is, and a tensor, or with a function as ``behavior`` any batch, as inputs alone.
        every_n_epochs: The number of epochs from one measurement to the next, each at the end of an epoch. ``None`` is
            each epoch where that takes five seconds in all, else as many as take a tenth of the wall time, or three.
        every_n_train_steps: The number of optimizer steps from one measurement to the next, instead of epochs.
        every_n_epochs_after_zero_loss: The number of epochs after the loss has reached zero; ``None`` changes nothing.
        every_n_spectra: The number of measurements from one with singular values to the next; others are faster.
        layers: The layers to report: ``"auto"`` (blocks above 32 layers), ``"all"``, or names of layers or blocks.
        hessian: The way to the Hessian: ``"auto"`` brackets its nullity, and up to 500 parameters forms it; ``"dense"``
            always, ``"bracket"`` never; ``"gauss-newton"`` measures its Gauss-Newton part only, ``False`` nothing.
        zero_loss_threshold: The largest magnitude of the loss on the probe that counts as zero.
        zero_loss_patience: The number of measurements in a row of which the loss must be zero.
        rtol: The relative tolerance of ranks; ``None`` means ``max(shape) * eps`` of the matrix that is decomposed.
        duplicate_rtol: The relative tolerance within which two activations are the same.
        duplicates_over: The training set over which duplicated activations are counted too, in two passes or more:
            ``"train"`` reads the data set of the run's loader anew, or a map-style data set or batches.
        max_outputs: The number of random combinations of outputs that are measured where a module has more outputs per
            input; ranks are then lower bounds. ``"auto"`` combines only too many outputs, ``None`` refuses them.
        memory_budget: The bytes that a measurement may use; ``None`` means half of what is free at its beginning.
        dtype: The type in which the copy is run, as in `measure_basin`; ``"float32"`` leaves the Hessian out.
        verify_null_space: When to log ``surviving_fraction`` too, which is 1 where random null directions are really
            free: ``"zero_loss"`` once, where the loss reaches zero; a number n at every n-th measurement.
        seed: The seed of all random vectors, the same at every measurement.
        max_overhead: The share of the wall time of the fit that measuring may take; what would exceed it is skipped.
            ``"auto"`` measures ever more rarely instead, densely again around zero loss, at steps that no clock sets.
        max_failures: The number of failures in a row after which measuring stops; ``None`` tries again every time.
        history: The format, ``"csv"`` or ``"jsonl"``, of a table of all measurements in the log directory.
        report: Whether a page with figures, ``report.html``, is written into the logger's directory, and handed to it.
        figures: Whether loggers get figures, and TensorBoard a layout, a summary and dots at zero loss.
        on_other_probe: What to do on resuming with another ``probe`` than before: ``"raise"`` or ``"replace"`` it.
        prefix: The first characters of every key, in which markup is percent-encoded; two monitors need two.

    Raises:
        MisconfigurationException: For values out of range, what cannot be measured, and another probe on resuming.

    Example:
        >>> BasinMonitor(probe=64, every_n_epochs=5).records
        []
    """

    def __init__(
        self,
        probe: int | Literal["auto"] | Probe | tuple[Any, Any] = "auto",
        *,
        loss_fn: Callable[..., Any] | Literal["behavioral"] | None = None,
        behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None = None,
        batch_fn: Callable[..., Any] | None = None,
        every_n_epochs: int | None = None,
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
        dtype: DType = "auto",
        verify_null_space: int | Literal["zero_loss"] | None = None,
        seed: int = 0,
        max_overhead: float | Literal["auto"] | None = None,
        max_failures: int | None = 3,
        history: Literal["csv", "jsonl"] | None = None,
        report: bool = True,
        figures: bool = True,
        on_other_probe: Literal["raise", "replace"] = "raise",
        prefix: str = "basin",
    ) -> None:
        arguments = {name: as_builtin(value) for name, value in locals().items() if name in Arguments.__annotations__}
        super().__init__()
        check_arguments(arguments)
        vars(self).update(arguments)
        self.progress = Progress(self, *probe_or_size(as_builtin(probe)))
        self._fit: Fit | None = None
        self._listeners: list[Listener] = []
        self._is_set_up = False

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
    def records(self) -> list[BasinRecord]:
        """Every record of the run, oldest first."""
        return self.progress.shown.records

    @property
    def zero_loss_step(self) -> int | None:
        """Optimizer steps taken when the loss had been zero for ``zero_loss_patience`` measurements."""
        return self.progress.shown.zero_loss_step

    @property
    def skipped_steps(self) -> list[int]:
        """Steps at which a measurement was due that ``max_overhead`` did not allow."""
        return self.progress.shown.skipped_steps

    @property
    def probe(self) -> Probe | None:
        """The inputs that are measured; ``None`` until enough training batches have come by."""
        return self.progress.probing.probe or self.progress.shown.probe

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener(trainer, record)`` after every measurement, on every process."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_set_up = True
        if stage == "fit":
            self._fit = Fit(trainer, pl_module, self.progress, self._listeners)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._fit is not None and stage == "fit":
            self._fit.close()
            self._fit = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._listeners.clear()  # There is no teardown.
        if self._fit is not None:
            self._fit.publisher.end()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _running(self._fit).begin()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _running(self._fit).before_batch(batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _running(self._fit).after_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _running(self._fit).after_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _running(self._fit).end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.progress.state_dict()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fit is not None:
            self._fit.publisher.watch_saving()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # `trainer.test(ckpt_path="best")` loads callbacks too, and would take the history back to the best epoch.
        self.progress.is_loadable = trainer.state.fn == "fit"

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.progress.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return plain_state(self) | {"_fit": None, "progress": copy.copy(self.progress)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.progress.belong_to(self)


def _running(fit: Fit | None) -> Fit:
    assert fit is not None, "set up before it trains"
    return fit
