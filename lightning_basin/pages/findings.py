"""What a run has shown, in words and integers: headlines, what is known of each, and tables."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_basin.history.columns import Column, History
from lightning_basin.history.knowledge import counted_nullity, nullity_knowledge, rank_knowledge


@dataclass(frozen=True)
class Headline:
    """A number at the top of a report, how it came there, what is known of it, and the word by which it is coloured."""

    name: str
    value: str
    change: str
    knowledge: str
    quantity: str


@dataclass(frozen=True)
class Table:
    """A table under a figure; the first column has the names of the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sentence(history: History) -> str:
    """Say in a few sentences what happened to the rank, when the loss was zero, and which layer merged inputs."""
    rank = history.column("gradient_rank")
    first, last = rank[0], rank[-1]
    change = f"stayed at {last:,.0f}" if first == last else f"went from {first:,.0f} to {last:,.0f}"
    whole = f"The rank {change} of {history.largest_rank()[-1]:,.0f} directions."
    return " ".join([whole, *_saturated(history), *_zero_loss(history), *_merged(history)])


def _saturated(history: History) -> Iterator[str]:
    """At most one sentence: a rank that fills the probe says nothing of the network."""
    if history.column("saturated")[-1] == 1:
        yield "This is all that the probe can show: a larger probe may show more."


def _zero_loss(history: History) -> Iterator[str]:
    """At most one sentence: nothing where no loss was measured."""
    at_zero = history.moments.get("zero loss")
    if at_zero is not None:
        rank = history.column("gradient_rank")[at_zero]
        yield f"The loss reached zero at step {history.zero_loss_step:,}, at rank {rank:,.0f}."
    elif not np.isnan(history.column("loss")).all():
        yield f"The loss did not reach zero in {history.steps[-1]:,} steps."


def _merged(history: History) -> Iterator[str]:
    duplicates = {layer: history.column("duplicated_activations", layer)[-1] for layer in list(history.layers)[1:]}
    merging = {layer: count for layer, count in duplicates.items() if count > 0}
    if merging:
        layer, count = next(iter(merging.items()))
        largest = max(merging, key=lambda name: merging[name])
        most = "" if largest == layer else f", at {largest!r}: {merging[largest]:,.0f}"
        yield f"The first layer that no longer distinguishes all inputs is {layer!r} (duplicates: {count:,.0f}{most})."
    elif duplicates:
        yield "Every layer still distinguishes all inputs."


def headlines(history: History) -> list[Headline]:
    """Return the numbers at the top of a report."""
    return [
        Headline(
            "rank of the behavioral gradients",
            number_text(history.column("gradient_rank")[-1]),
            _way(history, history.column("gradient_rank")),
            rank_knowledge(history)[-1],
            "rank",
        ),
        _nullity(history),
        Headline(
            "duplicates, most at one layer",
            number_text(history.column("duplicated_activations")[-1]),
            _way(history, history.column("duplicated_activations")),
            "proved",
            "information",
        ),
    ]


def _nullity(history: History) -> Headline:
    counted, knowledge = counted_nullity(history)[-1], nullity_knowledge(history)[-1]
    name = "flat directions of the loss"
    total = f"of {number_text(history.num_parameters()[-1])} parameters"
    if knowledge == "bracketed" or not np.isnan(counted):
        return Headline(name, bracket_text(history), total, knowledge, "nullity")
    free = number_text(history.column("gradient_nullity")[-1])
    name = "directions that leave the behavior as it is, at most"
    return Headline(name, free, total, rank_knowledge(history)[-1], "nullity")


def _way(history: History, column: Column) -> str:
    parts = [f"{name} {number_text(column[index])}" for name, index in history.moments.items() if name != "end"]
    return ", ".join(parts)


def moments_table(history: History, rows: Mapping[str, Column]) -> Table:
    """Return measured quantities at the start, at zero loss and at the end, with their least and largest value."""
    moments = history.moments
    measured = {name: column for name, column in rows.items() if not np.isnan(column).all()}
    return Table(
        ("", *moments, "least", "largest"),
        tuple(
            (
                name,
                *(number_text(column[index]) for index in moments.values()),
                number_text(np.nanmin(column)),
                number_text(np.nanmax(column)),
            )
            for name, column in measured.items()
        ),
    )


def layers_table(history: History) -> Table:
    """Return what each layer and the network had at the start, at zero loss and at the end."""
    moments = history.moments
    rows = []
    for layer in [*history.layers, None]:
        rank = history.column("gradient_rank", layer)
        rows.append(
            (
                "network" if layer is None else layer,
                number_text(history.num_parameters(layer)[-1]),
                *(number_text(rank[index]) for index in moments.values()),
                number_text(history.column("gradient_rank_deficit", layer)[-1]),
                bracket_text(history, layer),
                number_text(history.column("duplicated_activations", layer)[-1]),
                number_text(history.column("dead_units", layer)[-1]),
            )
        )
    ranks = ("rank, start", *list(moments)[1:])  # TensorBoard breaks words where heads are longer.
    return Table(("layer", "parameters", *ranks, "lost", "Hessian nullity", "duplicates", "dead units"), tuple(rows))


def markdown_of(history: History) -> str:
    """Return what happened as a bold sentence and a table in Markdown."""
    table = layers_table(history)
    rows = [table.columns, ("---", *("--:",) * (len(table.columns) - 1)), *table.rows]
    lines = [" | ".join(cell or " " for cell in row) for row in rows]
    return f"**{sentence(history)}**\n\n" + "\n".join(f"| {line} |" for line in lines)


def bracket_text(history: History, layer: str | None = None) -> str:
    """Return what is known at the end of the dimension of a Hessian's null space: a number, or two with "to"."""
    lower = history.column("hessian_nullity_lower", layer)[-1]
    upper = history.column("hessian_nullity_upper", layer)[-1]
    if np.isnan(lower) or lower == upper:
        counted = history.column("hessian_nullity", layer)[-1]
        return number_text(counted if np.isnan(lower) else lower)
    return f"{number_text(lower)} to {number_text(upper)}"


def number_text(value: float) -> str:
    """Write a number for a table: integers whole, others to three digits, a dash for what was not measured."""
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
