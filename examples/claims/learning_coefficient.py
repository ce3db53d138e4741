"""A cross-check by strangers: local learning coefficients from the sampler of devinterp, against ranks.

The local learning coefficient of singular learning theory (Watanabe, 2009) says how fast the volume of small loss
shrinks. Lau et al. (2023) estimate it by Langevin dynamics: where weights have the density exp(-B L - g/2 d^2), with
the loss L and the distance d from the minimum, B times the mean of L is near the coefficient. Here the package
devinterp takes the steps, 64 copies of a network in one chain, and no second derivative enters.

Predicted was: rank(H) / 2 <= coefficient <= N / 2. The coefficient is rank(H) / 2 where all N - rank(H) directions are
really free, as `verify_null_space` found for the networks 16-1-16-1 of `information_loss`: 15 / 2. It is larger at the
singular points: 1 and 1/2 as in `volume`, and 4 where a linear network 4-2-3 has weights of rank 1 (Aoyagi and
Watanabe, 2005). At finite B and steps e an estimate differs from it by an amount that is known on paper, too: a
direction with curvature h gives Bh / (2 a (1 - e a / 4)), a = Bh + g. Points with up to three parameters can be
integrated on a grid.

B, g and e were chosen at the first, regular point, before any other was sampled: B = 300 and g = 5, so that Bh / g is
over 100; e = 0.1 / (B h) for the largest h, or for h = 1 where it is smaller.
"""

import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from examples.claims.ensembles import Ensemble, make_ensemble, multilayer_perceptron, train
from examples.claims.information_loss import category_pairs
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean
from examples.claims.volume import Outputs, cases, draw_bounds, measure_at

INVERSE_TEMPERATURE, LOCALIZATION, STEP = 300.0, 5.0, 0.1
NUM_COPIES = 64


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of zero loss.

    Attributes:
        where: What the outputs are there.
        num_parameters: The number of parameters, N.
        rank: The rank of the Hessian, as measured.
        coefficient: The local learning coefficient, from paper.
        predicted: The estimate that is expected at this temperature; ``None`` where it was not computed.
        estimates: The estimate of each copy.
    """

    where: str
    num_parameters: int
    rank: int
    coefficient: float
    predicted: float | None
    estimates: list[float]

    @property
    def estimate(self) -> Interval:
        """The mean over the copies."""
        return mean(self.estimates)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All points, the regular one first."""

    points: list[Point]


