"""The wall time of a measurement, split by stage, and a progress bar that shows them."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from tqdm import tqdm

Stage = Literal["copy", "trace", "gradients", "ranks", "hessian", "duplicates"]
"""The stages of a measurement."""

Watcher = Callable[[Stage, int, int], None]
"""A function that is told of each change of the stage, and how many items of how many are done; 0 of 0 for no items."""

_Item = TypeVar("_Item")
_END = object()


class StageClock:
    """Adds up the wall time of each stage. The outer stage stands still while an inner one runs.

    The time is that of the process, and no device is waited for. On a GPU work is queued: the stage that reads a result
    first has waited for everything that was queued before, also by earlier stages.

    All time outside of the others belongs to ``"trace"``; ``watch`` is told what goes on.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter, watch: Watcher | None = None) -> None:
        self._now, self._watch = now, watch
        self._num_done = self._num_items = 0
        self._stage: Stage = "trace"
        self._since = now()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        """Count the time inside of the context as a stage's."""
        outer = self._switch(stage)
        try:
            yield
        finally:
            self._switch(outer)

    def each(self, stage: Stage, items: Iterable[_Item], *, num_items: int = 0) -> Iterator[_Item]:
        """Yield items, and count the time in which they are made as a stage's; watchers are told their number."""
        iterator = iter(items)
        self._num_done, self._num_items = 0, num_items
        try:
            while True:
                with self(stage):
                    item = next(iterator, _END)
                if item is _END:
                    return
                self._num_done += 1
                yield item  # type: ignore[misc]  # no end
        finally:
            self._num_done = self._num_items = 0

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage so far, in the order in which the stages began; all time is in one."""
        self._switch(self._stage)
        return dict(self._seconds)

    def _switch(self, stage: Stage) -> Stage:
        now, outer = self._now(), self._stage
        self._seconds[outer] = self._seconds.get(outer, 0.0) + now - self._since
        self._stage, self._since = stage, now
        if self._watch is not None and stage != outer:
            self._watch(stage, self._num_done, self._num_items)
        return outer


_DELAY = 1.0  # seconds of a measurement before which nobody wants to see a bar


@contextmanager
def progress_bar(*, progress: bool | None) -> Iterator[Watcher | None]:
    """Show the stage of a measurement, and how many layers are differentiated, while the body runs.

    ``None`` shows a bar where standard error is a terminal, after a second. A `StageClock` tells the yielded function
    what goes on; ``None`` is yielded where no bar is shown.
    """
    if progress is False:
        yield None
        return
    delay = 0.0 if progress else _DELAY
    with tqdm(
        desc="Measuring", unit="layer", delay=delay, leave=False, disable=None if progress is None else False
    ) as bar:
        shown_from = time.monotonic() + delay

        def watch(stage: Stage, num_done: int, num_items: int) -> None:
            bar.total, bar.n = num_items or None, num_done
            bar.set_description_str(f"Measuring, {stage}", refresh=False)
            if time.monotonic() >= shown_from:
                bar.refresh()

        yield None if bar.disable else watch
