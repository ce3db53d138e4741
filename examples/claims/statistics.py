"""Intervals and tests at the 95 % level."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        value, lower, upper = (format(number, spec or ".2f") for number in self)
        return f"{value} ({lower} to {upper})"


def share(count: int, total: int) -> Interval:
    """Estimate a probability; the interval is that of Clopper and Pearson (1934).

    Example:
        >>> print(share(20, 20))
        1.00 (0.83 to 1.00)
    """
    interval = stats.binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return Interval(count / total, float(interval.low), float(interval.high))


def mean(values: Sequence[float]) -> Interval:
    """Estimate a mean; the interval is that of Student's t.

    Example:
        >>> print(mean([1.0, 2.0, 3.0]))
        2.00 (-0.48 to 4.48)
    """
    center = float(np.mean(values))
    half = float(stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(center, center - half, center + half)


def spearman(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Estimate a rank correlation; the interval is that of Bonett and Wright (2000).

    Example:
        >>> print(spearman([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5]))
        0.94 (0.38 to 1.00)
    """
    rho = float(stats.spearmanr(first, second).statistic)
    if abs(rho) >= 1.0:
        return Interval(rho, rho, rho)
    half = stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt((1 + rho**2 / 2) / (len(first) - 3))
    center = math.atanh(rho)
    return Interval(rho, math.tanh(center - half), math.tanh(center + half))
