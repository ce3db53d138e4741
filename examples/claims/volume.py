"""A cross-check by counting: how fast the volume of small loss shrinks, against the rank.

Near a point of zero loss, the share of weights with a loss below e falls as e^lambda. Here lambda is the local learning
coefficient of singular learning theory (Watanabe, 2009). It is at least rank(H) / 2, at most half the codimension of
the set of zero loss, and rank(H) / 2 exactly where N - rank(H) directions are really free. Points are drawn at random
and counted: no derivative enters. Of the points with a loss below e, the share below e / 16 estimates lambda.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from examples.claims.page import publish, table
from examples.claims.paper import Function, squared_error
from examples.claims.statistics import Interval, share
from lightning_basin import BasinRecord, measure_basin
from lightning_basin.figures.style import NULLITY, QUIET, RANK, axes_or_new

RATIO = 16.0
RADIUS = 0.5  # Half the side of the cube from which points are drawn.

Outputs = Callable[[Tensor], Tensor]
"""From points, shape ``(n, N)``, to outputs, shape ``(n, m)``."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of zero loss.

    Attributes:
        where: What the outputs are there.
        num_parameters: The number of parameters, N.
        rank: The rank of the Hessian, as measured.
        codimension: N minus the dimension of the set of zero loss, from paper.
        predicted: The local learning coefficient, from paper.
        share_predicted: The share of points with a small loss that are below a sixteenth of it, from paper.
        num_below: The number of points with a small loss.
        num_far_below: The number of those with a sixteenth of it.
    """

    where: str
    num_parameters: int
    rank: int
    codimension: int
    predicted: float
    share_predicted: float
    num_below: int
    num_far_below: int

    @property
    def coefficient(self) -> Interval:
        """The estimate of the coefficient, from the exact interval of a share."""
        return Interval(*(-math.log(value) / math.log(RATIO) for value in self._share_in_order()))

    def _share_in_order(self) -> tuple[float, float, float]:
        value, lower, upper = share(self.num_far_below, self.num_below)
        return value, upper, lower


@dataclass(frozen=True, kw_only=True)
class Result:
    """All points."""

    points: list[Point]


def cases() -> list[tuple[str, Outputs, list[float], int, float]]:
    """List name, outputs, point, codimension and local learning coefficient."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(5, 3, generator=generator, dtype=torch.float64)).Q
    centers = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)

    def distances(points: Tensor) -> Tensor:
        return (points[:, None] - centers).square().sum(2)

    def matrices(points: Tensor) -> Tensor:
        return (points[:, :2, None] * points[:, None, 2:]).flatten(1)

    return [
        ("linear, 5 weights, 3 inputs", lambda points: points @ inputs, [0.3, -0.2, 0.5, 0.1, 0.4], 3, 1.5),
        ("linear 2-1-2, product of rank 1", matrices, [1.0, 1.0, 1.0, 1.0], 3, 1.5),
        ("two spheres that cross", distances, [0.0, 1.0, 0.0], 2, 1.0),
        ("two spheres that touch", distances, [0.0, 0.0, 0.0], 3, 1.0),
        ("xy = 0 at the crossing", lambda points: points.prod(1, keepdim=True), [0.0, 0.0], 1, 0.5),
    ]


def _share_at_the_crossing(loss: float) -> float:
    """Compute the share below a sixteenth for xy = 0, which has a logarithm: 4t (1 + log(1 / t)) of |xy| < t."""
    areas = [t * (1 - math.log(t)) for t in (math.sqrt(loss / RATIO) / RADIUS**2, math.sqrt(loss) / RADIUS**2)]
    return areas[0] / areas[1]


def _outputs_at(outputs: Outputs, theta: Tensor, rows: Tensor) -> Tensor:
    return rows @ outputs(theta[None]).mT


