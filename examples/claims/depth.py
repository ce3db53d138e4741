"""Depth and ReLU throw information away: duplicated activations and ranks against the depth of a network.

Networks 4-w-...-w-1 without bias, at initialization. Of w units with symmetric weights each is off with probability
1/2 for a given input, independently: all are off, and the input is lost for good, with probability 2^-w at each layer.
So behind D hidden layers an input is dead with probability 1 - (1 - 2^-w)^D. Dead inputs have the same activation,
zero, and are duplicates of one another. tanh never loses an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import fisher_exact
from torch import Tensor, nn

from examples.claims.ensembles import Ensemble, make_ensemble, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean, share
from lightning_basin.figures.style import INFORMATION, QUIET, RANK, axes_or_new
from lightning_basin.functional import duplicated_activations

NUM_INPUTS, WIDTH_OF_INPUTS = 16, 4
SOLVED = 1e-4  # Mean squared error, of targets that are -1 and 1.


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Networks of one shape at initialization.

    Attributes:
        activation: The name of the activation function.
        width: The width of the hidden layers.
        depth: Their number.
        predicted: The probability that an input is dead at the last hidden layer.
        dead: The measured share of dead inputs, as a mean over networks.
        duplicates: The mean number of duplicated activations at the last hidden layer.
        rank: The mean rank of the gradients.
        violations: The number of networks whose rank is above the bound that duplicates leave.
    """

    activation: str
    width: int
    depth: int
    predicted: float
    dead: Interval
    duplicates: Interval
    rank: Interval
    violations: int


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Networks of one shape that were trained until they fit.

    Attributes:
        activation: The name of the activation function.
        depth: The number of hidden layers, of width 8.
        num_networks: The number of networks.
        num_solved: The number of those that fit.
        num_merged: The number of those that fit and have a duplicate.
        before: The mean number of duplicates of the solved ones behind each hidden layer, at initialization.
        after: The same after training.
        rank: The mean rank after training.
        violations: The number of networks whose rank is above the bound.
    """

    activation: str
    depth: int
    num_networks: int
    num_solved: int
    num_merged: int
    before: list[float]
    after: list[float]
    rank: Interval
    violations: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, before and after training."""

    untrained: list[Untrained]
    fitted: list[Fitted]

    @property
    def violations(self) -> int:
        """The number of networks whose rank is above the bound that duplicates leave."""
        return sum(shape.violations for shape in self.untrained) + sum(fitted.violations for fitted in self.fitted)


