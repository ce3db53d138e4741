"""How much of the wall time measuring may take."""

import time
from collections.abc import Callable


class OverheadLimit:
    """Says when a measurement has to wait, so that all of them take at most a share of the wall time since the start.

    The next one is expected to take as long as the last.

    Args:
        share: Of the wall time, inside ``(0, 1)``.
        clock: Seconds since any moment.

    Example:
        A measurement of one second at the start, and a limit of a tenth: the second has to wait for 19 s.

        >>> now = iter([0.0, 18.0, 19.5])
        >>> limit = OverheadLimit(0.1, clock=lambda: next(now))
        >>> limit.add(1.0)
        >>> limit.allows_next(), limit.allows_next()
        (False, True)
    """

    def __init__(self, share: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._started = clock()
        self._spent = 0.0
        self._last = 0.0

    def add(self, seconds: float) -> None:
        """Take note of what a measurement has taken."""
        self._spent += seconds
        self._last = seconds

    def allows_next(self) -> bool:
        """Whether the limit holds at the end of a measurement that begins now."""
        elapsed = self._clock() - self._started
        return self._spent + self._last <= self._share * (elapsed + self._last)
