"""When to measure, as plain numbers of steps and epochs say it."""

from lightning_basin.callback.arguments import Arguments


class Schedule:
    """Decides after every batch and epoch whether a measurement is due.

    A step is the number of optimizer steps taken, an epoch the number of epochs before it.

    Args:
        arguments: The monitor's arguments, of which the cadence is read.

    Attributes:
        arguments: The monitor's arguments.
        seen_step: The step at the last batch that was looked at.
        measured_step: The step at the last measurement that was due; ``None`` before the baseline.
        resumed_step: The step at which the run was resumed, until its first batch begins.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.seen_step = 0
        self.measured_step: int | None = None
        self.resumed_step: int | None = None

    def begin(self, step: int, *, is_resumed: bool) -> None:
        """Take note of the step at which training begins, and whether a checkpoint was loaded."""
        self.seen_step = step
        self.resumed_step = step if is_resumed else None

    def is_due_after_batch(self, step: int, *, at_zero_loss: bool) -> bool:
        """Whether a cadence in steps asks for a measurement after a batch; to be asked after each.

        Steps that cross a multiple of the cadence are counted, not steps that meet one: several batches may share a
        step, and manual optimization may take several steps in a batch.
        """
        seen, self.seen_step = self.seen_step, step
        interval = self.arguments.every_n_train_steps
        if interval is None or self._epochs_after_zero_loss(at_zero_loss=at_zero_loss) or self.measured_step is None:
            return False
        return step // interval > seen // interval

    def is_due_after_epoch(self, epoch: int, step: int, *, at_zero_loss: bool) -> bool:
        """Whether a cadence in epochs asks for a measurement at the end of an epoch."""
        interval = self._epochs_between(at_zero_loss=at_zero_loss)
        return interval is not None and (epoch + 1) % interval == 0 and step != self.measured_step

    def is_overdue(self, epoch: int, step: int, batch_idx: int, *, at_zero_loss: bool) -> bool:
        """Whether a resumed run begins where a measurement was interrupted or left out; to be asked at each batch."""
        resumed_step, self.resumed_step = self.resumed_step, None
        if self.measured_step is None or resumed_step != step or step == self.measured_step:
            return False
        # lightning 2.6 does not call the end of an epoch again whose last batch was the last thing before saving.
        interval = self._epochs_between(at_zero_loss=at_zero_loss)
        if interval is not None:
            return batch_idx == 0 and epoch % interval == 0
        steps_between = self.arguments.every_n_train_steps
        assert steps_between is not None, "a cadence is one in epochs or in steps"
        return step // steps_between > self.measured_step // steps_between

    def _epochs_between(self, *, at_zero_loss: bool) -> int | None:
        """Return the cadence in epochs; ``None`` where it is one in steps."""
        after_zero_loss = self._epochs_after_zero_loss(at_zero_loss=at_zero_loss)
        if after_zero_loss is None and self.arguments.every_n_train_steps is None:
            return self.arguments.every_n_epochs
        return after_zero_loss

    def _epochs_after_zero_loss(self, *, at_zero_loss: bool) -> int | None:
        """Return the cadence that holds once the loss has reached zero; ``None`` where there is none, or not yet."""
        return self.arguments.every_n_epochs_after_zero_loss if at_zero_loss else None
