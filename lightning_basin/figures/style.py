"""How all figures look: one colour for each quantity, one line style for each kind of knowledge, names at line ends."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_basin.history.columns import Column, History
from lightning_basin.history.knowledge import Knowledge

INK, QUIET, PALE = "#222222", "#767676", "#f1f1ef"
RANK, NULLITY, INFORMATION, BOUND, ZERO_LOSS = "#c8102e", "#1f6f8b", "#0b5d7a", "#444444", "#b26a00"
"""Colours that colour-blind readers can tell apart by their lightness too; the report exchanges them in the dark."""

TOLERANCE_COLORS = ("#5c0616", "#8f1026", "#b8142d", "#d9566d", "#e88a9a")
"""The colours of ranks at five tolerances, the strictest one first; a page exchanges dark and light in the dark."""

LINE_STYLES: dict[Knowledge, Any] = {
    "proved": "-",
    "bracketed": (0, (1, 1)),
    "lower bound": (0, (7, 2)),
    "ill-defined": (0, (1, 3)),
}
"""How a curve is drawn by what is known of its values, the same in every figure."""

FIGURE_SIZE = (6.4, 3.2)
"""Inches; large letters on a small figure stay legible as a thumbnail."""


def axes_or_new(ax: Axes | None, size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """Return the axes of the caller, or those of a new figure of a size in inches, which pyplot does not know."""
    if ax is None:
        ax = Figure(figsize=size, layout="constrained").add_subplot()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(QUIET)
    ax.tick_params(colors=QUIET)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(INK)
    return ax


def draw_steps(ax: Axes, steps: Any, values: Column, **style: Any) -> None:
    """Draw a quantity that is known at some steps and stays as it is until the next one; of NaN nothing is drawn."""
    is_known = ~np.isnan(values)
    marker = {"marker": "o", "markersize": 4} if is_known.sum() == 1 else {}  # One point has no line.
    ax.plot(steps[is_known], values[is_known], drawstyle="steps-post", **{**marker, **style})


def draw_known(ax: Axes, steps: Any, values: Column, knowledge: Iterable[Knowledge], **style: Any) -> None:
    """Draw a curve whose line style says at each step what is known of it."""
    kinds = list(knowledge)
    changes = [i for i, (before, after) in enumerate(pairwise(kinds), start=1) if before != after]
    edges = [0, *changes, len(kinds)]
    for start, end in pairwise(edges):
        piece = slice(start, min(end + 1, len(kinds)))  # Up to the first value of the next kind.
        draw_steps(ax, steps[piece], values[piece], linestyle=LINE_STYLES[kinds[start]], **style)


def mark_zero_loss(ax: Axes, history: History, *, named: bool = True) -> None:
    """Draw the line at which the loss had reached zero, if it has."""
    step = history.zero_loss_step
    if step is None:
        return
    ax.axvline(step, color=ZERO_LOSS, linewidth=1.4, zorder=5)
    if named:
        is_late = step > 0.85 * history.steps[-1]
        ax.annotate(
            "zero loss",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if is_late else 4, -2),
            textcoords="offset points",
            color=ZERO_LOSS,
            ha="right" if is_late else "left",
            va="top",
            fontsize="small",
        )


def name_end(ax: Axes, history: History, value: float, text: str, *, color: str, offset: float = 0.0) -> None:
    """Write the name of a curve, with its last value, some points above its right end; of NaN nothing is written."""
    if not np.isnan(value):
        write_beside(ax, text, (float(history.steps[-1]), value), xytext=(6, offset), color=color)


def write_beside(ax: Axes, text: str, place: tuple[float, float], **style: Any) -> None:
    """Write some points to the right of a place, also outside of the axes."""
    style = {"xytext": (6, 0), "va": "center", **style}
    ax.annotate(text, place, textcoords="offset points", annotation_clip=False, **style)


def edges_of(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the cells of a map begin and end: the last one is as wide as the one before it."""
    return np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))


def label_steps(ax: Axes, history: History) -> None:
    """Let the horizontal axis be the optimizer steps of a run."""
    first, last = int(history.steps[0]), int(history.steps[-1])
    ax.set_xlim(first, last if last > first else first + 1)
    ax.set_xlabel("optimizer steps")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def last_known(values: Column) -> float:
    """Return the last value that was measured; NaN for none."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else float("nan")


def at_least(ax: Axes, top: float) -> None:
    """Let the vertical axis begin at zero and leave room above the largest value."""
    ax.set_ylim(0, max(1.0, 1.12 * top))
