"""What Lightning's own callbacks make of a value that is not measured at each of their checks."""

from collections.abc import Callable, Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def misunderstandings(
    trainer: Trainer, logs: Callable[[str], bool], *, epochs_between: int, at_epoch_end: bool, rare: tuple[str, ...]
) -> Iterator[str]:
    """Say where a callback that monitors a measured value cannot do what is meant.

    Args:
        trainer: At the start of training, when every callback is set up.
        logs: Whether a key is one of the measured values.
        epochs_between: Largest number of epochs from one measurement to the next.
        at_epoch_end: Whether measurements are taken at the end of an epoch, which is after its validation.
        rare: Keys that are not there from the first measurement on.

    Returns:
        One sentence for each, with what to change.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and logs(callback.monitor):
            yield from _of_checkpoint(trainer, callback, epochs_between, at_epoch_end=at_epoch_end)
        # One that has a way of its own to look at values is left alone.
        is_plain = getattr(type(callback), "on_train_epoch_end", None) is EarlyStopping.on_train_epoch_end
        if isinstance(callback, EarlyStopping) and is_plain and logs(callback.monitor):
            yield from _of_early_stopping(trainer, callback, epochs_between, at_epoch_end=at_epoch_end, rare=rare)


def _of_early_stopping(
    trainer: Trainer, stopping: EarlyStopping, epochs_between: int, *, at_epoch_end: bool, rare: tuple[str, ...]
) -> Iterator[str]:
    name = f"EarlyStopping(monitor={stopping.monitor!r})"
    if not stopping._check_on_train_epoch_end and not trainer.enable_validation:
        yield (
            f"{name} checks after validation, of which there is none. HINT: pass check_on_train_epoch_end=True, or use "
            f"RankEarlyStopping"
        )
    elif not stopping._check_on_train_epoch_end and at_epoch_end:
        yield (
            f"{name} checks after validation, before the measurement of the epoch, and sees the one before. HINT: pass "
            f"check_on_train_epoch_end=True, or use RankEarlyStopping"
        )
    if stopping.patience < epochs_between:
        yield (
            f"{name} counts its checks, and finds each value up to {epochs_between} times: "
            f"patience={stopping.patience} is over before the next measurement. HINT: pass "
            f"patience={epochs_between * stopping.patience}, or RankEarlyStopping, whose patience counts measurements"
        )
    if stopping.strict and stopping.monitor in rare:
        yield f"{name} looks for a value that is not there from the start, and would raise. HINT: pass strict=False"


def _of_checkpoint(
    trainer: Trainer, checkpoint: ModelCheckpoint, epochs_between: int, *, at_epoch_end: bool
) -> Iterator[str]:
    name = f"ModelCheckpoint(monitor={checkpoint.monitor!r})"
    if not at_epoch_end or checkpoint._every_n_epochs < 1:
        return
    if trainer.enable_validation and not checkpoint._should_save_on_train_epoch_end(trainer):
        yield (
            f"{name} saves after validation, before the measurement of the epoch, under the value of the one before. "
            f"HINT: pass save_on_train_epoch_end=True"
        )
    if checkpoint._every_n_epochs % epochs_between:
        yield (
            f"{name} also saves weights that were not measured, under the value of others. HINT: pass "
            f"every_n_epochs={epochs_between}"
        )
