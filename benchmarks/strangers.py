"""Modules as their packages publish them, each fitted with and without ``BasinMonitor()``.

``python -m benchmarks.strangers`` prints a row for each module of the packages that are installed, and
``python -m benchmarks.strangers darts chemprop`` those of these packages. Each package runs in a process of its own.
"""

import contextlib
import logging
import random
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch

from benchmarks.published_modules import PACKAGES, WITH, Fit
from lightning_basin import BasinMonitor


def state_of(fit: Fit, callbacks: list[Any]) -> dict[str, Any]:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with contextlib.redirect_stdout(sys.stderr):  # Some packages print as they train.
        return fit(callbacks).state_dict()


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else repr(one) == repr(other)


def fitted(fit: Fit, arguments: dict[str, Any]) -> tuple[list[str], str]:
    """Whether the weights are the same, gradients, Hessian and duplicates; and what was said."""
    without = state_of(fit, [])
    monitor = BasinMonitor(**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state = state_of(fit, [monitor])
        except Exception as error:  # What the row is for: also what should not have been raised.
            return 4 * [""], f"{type(error).__name__}: {error}"
    messages = [str(item.message) for item in caught]
    said = [message for message in messages if "BasinMonitor" in message or "Hessian" in message]
    is_same = state.keys() == without.keys() and all(same(state[name], without[name]) for name in state)
    numbers = ["yes" if is_same else "NO", "", "", ""]
    if monitor.records:
        record = monitor.records[-1]
        numbers[1] = f"{record.gradient_rank} of {record.num_parameters}"
        if record.hessian_nullity is not None:
            numbers[2] = str(record.hessian_nullity)
        elif record.hessian_nullity_lower is not None:
            numbers[2] = f"{record.hessian_nullity_lower}–{record.hessian_nullity_upper}"
        if record.duplicated_activations is not None:
            numbers[3] = str(record.duplicated_activations)
    return numbers, said[0] if said else ""


def show(package: str, name: str, fit: Fit, what: str, arguments: dict[str, Any]) -> bool:
    """Print a row, and say whether it has all numbers."""
    try:
        numbers, said = fitted(fit, arguments)
    except Exception as error:  # Another version of the package, say.
        numbers, said = 4 * [""], f"fails without monitor: {type(error).__name__}: {error}"
    said = re.sub(r"\s+", " ", said).replace("|", "/")[:100]
    of, package = PACKAGES[package][0], f"`{package}` {metadata.version(package)}"
    print(f"| {' | '.join([package, f'`{name}`', f'`{of}`', f'`BasinMonitor({what})`', *numbers, said])} |", flush=True)
    return all(numbers)


def measured(package: str) -> None:
    try:
        for name, fit in PACKAGES[package][1]():
            if not show(package, name, fit, "", {}) and package in WITH:
                show(package, name, fit, WITH[package][0], WITH[package][1]())
    except Exception as error:  # Not installed as a whole, say.
        print(f"{package} cannot be fitted. {type(error).__name__}: {error}", file=sys.stderr)


def main(names: list[str]) -> None:
    if len(names) == 1:
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # Some packages write logs.
            measured(names[0])
        return
    print("| package | module | trainer of | measured with | same weights | rank | nullity | duplicates | said |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in names or PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            subprocess.run([sys.executable, "-m", "benchmarks.strangers", name], check=False)


if __name__ == "__main__":
    main(sys.argv[1:])