def measure_at(outputs: Outputs, center: Sequence[float]) -> BasinRecord:
    """Measure outputs, and their squared distance from those at a point, at this point."""
    target = outputs(torch.tensor([center], dtype=torch.float64)).mT
    rows = torch.eye(len(target), dtype=torch.float64)
    module = Function(partial(_outputs_at, outputs), center)
    return measure_basin(module, rows, target, loss_fn=squared_error, hessian="dense")


def run(num_points: int = 10_000_000, loss: float = 2e-3) -> Result:
    """Draw points around each zero, and measure the rank there.

    Args:
        num_points: The number of points.
        loss: The larger of the two losses, a squared error.
    """
    points = []
    for where, outputs, center, codimension, predicted in cases():
        start, generator = torch.tensor(center, dtype=torch.float64), torch.Generator().manual_seed(1)
        target = outputs(start[None])
        below = far_below = 0
        for _ in range(10):
            draws = torch.rand(num_points // 10, len(center), generator=generator, dtype=torch.float64)
            losses = (outputs(start + RADIUS * (2 * draws - 1)) - target).square().sum(1)
            below += int((losses < loss).sum())
            far_below += int((losses < loss / RATIO).sum())
        record = measure_at(outputs, center)
        assert record.hessian_nullity is not None
        is_crossing = where.startswith("xy")
        points.append(
            Point(
                where=where,
                num_parameters=len(center),
                rank=len(center) - record.hessian_nullity,
                codimension=codimension,
                predicted=predicted,
                share_predicted=_share_at_the_crossing(loss) if is_crossing else RATIO**-predicted,
                num_below=below,
                num_far_below=far_below,
            )
        )
    return Result(points=points)


def check(result: Result) -> None:
    """Check the bounds at the 5 % level, and the predicted coefficients within 0.05.

    Raises:
        AssertionError: If one of them fails.
    """
    for point in result.points:
        expected = -math.log(point.share_predicted) / math.log(RATIO)
        assert point.coefficient.lower - 0.05 < expected < point.coefficient.upper + 0.05, point
        assert point.rank <= 2 * point.predicted <= point.codimension, point
    strict = [point for point in result.points if point.rank < 2 * point.predicted]
    assert [point.where[:5] for point in strict] == ["two s", "xy = "]
    for point in strict:
        chance = RATIO ** (-point.rank / 2)
        assert binomtest(point.num_far_below, point.num_below, chance, alternative="less").pvalue < 0.05, point


def describe(result: Result) -> str:
    """Write bounds and estimates in Markdown."""
    header = ["point", "rank(H) / 2", "codimension / 2", "λ, from paper", "slope, predicted", "slope, counted"]
    rows = [
        [
            point.where,
            point.rank / 2,
            point.codimension / 2,
            point.predicted,
            f"{-math.log(point.share_predicted) / math.log(RATIO):.3f}",
            f"{point.coefficient:.3f}",
        ]
        for point in result.points
    ]
    return table(header, rows)


def draw_bounds(rows: Sequence[tuple[str, float, float, Interval]]) -> Axes:
    """Draw the first row at the top, each with its name, the lower and the upper bound, and what was measured."""
    ax = axes_or_new(None)
    for place, (_, lowest, highest, (value, lower, upper)) in enumerate(reversed(rows)):
        ax.plot([lowest, highest], [place, place], color=QUIET, linewidth=5, alpha=0.3)
        ax.plot(lowest, place, "|", color=NULLITY, markersize=14, markeredgewidth=2)
        ax.errorbar(value, place, xerr=[[value - lower], [upper - value]], fmt="o", color=RANK, markersize=5)
    ax.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    ax.set(ylim=(-0.6, len(rows) - 0.4))
    return ax


def draw(result: Result) -> Figure:
    """Draw each estimate between its two bounds."""
    ax = draw_bounds(
        [(point.where, point.rank / 2, point.codimension / 2, point.coefficient) for point in result.points]
    )
    ax.set(xlabel="slope of the volume", xlim=(-0.05, 1.7))
    ax.set_title("Counted slopes (red), rank(H) / 2 (blue)", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.volume", run=run, check=check, describe=describe, draw=draw)
