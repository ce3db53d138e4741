"""A network that must merge its inputs has a flat basin, of a dimension that can be counted beforehand.

Networks 16-w-16-1 with tanh see all 64 pairs of two categories with 8 values each (one-hot), and learn a label that
depends on the first category only. With w = 1 a network fits the labels only by merging the 8 inputs of each first
category. Then 64 - 8 = 56 activations are duplicated, the rank of the behavioral gradients is 8 + 1 * 7 = 15 (bound B4:
8 distinct activations, and one unit times the 7 differences between second categories), and N - 15 = 51 eigenvalues of
the Hessian are zero. A wider network needs no merge: predicted was no duplicate, and the rank 64 of all inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor, nn

from examples.claims.ensembles import Ensemble, make_ensemble, multilayer_perceptron, train
from examples.claims.page import publish, table
from examples.claims.statistics import share
from lightning_basin import BasinRecord, measure_basin
from lightning_basin.figures.style import BOUND, INFORMATION, NULLITY, RANK, axes_or_new

CATEGORIES = 8
PREDICTED = {"duplicates": 56, "rank": 15, "bound": 15, "Hessian nullity": 51}
COLORS = {"duplicates": INFORMATION, "rank": RANK, "bound": BOUND, "Hessian nullity": NULLITY}
SOLVED = 1e-4  # Mean squared error, of labels with variance one.

Counts = dict[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the networks came to.

    Attributes:
        steps: The steps at which the narrow networks were measured.
        curves: The counts of the first narrow network at these steps.
        narrow: The counts at the end, for each narrow network that fits the labels.
        wide: The counts at the end, for each network of a width that fits the labels, by width.
        num_seeds: The number of networks of each width.
    """

    steps: list[int]
    curves: list[Counts]
    narrow: list[Counts]
    wide: dict[int, list[Counts]]
    num_seeds: int

    @property
    def num_predicted(self) -> int:
        """The number of narrow networks in which all four counts are the predicted ones."""
        return sum(all(count[name] == PREDICTED[name] for name in PREDICTED) for count in self.narrow)

    def num_full(self, width: int) -> int:
        """The number of solutions of a width without a duplicate and with the full rank."""
        return sum(count["duplicates"] == 0 and count["rank"] == CATEGORIES**2 for count in self.wide[width])


def category_pairs() -> tuple[Tensor, Tensor]:
    """Make all pairs, and a label for each first category."""
    codes = torch.eye(CATEGORIES, dtype=torch.float64)
    first, second = codes.repeat_interleave(CATEGORIES, 0), codes.repeat(CATEGORIES, 1)
    labels = torch.randn(CATEGORIES, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([first, second], dim=1), first @ labels


def _counts(record: BasinRecord) -> Counts:
    return {
        "duplicates": record.duplicated_activations,
        "rank": record.gradient_rank,
        "bound": record.gradient_rank_bound,
        "Hessian nullity": record.hessian_nullity,
        "rank at 1e-4": record.gradient_rank_at[1e-4],
    }


def _measure(ensemble: Ensemble, index: int) -> BasinRecord:
    pairs, targets = category_pairs()
    return measure_basin(ensemble.member(index), pairs, targets, loss_fn=nn.MSELoss())


def _counts_of_solutions(ensemble: Ensemble) -> list[Counts]:
    records = [_measure(ensemble, index) for index in range(ensemble.size)]
    return [_counts(record) for record in records if record.loss is not None and record.loss < SOLVED]


def run(
    seeds: Sequence[int] = range(20), widths: Sequence[int] = (2, 4, 8), steps: int = 2500, every: int = 100
) -> Result:
    """Train and measure networks of width 1, and wider ones.

    Args:
        seeds: The seed of each network.
        widths: The widths of the first layer for comparison.
        steps: The number of steps of Adam.
        every: The number of steps between two measurements of the first narrow network.
    """
    measured_at: list[int] = []
    curves: list[Counts] = []
    pairs, targets = category_pairs()

    def train_width(width: int) -> Ensemble:
        ensemble = make_ensemble(partial(multilayer_perceptron, (16, width, 16, 1)), seeds)

        def watch(step: int) -> None:
            if width == 1 and step % every == 0:
                measured_at.append(step)
                curves.append(_counts(_measure(ensemble, 0)))

        # A rate that falls: at a constant one Adam keeps kicking the merged activations apart.
        train(ensemble, pairs, targets, steps=steps, decay=0.999, watch=watch)
        return ensemble

    return Result(
        narrow=_counts_of_solutions(train_width(1)),
        wide={width: _counts_of_solutions(train_width(width)) for width in widths},
        steps=measured_at,
        curves=curves,
        num_seeds=len(seeds),
    )


def check(result: Result) -> None:
    """Check that most solutions are as predicted, at width 1 and at the largest, at the 5 % level.

    Raises:
        AssertionError: If they are not.
    """
    widest = max(result.wide)
    for count, total in (
        (result.num_predicted, len(result.narrow)),
        (result.num_full(widest), len(result.wide[widest])),
    ):
        assert binomtest(count, total, 0.5, alternative="greater").pvalue < 0.05, f"only {count} of {total}"


def describe(result: Result) -> str:
    """Write the counts in Markdown."""
    rows: list[list[object]] = [["16-1-16-1, predicted", "", *PREDICTED.values(), 15, ""]]
    for width, counts in {1: result.narrow, **result.wide}.items():
        middle = [sorted(count[name] or 0 for count in counts)[len(counts) // 2] for name in counts[0]]
        count = result.num_predicted if width == 1 else result.num_full(width)
        solved = f"{len(counts)} of {result.num_seeds}"
        rows.append([f"16-{width}-16-1", solved, *middle, share(count, len(counts))])
    header = ["network", "solved", *result.narrow[0], "share of the solved ones that is as predicted"]
    return (
        f"{table(header, rows)}\n\n"
        "Medians over the solved networks. As predicted: all four integers of the first row at width 1, "
        "no duplicate and rank 64 at the other widths."
    )


def draw(result: Result) -> Figure:
    """Draw the counts of the first narrow network over the steps, with the predicted ones as dots."""
    ax = axes_or_new(None)
    for name, prediction in PREDICTED.items():
        values = [float("nan") if (value := count[name]) is None else value for count in result.curves]
        style = "--" if name == "bound" else "-"
        ax.plot(result.steps, values, style, color=COLORS[name], drawstyle="steps-post")
        ax.axhline(prediction, color=COLORS[name], linewidth=0.6, linestyle=":")
        place = (6, 9 if name == "bound" else 0)
        end = (result.steps[-1], prediction)
        ax.annotate(f"{name} {prediction}", end, place, textcoords="offset points", color=COLORS[name], va="center")
    ax.set(xlabel="optimizer steps", ylim=(0, 70), xlim=(0, result.steps[-1]))
    ax.set_title("Information loss leads to a flat basin (dots: predicted)", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.information_loss", run=run, check=check, describe=describe, draw=draw)
