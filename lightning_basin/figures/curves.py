"""Curves over the steps of a run: the rank and what allows it, the null space in its bracket, the loss."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from lightning_basin.figures.style import (
    BOUND,
    INFORMATION,
    NULLITY,
    QUIET,
    RANK,
    TOLERANCE_COLORS,
    at_least,
    axes_or_new,
    draw_known,
    draw_steps,
    label_steps,
    last_known,
    mark_zero_loss,
    name_end,
)
from lightning_basin.history.columns import History
from lightning_basin.history.knowledge import counted_nullity, nullity_knowledge, rank_knowledge
from lightning_basin.history.sources import Source, read_histories, read_history

_LINE = 14.0
"""The height of a line of text, in points."""


def plot_history(sources: Source | Iterable[Source], ax: Axes | None = None) -> Axes:
    """Draw the rank of the behavioral gradients over the steps, of one run or of several.

    One run is drawn with the most that its merged inputs allow, and with the largest rank that there can be. Where a
    rank depends on the tolerance its line is dotted; where it is a lower bound it is dashed.

    Args:
        sources: Records, the path of a table (CSV or JSON lines) or of a log directory, or several of them.
        ax: The axes; ``None`` makes a new figure, which is the axes' ``figure``.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a source holds nothing of a monitor.
    """
    histories = read_histories(sources)
    ax = axes_or_new(ax)
    if len(histories) == 1:
        _draw_rank(ax, histories[0])
    else:
        _draw_ranks(ax, histories)
    ax.set_ylabel("directions")
    return ax


def _draw_rank(ax: Axes, history: History) -> None:
    rank, largest = history.column("gradient_rank"), history.largest_rank()
    bound = history.column("gradient_rank_bound")
    draw_steps(ax, history.steps, largest, color=QUIET, linewidth=1.0, zorder=2)
    draw_known(ax, history.steps, rank, rank_knowledge(history), color=RANK, linewidth=2.4, zorder=3)
    draw_steps(ax, history.steps, bound, color=BOUND, linewidth=1.2, linestyle=(0, (4, 2.5)), zorder=4)
    at_least(ax, float(np.nanmax(np.concatenate([largest, rank]))))
    label_steps(ax, history)
    mark_zero_loss(ax, history)
    ends = {
        "rank": (last_known(rank), RANK),
        "allowed by merges": (last_known(bound), BOUND),
        "largest possible": (last_known(largest), QUIET),
    }
    _name_ends(ax, history, ends)


def _name_ends(ax: Axes, history: History, ends: dict[str, tuple[float, str]]) -> None:
    """Write the names of curves at their ends, on lines of their own where curves end at about the same place."""
    bottom, top = ax.get_ylim()
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    line = _LINE * (top - bottom) / max(points, 1.0)
    names = sorted((name for name in ends if not np.isnan(ends[name][0])), key=lambda name: ends[name][0])
    for name, place in zip(names, _apart([ends[name][0] for name in names], line, top), strict=True):
        value, color = ends[name]
        offset = (place - value) / line * _LINE
        name_end(ax, history, value, f"{name} {value:,.0f}", color=color, offset=offset)


def _apart(values: Sequence[float], least: float, top: float) -> list[float]:
    """Move ascending places apart: up to have their distance, and down again below the top.

    Example:
        >>> _apart([1.0, 1.0, 6.0], 2.0, 10.0), _apart([9.0, 9.0, 9.0], 2.0, 10.0)
        ([1.0, 3.0, 6.0], [6.0, 8.0, 10.0])
    """
    places: list[float] = []
    for value in values:
        places.append(max([value, *(place + least for place in places[-1:])]))
    for index in reversed(range(len(places))):
        places[index] = min(places[index], top)
        top = places[index] - least
    return places


def _draw_ranks(ax: Axes, histories: list[History]) -> None:
    """One line a run; line styles say what is known, and the runs' names stand at the ends."""
    longest = max(histories, key=lambda history: int(history.steps[-1]))
    for index, history in enumerate(histories):
        color = f"C{index}"
        draw_known(
            ax, history.steps, history.column("gradient_rank"), rank_knowledge(history), color=color, linewidth=1.8
        )
        if history.zero_loss_step is not None:
            at_zero = history.index_at(history.zero_loss_step)
            ax.plot(history.steps[at_zero], history.column("gradient_rank")[at_zero], "o", color=color, markersize=5)
    at_least(ax, max(float(np.nanmax(history.column("gradient_rank"))) for history in histories))
    label_steps(ax, longest)
    ends = {
        history.name: (last_known(history.column("gradient_rank")), f"C{index}")
        for index, history in enumerate(histories)
    }
    _name_ends(ax, longest, ends)


