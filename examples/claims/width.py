"""The wider a network, the less often training finds a solution with dependent behavioral gradients.

Networks 2-w-1 fit a boolean function of two inputs at its four points, from 100 seeds at each width. A solution has
full rank where its four behavioral gradients are independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from scipy.stats import fisher_exact
from torch import Tensor, nn

from examples.claims.ensembles import Ensemble, make_ensemble, multilayer_perceptron, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, share
from lightning_basin.figures.style import BOUND, NULLITY, QUIET, RANK, axes_or_new
from lightning_basin.functional import duplicated_activations

POINTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
LABELS = {"first": [0, 0, 1, 1], "OR": [0, 1, 1, 1], "XOR": [0, 1, 1, 0]}
SOLVED = 1e-6  # Mean squared error, of labels that are 0 and 1.


@dataclass(frozen=True, kw_only=True)
class Share:
    """The solutions of one function at one width.

    Attributes:
        activation: The name of the activation function.
        task: The name of the boolean function.
        width: The width of the hidden layer.
        num_seeds: The number of networks.
        num_solved: The number of those that fit.
        num_deficient: The number of those that fit with a rank below four.
        num_merged: The number of those that fit with a duplicated hidden activation.
        num_both: The number of those with both.
        spread: The standard deviation of the outputs of the solutions between the four points, over runs.
    """

    activation: str
    task: str
    width: int
    num_seeds: int
    num_solved: int
    num_deficient: int
    num_merged: int
    num_both: int
    spread: float

    @property
    def deficient(self) -> Interval:
        """The share of solutions with a rank below four."""
        return share(self.num_deficient, self.num_solved)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The shares of all functions, widths and activations."""

    shares: list[Share]

    def of(self, activation: str, task: str) -> list[Share]:
        """Select the shares of a task that was solved, by width."""
        return [one for one in self.shares if (one.activation, one.task) == (activation, task) and one.num_solved]


