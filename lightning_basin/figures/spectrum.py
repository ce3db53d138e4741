"""The singular values over the steps of a run: where directions go that are lost."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm

from lightning_basin.figures.style import BOUND, QUIET, axes_or_new, edges_of, label_steps, mark_zero_loss, write_beside
from lightning_basin.functional.rank import BINS_PER_DECADE
from lightning_basin.history.sources import Source, read_history

_COLORS = LinearSegmentedColormap.from_list("singular values", ["#f0b3bd", "#c8102e", "#5c0616"])
"""Shades of the rank's colour, which are seen on white and on black."""


def plot_spectrum(source: Source, ax: Axes | None = None, *, layer: str | None = None) -> Axes:
    """Draw how many singular values of the behavioral gradients there are of each size, over the steps.

    The darker a cell, the more singular values are in its quarter of a decade. The dashed line is the tolerance, up to
    which a singular value counts as zero; what is rounding is not drawn.

    Args:
        source: Records, the path of a report or a table, or a log directory. A report holds the singular values of the
            network and of the eight layers that have lost most; a table that a logger has written holds none.
        ax: The axes; ``None`` makes a new figure.
        layer: The layer's name in logged keys; ``None`` draws the network.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If the source does not hold these singular values.
    """
    history = read_history(source)
    if layer not in history.spectra:
        scope = "the network" if layer is None else f"the layer {layer!r}"
        held = ["the network" if name is None else name for name in history.spectra]
        raise ValueError(f"the run {history.name!r} must hold singular values of {scope}, but has those of {held}")
    spectrum = history.spectra[layer]
    counts, first = spectrum.table()
    ax = axes_or_new(ax)
    edges = edges_of(history.steps)
    ends = [*edges[spectrum.measured], edges[-1]]
    heights = (first + np.arange(len(counts) + 1)) / BINS_PER_DECADE
    shades = LogNorm(1, max(2, int(counts.max())))
    ax.pcolormesh(ends, heights, np.where(counts, counts, np.nan), cmap=_COLORS, norm=shades, rasterized=True)
    cuts = np.array([spectrum.cuts[index] for index in spectrum.measured], dtype=np.float64)
    ax.plot(ends, [*cuts, cuts[-1]], color=BOUND, linewidth=1.2, linestyle=(0, (4, 2.5)), drawstyle="steps-post")
    ax.set_ylim(min(heights[0], np.nanmin(cuts)) - 1, heights[-1] + 1)
    for height, text, color in (cuts[-1], "zero up to here", BOUND), (heights[-1], f"darkest: {counts.max():,}", QUIET):
        write_beside(ax, text, (1.0, float(height)), xycoords=("axes fraction", "data"), color=color)
    label_steps(ax, history)
    ax.set_xlim(edges[0], edges[-1])
    mark_zero_loss(ax, history)
    ax.set_ylabel("log₁₀ of singular values")
    return ax