class Copies(nn.Module):
    """Copies of all weights, each a row."""

    def __init__(self, center: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(center.repeat(NUM_COPIES, 1))


class OneBatch(Dataset[dict[str, Tensor]]):
    """The data as devinterp asks for them; the losses hold their inputs themselves."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1)}


def _step(largest_curvature: float) -> float:
    return STEP / (INVERSE_TEMPERATURE * max(largest_curvature, 1.0))


def sample(outputs: Outputs, center: Tensor, largest_curvature: float, num_steps: int) -> list[float]:
    """Estimate the coefficient at a point, once for each copy, from the second half of a chain.

    Args:
        outputs: The outputs as a function of points, from shape ``(n, N)`` to ``(n, m)``.
        center: The point, shape ``(N,)``; the loss is the squared distance from the outputs there.
        largest_curvature: The largest eigenvalue of the Hessian of the loss.
        num_steps: The number of steps.
    """
    from devinterp.optim.sgmcmc import SGMCMC
    from devinterp.slt.sampler import sample_single_chain

    target, losses = outputs(center[None]), []

    def evaluate(copies: Copies, _: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs(copies.rows) - target).square().sum(dim=1), {}

    with redirect_stderr(StringIO()):  # Its progress bar.
        sample_single_chain(
            Copies(center),
            OneBatch(),
            evaluate,
            {"rows": None},
            num_draws=num_steps,
            sampling_method=SGMCMC.sgld,
            sampling_method_kwargs={
                "lr": _step(largest_curvature),
                "nbeta": INVERSE_TEMPERATURE * NUM_COPIES,  # It takes the mean over the copies.
                "localization": LOCALIZATION,
            },
            seed=0,
            batch_size=1,
            micro_callback=lambda loss, **_: losses.append(loss),
        )
    estimates: list[float] = (INVERSE_TEMPERATURE * torch.stack(losses[num_steps // 2 :]).mean(dim=0)).tolist()
    return estimates


def _regular_estimate(outputs: Outputs, center: Tensor) -> float:
    """Compute what curvatures give at this temperature and step, where the free directions are straight."""
    rows = torch.func.jacrev(lambda point: outputs(point[None])[0])(center)
    curvatures = 2 * torch.linalg.svdvals(rows) ** 2
    stiffness = INVERSE_TEMPERATURE * curvatures + LOCALIZATION
    variances = 1 / (stiffness * (1 - _step(float(curvatures.max())) * stiffness / 4))
    return float((INVERSE_TEMPERATURE * curvatures * variances).sum() / 2)


def _estimate_on_grid(outputs: Outputs, center: Tensor) -> float:
    """Integrate over a grid that is finer near the point."""
    places = torch.linspace(-1, 1, 121, dtype=torch.float64)
    offsets = 4 / math.sqrt(LOCALIZATION) * torch.cartesian_prod(*[places**3] * len(center))
    cells = torch.cartesian_prod(*[places**2] * len(center)).prod(dim=1)
    energies = INVERSE_TEMPERATURE * (outputs(center + offsets) - outputs(center[None])).square().sum(dim=1)
    weights = cells * torch.exp(-energies - LOCALIZATION / 2 * offsets.square().sum(dim=1))
    return float((energies * weights).sum() / weights.sum())


def _product_of_matrices(points: Tensor) -> Tensor:
    return torch.bmm(points[:, 8:].reshape(-1, 3, 2), points[:, :8].reshape(-1, 2, 4)).flatten(1)


def paper_points() -> list[tuple[str, Outputs, list[float], float]]:
    """List name, outputs, point and coefficient where these are known on paper."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    rank_one = [1.0, 0.0, 0.0, 0.0, *[0.0] * 4, 1.0, 0.0, *[0.0] * 4]
    return [
        ("linear, 5 weights, 5 inputs", lambda points: points @ inputs, [0.3, -0.2, 0.5, 0.1, 0.4], 2.5),
        *((where, outputs, center, coefficient) for where, outputs, center, _, coefficient in cases()),
        ("linear 4-2-3 at weights of rank 1", _product_of_matrices, rank_one, 4.0),
    ]


def trained_points(num_networks: int) -> list[tuple[str, Outputs, list[float], float]]:
    """Train networks 16-1-16-1 on the categorical pairs to zero loss."""
    pairs, labels = category_pairs()
    ensemble = make_ensemble(partial(multilayer_perceptron, (16, 1, 16, 1)), range(num_networks))
    train(ensemble, pairs, labels, steps=2500, decay=0.999)
    sizes = [values[0].numel() for values in ensemble.parameters.values()]

    def outputs(points: Tensor) -> Tensor:
        pieces = zip(ensemble.parameters.items(), torch.split(points, sizes, dim=1), strict=True)
        values = {name: piece.reshape(-1, *like.shape[1:]) for (name, like), piece in pieces}
        return Ensemble(ensemble.network, values)(pairs).flatten(1)

    rows = torch.cat([values.detach().flatten(1) for values in ensemble.parameters.values()], dim=1)
    return [(f"trained 16-1-16-1, seed {seed}", outputs, row.tolist(), 7.5) for seed, row in enumerate(rows)]


def run(num_steps: int = 8000, num_networks: int = 2) -> Result:
    """Measure the rank at each point, and sample around it.

    Args:
        num_steps: The number of steps of each chain, of which the second half counts.
        num_networks: The number of trained networks.
    """
    points = []
    for where, outputs, weights, coefficient in [*paper_points(), *trained_points(num_networks)]:
        center, record = torch.tensor(weights, dtype=torch.float64), measure_at(outputs, weights)
        assert record.hessian_nullity is not None
        assert record.hessian_largest is not None
        rank = record.num_parameters - record.hessian_nullity
        is_regular = rank == 2 * coefficient
        on_grid = not is_regular and len(weights) <= 3
        predicted = _regular_estimate(outputs, center) if is_regular else None
        points.append(
            Point(
                where=where,
                num_parameters=len(weights),
                rank=rank,
                coefficient=coefficient,
                predicted=_estimate_on_grid(outputs, center) if on_grid else predicted,
                estimates=sample(outputs, center, record.hessian_largest, num_steps),
            )
        )
    return Result(points=points)


def check(result: Result) -> None:
    """Check bounds and expected estimates, at the 5 % level: temperature and step may move both by 5 %.

    Raises:
        AssertionError: If one of them fails.
    """
    for point in result.points:
        value, lower, upper = point.estimate
        assert upper > 0.95 * point.rank / 2, point.where
        assert lower < 1.05 * point.num_parameters / 2, point.where
        expected = point.coefficient if point.predicted is None else point.predicted
        assert abs(value - expected) < 0.05 * expected + (upper - lower), (point.where, point.estimate, expected)


def describe(result: Result) -> str:
    """Write bounds and estimates in Markdown."""
    header = ["point", "rank(H) / 2", "coefficient, from paper", "N / 2", "expected estimate", "estimate by devinterp"]
    rows = [
        [
            point.where,
            point.rank / 2,
            point.coefficient,
            point.num_parameters / 2,
            "" if point.predicted is None else f"{point.predicted:.2f}",
            point.estimate,
        ]
        for point in result.points
    ]
    return table(header, rows)


def draw(result: Result) -> Figure:
    """Draw each estimate over the coefficient from paper, between its bounds."""
    ax = draw_bounds(
        [(point.where, point.rank / 2, point.num_parameters / 2, point.estimate) for point in result.points]
    )
    ax.set(xlabel="local learning coefficient", xlim=(-0.2, 9))
    ax.set_title("Estimates (red), rank(H) / 2 (blue), up to N / 2", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.learning_coefficient", run=run, check=check, describe=describe, draw=draw)
