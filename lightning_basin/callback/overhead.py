"""The wall time of measuring: a limit to it, and a word where it takes long."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_info

LONG_SECONDS = 10.0
"""A measurement that takes longer is announced, so that nobody takes a run for dead."""


class OverheadLimit:
    """Says when a measurement has to wait, so that all of them take at most a share of the wall time since the start.

    The next one is expected to take as long as the last.

    Args:
        share: The share of the wall time, inside ``(0, 1)``.
        clock: A function that returns seconds since any moment; ``None`` means ``time.monotonic``.

    Example:
        A measurement of one second at the start, and a limit of a tenth: the second has to wait for 19 s.

        >>> now = iter([0.0, 0.0, 1.0, 18.0, 19.5])
        >>> limit = OverheadLimit(0.1, clock=lambda: next(now))
        >>> with limit.measuring():
        ...     pass
        >>> limit.allows_next(), limit.allows_next()
        (False, True)
    """

    def __init__(self, share: float, *, clock: Callable[[], float] | None = None) -> None:
        self._share = share
        self._clock = time.monotonic if clock is None else clock
        self._started = self._clock()
        self._spent = 0.0
        self._last = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Take note of the time of a measurement."""
        started = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - started
            self._spent += self._last

    def allows_next(self) -> bool:
        """Whether the limit holds at the end of a measurement that begins now."""
        elapsed = self._clock() - self._started
        return self._spent + self._last <= self._share * (elapsed + self._last)


@contextmanager
def announced(measurement: str) -> Iterator[None]:
    """Say once that a measurement is still running, and how long it was, where it takes longer than `LONG_SECONDS`.

    Args:
        measurement: The name of the measurement.
    """
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
