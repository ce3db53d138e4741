"""Figures of runs, drawn with matplotlib on axes of the caller's.

They need matplotlib, which ``pip install 'lightning-basin[figures]'`` installs.
"""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ImportError("figures need matplotlib: pip install 'lightning-basin[figures]'")

from lightning_basin.figures.curves import plot_history, plot_loss, plot_nullity, plot_tolerances
from lightning_basin.figures.layers import plot_layers
from lightning_basin.figures.merges import plot_merges
from lightning_basin.figures.runs import plot_band, plot_final
from lightning_basin.figures.spectrum import plot_spectrum

__all__ = [
    "plot_band",
    "plot_final",
    "plot_history",
    "plot_layers",
    "plot_loss",
    "plot_merges",
    "plot_nullity",
    "plot_spectrum",
    "plot_tolerances",
]
