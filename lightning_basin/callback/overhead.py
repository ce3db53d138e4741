"""The wall time of measuring: a limit to it, what it costs a run, and a word where it takes long."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_basin.callback.cost import Cost
from lightning_basin.record import BasinRecord

LONG_SECONDS = 10.0
"""A measurement that takes longer is announced, so that nobody takes a run for dead."""

FREE_SECONDS = 5.0
"""The wall time that all measurements of a fit may take together, however short the fit is."""

LEAST_MEASUREMENTS = 3
"""The number of measurements after the first that a fit may take, however long they are: they show how a curve runs."""

_SHORTEST = 1e-6  # seconds of a measurement that took no time by the clock


class Overhead:
    """The wall time of measuring beside that of a fit.

    Args:
        clock: A function that returns seconds since any moment; ``None`` means ``time.monotonic``.

    Attributes:
        num_measurements: The number of measurements so far.

    Example:
        A measurement of one second at the start, and a limit of a tenth: the second has to wait for 19 s.

        >>> now = iter([0.0, 0.0, 1.0, 18.0, 19.5])
        >>> overhead = Overhead(clock=lambda: next(now))
        >>> with overhead.measuring():
        ...     pass
        >>> overhead.allows_next(0.1), overhead.allows_next(0.1)
        (False, True)
    """

    def __init__(self, *, clock: Callable[[], float] | None = None) -> None:
        self._clock = time.monotonic if clock is None else clock
        self._started = self._clock()
        self._spent = self._first = self._last = 0.0
        self._first_ended = self._last_ended = self._started
        self.num_measurements = 0
        self._num_occasions = self._num_passed = 0  # In the fit, and of these before the last measurement.

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Take note of the time of a measurement."""
        started = self._clock()
        try:
            yield
        finally:
            self._last_ended = self._clock()
            self._last = self._last_ended - started
            self._spent += self._last
            self.num_measurements += 1
            self._num_passed = self._num_occasions
            if self.num_measurements == 1:
                self._first, self._first_ended = self._last, self._last_ended

    def allows_next(self, share: float) -> bool:
        """Whether all measurements together keep to a share of the time, if one as long as the last begins now."""
        elapsed = self._clock() - self._started
        return self._spent + self._last <= share * (elapsed + self._last)

    def allows_in_all(self, share: float, num_left: float) -> bool:
        """Whether it is time for the next of as many measurements as fit into a share of the time of a whole fit.

        That is `FREE_SECONDS` at least, and the number of measurements after the first `LEAST_MEASUREMENTS` at least.
        They are spread evenly, and the last of them is at the end. They are expected to take half of the time of the
        first, which makes checks, and later as long as the last. Each call after the first measurement stands for an
        occasion to measure; ``num_left`` are left, with this one, and infinitely many where nobody knows.
        """
        if self.num_measurements == 0:
            return True
        self._num_occasions += 1
        expected = self._last if self.num_measurements > 1 else self._first / 2
        if math.isinf(num_left):
            return self._spent + expected <= FREE_SECONDS or self.allows_next(share)
        num_in_all = self._num_occasions + num_left - 1
        training = (self._clock() - self._started - self._spent) * num_in_all / self._num_occasions
        allowed = max(FREE_SECONDS, training * share / (1 - share))
        num_fitting = (allowed - self._spent) // max(expected, _SHORTEST)
        num_measurements = max(num_fitting, LEAST_MEASUREMENTS + 1 - self.num_measurements)
        num_waited = self._num_occasions - self._num_passed
        return num_measurements >= 1 and num_waited * num_measurements >= num_waited + num_left - 1

    def cost(self, records: Sequence[BasinRecord]) -> Cost:
        """Return the cost of measurements since the end of the first, which takes longer; stages are records' means."""
        num_later = self.num_measurements - 1
        measuring = (self._spent - self._first) / num_later
        stages = {stage for record in records for stage in record.seconds}
        return Cost(
            measuring=measuring,
            training=(self._last_ended - self._first_ended) / num_later - measuring,
            stages={stage: fmean(record.seconds.get(stage, 0.0) for record in records) for stage in sorted(stages)},
        )


@contextmanager
def announced(measurement: str) -> Iterator[None]:
    """Say once that a measurement is still running, and how long it was, where it takes longer than `LONG_SECONDS`."""
    started = time.monotonic()
    # From another thread, as this one is inside a decomposition.
    timer = threading.Timer(LONG_SECONDS, rank_zero_info, [f"{measurement} is taking more than {LONG_SECONDS:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        seconds = time.monotonic() - started
        if seconds >= LONG_SECONDS:
            rank_zero_info(f"{measurement} took {seconds:.0f} s")
