"""When to measure, as plain numbers of steps and epochs say it."""

from lightning_basin.callback.arguments import Arguments


def is_next(step: int, *, measured: int, origin: int) -> bool:
    """Whether the geometric cadence of ``max_overhead="auto"`` has come to its next measurement.

    That is the first step, of those at which a measurement could be taken, that is at least 5/4 times as far from the
    origin, from which measurements become rarer, as the last measurement. So the first five are taken, and the number
    of the others grows with the logarithm of the number of steps. It is decided in integers.
    """
    return 4 * (step - origin) >= 5 * (measured - origin)


class Schedule:
    """Decides after every batch and epoch whether a measurement is due.

    A step is the number of optimizer steps taken, an epoch the number of epochs before it. ``sparse_since`` is the step
    from which on measurements become rarer, as `is_next` says; ``None`` takes each that the cadence asks for. Steps are
    all that decides: runs with the same losses measure at the same steps, resumed or not, on all of their processes.

    Attributes:
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

    def cadence(self, *, at_zero_loss: bool) -> tuple[str, int]:
        """Return the argument that sets the cadence now, and its value."""
        after_zero_loss, steps = self.arguments.every_n_epochs_after_zero_loss, self.arguments.every_n_train_steps
        if at_zero_loss and after_zero_loss is not None:
            return "every_n_epochs_after_zero_loss", after_zero_loss
        epochs = self.arguments.every_n_epochs or 1  # Of which a paced monitor leaves some out.
        return ("every_n_epochs", epochs) if steps is None else ("every_n_train_steps", steps)

    def is_due_after_batch(self, step: int, *, at_zero_loss: bool, sparse_since: int | None = None) -> bool:
        """Whether a cadence in steps asks for a measurement after a batch; to be asked after each.

        Steps that cross a multiple of the cadence are counted, not steps that meet one: several batches may share a
        step, and manual optimization may take several steps in a batch.
        """
        seen, self.seen_step = self.seen_step, step
        name, interval = self.cadence(at_zero_loss=at_zero_loss)
        if name != "every_n_train_steps" or self.measured_step is None:
            return False
        return step // interval > seen // interval and self._is_next(step, sparse_since, interval)

    def is_due_after_epoch(self, epoch: int, step: int, *, at_zero_loss: bool, sparse_since: int | None = None) -> bool:
        """Whether a cadence in epochs asks for a measurement at the end of an epoch."""
        name, interval = self.cadence(at_zero_loss=at_zero_loss)
        is_offered = name != "every_n_train_steps" and (epoch + 1) % interval == 0 and step != self.measured_step
        return is_offered and self._is_next(step, sparse_since)

    def is_overdue(
        self, epoch: int, step: int, batch_idx: int, *, at_zero_loss: bool, sparse_since: int | None = None
    ) -> bool:
        """Whether a resumed run begins where a measurement was interrupted or left out; to be asked at each batch."""
        resumed_step, self.resumed_step = self.resumed_step, None
        if self.measured_step is None or resumed_step != step or step == self.measured_step:
            return False
        # lightning 2.6 does not call the end of an epoch again whose last batch was the last thing before saving.
        name, interval = self.cadence(at_zero_loss=at_zero_loss)
        if name != "every_n_train_steps":
            return batch_idx == 0 and epoch % interval == 0 and self._is_next(step, sparse_since)
        is_crossed = step // interval > self.measured_step // interval
        return is_crossed and self._is_next(step, sparse_since, interval)

    def _is_next(self, step: int, origin: int | None, interval: int = 1) -> bool:
        """Whether no geometric cadence holds, or it has come to its next measurement."""
        if origin is None or self.measured_step is None:
            return True
        # By the multiples that were crossed: a resumed run may look back from a later step.
        step, measured, origin = (value - value % interval for value in (step, self.measured_step, origin))
        return is_next(step, measured=measured, origin=origin)
