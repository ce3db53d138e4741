"""A progress bar of one measurement, for those that take long."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from lightning_basin.stages import Stage, Watcher

_DELAY = 1.0  # seconds of a measurement before which nobody wants to see a bar


@contextmanager
def progress_bar(*, progress: bool | None) -> Iterator[Watcher | None]:
    """Show the stage of a measurement, and how many layers are differentiated, while the body runs.

    Args:
        progress: Whether to show a bar. ``None`` shows one where standard error is a terminal, after a second.

    Yields:
        The function that a `StageClock` tells what goes on; ``None`` where no bar is shown.
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
