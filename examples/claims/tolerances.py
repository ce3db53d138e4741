"""Why a rank is reported at several tolerances: merges that are only approximate, and minima that are not flat.

Networks 16-6-16-1 learn the categorical pairs of `information_loss`, with weight decay and without. Weight decay makes
the 8 inputs of a category similar, but never equal: their activations merge at a tolerance of 1e-2, the exact ones do
not, and the rank falls from tolerance to tolerance like a staircase, on which no single step is right. Where the inputs
of a category are merged but for their differences at u of the 6 units, algebra gives the rank 8 + 7u.

Two hidden units with incoming weights w and w + εu, and outgoing weights -1/ε and 1/ε, compute a derivative as ε goes
to zero: a channel to infinity. It looks flat, and the ranks at different tolerances disagree about it more and more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import nn

from examples.claims.ensembles import make_ensemble, multilayer_perceptron, squared_errors, train
from examples.claims.information_loss import category_pairs
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean, share
from lightning_basin import measure_basin
from lightning_basin.figures.style import NULLITY, QUIET, RANK, axes_or_new
from lightning_basin.functional import RANK_TOLERANCES

COARSE = 1e-2
STEPS = {8 + 7 * units for units in range(1, 7)}  # Ranks of merged inputs that still differ at some units.

Staircase = Mapping[float, int]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Networks that were trained with one weight decay.

    Attributes:
        staircases: The rank at each of `RANK_TOLERANCES`, one staircase for each network.
        merged: The number of inputs whose activation is that of an earlier one within 1e-2, for each network.
        equal: The same with equality in place of a tolerance.
        losses: The mean squared error of each network.
    """

    staircases: list[Staircase]
    merged: list[int]
    equal: list[int]
    losses: list[float]

    def mean_rank(self, tolerance: float) -> Interval:
        """Estimate the mean rank at a tolerance."""
        return mean([float(staircase[tolerance]) for staircase in self.staircases])

    @property
    def share_of_steps(self) -> Interval:
        """Estimate how often a rank at the three coarsest tolerances is one that algebra gives."""
        ranks = [staircase[tolerance] for staircase in self.staircases for tolerance in RANK_TOLERANCES[2:]]
        return share(sum(rank in STEPS for rank in ranks), len(ranks))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        trained: The networks by weight decay.
        channels: The rank at each tolerance on the way to infinity, by ε.
    """

    trained: dict[float, Trained]
    channels: dict[float, Staircase]


def train_with(weight_decay: float, seeds: Sequence[int], steps: int) -> Trained:
    """Train networks with a weight decay, and measure them."""
    pairs, targets = category_pairs()
    ensemble = make_ensemble(partial(multilayer_perceptron, (16, 6, 16, 1)), seeds)
    train(ensemble, pairs, targets, steps=steps, decay=0.9997, weight_decay=weight_decay)
    records = [
        measure_basin(ensemble.member(index), pairs, duplicate_rtol=COARSE, hessian=False)
        for index in range(ensemble.size)
    ]
    return Trained(
        staircases=[dict(record.gradient_rank_at) for record in records],
        merged=[record.duplicated_activations or 0 for record in records],
        equal=[record.duplicated_activations_exact or 0 for record in records],
        losses=squared_errors(ensemble, pairs, targets).tolist(),
    )


def channel(epsilon: float) -> Staircase:
    """Measure a network 3-6-1 without bias, N = 24, whose first two hidden units are a channel."""
    torch.manual_seed(0)
    first, last = nn.Linear(3, 6, bias=False).double(), nn.Linear(6, 1, bias=False).double()
    inputs, direction = torch.randn(60, 3).double(), torch.randn(3).double()
    with torch.no_grad():
        first.weight[1] = first.weight[0] + epsilon * direction
        last.weight[0, :2] = torch.tensor([-1.0, 1.0]) / epsilon
    return dict(measure_basin(nn.Sequential(first, nn.Tanh(), last), inputs).gradient_rank_at)


def run(
    seeds: Sequence[int] = range(12),
    steps: int = 6000,
    epsilons: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6),
) -> Result:
    """Train networks with weight decay 1e-3 and without, and walk along a channel."""
    return Result(
        trained={decay: train_with(decay, seeds, steps) for decay in (1e-3, 0.0)},
        channels={epsilon: channel(epsilon) for epsilon in epsilons},
    )


def check(result: Result) -> None:
    """Check, at the 5 % level, that weight decay merges approximately; and the ranks along the channel.

    Raises:
        AssertionError: If it does not.
    """
    decayed, free = result.trained[1e-3], result.trained[0.0]
    merging = [
        merged > equal and max(staircase.values()) > min(staircase.values())
        for merged, equal, staircase in zip(decayed.merged, decayed.equal, decayed.staircases, strict=True)
    ]
    assert binomtest(sum(merging), len(merging), 0.5, alternative="greater").pvalue < 0.05, merging
    # The intervals of the two means do not meet.
    assert decayed.mean_rank(1e-4).upper < free.mean_rank(1e-4).lower
    steps = [max(channel.values()) - min(channel.values()) for channel in result.channels.values()]
    assert steps[-1] > steps[0]


def describe(result: Result) -> str:
    """Write the staircases in Markdown."""
    header = [
        "",
        *(f"rank at {tolerance:.0e}" for tolerance in RANK_TOLERANCES),
        "merged at 1e-2",
        "equal",
        "ranks that are 8 + 7u",
    ]
    rows: list[list[object]] = [["predicted from one run", 56, 29, 22, 15, 15, 56, 0, ""]]
    for decay, trained in result.trained.items():
        ranks = [f"{trained.mean_rank(tolerance):.1f}" for tolerance in RANK_TOLERANCES]
        counts = [f"{mean([float(value) for value in values]):.1f}" for values in (trained.merged, trained.equal)]
        rows.append([f"weight decay {decay:g}, mean", *ranks, *counts, trained.share_of_steps])
    header_of_channels = ["ε", *(f"rank at {tolerance:.0e}" for tolerance in RANK_TOLERANCES)]
    channels = [[f"{epsilon:.0e}", *staircase.values()] for epsilon, staircase in result.channels.items()]
    losses = "; ".join(f"{max(trained.losses):.0e} with decay {decay:g}" for decay, trained in result.trained.items())
    return "\n\n".join(
        [
            table(header, rows),
            f"{len(result.trained[0.0].losses)} networks each. Last column: share of the coarse ranks that are steps.",
            f"Losses up to {losses}.",
            "A channel to infinity, N = 24 parameters:",
            table(header_of_channels, channels),
        ]
    )


def draw(result: Result) -> Figure:
    """Draw the staircases of all networks."""
    ax = axes_or_new(None)
    colors = {1e-3: RANK, 0.0: NULLITY}
    for decay, trained in result.trained.items():
        for staircase in trained.staircases:
            ax.plot(list(staircase), list(staircase.values()), color=colors[decay], alpha=0.25, linewidth=1)
        means = [trained.mean_rank(tolerance).value for tolerance in RANK_TOLERANCES]
        ax.plot(RANK_TOLERANCES, means, "o-", color=colors[decay], linewidth=2)
        name = f"weight decay {decay:g}" if decay else "no weight decay"
        ax.annotate(name, (RANK_TOLERANCES[-1], means[-1]), (6, 0), textcoords="offset points", color=colors[decay])
    ax.axhline(15, color=QUIET, linewidth=0.6, linestyle=":")
    ax.set(xscale="log", xlabel="relative tolerance", ylabel="rank of the gradients", ylim=(0, 70))
    ax.set_title("Weight decay merges approximately: a staircase, and no integer", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.tolerances", run=run, check=check, describe=describe, draw=draw)
