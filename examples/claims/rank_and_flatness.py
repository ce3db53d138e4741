"""The three claims of the theory about gradients, dimensions and Hessians, each where it holds and where it does not.

1. Behavioral gradients are orthogonal to the manifold of parameters with the same behavior.
2. N - rank(G) is at least the dimension of this manifold, and not always equal to it.
3. At a fit, the Hessian has the rank of the gradients: where the residual is zero and the loss curves in all outputs.

All expected integers come from algebra, so that no significance is needed: each must be met.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import one_hot

from examples.claims.page import publish, table
from examples.claims.paper import Count, Dimension, counts, dimensions, normal, small_network, squared_error
from lightning_basin import measure_basin
from lightning_basin.figures.style import NULLITY, QUIET, RANK, axes_or_new
from lightning_basin.functional import gradient_rows


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A network whose outputs are off by a residual.

    Attributes:
        size: The size of the residual.
        strict: The number of eigenvalues of the Hessian that are zero to rounding.
        lower: The lower end of the bracket of the nullity at the resolution that the residual leaves.
        upper: The upper end.
    """

    size: float
    strict: int | None
    lower: int | None
    upper: int | None


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier that is right on all inputs.

    Attributes:
        scale: The factor on its logits.
        loss: The cross-entropy.
        residual_curvature: The norm of the residual part of the Hessian, relative to the largest eigenvalue.
        smallest_curvature: The smallest nonzero eigenvalue of the Gauss–Newton part, relative to the largest.
    """

    scale: float
    loss: float | None
    residual_curvature: float | None
    smallest_curvature: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        largest_cosine: The largest cosine between a gradient and the tangent of a curve on the manifold.
        dimensions: The nullities beside dimensions that are known (claim 2).
        residuals: The null space of a Hessian as the residual falls (claim 3).
        gradient_nullity: The nullity of the gradients of the same network.
        counts: Further integers of claim 3.
        hard_labels: Classifiers with hard labels, by the scale of their logits.
    """

    largest_cosine: float
    dimensions: list[Dimension]
    residuals: list[Residual]
    gradient_nullity: int
    counts: list[Count]
    hard_labels: list[Classifier]


def largest_cosine(num_points: int = 50) -> float:
    """Walk along the rescalings of a ReLU network, which leave its outputs, and compare tangents with gradients.

    Hidden unit j with its incoming weights times exp(t a_j) and its outgoing ones times exp(-t a_j) computes the same.
    """
    network, inputs, rates = small_network(3, 6, 2, activation=nn.ReLU), normal(10, 3), normal(6, seed=1)
    first, last = network[0], network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    parameters = [first.weight, first.bias, last.weight]
    cosines = []
    for _ in range(num_points):
        moves = [rates[:, None] * first.weight, rates * first.bias, -last.weight * rates]
        tangent = torch.cat([move.flatten() for move in moves]).detach()
        gradients = gradient_rows(network(inputs), parameters)
        lengths = gradients.norm(dim=1) * tangent.norm()
        cosines.append(float(((gradients @ tangent).abs() / lengths)[lengths > 0].max()))
        with torch.no_grad():
            for parameter, factor in zip(parameters, (rates[:, None], rates, -rates), strict=True):
                parameter.mul_(torch.exp(0.05 * factor))
    return max(cosines)


def residuals(sizes: Sequence[float]) -> tuple[list[Residual], int]:
    """Measure the Hessian of 3-10-1 with tanh on 8 inputs, N = 51, whose targets are the outputs and a residual."""
    network, inputs = small_network(3, 10, 1), normal(8, 3)
    outputs, noise = network(inputs).detach(), normal(8, 1, seed=1)
    measured = []
    for size in sizes:
        record = measure_basin(network, inputs, outputs + size * noise, loss_fn=squared_error, hessian="dense")
        measured.append(
            Residual(
                size=size,
                strict=record.hessian_nullity_strict,
                lower=record.hessian_nullity_lower,
                upper=record.hessian_nullity_upper,
            )
        )
    return measured, record.gradient_nullity


def hard_labels(scales: Sequence[float] = (1.0, 4.0, 16.0, 64.0, 256.0)) -> list[Classifier]:
    """Measure the two parts of the Hessian of a classifier that is right, and surer and surer of it."""
    inputs = normal(6, 4)
    labels = one_hot(small_network(4, 8, 3)(inputs).argmax(1), 3).double()
    measured = []
    for scale in scales:
        network = small_network(4, 8, 3)
        with torch.no_grad():
            for parameter in network[2].parameters():
                parameter.mul_(scale)
        record = measure_basin(network, inputs, labels, loss_fn=nn.CrossEntropyLoss())
        measured.append(
            Classifier(
                scale=scale,
                loss=record.loss,
                residual_curvature=record.residual_curvature,
                smallest_curvature=record.smallest_curvature,
            )
        )
    return measured


