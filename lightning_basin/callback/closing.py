"""What a fit says at its end: what happened to the network, and where to look at it."""

import re
import shutil
import sys
from collections.abc import Iterator

from lightning_basin.callback.event_files import tensorboard_loggers
from lightning_basin.callback.lightnings import Trainer
from lightning_basin.callback.report_file import ReportFile
from lightning_basin.callback.session import Session
from lightning_basin.history.columns import history_of
from lightning_basin.naming import escaped, printable
from lightning_basin.pages.terminal import summary_of


def closing_words(trainer: Trainer, session: Session, report: ReportFile) -> str:
    """Return a sentence, a table and the places of report and curves, in characters that a terminal may show.

    Args:
        trainer: The trainer.
        session: The records of the run, of which there is at least one.
        report: The report of the fit.
    """
    results = session.results
    history = history_of(results.records, zero_loss_step=results.zero_loss_step)
    width = shutil.get_terminal_size((100, 24)).columns
    summary = summary_of(history, width, has_colors=sys.stderr.isatty())  # Where messages of Lightning go.
    return "\n".join([summary, *map(printable, _places(trainer, session.arguments.prefix, report))])


def _places(trainer: Trainer, prefix: str, report: ReportFile) -> Iterator[str]:
    if report.path is not None and report.path.is_file():
        yield f"The report: {report.path}"
    for logger in tensorboard_loggers(trainer.loggers)[:1]:
        yield f"The curves: tensorboard --logdir {logger.root_dir}"
        # Integers need no smoothing, and the network's curves come first.
        yield f"  http://localhost:6006/?smoothing=0&tagFilter=^{re.escape(escaped(prefix))}/#timeseries"
