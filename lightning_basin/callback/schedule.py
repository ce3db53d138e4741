"""When to measure, as plain numbers of steps and epochs say it."""

from lightning_basin.callback.arguments import Arguments


class Schedule:
    """Decides after every batch and epoch whether a measurement is due.

    Args:
        arguments: The monitor's arguments, of which the cadence is read.

    Attributes:
        arguments: The same.
        seen_step: The number of optimizer steps at the last batch that was looked at.
        measured_step: The number of optimizer steps at the last measurement that was due; ``None`` before the baseline.
        resumed_step: The number of optimizer steps at which the run was resumed, until its first batch begins.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.seen_step = 0
        self.measured_step: int | None = None
        self.resumed_step: int | None = None

    def begin(self, step: int, *, is_resumed: bool) -> None:
        """Take note of the step at which training begins.

        Args:
            step: The number of optimizer steps taken.
            is_resumed: Whether a checkpoint was loaded.
        """
        self.seen_step = step
        self.resumed_step = step if is_resumed else None

    def is_due_after_batch(self, step: int, *, at_zero_loss: bool) -> bool:
        """Whether a cadence in steps asks for a measurement after a batch; to be asked after each.

        Steps that cross a multiple of the cadence are counted, not steps that meet one: several batches may share a
        step, and manual optimization may take several steps in a batch.

        Args:
            step: The number of optimizer steps taken.
            at_zero_loss: Whether the loss has reached zero.
        """
        seen, self.seen_step = self.seen_step, step
        interval = self.arguments.every_n_train_steps
        if interval is None or self._epochs_after_zero_loss(at_zero_loss=at_zero_loss) or self.measured_step is None:
            return False
        return step // interval > seen // interval

    def is_due_after_epoch(self, epoch: int, step: int, *, at_zero_loss: bool) -> bool:
        """Whether a cadence in epochs asks for a measurement at the end of an epoch.

        Args:
            epoch: The number of the epoch, which ends; the first is 0.
            step: The number of optimizer steps taken.
            at_zero_loss: Whether the loss has reached zero.
        """
        interval = self._epochs_between(at_zero_loss=at_zero_loss)
        return interval is not None and (epoch + 1) % interval == 0 and step != self.measured_step

    def is_overdue(self, epoch: int, step: int, batch_idx: int, *, at_zero_loss: bool) -> bool:
        """Whether a resumed run begins where a measurement was interrupted or left out; to be asked before each batch.

        Args:
            epoch: The number of the epoch, which goes on; the first is 0.
            step: The number of optimizer steps taken.
            batch_idx: The index of the batch in its epoch.
            at_zero_loss: Whether the loss has reached zero.
        """
        resumed_step, self.resumed_step = self.resumed_step, None
        if self.measured_step is None or resumed_step != step or step == self.measured_step:
            return False
        # lightning 2.6 does not call the end of an epoch again whose last batch was the last thing before saving.
        interval = self._epochs_between(at_zero_loss=at_zero_loss)
        if interval is not None:
            return batch_idx == 0 and epoch % interval == 0
        assert self.arguments.every_n_train_steps is not None
        return step // self.arguments.every_n_train_steps > self.measured_step // self.arguments.every_n_train_steps

    def _epochs_between(self, *, at_zero_loss: bool) -> int | None:
        """Return the cadence in epochs; ``None`` where it is one in steps."""
        after_zero_loss = self._epochs_after_zero_loss(at_zero_loss=at_zero_loss)
        if after_zero_loss is None and self.arguments.every_n_train_steps is None:
            return self.arguments.every_n_epochs
        return after_zero_loss

    def _epochs_after_zero_loss(self, *, at_zero_loss: bool) -> int | None:
        """Return the cadence that holds once the loss has reached zero; ``None`` where there is none, or not yet."""
        return self.arguments.every_n_epochs_after_zero_loss if at_zero_loss else None
