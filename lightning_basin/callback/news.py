"""What is said in a terminal: when something new is measured, and at the end of a fit."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator

from lightning_basin.callback.event_files import tensorboard_loggers
from lightning_basin.callback.lightnings import Trainer
from lightning_basin.callback.report_file import ReportFile
from lightning_basin.callback.session import Session
from lightning_basin.layer_names import tag
from lightning_basin.naming import escaped, printable
from lightning_basin.pages.terminal import summary_of
from lightning_basin.record import BasinRecord


def news(record: BasinRecord, earlier: list[BasinRecord], zero_loss_step: int | None) -> Iterator[str]:
    """Say in one sentence each what is new, and so happens once in a run."""
    step = "" if record.step is None else f" at step {record.step:,}"
    if record.step is not None and record.step == zero_loss_step:
        yield f"The loss has reached zero{step}, with a gradient rank of {record.gradient_rank:,}"
    # The first layer is entered by the inputs themselves, of which some may be equal.
    for name, layer in list(record.layers.items())[1:]:
        if (
            layer.duplicated_activations
            and earlier
            and not any(other.layers[name].duplicated_activations for other in earlier if name in other.layers)
        ):
            yield (
                f"Layer {tag(name)!r} has begun to merge inputs{step}: {layer.duplicated_activations:,} of "
                f"{record.num_inputs:,} have the activation of another one"
            )
    if record.hessian_certified and earlier and not any(other.hessian_certified for other in earlier):
        yield (
            f"The bracket of the Hessian's nullity has closed{step}: {record.hessian_nullity_lower:,} of "
            f"{record.num_parameters:,} directions are flat"
        )


def closing_words(trainer: Trainer, session: Session, report: ReportFile) -> str:
    """Return a sentence, a table and the places of report and curves, in characters that a terminal may show."""
    history, width = session.results.history(), shutil.get_terminal_size((100, 24)).columns
    summary = summary_of(history, width, has_colors=sys.stderr.isatty())  # Where messages of Lightning go.
    return "\n".join([summary, *map(printable, _places(trainer, session.arguments.prefix, report))])


def _places(trainer: Trainer, prefix: str, report: ReportFile) -> Iterator[str]:
    if report.path is not None and report.path.is_file():
        yield f"The report: {report.path}"
    for logger in tensorboard_loggers(trainer.loggers)[:1]:
        yield f"The curves: tensorboard --logdir {shlex.quote(logger.root_dir)}"
        # Integers need no smoothing, and the network's curves come first.
        yield f"  http://localhost:6006/?smoothing=0&tagFilter=^{re.escape(escaped(prefix))}/#timeseries"
