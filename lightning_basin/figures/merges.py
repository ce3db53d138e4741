"""The merge tree: each line is an input, and lines meet at the layer that no longer distinguishes their inputs."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, PathCollection
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from numpy.typing import NDArray

from lightning_basin.figures.style import INFORMATION, INK, QUIET, axes_or_new, write_beside
from lightning_basin.history.sources import Source, read_history
from lightning_basin.layer_names import shortened
from lightning_basin.record import MergedInput

_LABEL_COLORS = (
    *("#c8102e", "#1f6f8b", "#b26a00", "#5b4b8a", "#3b7a57"),
    *("#8a8f98", "#a0527a", "#7a5c2e", "#4f9db8", "#e07a5f"),
)
_MAX_LABELS = len(_LABEL_COLORS)
_GROUP_GAP = 2.0
"""Lines' worth of space between inputs with different labels."""

_MANY = 3
"""The number of inputs from which on a node is counted in words."""

_LINE_HEIGHT = 4.0
"""The height of a line of text, in percent of all inputs."""

_MAX_STAGES = 12
"""The largest number of layers that are drawn; of more, those where inputs merge and the ends."""


def plot_merges(
    source: Source, ax: Axes | None = None, *, step: int | None = None, labels: Sequence[Hashable] | None = None
) -> Axes:
    """Draw which inputs become one, and at which layer, as they were at one measurement.

    Args:
        source: Records, the path of a report or a table, or a log directory. A table that a logger has written holds
            no merges.
        ax: The axes; ``None`` makes a new figure.
        step: The optimizer step of the measurement; ``None`` takes the last one.
        labels: A label for each input of the probe, by which lines are sorted and coloured: its class, for example.
            ``None`` takes those of the source.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If the source does not say which inputs merged, or ``labels`` are not one for each input.
    """
    history = read_history(source)
    index = len(history.steps) - 1 if step is None else history.index_at(step)
    merged = history.merged_inputs[index] if index < len(history.merged_inputs) else None
    if merged is None or history.num_inputs is None:
        raise ValueError(f"the run {history.name!r} does not say which inputs merged: pass records or a log directory")
    labels = history.labels if labels is None else labels
    if labels is not None and len(labels) != history.num_inputs:
        raise ValueError(f"labels must be one for each of {history.num_inputs} inputs, got {len(labels)}")
    stages = merge_stages(merged, list(history.layers), history.num_inputs)
    names = _shown([*stages], stages)
    ax = axes_or_new(ax, (1.6 + 1.1 * len(names), 4.2))
    kinds = list(labels) if labels is not None else [None] * history.num_inputs
    _draw_tree(ax, [stages[name] for name in names], kinds)
    _name_stages(ax, names, [stages[name] for name in names])
    return ax


def merge_stages(merged: Sequence[MergedInput], layers: Sequence[str], num_inputs: int) -> dict[str, NDArray[np.int64]]:
    """Say at each stage of a network which inputs are still distinguished.

    Return for ``"input"``, each layer and ``"output"`` the index of the first input with the same activation, by input.
    """
    first = np.arange(num_inputs)
    stages = {"input": first.copy()}
    for layer in [*layers, None]:
        for item in merged:
            if item.layer == layer:
                # All that had become this input before goes where it goes.
                first[first == item.index] = first[item.equals]
        stages["output" if layer is None else layer] = first.copy()
    return stages


def _shown(names: list[str], stages: dict[str, NDArray[np.int64]]) -> list[str]:
    """Of many layers those at which something changes; the first ones of these, and the output."""
    if len(names) <= _MAX_STAGES:
        return names
    counts = [len(np.unique(stages[name])) for name in names]
    changes = [name for name, before, count in zip(names[1:-1], counts, counts[1:], strict=False) if count < before]
    return [names[0], *changes[: _MAX_STAGES - 2], names[-1]]


