"""What happens after zero loss: noise in the labels moves the weights along the set of perfect fits to lower ranks.

(a) ReLU networks 2-20-1 fit 15 points of a teacher, by SGD with one point a step. For the middle third of the run some
get noise in the labels, others a larger learning rate, others nothing. The rank is that on 60 other points.
(b) A deep linear network 8-6-4 that fits a linear map: the Hessian loses rank while the gradients do not.
(c) A classifier, whose solutions are infinite: margins grow for ever, the integer rank stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.claims.ensembles import Ensemble, make_ensemble, multilayer_perceptron, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import mean
from lightning_basin import BasinRecord, measure_basin
from lightning_basin.figures.style import BOUND, NULLITY, RANK, ZERO_LOSS, axes_or_new

NUM_POINTS, NUM_PROBES, NOISE = 15, 60, 0.5
RATES = {"plain": 0.13, "larger rate": 0.2, "label noise": 0.13}
COLORS = {"plain": NULLITY, "larger rate": BOUND, "label noise": RANK}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Networks that were trained in one way.

    Attributes:
        steps: The steps at which they were measured.
        ranks: The rank on the probes, one list for each network.
        losses: The mean squared error of each network at the end of each third of the run.
    """

    steps: list[int]
    ranks: list[list[int]]
    losses: list[list[float]]

    def rank_after(self, third: int) -> list[int]:
        """Select the rank of each network at the end of a third of the run, counted from one."""
        index = self.steps.index(self.steps[-1] // 3 * third)
        return [curve[index] for curve in self.ranks]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A network at one step.

    Attributes:
        step: The step.
        loss: The loss.
        rank: The rank of the gradients.
        rank_at_1e_4: The same at the tolerance 1e-4.
        hessian_nullity: The number of eigenvalues of the Hessian that are zero to rounding.
        margin: The smallest margin of a classifier.
    """

    step: int
    loss: float | None
    rank: int
    rank_at_1e_4: int
    hessian_nullity: int | None
    margin: float | None = None

    @classmethod
    def of(cls, step: int, record: BasinRecord, nullity: int | None, margin: float | None = None) -> "Moment":
        """Take the numbers of a record."""
        return cls(
            step=step,
            loss=record.loss,
            rank=record.gradient_rank,
            rank_at_1e_4=record.gradient_rank_at[1e-4],
            hessian_nullity=nullity,
            margin=margin,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured: (a) by way of training, (b) the deep linear network, (c) the classifier."""

    arms: dict[str, Arm]
    linear: list[Moment]
    classifier: list[Moment]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _sgd_step(ensemble: Ensemble, points: Tensor, targets: Tensor, rates: Tensor) -> None:
    """Take a step of SGD on the point of each network, shape ``(S, 1, d)``."""
    values = list(ensemble.parameters.values())
    losses = squared_errors(ensemble, points, targets).sum()
    with torch.no_grad():
        for value, gradient in zip(values, torch.autograd.grad(losses, values), strict=True):
            value.sub_(rates.view(-1, *[1] * (value.dim() - 1)) * gradient)


def label_noise(seeds: Sequence[int], third: int, every: int) -> dict[str, Arm]:
    """Train all networks, in thirds of as many steps, and measure ranks on the way."""
    teacher = make_ensemble(partial(multilayer_perceptron, (2, 3, 1), nn.ReLU), [1000])
    points, probes = _normal(NUM_POINTS, 2, seed=0), _normal(NUM_PROBES, 2, seed=1)
    labels = teacher(points)[0].detach()
    ensemble = make_ensemble(partial(multilayer_perceptron, (2, 20, 1), nn.ReLU), [*seeds] * len(RATES))
    rates = torch.tensor([rate for rate in RATES.values() for _ in seeds], dtype=torch.float64)
    noises = torch.tensor([NOISE * (name == "label noise") for name in RATES for _ in seeds], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    steps: list[int] = []
    ranks: list[list[int]] = []
    losses: list[list[float]] = []
    for step in range(3 * third + 1):
        if step % every == 0:
            steps.append(step)
            ranks.append(ensemble.gradient_ranks(probes))
        if step % third == 0 and step:
            losses.append(squared_errors(ensemble, points, labels).tolist())
        # Every arm sees the same points and, where it sees any, the same noise.
        chosen = torch.randint(NUM_POINTS, (len(seeds),), generator=generator).repeat(len(RATES))
        noise = torch.randn(len(seeds), generator=generator, dtype=torch.float64).repeat(len(RATES)) * noises
        is_noisy = third <= step < 2 * third
        targets = labels[chosen] + (noise[:, None] if is_noisy else 0.0)
        _sgd_step(ensemble, points[chosen][:, None], targets[:, None], rates if is_noisy else rates.clamp(max=0.13))
    by_network = list(zip(*ranks, strict=True)), list(zip(*losses, strict=True))
    return {
        name: Arm(
            steps=steps,
            ranks=[list(curve) for curve in by_network[0][start : start + len(seeds)]],
            losses=[list(values) for values in by_network[1][start : start + len(seeds)]],
        )
        for name, start in zip(RATES, range(0, ensemble.size, len(seeds)), strict=True)
    }


def deep_linear(steps: int, num_moments: int = 8) -> list[Moment]:
    """Fit a linear map by a network 8-6-4 without bias, N = 72."""
    ensemble = make_ensemble(lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)), [0])
    inputs = _normal(20, 8, seed=0)
    targets = inputs @ _normal(8, 4, seed=1)
    moments: list[Moment] = []

    def watch(step: int) -> None:
        if step % (steps // num_moments) == 0:
            record = measure_basin(ensemble.member(0), inputs, targets, loss_fn=nn.MSELoss(), hessian="dense")
            moments.append(Moment.of(step, record, record.hessian_nullity_strict))

    train(ensemble, inputs, targets, steps=steps, decay=0.9995, watch=watch)
    return moments


def classifier(steps: int, num_moments: int = 8) -> list[Moment]:
    """Train a classifier 2-16-3, N = 99, on 30 points in three heaps, with cross-entropy."""
    ensemble = make_ensemble(partial(multilayer_perceptron, (2, 16, 3)), [0])
    labels = torch.arange(3).repeat_interleave(10)
    inputs = 0.4 * _normal(30, 2, seed=0) + 2 * torch.eye(3, 2, dtype=torch.float64)[labels]
    moments: list[Moment] = []

    def losses(networks: Ensemble, points: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(networks(points)[0], classes, reduction="none").mean(0, keepdim=True)

    def watch(step: int) -> None:
        if step % (steps // num_moments) == 0:
            record = measure_basin(
                ensemble.member(0), inputs, labels, loss_fn=nn.CrossEntropyLoss(), hessian="gauss-newton"
            )
            logits = ensemble(inputs)[0].detach()
            right = logits.gather(1, labels[:, None])
            margins = (right - logits.scatter(1, labels[:, None], float("-inf"))).min(dim=1).values
            moments.append(Moment.of(step, record, record.gauss_newton_nullity, float(margins.min())))

    train(ensemble, inputs, labels, steps=steps, losses=losses, watch=watch)
    return moments


def run(seeds: Sequence[int] = range(12), third: int = 10000, every: int = 1000, steps: int = 4000) -> Result:
    """Run all three parts.

    Args:
        seeds: The seed of each network of (a).
        third: The number of steps of each third of the runs of (a).
        every: The number of steps between two measurements.
        steps: The number of steps of (b) and (c).
    """
    return Result(arms=label_noise(seeds, third, every), linear=deep_linear(steps), classifier=classifier(steps))


def check(result: Result) -> None:
    """Check that noise lowers the rank, at the 5 % level, and the integers of the deep linear network.

    Raises:
        AssertionError: If one of these fails.
    """
    noisy = result.arms["label noise"].rank_after(3)
    plain = result.arms["plain"].rank_after(3)
    assert mannwhitneyu(noisy, plain, alternative="less").pvalue < 0.05, (noisy, plain)
    first, last = result.linear[0], result.linear[-1]
    # Singh, Bachmann and Hofmann (2021): rank(G) = 4 (8 + 4 - 4) always, rank(H) = 64 before the fit.
    assert {moment.rank for moment in result.linear} == {32}
    assert first.hessian_nullity == 72 - 64
    assert last.hessian_nullity == 72 - 32
    margins = [moment.margin or 0.0 for moment in result.classifier]
    assert margins[-1] > margins[len(margins) // 2] > 0.0


def describe(result: Result) -> str:
    """Write all three parts in Markdown."""
    arms = [
        [
            name,
            *(f"{mean([float(rank) for rank in arm.rank_after(third)]):.1f}" for third in (1, 2, 3)),
            f"{sorted(values[-1] for values in arm.losses)[len(arm.losses) // 2]:.0e}",
        ]
        for name, arm in result.arms.items()
    ]
    thirds = ["(a) ReLU 2-20-1", "mean rank after a third", "after two thirds", "at the end", "median loss at the end"]
    linear = [[moment.step, f"{moment.loss:.0e}", moment.rank, moment.hessian_nullity] for moment in result.linear]
    classes = [
        [moment.step, f"{moment.loss:.0e}", f"{moment.margin:.1f}", moment.rank, moment.rank_at_1e_4]
        for moment in result.classifier
    ]
    return "\n\n".join(
        [
            table(thirds, arms),
            table(["(b) linear 8-6-4, step", "loss", "rank(G), predicted 32", "nullity(H), predicted 8 to 40"], linear),
            table(["(c) classifier, step", "loss", "smallest margin", "rank(G)", "rank(G) at 1e-4"], classes),
        ]
    )


def draw(result: Result) -> Figure:
    """Draw the mean rank over the steps, for each way of training."""
    ax = axes_or_new(None)
    for name, arm in result.arms.items():
        for curve in arm.ranks:
            ax.plot(arm.steps, curve, color=COLORS[name], alpha=0.15, linewidth=0.8)
        means = [sum(ranks) / len(ranks) for ranks in zip(*arm.ranks, strict=True)]
        ax.plot(arm.steps, means, color=COLORS[name], linewidth=2)
        # The first two curves end in the same place.
        height = {"plain": 4, "larger rate": -12}.get(name, -3)
        ax.annotate(name, (arm.steps[-1], means[-1]), (6, height), textcoords="offset points", color=COLORS[name])
    last = arm.steps[-1]
    ax.axvspan(last / 3, 2 * last / 3, color=ZERO_LOSS, alpha=0.1, linewidth=0)
    ax.annotate("noise", (last / 2, 1), color=ZERO_LOSS, ha="center")
    ax.set(xlabel="optimizer steps", ylabel="rank on 60 other points", xlim=(0, last), ylim=(0, None))
    ax.set_title("After zero loss the rank falls with noise", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.after_zero_loss", run=run, check=check, describe=describe, draw=draw)
