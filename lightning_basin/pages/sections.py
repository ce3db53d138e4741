"""The figures of a report: what each one shows, how to read it, and the integers under it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_basin.figures import plot_history, plot_layers, plot_loss, plot_merges, plot_nullity, plot_tolerances
from lightning_basin.history.columns import History
from lightning_basin.pages.drawing import svg_of
from lightning_basin.pages.findings import Table, moments_table

_WIDTH = 9.2
"""The width of a figure, in inches; the page scales it."""


@dataclass(frozen=True)
class Section:
    """A figure of the page.

    Attributes:
        title: What the figure shows.
        text: How to read it.
        figure: The figure as SVG.
        table: The table under it; ``None`` for none.
    """

    title: str
    text: str
    figure: str
    table: Table | None = None


def sections_of(history: History, labels: Sequence[Hashable] | None = None) -> list[Section]:
    """Draw all figures for which a run has values.

    Args:
        history: The run.
        labels: A label for each input of the probe, by which the merge tree is sorted and coloured.
    """
    sections = [_rank_section(history)]
    if not np.isnan(history.column("log10_loss")).all():
        figure = svg_of(
            lambda ax: plot_loss(history, ax),
            name="loss",
            size=(_WIDTH, 1.7),
            description="Logarithm of the loss over optimizer steps",
        )
        sections.append(Section("The loss on the probe", "", figure))
    if not np.isnan(history.column("hessian_nullity_lower")).all():
        sections.append(_nullity_section(history))
    if history.layers:
        sections += _layer_sections(history)
    if _has_merges(history):
        sections.append(_merge_section(history, labels))
    if not np.isnan(history.column("gradient_rank_at_1e-06")).all():
        sections.append(_tolerance_section(history))
    return sections


def _has_merges(history: History) -> bool:
    return bool(history.merged_inputs) and bool(history.merged_inputs[-1])


def _rank_section(history: History) -> Section:
    figure = svg_of(
        lambda ax: plot_history(history, ax),
        name="rank",
        size=(_WIDTH, 3.2),
        description="Rank of the behavioral gradients over optimizer steps",
    )
    text = (
        "How many independent directions in parameter space the outputs on the probe respond to. Where the rank meets "
        "the dashed line, the merged inputs explain all that was lost."
    )
    rows = {
        "rank": history.column("gradient_rank"),
        "allowed by merged inputs": history.column("gradient_rank_bound"),
        "lost directions": history.column("gradient_rank_deficit"),
        "digits of the gap": history.column("gradient_rank_gap"),
    }
    return Section("What can still change: the rank", text, figure, moments_table(history, rows))


def _nullity_section(history: History) -> Section:
    figure = svg_of(
        lambda ax: plot_nullity(history, ax),
        name="nullity",
        size=(_WIDTH, 2.8),
        description="Bracket of the dimension of the null space of the Hessian over optimizer steps",
    )
    text = (
        "Directions that leave the loss flat. The band is proved: the nullity is inside of it. At a perfect fit of a "
        "regression it closes at N − rank."
    )
    rows = {
        "at least": history.column("hessian_nullity_lower"),
        "at most": history.column("hessian_nullity_upper"),
        "N − rank": history.column("gradient_nullity"),
    }
    return Section("How flat the basin is: the null space", text, figure, moments_table(history, rows))


def _layer_sections(history: History) -> list[Section]:
    height = 0.7 + 0.26 * min(len(history.layers), 40)
    lost = svg_of(
        lambda ax: plot_layers(history, ax, quantity="lost_rank"),
        name="lost-rank",
        size=(_WIDTH, height),
        description="Lost directions of each layer over optimizer steps",
    )
    merged = svg_of(
        lambda ax: plot_layers(history, ax, quantity="duplicated_activations"),
        name="duplicates",
        size=(_WIDTH, height),
        description="Duplicated activations in front of each layer over optimizer steps",
    )
    return [
        Section("Which layer lost it", "Layers from the inputs (top) to the outputs (bottom).", lost),
        Section("Where inputs become one", "Counted on the activations that enter each layer.", merged),
    ]


def _merge_section(history: History, labels: Sequence[Hashable] | None) -> Section:
    figure = svg_of(
        lambda ax: plot_merges(history, ax, labels=labels),
        name="merges",
        size=(_WIDTH, 5.2),
        description="Tree of the inputs that become one from layer to layer",
        is_over_steps=False,
    )
    text = (
        f"Each line is an input of the probe, as it was at step {history.steps[-1]:,}. Lines meet in front of the "
        f"layer that no longer distinguishes their inputs. Below each layer stands the number of distinct activations."
    )
    return Section("Which inputs became one: the merge tree", text, figure)


def _tolerance_section(history: History) -> Section:
    figure = svg_of(
        lambda ax: plot_tolerances(history, ax),
        name="tolerances",
        size=(_WIDTH, 2.8),
        description="Ranks at five tolerances over optimizer steps",
    )
    text = (
        "The number of singular values σ above five fractions of the largest. Where the steps lie on each other the "
        "rank is a fact; where they spread it depends on the tolerance."
    )
    return Section("How sharp the rank is", text, figure)
