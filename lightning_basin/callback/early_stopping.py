"""Stop training on a measured rank."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_basin.callback.arguments import FLAG, Rule, as_builtin, check_rules, is_count
from lightning_basin.callback.lightnings import (
    BaseEarlyStopping,
    EarlyStoppingReason,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    early_stopping_reasons,
    plain_state,
)
from lightning_basin.callback.monitor import BasinMonitor
from lightning_basin.callback.notices import Notices, warn
from lightning_basin.callback.reliability import passed_over_because
from lightning_basin.callback.session import Session
from lightning_basin.callback.watching import keys_of
from lightning_basin.checks import is_flag, is_number
from lightning_basin.keys import did_you_mean
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
        monitor: The key of the quantity.
        mode: ``"plateau"`` stops when the value has not moved by more than ``min_delta`` either way, ``"min"`` when it
            has not fallen by more than that, ``"max"`` when it has not risen.
        patience: The number of measurements in a row without a move after which training stops.
        min_delta: The largest change of the value that counts as none.
        stopping_threshold: A value beyond which training stops at once; with ``"min"`` and ``"max"`` only.
        after_zero_loss: Look only at measurements from the one on at which the loss on the probe has reached zero, as
            ``BasinMonitor(zero_loss_threshold=...)`` says. ``False`` looks at all, for runs without such a moment.
        strict: Refuse, at the start of the fit, a quantity that the monitor is set not to measure; ``False`` warns.
        check_finite: Stop when the value is not finite.
        verbose: Log improvements too; why training stopped is always logged.

    Raises:
        MisconfigurationException: If an argument is of another type, or out of range; at the start of the fit if no
            `BasinMonitor` of the trainer logs ``monitor``.

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
        arguments = {name: as_builtin(value) for name, value in locals().items()}
        _check_arguments(arguments)
        self._reasons = early_stopping_reasons()
        super().__init__(
            monitor=monitor,
            min_delta=min_delta,
            patience=arguments["patience"],
            verbose=verbose,
            mode=mode,
            strict=strict,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
        )
        self.after_zero_loss = after_zero_loss
        self._session: Session | None = None
        self._notices = Notices()

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
        basin_monitor = _find_monitor(self.monitor, trainer, pl_module)
        self._session, self._notices = basin_monitor.progress.session, Notices()
        basin_monitor.subscribe(self.on_measurement)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unread = self.state_dict()
        try:
            super().load_state_dict(state_dict)
            counts = (self.wait_count, self.stopped_epoch, self.patience)
            if not isinstance(self.best_score, Tensor) or not all(isinstance(count, int) for count in counts):
                raise TypeError("it holds other values than numbers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # Damaged, or of another version.
            super().load_state_dict(unread)
            warn(
                f"{self._name} counts anew: its state in the checkpoint cannot be read. {type(error).__name__}: {error}"
            )

    def on_measurement(self, trainer: Trainer, record: BasinRecord) -> None:
        """Take the newest measurement into account, and stop training if it decides so."""
        session = self._session
        assert session is not None, "set up before it listens"
        reason = passed_over_because(self.monitor, record, session, after_zero_loss=self.after_zero_loss)
        if reason is not None:
            if reason:
                self._notices.warn(f"{self._name} {reason}")
            return
        stopped_before = self.stopping_reason_message
        values = session.callback_values(record)
        self._check(trainer, {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()})
        stopped = self.stopping_reason_message
        if stopped is not None and stopped != stopped_before and not self.verbose:
            rank_zero_info(stopped)

    @property
    def _name(self) -> str:
        return f"RankEarlyStopping(monitor={printable(self.monitor)!r})"

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
        return plain_state(self) | {"_session": None}


_MODES = tuple(RankEarlyStopping.mode_dict)
_RULES: tuple[Rule, ...] = (
    ("monitor", lambda value: isinstance(value, str), "be the key of a logged value"),
    ("mode", lambda value: isinstance(value, str) and value in _MODES, f"be in {_MODES}"),
    ("patience", is_count, "be an integer, at least 1"),
    ("min_delta", lambda value: is_number(value, float) and value >= 0, "be a number, and not be negative"),
    ("stopping_threshold", lambda value: value is None or is_number(value, float), "be a number or None"),
    *((name, is_flag, FLAG) for name in ("after_zero_loss", "strict", "check_finite", "verbose")),
)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    check_rules("RankEarlyStopping", _RULES, arguments)
    threshold = arguments["stopping_threshold"]
    if arguments["mode"] == "plateau" and threshold is not None:
        raise MisconfigurationException(
            f"`RankEarlyStopping(stopping_threshold={threshold})` needs a direction. HINT: pass mode='min' to stop "
            f"below it, mode='max' to stop above it"
        )


def _find_monitor(key: str, trainer: Trainer, module: LightningModule) -> BasinMonitor:
    """Return the monitor of a trainer that logs a key."""
    monitors = [callback for callback in callbacks_of(trainer) if isinstance(callback, BasinMonitor)]
    for monitor in monitors:
        if monitor.progress.session.owns_key(key):
            return monitor
    prefixes = [monitor.prefix for monitor in monitors]
    keys = [possible for monitor in monitors for possible in keys_of(monitor, module)]
    hint = ". HINT: `Trainer(callbacks=[BasinMonitor(), RankEarlyStopping()])`"
    raise MisconfigurationException(
        f"`RankEarlyStopping(monitor={key!r})` needs a BasinMonitor that logs this key, "
        f"got {f'monitors with the prefixes {prefixes}' if prefixes else 'none'}{did_you_mean(key, keys) or hint}"
    )
