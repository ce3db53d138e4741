"""Maps of layers over steps: where directions are lost, and where inputs become one."""

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from lightning_basin.figures.style import INK, QUIET, axes_or_new, edges_of, label_steps, mark_zero_loss, write_beside
from lightning_basin.history.sources import Source, read_history
from lightning_basin.layer_names import shortened

LayerQuantity = Literal["lost_rank", "duplicated_activations", "dead_units"]

_TITLES: dict[LayerQuantity, str] = {
    "lost_rank": "Share of each layer's directions that no output responds to (%)",
    "duplicated_activations": "Inputs that the layer no longer distinguishes from another one",
    "dead_units": "Units that are constant over the probe",
}
_COLORS: dict[LayerQuantity, list[str]] = {
    "lost_rank": ["#f1f1ef", "#f0b3bd", "#c8102e", "#5c0616"],
    "duplicated_activations": ["#f1f1ef", "#9cc3d0", "#1f6f8b", "#0b2f3d"],
    "dead_units": ["#f1f1ef", "#d9c9a3", "#b26a00", "#4a2c00"],
}
_NAMED = 40
"""The largest number of layers whose names stand at the axis; of more, a part is named."""

_ROW, _HIGHEST = 0.27, 6.5
"""The height of a layer, and the largest height of all of them, in inches."""

NAME_LENGTH = 28
"""The largest number of characters of a layer's name in a figure."""


def plot_layers(source: Source, ax: Axes | None = None, *, quantity: LayerQuantity = "lost_rank") -> Axes:
    """Draw a quantity of each layer over the steps as a map: layers from top to bottom, in the order of the network.

    Args:
        source: Records, or the path of a table or of a log directory.
        ax: The axes; ``None`` makes a new figure.
        quantity: ``"lost_rank"``, the share of a layer's ``min(m, N)`` directions that its rank lacks, in percent;
            ``"duplicated_activations"`` or ``"dead_units"``.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If the run has no values of layers, or if there is no such map.
    """
    if quantity not in _TITLES:
        raise ValueError(f"quantity must be among {[*_TITLES]}, got {quantity!r}")
    history = read_history(source)
    if not history.layers:
        raise ValueError(f"the run {history.name!r} has no values of layers: measure with layers='auto'")
    values = np.stack(
        [
            100.0 * history.lost_share(layer) if quantity == "lost_rank" else history.column(quantity, layer)
            for layer in history.layers
        ]
    )
    ax = axes_or_new(ax, (6.4, 1.2 + map_height(len(values))))
    colors = LinearSegmentedColormap.from_list(quantity, _COLORS[quantity])
    highest = 100.0 if quantity == "lost_rank" else max(1.0, float(np.nanmax(values, initial=0.0)))
    edges = edges_of(history.steps)
    ax.pcolormesh(edges, np.arange(len(values) + 1), values, cmap=colors, vmin=0, vmax=highest, rasterized=True)
    _name_rows(ax, list(history.layers), values[:, -1], edges[-1])
    label_steps(ax, history)
    ax.set_xlim(edges[0], edges[-1])
    mark_zero_loss(ax, history, named=False)
    ax.set_title(_TITLES[quantity], fontsize="medium")
    return ax


def map_height(num_layers: int) -> float:
    """Return the height of a map, in inches."""
    return min(_ROW * num_layers, _HIGHEST)


def _name_rows(ax: Axes, names: list[str], last: NDArray[np.float64], right: float) -> None:
    every = -(-len(names) // _NAMED)
    shown = range(0, len(names), every)
    ax.set_ylim(len(names), 0)
    ax.set_yticks(
        [row + 0.5 for row in shown], [shortened(names[row], NAME_LENGTH) for row in shown], fontsize="small", color=INK
    )
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if len(names) <= _NAMED:
        for row in range(1, len(names)):
            ax.axhline(row, color="white", linewidth=1.5)
    for row in shown:
        if not np.isnan(last[row]):
            color = INK if last[row] > 0 else QUIET
            write_beside(ax, f"{last[row]:,.0f}", (right, row + 0.5), fontsize="small", color=color)
