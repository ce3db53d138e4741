"""What loggers show beside the curves: figures; in TensorBoard a layout, the run in words and a dot at zero loss."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_basin.callback.event_files import (
    add_values,
    is_spectrum_written,
    prefix_of,
    tensorboard_loggers,
    with_prefix,
    write_details,
    write_end_values,
    write_spectra,
)
from lightning_basin.callback.lightnings import Logger, Trainer
from lightning_basin.callback.media import image_writer
from lightning_basin.callback.session import Session
from lightning_basin.history.columns import History
from lightning_basin.keys import tensorboard_values
from lightning_basin.naming import escaped
from lightning_basin.pages.findings import markdown_of
from lightning_basin.record import BasinRecord

ZERO_LOSS_RUN = "zero_loss"
"""The folder below that of a run with one point of each curve: TensorBoard has no other way to mark a step."""

_LAYOUT = "custom_scalars__config__"
"""The tag under which the layout of custom scalars stands."""


class Dashboard:
    """Writes to the loggers of one fit at its first record, at zero loss and at the end."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer = trainer
        self._session = session
        self._log_step = 0
        self._num_shown = 0
        self._has_layout = False

    def begin(self) -> None:
        """Take the records of the run that is resumed for shown."""
        self._num_shown = len(self._session.results.records)

    def add(self, record: BasinRecord, log_step: int) -> None:
        """Take note of a record, and show what it changes."""
        self._log_step = log_step
        prefix, results = self._session.arguments.prefix, self._session.results
        if not self._has_layout:
            self._has_layout = True
            self._each(lambda logger: _add_layout(logger, prefix, self._values(record)))
        if is_spectrum_written(len(results.records) - 1):
            self._each(lambda logger: write_spectra(logger, record, prefix, step=log_step))
            self._each(lambda logger: write_details(logger, record, prefix, step=log_step))
        if record.step is not None and record.step == results.zero_loss_step:
            self._each(lambda logger: _mark(logger, self._values(record), log_step))
            self.show()

    def end(self) -> None:
        """Write the summary and the figures of the whole run, of which there is a record, and what it ended with."""
        self.show()
        record, prefix = self._session.results.records[-1], self._session.arguments.prefix
        values = self._values(record)
        self._each(lambda logger: write_details(logger, record, prefix, step=self._log_step))
        self._each(lambda logger: write_end_values(logger, values, prefix, step=self._log_step))

    def _values(self, record: BasinRecord) -> dict[str, float]:
        """The values of a record by the tags that TensorBoard shows."""
        return tensorboard_values(self._session.log_values(record), self._session.arguments.prefix)

    def show(self) -> None:
        """Write the summary and the figures, if there are records that they do not have."""
        results = self._session.results
        if not results.records or len(results.records) == self._num_shown or not self._is_wanted:
            return
        self._num_shown = len(results.records)
        history = results.history()
        prefix = escaped(self._session.arguments.prefix)
        self._each(lambda logger: logger.experiment.add_text(f"{prefix}/summary", markdown_of(history), self._log_step))
        drawn: dict[str, Any] = {}  # Once for all loggers, and only where one takes images.
        for logger in self._trainer.loggers:
            self._try(lambda logger: self._draw(logger, drawn, history, prefix), logger)

    def _draw(self, logger: Logger, drawn: dict[str, Any], history: History, prefix: str) -> None:
        write = image_writer(logger)
        if write is None:
            return
        from lightning_basin.figures.images import images_of  # Loading matplotlib takes half a second.

        drawn.update(drawn or images_of(history))
        for name, image in drawn.items():
            write(f"{prefix}_figures/{name}", image, self._log_step)

    @property
    def _is_wanted(self) -> bool:
        fast_dev_run: bool = self._trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        return self._session.arguments.figures and self._trainer.is_global_zero and not fast_dev_run

    def _each(self, write: Callable[[Any], None]) -> None:
        """Write to each TensorBoard logger."""
        if self._is_wanted:
            for logger in tensorboard_loggers(self._trainer.loggers):
                self._try(write, logger)

    def _try(self, write: Callable[[Any], None], logger: Any) -> None:
        """Write to a logger; a failure costs a message."""
        try:
            write(logger)
        except Exception as error:  # A full disk, a server that does not answer, or matplotlib that is not there.
            self._session.notices.inform(
                f"{type(logger).__name__} has no figures of BasinMonitor. {type(error).__name__}: {error}. HINT: "
                f"BasinMonitor(figures=False) asks for none"
            )


def layout_of(prefix: str, tags: Collection[str], *, logger_prefix: str = "") -> dict[str, dict[str, list[Any]]]:
    """Return the charts of TensorBoard's custom scalars for which there are curves, by category and title.

    Tags are expressions that match the curves of every run, so that the layouts of several runs are one; but those of
    a band, which TensorBoard takes as they are.
    """
    name = escaped(prefix)
    start, own = rf"^(?:.*-)?{re.escape(name)}", f"{logger_prefix}{name}"
    happened = {
        "rank, and what merged inputs allow": ["Multiline", [rf"{start}/gradient_rank(_bound)?$"]],
        "log10 of the loss": ["Multiline", [rf"{start}/log10_loss$"]],
        "inputs that a layer no longer distinguishes": [
            "Multiline",
            [rf"{start}_(layer|block)_duplicated_activations/.*"],
        ],
        "null space: N - rank in the bracket of the Hessian's nullity": [
            "Margin",
            [f"{own}_more/gradient_nullity", f"{own}/hessian_nullity_lower", f"{own}/hessian_nullity_upper"],
        ],
    }
    layers = {
        "rank of each layer": ["Multiline", [rf"{start}_(layer|block)_gradient_rank/.*"]],
        "lost directions of each layer": ["Multiline", [rf"{start}_(layer|block)_gradient_rank_deficit/.*"]],
        "lost directions: the median of the layers, and their middle eight tenths": _band(own, "gradient_rank_deficit"),
        "duplicates: the median of the layers, and their middle eight tenths": _band(own, "duplicated_activations"),
    }
    layout: dict[str, dict[str, list[Any]]] = {}
    for category, charts in {"what happened": happened, "layer by layer": layers}.items():
        drawn = {title: chart for title, chart in charts.items() if _has_curves(chart[1], tags)}
        layout |= {f"{name}: {category}": drawn} if drawn else {}
    return layout


def _band(start: str, quantity: str) -> list[Any]:
    return ["Margin", [f"{start}_stats/{quantity}_{quantile}" for quantile in ("median", "p10", "p90")]]


def _has_curves(expressions: Iterable[str], tags: Collection[str]) -> bool:
    return all(item in tags or any(re.match(item, tag) for tag in tags) for item in expressions)


def _add_layout(logger: Any, prefix: str, values: Mapping[str, float]) -> None:
    """Add the layout, unless there is one in the folder: a second one would take its place."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # Loading it takes a second.

    logger.experiment.flush()
    if _LAYOUT not in EventAccumulator(logger.log_dir).Reload().Tags()["tensors"]:
        layout = layout_of(prefix, with_prefix(logger, values), logger_prefix=prefix_of(logger))
        logger.experiment.add_custom_scalars(layout)


def _mark(logger: Any, values: Mapping[str, float], step: int) -> None:
    """Write one point of each curve into a run of its own, whose dots lie on the curves."""
    with SummaryWriter(str(Path(logger.log_dir) / ZERO_LOSS_RUN)) as writer:
        add_values(writer, with_prefix(logger, values), step=step)
