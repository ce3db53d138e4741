"""A run as a table for a terminal: whole columns are left out where it is narrow, and never a digit."""

import io
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from lightning_basin.history.columns import Column, History
from lightning_basin.layer_names import MAX_LAYER_CURVES, shortened
from lightning_basin.naming import printable
from lightning_basin.pages.findings import bracket_text, number_text, sentence
from lightning_basin.printing import aligned

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 12
"""The number of characters of a small curve."""

_OPTIONAL = ("trend", "parameters", "dead units", "zero loss", "duplicates", "Hessian nullity", "start")
"""Columns in the order in which they are left out; the layer's name and its last rank always stay."""

_LONGEST_NAME, _SHORTEST_NAME = 36, 8


def summary_of(history: History, width: int = 100, *, has_colors: bool = False) -> str:
    """Return what happened as a sentence and a table with one row for each layer and the network.

    A line has at most ``width`` characters, 20 or more. Colours need rich.
    """
    columns = _columns(history)
    longest = min(_LONGEST_NAME, max(map(len, list(history.layers)[:MAX_LAYER_CURVES]), default=0))
    for left_out in ("", *_OPTIONAL):
        columns.pop(left_out, None)
        table = _table(history, columns, longest)
        excess = max(map(len, table.splitlines())) - width
        if excess <= 0:
            break
    else:
        table = _table(history, columns, max(_SHORTEST_NAME, longest - excess))
    more = len(history.layers) - MAX_LAYER_CURVES
    note = f"\n(the last {more:,} of {len(history.layers):,} layers are left out)" if more > 0 else ""
    table = printable(table)
    if has_colors and find_spec("rich"):
        table = _colored(table)
    return f"{printable(sentence(history))}\n{table}{note}"


def _table(history: History, columns: dict[str, Sequence[str]], longest_name: int) -> str:
    names = ["network" if scope is None else shortened(scope, longest_name) for scope in _scopes(history)]
    return aligned([["layer", *columns], *map(list, zip(names, *columns.values(), strict=True))])


def _colored(table: str) -> str:
    """Add colours by rich, which is told neither markup nor a width: it crops what does not fit."""
    from rich.console import Console
    from rich.text import Text

    text = Text(table)
    text.highlight_regex(r"^.*\n", "bold")
    text.highlight_regex(r".*$", "bold")
    text.highlight_regex(f"[{_BARS}]+", "red")
    file = io.StringIO()
    Console(file=file, force_terminal=True).print(text, soft_wrap=True, end="")
    return file.getvalue()


def spark(values: Column, largest: float) -> str:
    """Draw a curve with letters, from 0 to the largest value; NaN draws nothing."""
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), _SPARKS)).round().astype(int))
    heights = values[places] / max(largest, 1.0) * (len(_BARS) - 1)
    return "".join(" " if np.isnan(height) else _BARS[min(round(height), len(_BARS) - 1)] for height in heights)


def _scopes(history: History) -> list[str | None]:
    return [*list(history.layers)[:MAX_LAYER_CURVES], None]


def _columns(history: History) -> dict[str, Sequence[str]]:
    scopes, moments = _scopes(history), history.moments
    ranks = {scope: history.column("gradient_rank", scope) for scope in scopes}
    columns: dict[str, Sequence[str]] = {
        "parameters": [number_text(history.num_parameters(scope)[-1]) for scope in scopes]
    }
    for moment, index in moments.items():
        name = "rank" if moment == "end" else moment
        columns[name] = [number_text(ranks[scope][index]) for scope in scopes]
    # The events of a deep network do not say how large the rank of each layer can be.
    largest = [np.nanmax(history.largest_rank(scope), initial=np.nanmax(ranks[scope])) for scope in scopes]
    columns["trend"] = [spark(ranks[scope], float(most)) for scope, most in zip(scopes, largest, strict=True)]
    columns["Hessian nullity"] = [bracket_text(history, scope) for scope in scopes]
    for name, quantity in (("duplicates", "duplicated_activations"), ("dead units", "dead_units")):
        columns[name] = [number_text(history.column(quantity, scope)[-1]) for scope in scopes]
    return columns
