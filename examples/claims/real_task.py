"""Ranks through training on handwritten digits: on images that were trained on, on others, and on random inputs.

Networks 16-10-10-10 with ReLU see digits of 4 x 4 pixels. A ReLU unit may be rescaled: its incoming weights times a
positive number, its outgoing ones divided by it, and nothing changes. So the rank is at most N minus the number of
hidden units, on any inputs: 390 - 20 = 370.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import wilcoxon
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from examples.claims.ensembles import Ensemble, make_ensemble, multilayer_perceptron, train
from examples.claims.page import publish, table
from examples.claims.statistics import mean
from lightning_basin.figures.style import BOUND, NULLITY, QUIET, RANK, axes_or_new

WIDTHS = (16, 10, 10, 10)
NUM_TRAINED, NUM_PROBES = 600, 60
COLORS = {"trained": RANK, "other": NULLITY, "random": BOUND}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        num_parameters: The number of parameters, N.
        ceiling: N minus the number of hidden units.
        steps: The steps at which the networks were measured.
        ranks: The rank of each network at these steps, by the kind of the inputs.
        errors: The share of other digits that each network gets wrong at the end.
    """

    num_parameters: int
    ceiling: int
    steps: list[int]
    ranks: dict[str, list[list[int]]]
    errors: list[float]


def small_digits() -> tuple[Tensor, Tensor]:
    """Load the digits of scikit-learn, averaged to 4 x 4 pixels with mean 0 and variance 1, and their classes."""
    digits = load_digits()
    images = avg_pool2d(torch.tensor(digits.images)[:, None], 2).flatten(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)


def _losses(ensemble: Ensemble, images: Tensor, classes: Tensor) -> Tensor:
    logits = ensemble(images)
    return cross_entropy(logits.mT, classes.expand(ensemble.size, -1), reduction="none").mean(dim=1)


def run(seeds: Sequence[int] = range(8), steps: int = 3000, num_moments: int = 6) -> Result:
    """Train networks, and measure them on three kinds of inputs.

    Args:
        seeds: The seed of each network.
        steps: The number of steps of full-batch Adam.
        num_moments: The number of measurements after the first one.
    """
    images, classes = small_digits()
    ensemble = make_ensemble(partial(multilayer_perceptron, WIDTHS, nn.ReLU), seeds)
    generator = torch.Generator().manual_seed(0)
    probes = {
        "trained": images[:NUM_PROBES],
        "other": images[NUM_TRAINED : NUM_TRAINED + NUM_PROBES],
        "random": torch.randn(NUM_PROBES, WIDTHS[0], generator=generator, dtype=torch.float64),
    }
    measured_at: list[int] = []
    ranks: dict[str, list[list[int]]] = {kind: [] for kind in probes}

    def watch(step: int) -> None:
        if step % (steps // num_moments) == 0:
            measured_at.append(step)
            for kind, inputs in probes.items():
                ranks[kind].append(ensemble.gradient_ranks(inputs))

    train(ensemble, images[:NUM_TRAINED], classes[:NUM_TRAINED], steps=steps, losses=_losses, watch=watch)
    wrong = (ensemble(images[NUM_TRAINED:]).argmax(dim=2) != classes[NUM_TRAINED:]).double().mean(dim=1)
    num_parameters = sum(parameter[0].numel() for parameter in ensemble.parameters.values())
    return Result(
        num_parameters=num_parameters,
        ceiling=num_parameters - sum(WIDTHS[1:-1]),
        steps=measured_at,
        ranks={kind: [list(curve) for curve in zip(*curves, strict=True)] for kind, curves in ranks.items()},
        errors=wrong.tolist(),
    )


def check(result: Result) -> None:
    """Check the ceiling, and at the 5 % level that digits see less of the network than random inputs do.

    Raises:
        AssertionError: If one of them fails.
    """
    assert max(rank for curves in result.ranks.values() for curve in curves for rank in curve) <= result.ceiling
    pairs = zip(result.ranks["random"], result.ranks["trained"], strict=True)
    differences = [random[-1] - trained[-1] for random, trained in pairs]
    assert wilcoxon(differences, alternative="greater").pvalue < 0.05, differences


def describe(result: Result) -> str:
    """Write the mean ranks over the steps in Markdown."""
    rows = [
        [step, *(f"{mean([float(curve[index]) for curve in curves]):.1f}" for curves in result.ranks.values())]
        for index, step in enumerate(result.steps)
    ]
    changes = {kind: mean([float(curve[-1] - curve[0]) for curve in curves]) for kind, curves in result.ranks.items()}
    told = ", ".join(f"{kind} {change:.1f}" for kind, change in changes.items())
    return (
        f"{table(['step', *(f'mean rank, {kind} inputs' for kind in result.ranks)], rows)}\n\n"
        f"{len(result.errors)} networks; N = {result.num_parameters}, and the ceiling is {result.ceiling}. "
        f"Change of the mean rank: {told}. "
        f"Share of other digits that are wrong at the end: {mean(result.errors)}."
    )


def draw(result: Result) -> Figure:
    """Draw the rank on each kind of inputs over the steps."""
    ax = axes_or_new(None)
    for kind, curves in result.ranks.items():
        for curve in curves:
            ax.plot(result.steps, curve, color=COLORS[kind], alpha=0.2, linewidth=0.8)
        means = [sum(ranks) / len(ranks) for ranks in zip(*curves, strict=True)]
        ax.plot(result.steps, means, color=COLORS[kind], linewidth=2)
        end = (result.steps[-1], means[-1])
        # The curves of two kinds end in the same place.
        height = {"other": 3, "trained": -10}.get(kind, -3)
        ax.annotate(f"{kind} inputs", end, (6, height), textcoords="offset points", color=COLORS[kind])
    ax.axhline(result.ceiling, color=QUIET, linestyle=":", linewidth=1)
    ax.annotate("N − hidden units", (0, result.ceiling), (4, 3), textcoords="offset points", color=QUIET)
    ax.set(xlabel="optimizer steps", ylabel="rank of the gradients", xlim=(0, result.steps[-1]))
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.real_task", run=run, check=check, describe=describe, draw=draw)
