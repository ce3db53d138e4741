"""The commands for runs that were measured: a report of one, its integers for people or programs, a comparison."""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_basin.history.comparison import QUANTITIES, final_values
from lightning_basin.history.page import page_name
from lightning_basin.history.sources import read_histories, read_history, run_folder
from lightning_basin.naming import printable
from lightning_basin.pages.findings import number_text
from lightning_basin.pages.report import report
from lightning_basin.pages.terminal import summary_of
from lightning_basin.printing import aligned

_HEADS = {
    "gradient_rank": "rank",
    "gradient_rank_deficit": "lost",
    "gradient_rank_bound": "bound",
    "hessian_nullity_lower": "nullity from",
    "hessian_nullity_upper": "to",
    "duplicated_activations": "duplicates",
    "log10_loss": "log10 loss",
}
"""Heads of the printed comparison, which fits into a terminal; a file has the names of the quantities."""


def report_command(arguments: Sequence[str]) -> None:
    """Write the report of a run, and print where it is."""
    parser = _parser("report", "Write the report of a run: one page of HTML that needs nothing else.")
    parser.add_argument("--output", type=Path, help="the page to write (default: report.html in the log directory)")
    options = parser.parse_args(arguments)
    try:
        history = read_history(options.run, prefix=options.prefix)
        path = report(history, options.output or run_folder(options.run) / page_name(options.prefix or "basin"))
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(path)  # noqa: T201 - this is what the command is for


def show_command(arguments: Sequence[str]) -> None:
    """Print what a run has shown, or each of the runs below a folder."""
    parser = _parser("show", "Print what a run has shown, or each run below a folder.")
    parser.add_argument("--json", action="store_true", help="print one JSON object a run, with all columns")
    options = parser.parse_args(arguments)
    try:
        histories = read_histories(options.run, prefix=options.prefix)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    width = shutil.get_terminal_size((100, 24)).columns
    for history in histories:
        summary = summary_of(history, width, has_colors=sys.stdout.isatty())
        text = json.dumps(history.to_dict()) if options.json else f"{printable(history.name)}\n{summary}\n"
        print(text)  # noqa: T201 - this is what the command is for


def compare_command(arguments: Sequence[str]) -> None:
    """Print what several runs ended with, and write it as a table or a figure."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_basin compare", description="Compare what runs ended with, seeds for example."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="log directories, folders above them, tables or reports")
    parser.add_argument("--prefix", help="the prefix of the monitors' keys, where runs have several monitors")
    parser.add_argument("--against", metavar="KEY", help="another logged value, a validation error for example")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rank of all runs, and it against KEY")
    options = parser.parse_args(arguments)
    names = [*QUANTITIES, *([] if options.against is None else [options.against])]
    try:
        histories = read_histories(options.runs, prefix=options.prefix)
        values = [final_values(history, names) for history in histories]
        if options.figure is not None:
            from lightning_basin.figures.runs import comparison_figure  # Loading matplotlib takes half a second.

            comparison_figure(histories, options.against).savefig(options.figure)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    rows = [
        [history.name, _step_text(history.zero_loss_step), *map(number_text, row.values())]
        for history, row in zip(histories, values, strict=True)
    ]
    heads = [_HEADS.get(name, name) for name in names]
    print(aligned([["run", "zero loss", *heads], *rows]))  # noqa: T201 - this is what the command is for
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["run", "zero_loss_step", *names])
            writer.writeheader()
            for history, row in zip(histories, values, strict=True):
                writer.writerow({"run": history.name, "zero_loss_step": history.zero_loss_step, **row})


def _step_text(step: int | None) -> str:
    return "never" if step is None else f"{step:,}"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m lightning_basin {command}", description=description)
    parser.add_argument("run", type=Path, help="a log directory, a table (CSV or JSON lines) or a report")
    parser.add_argument("--prefix", help="the prefix of the monitor's keys, where a run has several monitors")
    return parser


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "compare": compare_command,
    "report": report_command,
    "show": show_command,
}
"""What each command does, by its name."""
