"""Several runs side by side: what each ended with, and the middle of all over the steps."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_basin.history.columns import Column, History

QUANTITIES = (
    *("gradient_rank", "gradient_rank_deficit", "gradient_rank_bound", "hessian_nullity_lower"),
    *("hessian_nullity_upper", "duplicated_activations", "log10_loss"),
)
"""Quantities of the network that a comparison shows, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class Band:
    """A quantity of several runs over all their steps: its tenth, fiftieth and ninetieth percentile."""

    steps: NDArray[np.int64]
    low: Column
    median: Column
    high: Column


def final_values(history: History, names: Iterable[str]) -> dict[str, float]:
    """Return the last measured value of quantities of the network, or of what else the run has logged, by name."""
    values = {}
    for name in names:
        column = history.logged[name].values if name in history.logged else history.column(name)
        if name not in history.logged and name not in history.network and name not in QUANTITIES:
            known = sorted([*history.network, *history.logged])
            raise ValueError(f"the run {history.name!r} has no values of {name!r}, but of {known}")
        measured = column[~np.isnan(column)]
        values[name] = float(measured[-1]) if measured.size else float("nan")
    return values


def band_of(histories: Sequence[History], quantity: str) -> Band:
    """Return the percentiles of a quantity of the network over several runs, each as it was measured last."""
    steps = np.unique(np.concatenate([history.steps for history in histories]))
    values = np.stack([_held(history, quantity, steps) for history in histories])
    if np.isnan(values).all():
        raise ValueError(f"quantity must be one that a run has values of, got {quantity!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # At some steps no run may have a value.
        low, median, high = np.nanpercentile(values, [10, 50, 90], axis=0)
    return Band(steps, low, median, high)


def _held(history: History, quantity: str, steps: NDArray[np.int64]) -> Column:
    """A quantity at some steps, NaN outside of the run."""
    column = history.column(quantity)
    places = np.searchsorted(history.steps, steps, side="right") - 1
    is_inside = (places >= 0) & (steps <= history.steps[-1])
    return np.where(is_inside, column[np.maximum(places, 0)], np.nan)
