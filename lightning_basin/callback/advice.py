"""What Lightning's own callbacks make of a value that is not measured at each of their checks."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.lightnings import EARLY_STOPPINGS, EarlyStopping, Trainer
from lightning_basin.callback.watching import Watcher


def sufficient_patience(checks: float, tolerated: int) -> int | None:
    """Return how many checks in a row must be tolerated so that patience outlasts the time between measurements.

    The number is one less than that of the checks of ``tolerated + 1`` measurements. ``None`` means that ``tolerated``
    is enough, or that nobody knows the number of checks from one measurement to the next (infinity).
    """
    if checks == math.inf or tolerated >= math.ceil(checks) - 1:  # The first check may see a better value.
        return None
    return (tolerated + 1) * math.ceil(checks) - 1


def epochs_between(arguments: Arguments, steps_in_epoch: float) -> int:
    """Return the largest number of epochs between measurements; the steps of an epoch are infinite if nobody knows."""
    steps = arguments.every_n_train_steps
    epochs = (arguments.every_n_epochs or 1) if steps is None else math.ceil(steps / max(1.0, steps_in_epoch))
    return max(1, epochs, arguments.every_n_epochs_after_zero_loss or 1)


def advise_patience(trainer: Trainer, watchers: Iterable[Watcher], arguments: Arguments) -> Iterator[str]:
    """Say which patience to pass to callbacks and schedulers that give up before there can be a new value."""
    automatic = trainer.lightning_module.automatic_optimization
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches if automatic else math.inf
    epochs = epochs_between(arguments, steps)
    # Between two measurements, of which the later is at least 5/4 times as far, is at most a fifth of the run.
    epochs += max(0, trainer.max_epochs or 0) // 5 if arguments.max_overhead == "auto" else 0
    for watcher in watchers:
        owner, scheduler = watcher.owner, getattr(watcher.owner, "scheduler", None)
        if isinstance(owner, EarlyStopping) and type(owner).on_train_epoch_end in _COUNTING:
            # It stops at the last check of its patience, where a scheduler still waits.
            patience, checks, remedy = owner.patience, float(epochs), ", or use RankEarlyStopping"
            sufficient = sufficient_patience(checks, patience - 1)
            needed = None if sufficient is None else sufficient + 1
        elif isinstance(scheduler, ReduceLROnPlateau):
            steps_between = None if arguments.max_overhead == "auto" else arguments.every_n_train_steps
            between = epochs if owner.interval != "step" else steps_between or epochs * steps
            patience, checks, remedy = scheduler.patience, between / owner.frequency, ""
            needed = sufficient_patience(checks, patience)
        else:
            continue
        if needed is not None:
            yield (
                f"{watcher.name} counts its checks, which see each value up to {math.ceil(checks)} times: "
                f"patience={patience} is over before the next measurement. HINT: pass patience={needed}{remedy}"
            )


_COUNTING = [stopping.on_train_epoch_end for stopping in EARLY_STOPPINGS]
"""Lightning's own ways to check; a callback with another one is left alone."""


class RankedSaves:
    """Notices where a ``ModelCheckpoint`` ranks weights by the value of others."""

    def __init__(self, watchers: Iterable[Watcher]) -> None:
        self._rankings = [(watcher, _ranking(watcher.owner)) for watcher in watchers if watcher.is_saving]

    def misjudged(self, step: int, measured_step: int | None, arguments: Arguments) -> list[str]:
        """Say once of each ``ModelCheckpoint`` that it saves weights that were not measured."""
        interval = arguments.every_n_train_steps
        cadence = f"every_n_epochs={epochs_between(arguments, math.inf)} and save_on_train_epoch_end=True"
        remedy = cadence if interval is None else f"every_n_train_steps={interval}"
        if arguments.max_overhead == "auto":
            remedy = "BasinMonitor(max_overhead=None)"
        current = [(saver, before, _ranking(saver.owner)) for saver, before in self._rankings]
        problems = {
            saver.name: f"{saver.name} ranks weights of step {step}, which were not measured, by the value of step "
            f"{measured_step}. HINT: pass {remedy}"
            for saver, before, after in current
            if after - before and step != measured_step
        }
        self._rankings = [(saver, after) for saver, _, after in current if saver.name not in problems]
        return list(problems.values())


def _ranking(checkpoint: Any) -> set[tuple[str, float]]:
    return {(path, float(value)) for path, value in checkpoint.best_k_models.items()}