def run(exponents: Sequence[int] = range(0, -17, -1)) -> Result:
    """Measure all of it, the null space of the Hessian at residuals of these powers of ten."""
    measured, gradient_nullity = residuals([10.0**exponent for exponent in exponents])
    return Result(
        largest_cosine=largest_cosine(),
        dimensions=dimensions(),
        residuals=measured,
        gradient_nullity=gradient_nullity,
        counts=counts(),
        hard_labels=hard_labels(),
    )


def check(result: Result) -> None:
    """Check every integer, that brackets hold, and that steps survive exactly where the dimension is the nullity.

    Raises:
        AssertionError: If one of these fails.
    """
    assert result.largest_cosine < 1e-14
    for point in result.dimensions:
        assert point.nullity >= point.dimension
        assert (point.surviving_fraction > 0.99) == (point.nullity == point.dimension), point
    for residual in result.residuals:
        assert residual.lower is not None
        assert residual.upper is not None
        assert residual.lower <= residual.upper
    assert result.residuals[-1].lower == result.residuals[-1].upper == result.gradient_nullity
    for count in result.counts:
        assert count.measured == count.predicted, count
    curvatures = [classifier.residual_curvature or 0.0 for classifier in result.hard_labels]
    # The scale grows by 4 between the last two: the residual part falls as its inverse, and does not stay.
    assert 3.0 < curvatures[-2] / curvatures[-1] < 5.0
    for curvature, classifier in zip(curvatures, result.hard_labels, strict=True):
        assert (classifier.smallest_curvature or 0.0) < 2 * curvature, classifier


def describe(result: Result) -> str:
    """Write what was measured in Markdown."""
    points = [
        [point.where, point.dimension, point.nullity, f"{point.surviving_fraction:.4f}"] for point in result.dimensions
    ]
    falling = [
        [f"{residual.size:.0e}", residual.strict, f"{residual.lower} to {residual.upper}"]
        for residual in result.residuals[:: max(1, len(result.residuals) // 8)]
    ]
    exact = [[count.what, count.predicted, count.measured] for count in result.counts]
    sure = [
        [
            f"{classifier.scale:.0f}",
            *(f"{number:.1e}" for number in (classifier.loss, classifier.residual_curvature) if number is not None),
            f"{classifier.smallest_curvature or 0.0:.0e}",
        ]
        for classifier in result.hard_labels
    ]
    return "\n\n".join(
        [
            f"Claim 1. The largest cosine between a gradient and a tangent is {result.largest_cosine:.0e}.",
            "Claim 2.",
            table(["point", "dimension", "N − rank(G)", "surviving fraction"], points),
            f"Claim 3, tanh 3-10-1, N − rank(G) = {result.gradient_nullity}.",
            table(["residual", "nullity of H to rounding", "bracket at the resolution of the residual"], falling),
            "Where the conditions of claim 3 do not hold, all at minima.",
            table(["rank", "predicted", "measured"], exact),
            "Cross-entropy with hard labels, tanh 4-8-3; both parts of H relative to its largest eigenvalue.",
            table(["logits times", "loss", "norm of the residual part", "smallest curvature of the other part"], sure),
        ]
    )


def draw(result: Result) -> Figure:
    """Draw the null space of the Hessian over the residual."""
    ax = axes_or_new(None)
    sizes = [residual.size for residual in result.residuals]
    nan = float("nan")
    strict = [nan if residual.strict is None else residual.strict for residual in result.residuals]
    lower, upper = (
        [nan if value is None else value for value in values]
        for values in zip(*((residual.lower, residual.upper) for residual in result.residuals), strict=True)
    )
    ax.fill_between(sizes, lower, upper, color=NULLITY, alpha=0.25, linewidth=0)
    ax.plot(sizes, strict, "o-", color=QUIET, markersize=3)
    ax.axhline(result.gradient_nullity, color=RANK, linewidth=1.2)
    ax.set(xscale="log", xlabel="residual", ylim=(0, 53), xlim=(sizes[0], sizes[-1]))
    ax.annotate("N − rank(G)", (sizes[0], result.gradient_nullity), (4, -14), textcoords="offset points", color=RANK)
    ax.annotate("certified bracket", (sizes[1], 48), color=NULLITY)
    ax.annotate("zero to rounding", (sizes[-5], 3), color=QUIET)
    ax.set_title("The nullity of the Hessian as the residual falls", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.rank_and_flatness", run=run, check=check, describe=describe, draw=draw)
