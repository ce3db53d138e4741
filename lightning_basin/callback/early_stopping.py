"""Stop training on a measured rank."""

from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_basin.callback.arguments import as_builtin
from lightning_basin.callback.keys import Key, did_you_mean
from lightning_basin.callback.lightnings import (
    BaseEarlyStopping,
    Callback,
    EarlyStoppingReason,
    LightningModule,
    MisconfigurationException,
    Trainer,
    early_stopping_reasons,
)
from lightning_basin.callback.monitor import BasinMonitor
from lightning_basin.callback.notices import warn
from lightning_basin.callback.reliability import rank_in_doubt
from lightning_basin.callback.watching import keys_of
from lightning_basin.naming import printable
from lightning_basin.record import BasinRecord


class RankEarlyStopping(BaseEarlyStopping):
    """Stop when a quantity of `BasinMonitor` has settled, fallen or risen; patience counts measurements.

    Lightning's ``EarlyStopping`` counts its own checks, and counts a value that is measured every fifth epoch five
    times. This one looks at each measurement once, at the moment it is taken, wherever the two callbacks stand in
    the list.

    It waits for zero loss: before, a rank that stays as it is says nothing of where training will end. A rank that
    is not the network's own never stops a run, as it may stand still where the network's moves: one that is
    *saturated* (that of the probe), *ill-defined* (that of the tolerance) or a *lower bound* (``max_outputs``).
    Such measurements are passed over, also where the quantity is only computed from such a rank.

    Args:
        monitor: Key of the quantity.
        mode: ``"plateau"`` stops when the value has not moved by more than ``min_delta`` either way, ``"min"`` when it
            has not fallen by more than that, ``"max"`` when it has not risen.
        patience: For so many measurements in a row.
        min_delta: See ``mode``.
        stopping_threshold: Stop at once when the value is beyond this; with ``"min"`` and ``"max"`` only.
        after_zero_loss: Look only at measurements from the one on at which the loss on the probe has reached zero, see
            ``zero_loss_threshold`` of `BasinMonitor`. ``False`` looks at all, and is for runs without such a moment.
        strict: Refuse, at the start of the fit, a quantity that the monitor is set not to measure; ``False`` warns.
        check_finite: Stop when the value is not finite.
        verbose: Log improvements too; why training stopped is always logged.

    Raises:
        MisconfigurationException: If ``mode``, ``patience``, ``min_delta`` or ``stopping_threshold`` are out of range;
            at the start of the fit if no `BasinMonitor` of the trainer logs ``monitor``.

    Example:
        >>> RankEarlyStopping(patience=5).monitor
        'basin/gradient_rank'
    """

    # Never called for a plateau: the base class looks up an operator by mode to initialise itself.
    mode_dict: dict[str, Any] = {**BaseEarlyStopping.mode_dict, "plateau": torch.ne}  # noqa: RUF012 - as its base does
    order_dict: dict[str, str] = {**BaseEarlyStopping.order_dict, "plateau": "!="}  # noqa: RUF012 - as its base does

    def __init__(
        self,
        monitor: str = "basin/gradient_rank",
        *,
        mode: Literal["plateau", "min", "max"] = "plateau",
        patience: int = 3,
        min_delta: float = 0.0,
        stopping_threshold: float | None = None,
        after_zero_loss: bool = True,
        strict: bool = True,
        check_finite: bool = True,
        verbose: bool = False,
    ) -> None:
        if mode not in self.mode_dict:
            raise MisconfigurationException(f"`RankEarlyStopping(mode={mode!r})` must be in {tuple(self.mode_dict)}")
        if patience < 1:
            raise MisconfigurationException(f"`RankEarlyStopping(patience={patience})` must be at least 1")
        if min_delta < 0:
            raise MisconfigurationException(f"`RankEarlyStopping(min_delta={min_delta})` must not be negative")
        if mode == "plateau" and stopping_threshold is not None:
            raise MisconfigurationException(
                f"`RankEarlyStopping(stopping_threshold={stopping_threshold})` needs a direction. HINT: pass "
                f"mode='min' to stop below it, mode='max' to stop above it"
            )
        self._reasons = early_stopping_reasons()
        super().__init__(
            monitor=monitor,
            min_delta=min_delta,
            patience=as_builtin(patience),
            verbose=verbose,
            mode=mode,
            strict=strict,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
        )
        self.after_zero_loss = after_zero_loss
        self._basin_monitor: BasinMonitor | None = None
        self._said: set[str] = set()

    @property
    def stopping_reason(self) -> EarlyStoppingReason:
        """Why training stopped: a member of the ``EarlyStoppingReason`` of the package whose trainer it was."""
        return self._reasons(self._stopping_reason)

    @stopping_reason.setter
    def stopping_reason(self, reason: EarlyStoppingReason) -> None:
        self._stopping_reason = reason.value

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, after_zero_loss=self.after_zero_loss)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reasons = early_stopping_reasons(trainer)
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        monitors = [callback for callback in callbacks if isinstance(callback, BasinMonitor)]
        self._basin_monitor = next((monitor for monitor in monitors if monitor.logs(self.monitor)), None)
        if self._basin_monitor is None:
            prefixes = [monitor.prefix for monitor in monitors]
            keys = [key for monitor in monitors for key in keys_of(vars(monitor), pl_module)]
            hint = ". HINT: `Trainer(callbacks=[BasinMonitor(), RankEarlyStopping()])`"
            raise MisconfigurationException(
                f"`RankEarlyStopping(monitor={self.monitor!r})` needs a BasinMonitor that logs this key, "
                f"got {f'those with prefixes {prefixes}' if prefixes else 'none'}"
                f"{did_you_mean(self.monitor, keys) or hint}"
            )
        self._said.clear()
        self._basin_monitor.subscribe(self.on_measurement)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unread = self.state_dict()
        try:
            super().load_state_dict(state_dict)
            counts = (self.wait_count, self.stopped_epoch, self.patience)
            if not isinstance(self.best_score, Tensor) or not all(isinstance(count, int) for count in counts):
                raise TypeError("it holds other things than numbers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # Damaged, or of another version.
            super().load_state_dict(unread)
            warn(
                f"{self._name} counts anew: its state in the checkpoint cannot be read. {type(error).__name__}: {error}"
            )

    def on_measurement(self, trainer: Trainer, record: BasinRecord) -> None:
        """Take the newest measurement into account, and stop training if it is the last straw."""
        basin_monitor = self._basin_monitor
        assert basin_monitor is not None, "set up before it listens"
        if self.after_zero_loss and basin_monitor.zero_loss_step is None:
            if record.loss is None:
                self._say(
                    f"{self._name} waits for zero loss, and none is measured: it will not stop this run. HINT: pass "
                    f"RankEarlyStopping(after_zero_loss=False), or BasinMonitor(loss_fn=...)"
                )
            return
        if self._is_in_doubt(record, basin_monitor.prefix):
            return
        values = basin_monitor.monitored(record)
        if self.monitor not in values and any(
            self.monitor in basin_monitor.logged(one) for one in basin_monitor.records
        ):
            return  # Not every measurement has a spectrum, say: this one says nothing of the quantity.
        stopped_before = self.stopping_reason_message
        self._check(trainer, {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()})
        reason = self.stopping_reason_message
        if reason is not None and reason != stopped_before and not self.verbose:
            rank_zero_info(reason)

    def _is_in_doubt(self, record: BasinRecord, prefix: str) -> bool:
        """Whether the value is none of the network itself, but of how it was measured; says so once."""
        key = Key.of(self.monitor, prefix)
        assert key is not None, "one that the monitor logs"
        reason = rank_in_doubt(key.quantity, key.measured(record), projected=record.projected)
        if reason is not None:
            self._say(f"{self._name} passes over ranks that are {reason}")
        return reason is not None

    @property
    def _name(self) -> str:
        return f"RankEarlyStopping(monitor={printable(self.monitor)!r})"

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warn(message)

    def _check(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        """As the base class does it, on values of a record: those of the trainer may be of an earlier one."""
        is_fast: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        if is_fast or not self._validate_condition_metric(values):
            return
        should_stop, reason = self._evaluate_stopping_criteria(values[self.monitor])
        should_stop = trainer.strategy.reduce_boolean_decision(should_stop, all=False)
        trainer.should_stop = trainer.should_stop or should_stop
        if should_stop:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
        if reason and self.verbose:
            self._log_info(trainer, reason, self.log_rank_zero_only)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: measurements are looked at when they are taken."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: measurements are looked at when they are taken."""

    @override
    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        if self.mode != "plateau" or not bool(current.isfinite()):
            return super()._evaluate_stopping_criteria(current)
        moved = not bool(self.best_score.isfinite()) or bool((current - self.best_score).abs() > abs(self.min_delta))
        if moved:
            self.best_score = current
            self.wait_count = 0
            return False, f"{self.monitor} moved to {float(current):g}"
        self.wait_count += 1
        if self.wait_count < self.patience:
            return False, None
        self.stopping_reason = self._reasons.PATIENCE_EXHAUSTED
        return True, (
            f"{self.monitor} has stayed within {abs(self.min_delta):g} of {float(self.best_score):g} for the last "
            f"{self.wait_count} measurements. Signaling Trainer to stop."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
