"""Is the dimension of a manifold of solutions a predictor of which solution is found? The first open question.

(a) Matrix factorization: a 4 x 4 matrix of rank r is sought as a product A B from n random linear measurements. The
smallest rank of behavioral gradients among all factorizations of it is 8 r - r^2, the model rank. Where the dimension
decides, the matrix is recovered from as many measurements as its model rank, and never from fewer.
(b) Networks 2-w-1 with ReLU at four points: ranks of the solutions that Adam finds, beside ranks of weights that are on
the right side of 1/2 and were drawn at random ("guess and check"), which measures volume.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.claims.ensembles import Ensemble, make_ensemble, matrix_rank, multilayer_perceptron, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, share, spearman
from examples.claims.width import LABELS, POINTS, SOLVED
from lightning_basin.figures.style import NULLITY, QUIET, RANK, axes_or_new
from lightning_basin.functional import behavioral_gradients

SIDE = 4
RECOVERED = 1e-2  # Relative error of the whole matrix.
CLOSE = 0.5  # Largest error of an output of a guess, with labels 0 and 1: it is on the right side.


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Matrices that were sought from n measurements.

    Attributes:
        matrix_rank: The rank of the matrices.
        num_measurements: The number of measurements.
        num_recovered: The number of runs that found the matrix.
        num_runs: The number of runs.
    """

    matrix_rank: int
    num_measurements: int
    num_recovered: int
    num_runs: int

    @property
    def is_below_model_rank(self) -> bool:
        """Whether there are fewer measurements than the model rank."""
        return self.num_measurements < model_rank(self.matrix_rank)

    @property
    def recovered(self) -> Interval:
        """The share of runs that found the matrix."""
        return share(self.num_recovered, self.num_runs)


@dataclass(frozen=True, kw_only=True)
class Solutions:
    """Networks of one width that fit one function.

    Attributes:
        task: The name of the function.
        width: The width.
        by_adam: The number of solutions of each rank among those that Adam found.
        by_guess: The same among weights that were drawn at random, with all outputs on the right side of 1/2.
    """

    task: str
    width: int
    by_adam: dict[int, int]
    by_guess: dict[int, int]

    def deficient(self, counts: dict[int, int]) -> Interval:
        """Estimate the share of solutions with a rank below four."""
        total = sum(counts.values())
        return share(total - counts.get(len(POINTS), 0), total)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        model_ranks: The measured rank of the gradients at a factorization of the smallest rank, by rank of the matrix.
        recoveries: The recoveries of (a).
        solutions: The solutions of (b).
    """

    model_ranks: dict[int, int]
    recoveries: list[Recovery]
    solutions: list[Solutions]


def model_rank(rank: int) -> int:
    """Compute the smallest rank of gradients at a factorization: the dimension of the matrices of this rank."""
    return 2 * SIDE * rank - rank**2


def measured_model_rank(rank: int) -> int:
    """Measure the rank of the gradients of all elements of A B, where A and B have this rank."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.zeros(SIDE, SIDE, dtype=torch.float64) for _ in range(2))
    first[:, :rank] = torch.randn(SIDE, rank, generator=generator)
    second[:rank] = torch.randn(rank, SIDE, generator=generator)
    gradients = behavioral_gradients(
        lambda values, inputs: inputs[0] @ values["first"] @ values["second"],
        {"first": first, "second": second},
        [torch.eye(SIDE, dtype=torch.float64)],
    )
    return matrix_rank(gradients)


