"""Figures as images: small ones with large letters, which can be read as thumbnails."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_basin.figures.curves import plot_history, plot_nullity
from lightning_basin.figures.layers import plot_layers
from lightning_basin.figures.merges import plot_merges
from lightning_basin.history.columns import History
from lightning_basin.history.knowledge import is_nullity_known

_SIZE, _DPI = (4.6, 3.0), 140
"""Inches, and pixels for each of them: letters of 10 points have 10 pixels in a thumbnail."""


def images_of(history: History) -> dict[str, NDArray[np.uint8]]:
    """Draw the figures for which a run has values, as images by names that sort in the order of reading."""
    draw: dict[str, Callable[[Axes], Axes]] = {"1_rank": lambda ax: plot_history(history, ax)}
    if is_nullity_known(history):
        draw["2_null_space"] = lambda ax: plot_nullity(history, ax)
    if history.layers:
        draw["3_lost_rank_by_layer"] = lambda ax: plot_layers(history, ax)
        draw["4_duplicates_by_layer"] = lambda ax: plot_layers(history, ax, quantity="duplicated_activations")
    if history.merged_inputs and history.merged_inputs[-1]:
        draw["5_merges"] = lambda ax: plot_merges(history, ax)
    return {name: image_of(function) for name, function in draw.items()}


def image_of(draw: Callable[[Axes], Axes]) -> NDArray[np.uint8]:
    """Return what a function draws on axes as an image, shape ``(height, width, 3)``."""
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
