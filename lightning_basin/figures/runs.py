"""Figures of several runs: the middle of all over the steps, and one value of each against another."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_basin.figures.curves import plot_history
from lightning_basin.figures.style import NULLITY, RANK, axes_or_new
from lightning_basin.history.columns import History
from lightning_basin.history.comparison import band_of, final_values
from lightning_basin.history.sources import Source, read_histories


def comparison_figure(histories: Sequence[History], against: str | None) -> Figure:
    """Draw the ranks of several runs, their median, and the last rank against another value, if there is one."""
    figure = Figure(figsize=(7.2, 5.6 if against is None else 9.0), layout="constrained")
    axes = figure.subplots(2 if against is None else 3, 1)
    plot_history(histories, axes[0]).set_title("The rank of each run, with a dot at zero loss")
    plot_band(histories, axes[1]).set_title("Their median, and the band of their middle eight tenths")
    if against is not None:
        plot_final(histories, axes[2], against=against).set_title("Each run at its end")
    return figure


def plot_band(sources: Iterable[Source], ax: Axes | None = None, *, quantity: str = "gradient_rank") -> Axes:
    """Draw the median of a quantity over several runs, in the band of the middle eight tenths.

    Args:
        sources: The runs, each as `plot_history` takes it.
        ax: The axes; ``None`` makes a new figure.
        quantity: The name of a quantity of the network.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a source holds nothing of a monitor.
    """
    histories = read_histories(sources)
    band = band_of(histories, quantity)
    ax = axes_or_new(ax)
    ax.fill_between(band.steps, band.low, band.high, step="post", color=RANK, alpha=0.2, linewidth=0)
    ax.plot(band.steps, band.median, drawstyle="steps-post", color=RANK, linewidth=2.0)
    for history in histories:
        if history.zero_loss_step is not None:
            index = history.index_at(history.zero_loss_step)
            ax.plot(history.steps[index], history.column(quantity)[index], ".", color=NULLITY, markersize=6)
    ax.set_xlabel("optimizer steps")
    ax.set_ylabel(quantity)
    return ax


def plot_final(
    sources: Iterable[Source], ax: Axes | None = None, *, against: str, quantity: str = "gradient_rank"
) -> Axes:
    """Draw a dot for each run: a quantity at the end against another value at the end, a validation error for example.

    Args:
        sources: The runs, each as `plot_history` takes it.
        ax: The axes; ``None`` makes a new figure.
        against: The name of a quantity of the network, or the key of another logged value; it is the vertical axis.
        quantity: The name of a quantity of the network, the horizontal axis.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a run has no such value.
    """
    histories = read_histories(sources)
    points = np.array([list(final_values(history, [quantity, against]).values()) for history in histories])
    ax = axes_or_new(ax, (4.2, 3.6))
    ax.plot(points[:, 0], points[:, 1], "o", color=RANK, markersize=5)
    ax.set_xlabel(quantity)
    ax.set_ylabel(against)
    return ax