def recover(rank: int, nums_measurements: Sequence[int], seeds: Sequence[int], steps: int) -> list[Recovery]:
    """Seek matrices by gradient descent with momentum from weights near zero, all runs at once."""
    runs = [(number, seed) for number in nums_measurements for seed in seeds]
    measurements = torch.zeros(len(runs), max(nums_measurements), SIDE**2, dtype=torch.float64)
    starts, matrices = [], []
    for index, (number, seed) in enumerate(runs):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        left, right = torch.randn(2, SIDE, rank, generator=generator, dtype=torch.float64)
        matrix = left @ right.mT
        matrices.append(matrix / matrix.norm())
        measurements[index, :number] = torch.randn(number, SIDE**2, generator=generator, dtype=torch.float64)
        starts.append(1e-4 * torch.randn(2, SIDE, SIDE, generator=generator, dtype=torch.float64))
    targets = torch.stack(matrices).flatten(1)
    weights, velocity = torch.stack(starts), torch.zeros(len(runs), 2, SIDE, SIDE, dtype=torch.float64)
    # The loss is the mean over measurements, absent ones left out: half the squared error in the limit of many.
    gram = measurements.mT @ measurements / torch.tensor([number for number, _ in runs])[:, None, None]
    for _ in range(steps):
        products = (weights[:, 0] @ weights[:, 1]).flatten(1)
        slope = (gram @ (products - targets)[:, :, None]).view(-1, SIDE, SIDE)
        gradient = torch.stack([slope @ weights[:, 1].mT, weights[:, 0].mT @ slope], dim=1)
        velocity = 0.9 * velocity - 0.02 * gradient
        weights = weights + velocity
    errors = ((weights[:, 0] @ weights[:, 1]).flatten(1) - targets).norm(dim=1)
    found = (errors < RECOVERED).view(len(nums_measurements), len(seeds)).sum(dim=1).tolist()
    return [
        Recovery(matrix_rank=rank, num_measurements=number, num_recovered=count, num_runs=len(seeds))
        for number, count in zip(nums_measurements, found, strict=True)
    ]


def _ranks(ensemble: Ensemble, fits: Tensor, limit: int = 300) -> dict[int, int]:
    members = fits.nonzero().flatten().tolist()[:limit]
    return dict(sorted(Counter(ensemble.gradient_ranks(POINTS, members)).items()))


def _guesses(width: int, num_guesses: int, generator: torch.Generator) -> Ensemble:
    """Draw the weights of many networks 2-w-1 from the distribution in which torch begins."""
    network = multilayer_perceptron((2, width, 1), nn.ReLU)
    parameters = {}
    for name, parameter in network.named_parameters():
        bound = (2 if name.startswith("0") else width) ** -0.5
        draws = torch.rand(num_guesses, *parameter.shape, generator=generator, dtype=torch.float64)
        parameters[name] = bound * (2 * draws - 1)
    return Ensemble(network, parameters)


def solutions(task: str, width: int, seeds: Sequence[int], steps: int, num_guesses: int) -> Solutions:
    """Find solutions of one task by Adam, and by guess and check."""
    targets = torch.tensor(LABELS[task], dtype=torch.float64)[:, None]
    trained = make_ensemble(partial(multilayer_perceptron, (2, width, 1), nn.ReLU), seeds)
    train(trained, POINTS, targets, steps=steps)
    guesses = _guesses(width, num_guesses, torch.Generator().manual_seed(width))
    return Solutions(
        task=task,
        width=width,
        by_adam=_ranks(trained, squared_errors(trained, POINTS, targets) < SOLVED),
        by_guess=_ranks(guesses, ((guesses(POINTS) - targets).abs() < CLOSE).all(dim=1).flatten()),
    )


def run(
    seeds: Sequence[int] = range(24),
    nums_measurements: Sequence[int] = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16),
    descent_steps: int = 8000,
    networks: Sequence[int] = range(100),
    widths: Sequence[int] = (2, 3, 4, 8),
    steps: int = 3000,
    num_guesses: int = 500_000,
) -> Result:
    """Run both parts.

    Args:
        seeds: The seeds of (a), for each number of measurements.
        nums_measurements: The numbers of measurements.
        descent_steps: The number of steps of gradient descent.
        networks: The seeds of (b), for each width and function.
        widths: The widths of the networks.
        steps: The number of steps of Adam.
        num_guesses: The number of weights that are drawn at random, for each width.
    """
    return Result(
        model_ranks={rank: measured_model_rank(rank) for rank in (1, 2)},
        recoveries=[one for rank in (1, 2) for one in recover(rank, nums_measurements, seeds, descent_steps)],
        solutions=[solutions(task, width, networks, steps, num_guesses) for task in LABELS for width in widths],
    )


