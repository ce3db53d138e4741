"""``report.html``: a run on one page, which needs no server and nothing from elsewhere."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lightning_basin.history.columns import History
from lightning_basin.history.page import DATA_ID, PAGE, write_data
from lightning_basin.history.sources import Source, read_history, run_folder
from lightning_basin.pages.findings import headlines, layers_table, sentence


def report(
    source: Source,
    path: str | Path | None = None,
    *,
    name: str | None = None,
    zero_loss_step: int | None = None,
    labels: Sequence[float | str] | None = None,
    stopped: str | None = None,
) -> Path:
    """Write the report of a run.

    Args:
        source: Records, or the path of a table or of a log directory.
        path: The path of the page; ``None`` writes ``report.html`` into the log directory, or the working directory.
        name: The name of the run; ``None`` takes that of the log directory.
        zero_loss_step: The step at which the loss had reached zero, which records do not say; ``None`` leaves it as the
            source says.
        labels: A number or a text for each input of the probe, by which the merge tree is sorted and coloured; ``None``
            leaves them as the source says.
        stopped: Why training was stopped; ``None`` leaves it as the source says.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is nothing at the source's path.
        ImportError: If matplotlib is not installed.
        ValueError: If the source holds nothing of a monitor.
    """
    history = read_history(source, name=name)
    given: dict[str, Any] = {"zero_loss_step": zero_loss_step, "labels": labels, "stopped": stopped}
    history = replace(history, **{field: value for field, value in given.items() if value is not None})
    if path is None:
        path = (run_folder(Path(source)) if isinstance(source, str | Path) else Path()) / PAGE
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(history), encoding="utf-8")
    return path


def page_of(history: History) -> str:
    """Return the page of a run as HTML."""
    from lightning_basin.pages.sections import sections_of  # Loading matplotlib takes half a second.

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("lightning_basin.pages").joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        history=history,
        sentence=sentence(history),
        headlines=headlines(history),
        sections=sections_of(history),
        layers=layers_table(history) if history.layers else None,
        data_id=DATA_ID,
        data=write_data(history),
        version=version("lightning-basin"),
    )
