"""Is the rank a measure of plasticity, the ability to learn new tasks? A stream of tasks tells.

Networks 8-12-12-1 learn one task after the other: 24 new random inputs with random labels -1 and 1, the same number of
steps for each, weights kept. The rank of the gradients on the new inputs, before training, is how many of the 24
outputs can be moved independently; the Gauss-Newton part of the Hessian has the same rank, and at a tolerance the
epsilon-rank of its spectrum. Beside it stands the loss that training then reaches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import wilcoxon
from torch import Tensor, nn

from examples.claims.ensembles import make_ensemble, matrix_rank, multilayer_perceptron, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean, spearman
from lightning_basin.figures.style import NULLITY, RANK, axes_or_new
from lightning_basin.functional import numerical_rank, singular_values

NUM_INPUTS, WIDTHS = 24, (8, 12, 12, 1)
TOLERANCE = 1e-2  # Of singular values: 1e-4 of the largest eigenvalue of the Gauss-Newton part.


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Networks with one activation function, one list of tasks for each network.

    Attributes:
        ranks: The rank on the inputs of each task, before it is learned; at most 24.
        soft_ranks: The same at the tolerance 1e-2.
        losses: The mean squared error on each task, after it was learned.
    """

    ranks: list[list[int]]
    soft_ranks: list[list[int]]
    losses: list[list[float]]

    @property
    def correlation(self) -> Interval | None:
        """The mean over networks of the rank correlation of rank and loss; ``None`` where a rank never changes."""
        if any(len(set(ranks)) == 1 for ranks in self.ranks):
            return None
        pairs = zip(self.ranks, self.losses, strict=True)
        return mean([spearman([float(rank) for rank in ranks], losses).value for ranks, losses in pairs])

    def quarter(self, values: Sequence[Sequence[float]], place: int) -> list[float]:
        """Average the values of each network over the first quarter of the tasks (0), or the last one (-1)."""
        length = len(values[0]) // 4
        part = slice(0, length) if place == 0 else slice(-length, None)
        return [sum(of_network[part]) / length for of_network in values]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The streams by the name of the activation function."""

    streams: dict[str, Stream]


def _task(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(NUM_INPUTS, WIDTHS[0], generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 2, (NUM_INPUTS, 1), generator=generator).double() * 2 - 1


def learn_stream(activation: type[nn.Module], seeds: Sequence[int], num_tasks: int, steps: int) -> Stream:
    """Train networks on one task after the other, with a new optimizer for each task."""
    ensemble = make_ensemble(partial(multilayer_perceptron, WIDTHS, activation), seeds)
    ranks, soft_ranks, losses = [], [], []
    for inputs, labels in map(_task, range(num_tasks)):
        gradients = [ensemble.jacobian(index, inputs) for index in range(ensemble.size)]
        ranks.append([matrix_rank(matrix) for matrix in gradients])
        soft_ranks.append([numerical_rank(singular_values(matrix), rtol=TOLERANCE) for matrix in gradients])
        train(ensemble, inputs, labels, steps=steps, learning_rate=0.03)
        losses.append(squared_errors(ensemble, inputs, labels).tolist())
    return Stream(
        ranks=[list(values) for values in zip(*ranks, strict=True)],
        soft_ranks=[list(values) for values in zip(*soft_ranks, strict=True)],
        losses=[list(values) for values in zip(*losses, strict=True)],
    )


def run(seeds: Sequence[int] = range(12), num_tasks: int = 20, steps: int = 200) -> Result:
    """Let networks with ReLU and with tanh learn a stream of tasks."""
    kinds = (nn.ReLU, nn.Tanh)
    return Result(streams={kind.__name__: learn_stream(kind, seeds, num_tasks, steps) for kind in kinds})


def check(result: Result) -> None:
    """Check, at the 5 % level, that both lose plasticity; that rank goes with it for ReLU, and does not for tanh.

    Raises:
        AssertionError: If one of these fails.
    """
    for stream in result.streams.values():
        first, last = (stream.quarter(stream.losses, place) for place in (0, -1))
        assert wilcoxon(last, first, alternative="greater").pvalue < 0.05, (first, last)
    rectified = result.streams["ReLU"].correlation
    assert rectified is not None
    assert rectified.upper < 0.0, rectified
    assert all(rank == NUM_INPUTS for ranks in result.streams["Tanh"].ranks for rank in ranks)


def describe(result: Result) -> str:
    """Write the first and the last quarter of each stream in Markdown."""
    rows = []
    for name, stream in result.streams.items():
        for place, quarter in ((0, "first quarter"), (-1, "last quarter")):
            rows.append(
                [
                    f"{name}, {quarter} of the tasks",
                    f"{mean(stream.quarter(stream.ranks, place)):.1f}",
                    f"{mean(stream.quarter(stream.soft_ranks, place)):.1f}",
                    f"{mean(stream.quarter(stream.losses, place)):.3f}",
                ]
            )
    correlations = ", ".join(
        f"{name} {'not defined, the rank never changes' if stream.correlation is None else stream.correlation}"
        for name, stream in result.streams.items()
    )
    header = ["networks", "rank before learning, of 24", "at 1e-2", "loss after learning"]
    return (
        f"{table(header, rows)}\n\n{len(result.streams['ReLU'].ranks)} networks each. Rank correlation of rank and "
        f"loss over the tasks, mean over networks: {correlations}."
    )


def draw(result: Result) -> Figure:
    """Draw rank and loss over the tasks."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = (axes_or_new(ax) for ax in figure.subplots(1, 2))
    for (name, stream), color in zip(result.streams.items(), (RANK, NULLITY), strict=True):
        tasks = range(1, len(stream.ranks[0]) + 1)
        for ax, values in ((left, stream.ranks), (right, stream.losses)):
            means = [sum(of_task) / len(of_task) for of_task in zip(*values, strict=True)]
            ax.plot(tasks, means, "o-", color=color, markersize=3)
            ax.annotate(name, (tasks[-1], means[-1]), (5, 3), textcoords="offset points", color=color)
            ax.set(xlabel="task", ylim=(0, None))
    left.set_title("Rank before learning, of 24", loc="left", fontsize="medium")
    right.set_title("Loss after learning", loc="left", fontsize="medium")
    return figure


if __name__ == "__main__":
    publish("examples.claims.plasticity", run=run, check=check, describe=describe, draw=draw)
