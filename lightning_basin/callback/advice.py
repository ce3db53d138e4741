"""What Lightning's own callbacks make of a value that is not measured at each of their checks."""

import math
from collections.abc import Callable, Iterator

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.lightnings import (
    EARLY_STOPPINGS,
    Callback,
    EarlyStopping,
    LRSchedulerConfig,
    ModelCheckpoint,
    Trainer,
)


def misunderstandings(trainer: Trainer, logs: Callable[[str], bool], arguments: Arguments) -> Iterator[str]:
    """Say where a callback that monitors a measured value cannot do what is meant.

    Args:
        trainer: The trainer at the start of training, when every callback is set up.
        logs: A function that says whether a key is one of the measured values.
        arguments: The monitor's arguments, of which the cadence is read.

    Returns:
        One sentence for each callback or scheduler, with what to change.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and logs(callback.monitor):
            yield from _of_checkpoint(trainer, callback, arguments)
        # One that has a way of its own to look at values is left alone.
        check = getattr(type(callback), "on_train_epoch_end", None)
        is_plain = any(check is plain.on_train_epoch_end for plain in EARLY_STOPPINGS)
        if isinstance(callback, EarlyStopping) and is_plain and logs(callback.monitor):
            yield from _of_early_stopping(trainer, callback, arguments)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor is not None and logs(config.monitor):
            yield from _of_scheduler(trainer, config, config.scheduler.patience, arguments)


def _of_early_stopping(trainer: Trainer, stopping: EarlyStopping, arguments: Arguments) -> Iterator[str]:
    name = f"EarlyStopping(monitor={stopping.monitor!r})"
    if not stopping._check_on_train_epoch_end and not trainer.enable_validation:
        yield (
            f"{name} checks after validation, of which there is none. HINT: pass check_on_train_epoch_end=True, or use "
            f"RankEarlyStopping"
        )
    elif not stopping._check_on_train_epoch_end and arguments.every_n_train_steps is None:
        yield (
            f"{name} checks after validation, before the measurement of the epoch, and sees the one before. HINT: pass "
            f"check_on_train_epoch_end=True, or use RankEarlyStopping"
        )
    epochs = _epochs_between(trainer, arguments)
    if stopping.patience < epochs:
        yield (
            f"{name} counts its checks, and finds each value up to {epochs} times: patience={stopping.patience} is "
            f"over before the next measurement. HINT: pass patience={epochs * stopping.patience}, or use "
            f"RankEarlyStopping, whose patience counts measurements"
        )


def _of_scheduler(trainer: Trainer, config: LRSchedulerConfig, patience: int, arguments: Arguments) -> Iterator[str]:
    between: float = _epochs_between(trainer, arguments)
    if config.interval == "step":
        between = arguments.every_n_train_steps or between * _steps_in_epoch(trainer)
    if between == math.inf:
        return
    steps = math.ceil(between / config.frequency)
    if patience < steps - 1:  # The first of them may find a better value, and the others do not.
        yield (
            f"{type(config.scheduler).__name__}(monitor={config.monitor!r}) counts its steps, and finds each value up "
            f"to {steps} times: patience={patience} is over before the next measurement. HINT: pass "
            f"patience={steps * (patience + 1) - 1}"
        )


def _of_checkpoint(trainer: Trainer, checkpoint: ModelCheckpoint, arguments: Arguments) -> Iterator[str]:
    if not (checkpoint._every_n_epochs or checkpoint._every_n_train_steps or checkpoint._train_time_interval):
        return
    name = f"ModelCheckpoint(monitor={checkpoint.monitor!r})"
    at_epoch_end = arguments.every_n_train_steps is None
    is_early = trainer.enable_validation and not checkpoint._should_save_on_train_epoch_end(trainer)
    if at_epoch_end and checkpoint._every_n_epochs >= 1 and is_early:
        yield (
            f"{name} saves after validation, before the measurement of the epoch, under the value of the one before. "
            f"HINT: pass save_on_train_epoch_end=True"
        )
    if not _measures_saved(trainer, checkpoint, arguments):
        wanted = (
            f"every_n_epochs={_epochs_between(trainer, arguments)}"
            if at_epoch_end
            else f"every_n_train_steps={arguments.every_n_train_steps}"
        )
        yield f"{name} also saves weights that were not measured, under the value of others. HINT: pass {wanted}"


def _epochs_between(trainer: Trainer, arguments: Arguments) -> int:
    """Return the largest number of epochs from one measurement to the next."""
    if arguments.every_n_train_steps is None:
        between = arguments.every_n_epochs
    else:
        between = math.ceil(arguments.every_n_train_steps / max(1.0, _steps_in_epoch(trainer)))
    return max(1, between, arguments.every_n_epochs_after_zero_loss or 1)


def _steps_in_epoch(trainer: Trainer) -> float:
    """Return the optimizer steps of an epoch; infinity where nobody knows: iterable data set, manual optimization."""
    if not trainer.lightning_module.automatic_optimization:
        return math.inf
    return trainer.num_training_batches / trainer.accumulate_grad_batches


def _measures_saved(trainer: Trainer, checkpoint: ModelCheckpoint, arguments: Arguments) -> bool:
    """Whether all weights are measured that a callback saves."""
    steps_between = arguments.every_n_train_steps
    if steps_between is None:
        epochs = _epochs_between(trainer, arguments)
        return checkpoint._every_n_epochs >= 1 and checkpoint._every_n_epochs % epochs == 0
    if checkpoint._every_n_epochs >= 1:
        steps = checkpoint._every_n_epochs * _steps_in_epoch(trainer)
        return not steps < math.inf or steps % steps_between == 0
    return checkpoint._every_n_train_steps >= 1 and checkpoint._every_n_train_steps % steps_between == 0