def _between() -> Tensor:
    """Points of a grid on the square, without its corners."""
    axis = torch.linspace(0, 1, 5, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return grid[((grid - 0.5).abs() < 0.5).any(dim=1)]


def _measure(ensemble: Ensemble, members: Sequence[int], **names: object) -> Share:
    """Measure the networks of one task, those among them that fit."""
    activation, task, width = (names[name] for name in ("activation", "task", "width"))
    targets = torch.tensor(LABELS[str(task)], dtype=torch.float64)[:, None]
    fits = squared_errors(ensemble, POINTS, targets) < SOLVED
    solved = [index for index in members if fits[index]]
    hidden = ensemble.activations(POINTS)[2].detach()
    deficient = [rank < len(POINTS) for rank in ensemble.gradient_ranks(POINTS, solved)]
    merged = [duplicated_activations(hidden[index]) > 0 for index in solved]
    outputs = ensemble(_between())[solved].detach()
    return Share(
        activation=str(activation),
        task=str(task),
        width=int(str(width)),
        num_seeds=len(members),
        num_solved=len(solved),
        num_deficient=sum(deficient),
        num_merged=sum(merged),
        num_both=sum(map(min, deficient, merged)),
        spread=float(outputs.std(dim=0).mean()) if len(solved) > 1 else float("nan"),
    )


def train_width(activation: type[nn.Module], width: int, seeds: Sequence[int], steps: int) -> list[Share]:
    """Train networks of one width on each function, all at once, and measure them."""
    make = partial(multilayer_perceptron, (2, width, 1), activation)
    ensemble = make_ensemble(make, [*seeds] * len(LABELS))
    labels = torch.tensor([LABELS[task] for task in LABELS for _ in seeds], dtype=torch.float64)
    train(ensemble, POINTS, labels[:, :, None], steps=steps)
    starts = range(0, ensemble.size, len(seeds))
    return [
        _measure(ensemble, range(start, start + len(seeds)), activation=activation.__name__, task=task, width=width)
        for task, start in zip(LABELS, starts, strict=True)
    ]


def run(
    seeds: Sequence[int] = range(100), widths: Sequence[int] = (2, 3, 4, 5, 8, 16, 32), steps: int = 3000
) -> Result:
    """Train networks of each width, with ReLU and with tanh."""
    return Result(
        shares=[
            one for kind in (nn.ReLU, nn.Tanh) for width in widths for one in train_width(kind, width, seeds, steps)
        ]
    )


def check(result: Result) -> None:
    """Check, at the 5 % level, that the share falls with width for ReLU; and that it is zero for tanh.

    Raises:
        AssertionError: If it is not.
    """
    for task in ("first", "OR"):
        narrow, *_, wide = result.of("ReLU", task)
        counts = [[one.num_deficient, one.num_solved - one.num_deficient] for one in (narrow, wide)]
        assert fisher_exact(counts, alternative="greater").pvalue < 0.05, (task, counts)
    for task in LABELS:
        # No rise between two widths, beyond what one expects of as many comparisons.
        for before, after in pairwise(result.of("ReLU", task)):
            assert after.deficient.lower <= before.deficient.upper, (task, before.width, after.width)
        assert all(one.num_deficient == 0 for one in result.of("Tanh", task))


def describe(result: Result) -> str:
    """Write the shares in Markdown."""
    header = ["function, width", "solved", "rank below 4", "with a duplicate", "without"]
    rows = [
        [
            f"{task}, {one.width}",
            f"{one.num_solved} of {one.num_seeds}",
            one.deficient,
            f"{one.num_both} of {one.num_merged}",
            f"{one.num_deficient - one.num_both} of {one.num_solved - one.num_merged}",
        ]
        for task in LABELS
        for one in result.of("ReLU", task)
    ]
    smooth = [one for task in LABELS for one in result.of("Tanh", task)]
    total = share(sum(one.num_deficient for one in smooth), sum(one.num_solved for one in smooth))
    spreads = [
        [f"{kind}, {task}", f"{narrow.spread:.3f}", f"{wide.spread:.3f}"]
        for kind in ("ReLU", "Tanh")
        for task in LABELS
        for narrow, *_, wide in [result.of(kind, task)]
    ]
    return "\n\n".join(
        [
            "ReLU:",
            table(header, rows),
            f"tanh, all widths and functions together: {total:.3f}.",
            "Standard deviation of the outputs between the four points, over solutions:",
            table(["", "smallest width", "largest width"], spreads),
        ]
    )


def draw(result: Result) -> Figure:
    """Draw the share of deficient solutions, and the spread between runs, over the width."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    shares, spreads = (axes_or_new(ax) for ax in figure.subplots(1, 2))
    for task, color, offset in (("first", RANK, 0.97), ("OR", NULLITY, 1.0), ("XOR", BOUND, 1.03)):
        points = result.of("ReLU", task)
        widths = [one.width * offset for one in points]
        values = [one.deficient for one in points]
        errors = [[value.value - value.lower for value in values], [value.upper - value.value for value in values]]
        shares.errorbar(widths, [value.value for value in values], errors, fmt="o-", color=color, markersize=4)
        shares.annotate(task, (widths[0], values[0].value), (-8, 6), textcoords="offset points", color=color)
        for activation, style in (("ReLU", "o-"), ("Tanh", "o:")):
            points = result.of(activation, task)
            spreads.plot(
                [one.width for one in points], [one.spread for one in points], style, color=color, markersize=4
            )
    shares.axhline(0.0, color=QUIET, linestyle=":", linewidth=1)
    shares.annotate("tanh: 0", (32, 0.0), (-4, 4), textcoords="offset points", color=QUIET, ha="right")
    for ax, title in ((shares, "Solutions with a rank below 4"), (spreads, "Spread between runs (dots: tanh)")):
        ax.set(xscale="log", xlabel="width")
        ax.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        ax.minorticks_off()
        ax.set_title(title, loc="left", fontsize="medium")
    return figure


if __name__ == "__main__":
    publish("examples.claims.width", run=run, check=check, describe=describe, draw=draw)