def check(result: Result) -> None:
    """Check, at the 5 % level, that the model rank is a floor of recovery and no threshold.

    Raises:
        AssertionError: If it is not.
    """
    assert result.model_ranks == {1: 7, 2: 12}
    below = [one for one in result.recoveries if one.is_below_model_rank]
    count, total = sum(one.num_recovered for one in below), sum(one.num_runs for one in below)
    assert share(count, total).upper < 0.05, (count, total)
    for rank in (1, 2):
        at, *_, last = (one for one in result.recoveries if one.matrix_rank == rank and not one.is_below_model_rank)
        assert at.recovered.upper < last.recovered.lower, (at, last)


def volume_against_training(result: Result) -> Interval:
    """Correlate the shares of deficient solutions that guessing and Adam find, over functions and widths."""
    both = [one for one in result.solutions if one.by_adam and one.by_guess]
    return spearman(
        [one.deficient(one.by_guess).value for one in both], [one.deficient(one.by_adam).value for one in both]
    )


def describe(result: Result) -> str:
    """Write both parts in Markdown."""
    numbers = sorted({one.num_measurements for one in result.recoveries})
    rows = [
        [f"rank {rank}, model rank {model_rank(rank)}"]
        + [f"{one.recovered.value:.2f}" for one in result.recoveries if one.matrix_rank == rank]
        for rank in (1, 2)
    ]
    below = [one for one in result.recoveries if one.is_below_model_rank]
    floor = share(sum(one.num_recovered for one in below), sum(one.num_runs for one in below))
    found = [
        [
            f"{one.task}, width {one.width}",
            _told(one.by_adam),
            one.deficient(one.by_adam) if one.by_adam else "",
            _told(one.by_guess),
            one.deficient(one.by_guess) if one.by_guess else "",
        ]
        for one in result.solutions
    ]
    header = ["(b) solutions", "Adam: rank × number", "rank below 4", "guesses: rank × number", "rank below 4"]
    return "\n\n".join(
        [
            "(a) Share of runs that recover the matrix, by number of measurements:",
            table(["", *numbers], rows),
            f"{result.recoveries[0].num_runs} runs each. All runs below the model rank together: {floor}.",
            table(header, found),
            "Rank correlation of the two shares, over functions and widths: " + str(volume_against_training(result)),
        ]
    )


def _told(counts: dict[int, int]) -> str:
    return ", ".join(f"{rank} × {count}" for rank, count in counts.items())


def draw(result: Result) -> Figure:
    """Draw recovery over the number of measurements, and the shares of deficient solutions against each other."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = (axes_or_new(ax) for ax in figure.subplots(1, 2))
    for rank, color in ((1, RANK), (2, NULLITY)):
        points = [one for one in result.recoveries if one.matrix_rank == rank]
        numbers, values = [one.num_measurements for one in points], [one.recovered for one in points]
        errors = [[value.value - value.lower for value in values], [value.upper - value.value for value in values]]
        left.errorbar(numbers, [value.value for value in values], errors, fmt="o-", color=color, markersize=4)
        left.axvline(model_rank(rank), color=color, linestyle=":", linewidth=1)
        left.annotate(f"rank {rank}", (model_rank(rank), 1.04), color=color, ha="center")
    left.set(xlabel="measurements", ylim=(-0.03, 1.12))
    left.set_title("Recovered (dots: model rank)", loc="left", fontsize="medium")
    both = [one for one in result.solutions if one.by_adam and one.by_guess]
    guessed, trained = (
        [one.deficient(counts).value for one, counts in pairs]
        for pairs in ([(one, one.by_guess) for one in both], [(one, one.by_adam) for one in both])
    )
    right.plot(guessed, trained, "o", color=RANK, markersize=5)
    right.plot([0, 1], [0, 1], ":", color=QUIET, linewidth=1)
    right.set(xlabel="guesses with rank below 4", ylabel="solutions of Adam", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    right.set_title("Training against volume", loc="left", fontsize="medium")
    return figure


if __name__ == "__main__":
    publish("examples.claims.dimension", run=run, check=check, describe=describe, draw=draw)
