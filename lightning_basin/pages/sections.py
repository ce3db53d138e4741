"""The figures of a report: what each one shows, how to read it, and the integers under it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from lightning_basin.figures import (
    plot_history,
    plot_layers,
    plot_loss,
    plot_merges,
    plot_nullity,
    plot_spectrum,
    plot_tolerances,
)
from lightning_basin.figures.layers import NAME_LENGTH, LayerQuantity, map_height
from lightning_basin.history.columns import History
from lightning_basin.history.knowledge import counted_nullity, is_nullity_known
from lightning_basin.pages.drawing import NARROW_WIDTH, WIDTH, svg_of
from lightning_basin.pages.findings import Table, moments_table

_INCHES_PER_LETTER, _LEFT = 0.075, 0.85
"""The width of a letter of a layer's name, and the least space left of axes, for the vertical axis."""


@dataclass(frozen=True)
class Section:
    """A figure of the page, how to read it, and the table under it."""

    title: str
    text: str
    figure: str = ""
    table: Table | None = None


def sections_of(history: History) -> Iterator[Section]:
    """Draw all figures for which a run has values."""
    yield _rank(history)
    if not np.isnan(history.column("log10_loss")).all():
        yield _loss(history)
    if is_nullity_known(history):
        yield _nullity(history)
    if history.layers:
        text = "Layers from the inputs (top) to the outputs (bottom). At the right end the value at the end."
        yield _map(history, "Which layer lost it: the share of its directions, in percent", text, "lost_rank")
        text = "Inputs whose activation in front of the layer is that of another input."
        yield _map(history, "Where inputs become one", text, "duplicated_activations")
    if history.merged_inputs and history.merged_inputs[-1]:
        yield _merges(history)
    if not np.isnan(history.column("gradient_rank_at_1e-06")).all():
        yield _tolerances(history)
    yield _spectrum(history)


def _rank(history: History) -> Section:
    text = (
        "How many independent directions in parameter space the outputs on the probe respond to. Where the rank meets "
        "the dashed line, the merged inputs explain all that was lost."
    )
    rows = {
        "rank": history.column("gradient_rank"),
        "allowed by merges": history.column("gradient_rank_bound"),
        "lost directions": history.column("gradient_rank_deficit"),
        "digits of the gap": history.column("gradient_rank_gap"),
    }
    figure = _over_steps(history, partial(plot_history, history), "rank", 3.2, "Rank of the behavioral gradients")
    return Section("What can still change: the rank", text, figure, moments_table(history, rows))


def _loss(history: History) -> Section:
    figure = _over_steps(history, partial(plot_loss, history), "loss", 1.7, "Logarithm of the loss")
    return Section("The loss on the probe", "", figure)


def _nullity(history: History) -> Section:
    text = (
        "Directions that leave the loss flat. The band is proved: the nullity is inside of it. At a perfect fit of a "
        "regression it closes at N − rank."
    )
    if np.isnan(history.column("hessian_nullity_lower")).all():
        text = (
            "Directions that leave the loss flat, counted without a bracket, as this loss has none. Where the line is "
            "dotted a residual is left, and another tolerance gives another number."
        )
    rows = {
        "counted": counted_nullity(history),
        "at least": history.column("hessian_nullity_lower"),
        "at most": history.column("hessian_nullity_upper"),
        "N − rank": history.column("gradient_nullity"),
    }
    figure = _over_steps(history, partial(plot_nullity, history), "nullity", 2.8, "Bracket of the Hessian's nullity")
    return Section("How flat the basin is: the null space", text, figure, moments_table(history, rows))


def _map(history: History, title: str, text: str, quantity: LayerQuantity) -> Section:
    draw = partial(plot_layers, history, quantity=quantity)
    return Section(title, text, _over_steps(history, draw, quantity, 0.65 + map_height(len(history.layers)), title))


def _merges(history: History) -> Section:
    figure = svg_of(
        partial(plot_merges, history),
        name="merges",
        height=5.2,
        description="Tree of the inputs that become one from layer to layer",
        narrow=min(WIDTH, max(NARROW_WIDTH, len(history.layers) + 2)),  # An inch for the name of each layer.
    )
    text = (
        f"Each line is an input of the probe, as it was at step {history.steps[-1]:,}. Lines meet in front of the "
        f"layer that no longer distinguishes their inputs. Below each layer stands the number of distinct activations."
    )
    return Section("Which inputs became one: the merge tree", text, figure)


def _tolerances(history: History) -> Section:
    text = (
        "The number of singular values σ above five fractions of the largest. Where the steps lie on each other the "
        "rank is a fact; where they spread it depends on the tolerance."
    )
    figure = _over_steps(history, partial(plot_tolerances, history), "tolerances", 2.8, "Ranks at five tolerances")
    return Section("How sharp the rank is", text, figure)


def _spectrum(history: History) -> Section:
    title = "Where singular values go: the spectrum"
    if None not in history.spectra:
        text = (
            "This run has no singular values: its ranks were proved without (every_n_spectra, spectrum=False), or it "
            "was read from the table of a logger, which holds single numbers only."
        )
        return Section(title, text)
    text = (
        "How many singular values of the network's gradients there are of each size: the darker, the more. What falls "
        "below the dashed line counts as zero. Directions that are lost cleanly leave a gap above it; where values "
        "pile up at the line, the rank depends on the tolerance."
    )
    figure = _over_steps(history, partial(plot_spectrum, history), "spectrum", 3.2, "Number of singular values by size")
    return Section(title, text, figure)


def _over_steps(history: History, draw: Callable[..., Axes], name: str, height: float, what: str) -> str:
    """A figure whose axes begin and end where those of all others over steps do."""
    longest = min(NAME_LENGTH, max((len(layer) for layer in history.layers), default=0))
    left = max(_LEFT, 0.15 + _INCHES_PER_LETTER * longest)
    return svg_of(
        lambda ax: draw(ax=ax),
        name=name,
        height=height,
        description=f"{what} over steps",
        left=left,
        narrow=NARROW_WIDTH + left - _LEFT,
    )
