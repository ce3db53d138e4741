"""From an experiment to its page: run it, print and check what was measured, and renew numbers and figure."""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

Result = TypeVar("Result")

DOCS = Path("docs/claims")
_MEASURED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end of measured -->)", re.DOTALL)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Write a table in Markdown.

    Example:
        >>> print(table(["width", "share"], [[2, 0.5]]))
        | width | share |
        |---|---|
        | 2 | 0.5 |
    """
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, *rows)).replace(
        "\n", f"\n|{'---|' * len(header)}\n", 1
    )


def publish(
    module: str,
    *,
    run: Callable[[], Result],
    check: Callable[[Result], None],
    describe: Callable[[Result], str],
    draw: Callable[[Result], Figure],
    write: bool | None = None,
) -> None:
    """Run an experiment in full size.

    Args:
        module: The name of its module, ``examples.claims.NAME``.
        run: A function that runs it.
        check: A function that raises an AssertionError where its finding does not hold.
        describe: A function that writes what was measured, in Markdown.
        draw: A function that draws the figure.
        write: Whether to renew the page; ``None`` asks the command line.
    """
    if write is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--write", action="store_true", help="renew the page in docs/claims")
        write = parser.parse_args().write
    torch.set_num_threads(1)  # The matrices are tiny: threads would wait for each other.
    name = module.rpartition(".")[2]
    started = _processor_seconds()
    result = run()
    seconds = _processor_seconds() - started
    measured = describe(result)
    print(f"{measured}\n\n{seconds:.0f} seconds")
    folder = DOCS if write else Path("logs/claims")
    folder.mkdir(parents=True, exist_ok=True)
    draw(result).savefig(folder / f"{name}.png", dpi=100)
    if write:
        _renew(name, module, measured, seconds, result)
    check(result)
    print("The finding holds.")


def _processor_seconds() -> float:
    """Sum the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _renew(name: str, module: str, measured: str, seconds: float, result: Any) -> None:
    versions = {package: version(package) for package in ("lightning-basin", "torch", "scipy")}
    command = f"python -m {module}"
    told = ", ".join(f"{package} {number}" for package, number in versions.items())
    lines = [measured, f"![{name}]({name}.png)", f"`{command}`: {seconds:.0f} seconds of one core; {told}."]
    path = DOCS / f"{name}.md"
    text = "\n\n".join(lines) + "\n\n"
    path.write_text(_MEASURED.sub(lambda _: "\n" + text, path.read_text("utf-8")), "utf-8")
    numbers = {"command": command, "versions": versions, "seconds": round(seconds), "result": asdict(result)}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