def _inputs() -> Tensor:
    return torch.randn(NUM_INPUTS, WIDTH_OF_INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _network(activation: type[nn.Module], width: int, depth: int, *, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in (WIDTH_OF_INPUTS, *[width] * (depth - 1)):
        layers += [nn.Linear(fan_in, width, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 1, bias=bias))


def duplicates_behind_layers(ensemble: Ensemble, inputs: Tensor) -> list[list[int]]:
    """Count the duplicated activations behind each hidden layer, for each network."""
    hidden = [values.detach() for values in ensemble.activations(inputs)[2:-1:2]]
    return [[duplicated_activations(layer[index]) for layer in hidden] for index in range(ensemble.size)]


def count_violations(ensemble: Ensemble, inputs: Tensor, duplicates: list[list[int]], ranks: list[int]) -> int:
    """Count the networks whose rank is above the smallest bound N_before + distinct activations."""
    weights = [module for module in ensemble.network if isinstance(module, nn.Linear)]
    sizes = torch.tensor([sum(p.numel() for p in module.parameters()) for module in weights]).cumsum(0).tolist()
    bounds = [
        min(before + len(inputs) - count for before, count in zip(sizes, counts, strict=False)) for counts in duplicates
    ]
    return sum(rank > bound for rank, bound in zip(ranks, bounds, strict=True))


def measure_untrained(activation: type[nn.Module], width: int, depth: int, seeds: Sequence[int]) -> Untrained:
    """Measure networks at initialization."""
    ensemble, inputs = make_ensemble(partial(_network, activation, width, depth, bias=False), seeds), _inputs()
    last = ensemble.activations(inputs)[-2]
    ranks = ensemble.gradient_ranks(inputs)
    counts = duplicates_behind_layers(ensemble, inputs)
    return Untrained(
        activation=activation.__name__,
        width=width,
        depth=depth,
        predicted=1 - (1 - 2.0**-width) ** depth if activation is nn.ReLU else 0.0,
        dead=mean((last == 0).all(dim=2).double().mean(dim=1).tolist()),
        duplicates=mean([float(behind[-1]) for behind in counts]),
        rank=mean([float(rank) for rank in ranks]),
        violations=count_violations(ensemble, inputs, counts, ranks),
    )


def measure_fitted(activation: type[nn.Module], depth: int, seeds: Sequence[int], steps: int) -> Fitted:
    """Train networks of width 8, with bias, to fit random signs, and measure the ones that do."""
    ensemble, inputs = make_ensemble(partial(_network, activation, 8, depth, bias=True), seeds), _inputs()
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 2, (NUM_INPUTS, 1), generator=generator).double() * 2 - 1
    before = duplicates_behind_layers(ensemble, inputs)
    train(ensemble, inputs, targets, steps=steps, decay=0.999)
    after = duplicates_behind_layers(ensemble, inputs)
    solved = (squared_errors(ensemble, inputs, targets) < SOLVED).nonzero().flatten().tolist()
    ranks = ensemble.gradient_ranks(inputs)
    return Fitted(
        activation=activation.__name__,
        depth=depth,
        num_networks=len(seeds),
        num_solved=len(solved),
        num_merged=sum(any(after[index]) for index in solved),
        before=torch.tensor([before[index] for index in solved]).double().mean(0).tolist(),
        after=torch.tensor([after[index] for index in solved]).double().mean(0).tolist(),
        rank=mean([float(ranks[index]) for index in solved]),
        violations=count_violations(ensemble, inputs, after, ranks),
    )


def run(
    seeds: Sequence[int] = range(200),
    shapes: Sequence[tuple[int, int]] = ((2, 1), (2, 2), (2, 4), (2, 10), (4, 4), (4, 10), (8, 10)),
    depths: Sequence[int] = (1, 2, 4),
    steps: int = 3000,
) -> Result:
    """Measure networks at initialization, of each width and depth, and trained ones.

    Args:
        seeds: The seed of each untrained network; the first quarter of them is trained.
        shapes: Width and depth of the untrained networks.
        depths: The depths of the trained ones.
        steps: The number of steps of training.
    """
    kinds = (nn.ReLU, nn.Tanh)
    return Result(
        untrained=[measure_untrained(kind, *shape, seeds) for kind in kinds for shape in shapes],
        fitted=[measure_fitted(kind, depth, seeds[: len(seeds) // 4], steps) for kind in kinds for depth in depths],
    )


def check(result: Result) -> None:
    """Check the bound, the share of dead inputs, and that deep trained ReLU networks merge more often than tanh.

    Both at the 5 % level, over all shapes together.

    Raises:
        AssertionError: If one of them fails.
    """
    assert result.violations == 0
    for shape in result.untrained:
        # 1.5 half-widths of a 95 % interval: that of seven shapes together.
        half = max(shape.dead.upper - shape.dead.value, 0.02)
        assert abs(shape.dead.value - shape.predicted) < 1.5 * half, shape
        assert shape.activation == "ReLU" or shape.duplicates.value == 0.0
    rectified, smooth = (
        max((fitted for fitted in result.fitted if fitted.activation == name), key=lambda fitted: fitted.depth)
        for name in ("ReLU", "Tanh")
    )
    counts = [[fitted.num_merged, fitted.num_solved - fitted.num_merged] for fitted in (rectified, smooth)]
    assert fisher_exact(counts, alternative="greater").pvalue < 0.05, counts


def describe(result: Result) -> str:
    """Write both parts in Markdown."""
    header = ["shape", "dead inputs, predicted", "measured", "duplicates of 16", "rank"]
    rows = [
        [
            f"{shape.activation}, width {shape.width}, depth {shape.depth}",
            f"{shape.predicted:.2f}",
            shape.dead,
            f"{shape.duplicates:.1f}",
            f"{shape.rank:.1f}",
        ]
        for shape in result.untrained
    ]
    trained = [
        [
            f"{fitted.activation}, depth {fitted.depth}",
            share(fitted.num_solved, fitted.num_networks),
            ", ".join(f"{count:.1f}" for count in fitted.before),
            ", ".join(f"{count:.1f}" for count in fitted.after),
            share(fitted.num_merged, fitted.num_solved),
            f"{fitted.rank:.1f}",
        ]
        for fitted in result.fitted
    ]
    names = ["width 8, with bias", "solved", "duplicates behind each layer before", "after", "with a duplicate", "rank"]
    return "\n\n".join(
        [
            "At initialization:",
            table(header, rows),
            "Trained to fit 16 random signs:",
            table(names, trained),
            f"Networks whose rank is above the bound that duplicates leave: {result.violations}.",
        ]
    )


def draw(result: Result) -> Figure:
    """Draw the share of dead inputs beside the predicted one, and the ranks."""
    ax = axes_or_new(None)
    shapes = [shape for shape in result.untrained if shape.activation == "ReLU"]
    smooth = [shape for shape in result.untrained if shape.activation == "Tanh"]
    places = list(range(len(shapes)))
    errors = [
        [shape.dead.value - shape.dead.lower for shape in shapes],
        [shape.dead.upper - shape.dead.value for shape in shapes],
    ]
    ax.bar(places, [16 * shape.predicted for shape in shapes], color=INFORMATION, alpha=0.25, width=0.7)
    scaled = [[16 * error for error in side] for side in errors]
    ax.errorbar(places, [16 * shape.dead.value for shape in shapes], scaled, fmt="o", color=INFORMATION, markersize=4)
    ax.plot(places, [shape.rank.value for shape in shapes], "s-", color=RANK, markersize=4)
    ax.plot(places, [shape.rank.value for shape in smooth], "s--", color=QUIET, markersize=4)
    ax.set_xticks(places, [f"{shape.width}×{shape.depth}" for shape in shapes])
    ax.set(xlabel="width × depth", ylim=(0, 17))
    for value, text, color in (
        (shapes[-1].rank.value, "rank, ReLU", RANK),
        (smooth[-1].rank.value + 0.8, "rank, tanh", QUIET),
        (16 * shapes[-1].dead.value, "dead inputs, ReLU\n(bars: predicted)", INFORMATION),
    ):
        ax.annotate(text, (places[-1], value), (16, -3), textcoords="offset points", color=color, annotation_clip=False)
    ax.set_title("Depth and ReLU throw information away, of 16 inputs", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.depth", run=run, check=check, describe=describe, draw=draw)
