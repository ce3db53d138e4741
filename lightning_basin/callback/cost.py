"""What measuring costs a run, and which settings would make it cheaper."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_basin.callback.arguments import Arguments

TOLERATED_SHARE = 0.1
"""The share of the wall time above which a monitor says what would bring it down."""

_AIMED_SHARE = 0.08
"""The share that settings are to leave at most: below the tolerated one, as times differ from run to run by a tenth."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What measuring costs a run that goes on as it does, in seconds of wall time.

    ``measuring`` is the time of a measurement, which ``stages`` split; ``training`` that from its end to the next one.
    """

    measuring: float
    training: float
    stages: Mapping[str, float]

    @property
    def share(self) -> float:
        """The share of the wall time that measuring takes."""
        return self.measuring / (self.measuring + self.training)

    @property
    def times_too_often(self) -> int:
        """The smallest n for which every n-th measurement takes the share that is aimed at."""
        return max(1, math.ceil(self.measuring * ((1 - _AIMED_SHARE) / _AIMED_SHARE) / self.training))

    def without(self, stage: str) -> "Cost":
        """Return the cost of measurements without a stage."""
        others = {other: seconds for other, seconds in self.stages.items() if other != stage}
        return replace(self, measuring=max(0.0, self.measuring - self.stages[stage]), stages=others)

    def every(self, n: int) -> "Cost":
        """Return the cost of every n-th measurement."""
        return replace(self, training=n * self.training)


def advise(cost: Cost, cadence: tuple[str, int], arguments: Arguments) -> str | None:
    """Say what share of the wall time measuring takes, and two settings that would bring it down.

    ``None`` says that the share is tolerated, or that no time has passed between measurements.
    """
    if arguments.verify_null_space == "zero_loss" and "verify_null_space" in cost.stages:
        cost = cost.without("verify_null_space")  # It is done once.
    if cost.training <= 0.0 or cost.share <= TOLERATED_SHARE or not cost.stages:
        return None
    longest = max(cost.stages, key=lambda stage: cost.stages[stage])
    rarer, rarer_share = _rarely_enough(cost, cadence)
    lighter, lighter_share = _light_enough(cost, cadence, arguments)
    return (
        f"Measuring takes {cost.share:.0%} of the wall time. Its longest stage is {longest!r}, with "
        f"{cost.stages[longest]:.2g} of {cost.measuring:.2g} s. HINT: BasinMonitor({rarer}) brings it to "
        f"{rarer_share:.0%}, BasinMonitor({lighter}) to {lighter_share:.0%}"
    )


def _rarely_enough(cost: Cost, cadence: tuple[str, int]) -> tuple[str, float]:
    """Return the cadence that leaves the share that is aimed at, as an argument, and the share."""
    name, interval = cadence
    return f"{name}={cost.times_too_often * interval}", cost.every(cost.times_too_often).share


def _light_enough(cost: Cost, cadence: tuple[str, int], arguments: Arguments) -> tuple[str, float]:
    """Return what to leave out so that the share that is aimed at is left, as arguments, and the share.

    A cadence is added where this is not enough. Where no setting leaves out half of a measurement, the clock is to
    decide how often.
    """
    settings = {"hessian": "hessian=False"}
    if arguments.duplicates_over is not None:
        settings["duplicates"] = "duplicates_over=None"
    if isinstance(arguments.verify_null_space, int):
        settings["verify_null_space"] = "verify_null_space='zero_loss'"
    costs = {setting: cost.without(stage) for stage, setting in settings.items() if stage in cost.stages}
    setting = min(costs, key=lambda setting: costs[setting].measuring, default=None)
    if setting is None or costs[setting].measuring > cost.measuring / 2:
        return f"max_overhead={TOLERATED_SHARE}", TOLERATED_SHARE
    if costs[setting].share <= _AIMED_SHARE:
        return setting, costs[setting].share
    rarer, share = _rarely_enough(costs[setting], cadence)
    return f"{setting}, {rarer}", share
