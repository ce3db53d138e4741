"""The commands for runs that were measured: a report of one, and its integers in a terminal or for a program."""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_basin.history.sources import read_histories, read_history
from lightning_basin.pages.report import report
from lightning_basin.pages.terminal import summary_of


def report_command(arguments: Sequence[str]) -> None:
    """Write the report of a run, and print where it is.

    Args:
        arguments: The arguments behind the name of the command.
    """
    parser = _parser("report", "Write the report of a run: one page of HTML that needs nothing else.")
    parser.add_argument("--output", type=Path, help="the page to write (default: report.html in the log directory)")
    options = parser.parse_args(arguments)
    try:
        history = read_history(options.run, prefix=options.prefix)
        folder = options.run if options.run.is_dir() else options.run.parent
        path = report(history, options.output or folder / "report.html")
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    print(path)  # noqa: T201 - this is what the command is for


def show_command(arguments: Sequence[str]) -> None:
    """Print what a run has shown, or each of the runs below a folder.

    Args:
        arguments: The arguments behind the name of the command.
    """
    parser = _parser("show", "Print what a run has shown, or each run below a folder.")
    parser.add_argument("--json", action="store_true", help="print one JSON object a run, with all columns")
    options = parser.parse_args(arguments)
    try:
        histories = read_histories(options.run, prefix=options.prefix)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    width = shutil.get_terminal_size((100, 24)).columns
    for history in histories:
        text = json.dumps(history.to_dict()) if options.json else f"{history.name}\n{summary_of(history, width)}\n"
        print(text)  # noqa: T201 - this is what the command is for


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m lightning_basin {command}", description=description)
    parser.add_argument("run", type=Path, help="a log directory, a table (CSV or JSON lines) or a report")
    parser.add_argument("--prefix", help="the prefix of the monitor's keys, where a run has several monitors")
    return parser


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"report": report_command, "show": show_command}
"""What each command does, by its name."""
