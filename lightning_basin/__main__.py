"""``python -m lightning_basin``: the curves of a run from its checkpoints, and what a run has shown."""

import argparse
import ast
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_basin.callback.lightnings import MisconfigurationException
from lightning_basin.callback.monitor import BasinMonitor
from lightning_basin.commands import COMMANDS
from lightning_basin.offline import measure_checkpoints
from lightning_basin.probe import Probe


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure checkpoints as a command line says, or run the command that it begins with."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given and given[0] in COMMANDS:
            COMMANDS[given[0]](given[1:])
        else:
            _measure(given)
        sys.stdout.flush()
    except BrokenPipeError:  # Of `head`, say. Python writes what is left at its exit, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _measure(arguments: Sequence[str]) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    functions = {"loss_fn": options.loss_fn, "behavior": options.behavior, "probe": options.probe}
    given = {name: value for name, value in functions.items() if value is not None}
    settings = dict(options.set)
    if both := given.keys() & settings.keys():
        parser.error(f"argument --set: {sorted(both)} must be given once, but came as options too")
    if unknown := settings.keys() - inspect.signature(BasinMonitor).parameters.keys():
        parser.error(f"argument --set: {sorted(unknown)} must be arguments of BasinMonitor")
    try:
        measure_checkpoints(
            options.checkpoints,
            options.module,
            BasinMonitor(**given, **settings),
            log_dir=options.log_dir,
            device=options.device,
            weights_only=not options.trust,
        )
    except (MisconfigurationException, FileNotFoundError, TypeError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_basin",
        description="Measure checkpoints of a run, and write the curves that a BasinMonitor in it would have written. "
        "Other commands: report (writes a page on a run), show (prints a run), compare (prints several). Each has a "
        "--help of its own.",
    )
    name = "PACKAGE.MODULE:NAME"
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoints of Lightning, or directories of them")
    parser.add_argument(
        "--module",
        required=True,
        type=_imported,
        metavar=name,
        help="class of the LightningModule, or a function that returns a module which takes the weights",
    )
    parser.add_argument(
        "--log-dir", required=True, type=Path, help="where to write events, metrics.csv, <prefix>.jsonl and report.html"
    )
    parser.add_argument(
        "--probe",
        type=_probe,
        metavar=f"FILE|{name}",
        help="a file of torch.save((inputs, targets)), or a function that returns them; without it, the probe that a "
        "BasinMonitor has left in the checkpoints",
    )
    parser.add_argument("--loss-fn", type=_imported, metavar=name, help="from outputs and targets to a scalar")
    parser.add_argument("--behavior", type=_imported, metavar=name, help="from a module and inputs to outputs")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        type=_setting,
        metavar="ARGUMENT=VALUE",
        help="any other argument of BasinMonitor, for example hessian=False prefix=held_out",
    )
    parser.add_argument("--device", type=_device, default="cpu", help="where to measure (default: %(default)s)")
    parser.add_argument("--trust", action="store_true", help="also read checkpoints that bring code along, and run it")
    return parser


def _imported(reference: str) -> Any:
    package, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{reference!r} must be PACKAGE.MODULE:NAME. {error}") from error


def _probe(reference: str) -> Any:
    if not Path(reference).is_file():
        if ":" not in reference:
            raise argparse.ArgumentTypeError(f"there is no file {reference!r}, and it is no PACKAGE.MODULE:NAME")
        return _imported(reference)()
    try:
        probe = torch.load(reference, weights_only=True)
    except Exception as error:  # Whatever torch raises for a file that is none of its own.
        raise argparse.ArgumentTypeError(f"{reference} must be a file of torch.save((inputs, targets))") from error
    if not isinstance(probe, Probe | tuple | list):
        kind = type(probe).__name__
        raise argparse.ArgumentTypeError(f"{reference} must hold a pair of inputs and targets, got {kind}")
    return probe


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} must be a device of this machine. {error}") from error
    return device


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be ARGUMENT=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # A word without quotes.
        return name, value


if __name__ == "__main__":
    main()
