"""Where measured values go: every logger, under names that it takes, at the step of Lightning's own curves."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from lightning_basin.callback.event_files import write_scalars
from lightning_basin.callback.lightnings import TENSORBOARD_LOGGERS, Logger, MLFlowLogger, Trainer, callbacks_of
from lightning_basin.keys import tensorboard_values

_REFUSED_BY_MLFLOW = re.compile(r"[^a-zA-Z0-9_/. -]")
_MLFLOW_BATCH = 1000
"""The number of values that MLflow takes in one request."""


def log_scalars(
    loggers: Iterable[Logger], scalars: Mapping[str, float], *, step: int, prefix: str = "basin"
) -> list[str]:
    """Hand values to every logger, as one row where it has rows; return a sentence for each logger that failed."""
    problems = [_problem_of(logger, scalars, step, prefix) for logger in loggers]
    return [problem for problem in problems if problem is not None]


def _problem_of(logger: Logger, scalars: Mapping[str, float], step: int, prefix: str) -> str | None:
    try:
        if isinstance(logger, TENSORBOARD_LOGGERS):
            write_scalars(logger, tensorboard_values(scalars, prefix), step=step)
            return None
        for accepted in _accepted(logger, scalars):
            logger.log_metrics(accepted, step=step)
    except Exception as error:  # Whatever a logger raises: a full disk, a server that does not answer.
        return f"{type(logger).__name__} could not log. {type(error).__name__}: {error}"
    return None


def _accepted(logger: Logger, scalars: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the values under names, and in portions, that a logger takes."""
    if not isinstance(logger, MLFlowLogger):
        return [dict(scalars)]
    named: dict[str, float] = {}
    for key in sorted(scalars, key=lambda key: _REFUSED_BY_MLFLOW.search(key) is not None):  # As they are, first.
        accepted = mlflow_name(key)
        while accepted in named:
            accepted += "_"
        named[accepted] = scalars[key]
    items = list(named.items())
    return [dict(items[start : start + _MLFLOW_BATCH]) for start in range(0, len(items), _MLFLOW_BATCH)]


def mlflow_name(key: str) -> str:
    """Replace the characters of a key that MLflow refuses."""
    return _REFUSED_BY_MLFLOW.sub("_", key)


def set_callback_metrics(trainer: Trainer, scalars: Mapping[str, float], is_ours: Callable[[str], bool]) -> None:
    """Put values where callbacks look for them, in place of all that stand there under keys of the same kind.

    A value that is not among the new ones stays where something monitors it: a strict ``EarlyStopping`` raises without.
    The trainer's ``callback_metrics`` is not read: this would compute its metrics too early.
    """
    metrics = getattr(trainer._logger_connector, "_callback_metrics", None)  # As of lightning 2.4 - 2.6.
    metrics = trainer.callback_metrics if metrics is None else metrics
    owners: list[Any] = [*callbacks_of(trainer), *trainer.lr_scheduler_configs]
    monitored = {getattr(owner, "monitor", None) for owner in owners}
    for key in [key for key in metrics if is_ours(key) and key not in scalars and key not in monitored]:
        del metrics[key]
    # Early stopping squeezes what it finds; float64 keeps large integers.
    metrics.update({key: torch.tensor(value, dtype=torch.float64) for key, value in scalars.items()})


def batches_that_stepped(trainer: Trainer) -> int:
    """Return the x axis of Lightning's curves: private, but what its LearningRateMonitor uses (lightning 2.5 - 2.6)."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