def _draw_tree(ax: Axes, stages: Sequence[NDArray[np.int64]], labels: Sequence[Any]) -> None:
    kinds = list(dict.fromkeys(sorted(labels, key=str)))
    colors = {kind: _LABEL_COLORS[i % _MAX_LABELS] for i, kind in enumerate(kinds)}
    if len(kinds) == 1:
        colors = dict.fromkeys(kinds, INFORMATION)
    heights = _heights(stages, labels)
    curves = [
        PathPatch(_curve([height[i] for height in heights]), fill=False, edgecolor=colors[labels[i]])
        for i in range(len(labels))
    ]
    ax.add_collection(PatchCollection(curves, match_original=True, linewidths=0.8, alpha=0.75))
    for place, (stage, height) in enumerate(zip(stages, heights, strict=True)):
        _draw_nodes(ax, place, stage, height, labels, colors, is_last=place == len(stages) - 1)
    lowest = max(float(height.max()) for height in heights)
    ax.set_ylim(lowest + 1.5, -1.5)
    if len(kinds) > 1:
        for kind in kinds:
            members = [i for i, label in enumerate(labels) if label == kind]
            middle = float(np.mean([heights[0][i] for i in members]))
            ax.text(-0.08, middle, str(kind), color=colors[kind], ha="right", va="center", fontsize="small")


def _heights(stages: Sequence[NDArray[np.int64]], labels: Sequence[Any]) -> list[NDArray[np.float64]]:
    """Where each input stands at each stage: by label at first, and in the middle of its class later."""
    order = sorted(range(len(labels)), key=lambda i: (str(labels[i]), int(stages[-1][i]), i))
    base, height = np.empty(len(labels)), 0.0
    for rank, i in enumerate(order):
        if rank and labels[i] != labels[order[rank - 1]]:
            height += _GROUP_GAP
        base[i] = height
        height += 1.0
    heights = []
    for stage in stages:
        sums, counts = np.bincount(stage, base, len(base)), np.bincount(stage, minlength=len(base))
        heights.append((sums / np.maximum(counts, 1))[stage])
    return heights


def _curve(heights: Sequence[float]) -> Curve:
    """A smooth line through the heights at places 0, 1, 2, ..."""
    points, codes = [(0.0, float(heights[0]))], [Curve.MOVETO]
    for place, (before, after) in enumerate(pairwise(heights)):
        if before == after:
            points.append((place + 1.0, float(after)))
            codes.append(Curve.LINETO)
        else:
            points += [(place + 0.5, float(before)), (place + 0.5, float(after)), (place + 1.0, float(after))]
            codes += [Curve.CURVE4] * 3
    return Curve(points, codes)


def _draw_nodes(
    ax: Axes,
    place: int,
    stage: NDArray[np.int64],
    heights: NDArray[np.float64],
    labels: Sequence[Any],
    colors: dict[Any, str],
    *,
    is_last: bool,
) -> None:
    """A dot for each class of inputs with one activation, whose area grows with the class; large ones are counted."""
    classes, firsts, counts = np.unique(stage, return_index=True, return_counts=True)
    several = counts > 1
    mixed = [len({labels[i] for i in np.flatnonzero(stage == name).tolist()}) > 1 for name in classes]
    shades = [INK if is_mixed else colors[labels[int(first)]] for is_mixed, first in zip(mixed, firsts, strict=True)]
    dots: PathCollection = ax.scatter(
        np.full(int(several.sum()), place),
        heights[firsts[several]],
        s=(3.0 + 1.1 * np.sqrt(counts[several])) ** 2,
        c=[shade for shade, is_class in zip(shades, several, strict=True) if is_class],
        edgecolors="white",
        linewidths=0.5,
        zorder=5,
    )
    dots.set_clip_on(False)
    if is_last:
        _count_classes(ax, place, heights[firsts], counts)


def _count_classes(ax: Axes, place: int, heights: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
    """Write how many inputs are one beside the large classes, the largest first, as long as there is room."""
    taken: list[float] = []
    for index in np.argsort(-counts, kind="stable").tolist():
        height, count = float(heights[index]), int(counts[index])
        if count >= _MANY and all(abs(height - other) >= _LINE_HEIGHT * counts.sum() / 100 for other in taken):
            taken.append(height)
            write_beside(ax, f"{count} are one", (place, height), xytext=(10, 0), fontsize="small", color=INK)


def _name_stages(ax: Axes, names: Sequence[str], stages: Sequence[NDArray[np.int64]]) -> None:
    texts = [f"{shortened(name, 14)}\n{len(np.unique(stage)):,}" for name, stage in zip(names, stages, strict=True)]
    ax.set_xticks(range(len(names)), texts, fontsize="small", color=QUIET)
    ax.set_xlim(-0.3, len(names) - 0.6)
    ax.set_yticks([])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
