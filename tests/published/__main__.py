"""Fit published modules with and without a monitor, and print a row for each: the table behind ``docs/modules.md``.

``python -m tests.published`` takes all packages that are installed, and ``python -m tests.published darts chemprop``
these two. Each package runs in a process of its own.
"""

import contextlib
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from typing import Any

import torch

from lightning_basin import BasinMonitor
from tests.published.modules import ARGUMENTS, PACKAGES, Fit
from tests.training import fingerprint, seeded

HEADER = ("package", "module", "trainer of", "measured with", "same weights", "rank", "nullity", "duplicates", "said")


def state_of(fit: Fit, callbacks: list[Any]) -> Any:
    """What identifies the fitted module's state."""
    with seeded(1), contextlib.redirect_stdout(sys.stderr):  # Some packages print as they train.
        return fingerprint(fit(callbacks).state_dict())


def fitted(fit: Fit, arguments: dict[str, Any]) -> list[str]:
    """The last five cells of a row."""
    without, monitor = state_of(fit, []), BasinMonitor(**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            is_same = state_of(fit, [monitor]) == without
        except Exception as error:  # The table shows a refusal, too.
            return ["", "", "", "", f"{type(error).__name__}: {error}"]
    cells = ["yes" if is_same else "NO", "", "", ""]
    if monitor.records:
        record = monitor.records[-1]
        cells[1] = f"{record.gradient_rank} of {record.num_parameters}"
        if record.hessian_nullity is not None:
            cells[2] = str(record.hessian_nullity)
        elif record.hessian_nullity_lower is not None:
            cells[2] = f"{record.hessian_nullity_lower} to {record.hessian_nullity_upper}"
        if record.duplicated_activations is not None:
            cells[3] = str(record.duplicated_activations)
    messages = [str(warning.message) for warning in caught]
    return [*cells, next((text for text in messages if "BasinMonitor" in text or "Hessian" in text), "")]


def show(package: str, name: str, fit: Fit, text: str, arguments: dict[str, Any]) -> bool:
    """Print a row, and say whether everything was measured."""
    try:
        cells = fitted(fit, arguments)
    except Exception as error:  # Of another version of the package, say.
        cells = ["", "", "", "", f"fails without a monitor: {type(error).__name__}: {error}"]
    cells[-1] = re.sub(r"\s+", " ", cells[-1]).replace("|", "/")[:100]
    about = [f"`{package}` {metadata.version(package)}", f"`{name}`", f"`{PACKAGES[package][0]}`"]
    print(f"| {' | '.join([*about, f'`BasinMonitor({text})`', *cells])} |", flush=True)
    return all(cells[:-1])


def show_package(package: str) -> None:
    """Print the rows of a package; with arguments where `BasinMonitor()` alone does not measure everything."""
    for name, fit in PACKAGES[package][1]().items():
        if not show(package, name, fit, "", {}) and package in ARGUMENTS:
            text, arguments = ARGUMENTS[package]
            show(package, name, fit, text, arguments())


def main(names: list[str]) -> None:
    """Print the rows of one package, or start a process for each of several."""
    if len(names) == 1:
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # Some packages write logs.
            return show_package(names[0])
    print(f"| {' | '.join(HEADER)} |\n|{len(HEADER) * '---|'}", flush=True)
    for name in names or PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            subprocess.run([sys.executable, "-m", "tests.published", name], check=False)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