def plot_nullity(source: Source, ax: Axes | None = None) -> Axes:
    """Draw the dimension of the Hessian's null space in its bracket, down to ``N - rank``.

    Where eigenvalues were counted without a bracket, and a residual is left, the line is dotted: another tolerance
    gives another number. The line of ``N - rank`` says what is known of the rank.

    Args:
        source: Records, or the path of a table or of a log directory.
        ax: The axes; ``None`` makes a new figure.
    """
    history = read_history(source)
    ax = axes_or_new(ax)
    lower, upper = history.column("hessian_nullity_lower"), history.column("hessian_nullity_upper")
    free = history.column("gradient_nullity")
    is_known = ~np.isnan(lower) & ~np.isnan(upper)
    steps = history.steps[is_known]
    ax.fill_between(steps, lower[is_known], upper[is_known], step="post", color=NULLITY, alpha=0.2, linewidth=0)
    for end in (lower, upper):
        draw_known(ax, history.steps, end, ["bracketed"] * len(end), color=NULLITY, linewidth=1.2)
    counted, knowledge = counted_nullity(history), nullity_knowledge(history)
    draw_known(ax, history.steps, counted, knowledge, color=NULLITY, linewidth=2.4, marker="o", markersize=3)
    draw_known(ax, history.steps, free, rank_knowledge(history), color=RANK, linewidth=1.2)
    _fit_between(ax, np.concatenate([lower, upper, counted, free, history.num_parameters()]))
    label_steps(ax, history)
    mark_zero_loss(ax, history)
    nullity = last_known(counted)
    ends = {"N − rank": (last_known(free), RANK)}
    if np.isnan(counted[-1]):
        ends = {"at most": (last_known(upper), NULLITY), "at least": (last_known(lower), NULLITY)} | ends
    else:
        name = "nullity" if knowledge[-1] == "proved" else f"nullity, {knowledge[-1]}"
        ends = {name: (nullity, NULLITY)} | ends
    _name_ends(ax, history, ends)
    ax.set_ylabel("flat directions")
    return ax


def _fit_between(ax: Axes, values: np.typing.NDArray[np.float64]) -> None:
    known = values[~np.isnan(values)]
    if known.size:
        lowest, highest = float(known.min()), float(known.max())
        margin = 0.08 * max(highest - lowest, 1.0)
        ax.set_ylim(lowest - margin, highest + margin)


def plot_loss(source: Source, ax: Axes | None = None) -> Axes:
    """Draw the logarithm of the loss on the probe over the steps.

    Args:
        source: Records, or the path of a table or of a log directory.
        ax: The axes; ``None`` makes a new figure.
    """
    history = read_history(source)
    ax = axes_or_new(ax, (6.4, 1.6))
    loss = history.column("log10_loss")
    is_known = ~np.isnan(loss)
    marker = "o" if is_known.sum() == 1 else None
    ax.plot(history.steps[is_known], loss[is_known], color=QUIET, linewidth=1.4, marker=marker)
    ax.set_ylabel("log₁₀ loss")
    label_steps(ax, history)
    mark_zero_loss(ax, history, named=False)
    return ax


def plot_tolerances(source: Source, ax: Axes | None = None) -> Axes:
    """Draw the rank at five tolerances as a staircase; where they differ, no single integer is right.

    Args:
        source: Records, or the path of a table or of a log directory.
        ax: The axes; ``None`` makes a new figure.
    """
    history = read_history(source)
    ax = axes_or_new(ax)
    tolerances = ("1e-12", "1e-08", "1e-06", "1e-04", "1e-02")
    columns = [history.column(f"gradient_rank_at_{tolerance}") for tolerance in tolerances]
    ends = {}
    for tolerance, color, column, looser in zip(
        tolerances, TOLERANCE_COLORS, columns, [*columns[1:], None], strict=True
    ):
        if looser is not None:
            is_known = ~np.isnan(column) & ~np.isnan(looser)
            ax.fill_between(
                history.steps[is_known], looser[is_known], column[is_known], step="post", color=color, alpha=0.12, lw=0
            )
        draw_steps(ax, history.steps, column, color=color, linewidth=1.6)
        ends[f"σ > {float(tolerance):.0e}:"] = (last_known(column), color)
    rank = history.column("gradient_rank")
    draw_known(ax, history.steps, rank, rank_knowledge(history), color=INFORMATION, linewidth=1.0, zorder=6)
    at_least(ax, float(np.nanmax([np.nanmax(column) for column in [*columns, rank] if not np.isnan(column).all()])))
    label_steps(ax, history)
    mark_zero_loss(ax, history)
    _name_ends(ax, history, {**ends, "rank": (last_known(rank), INFORMATION)})
    ax.set_ylabel("rank")
    return ax
