"""Second derivatives behind a softmax, saturated or not: algebra on paper, and mpmath."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional.output_curvature import output_curvature
from lightning_basin.functional.rank import default_rtol
from tests.functional.curvatures import assert_factored, linear, softmax_curvature
from tests.networks import drawn

HARD = torch.tensor([0, 2, 1, 2])


SOFT = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0], [0.3, 0.3, 0.4]], dtype=torch.float64)


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


# In every case the second derivative is s_x (diag(p) - p p^T), with s_x the sum of the weights of the targets of x.
CROSS_ENTROPIES = {
    "hard labels, sum": ({"target": HARD, "reduction": "sum"}, [1.0, 1.0, 1.0, 1.0]),
    "hard labels, mean": ({"target": HARD}, [0.25, 0.25, 0.25, 0.25]),
    "soft labels, mean": ({"target": SOFT}, [0.25, 0.25, 0.25, 0.25]),
    "class weights, sum": ({"target": HARD, "weight": CLASS_WEIGHTS, "reduction": "sum"}, [1.0, 4.0, 2.0, 4.0]),
    "class weights, mean": ({"target": HARD, "weight": CLASS_WEIGHTS}, [1 / 11, 4 / 11, 2 / 11, 4 / 11]),
    "soft labels and class weights": (
        {"target": SOFT, "weight": CLASS_WEIGHTS, "reduction": "sum"},
        [1.5, 3.3, 4.0, 2.5],
    ),
    "label smoothing": ({"target": HARD, "label_smoothing": 0.1, "reduction": "sum"}, [1.0, 1.0, 1.0, 1.0]),
    "label smoothing and class weights": (
        {"target": HARD, "weight": CLASS_WEIGHTS, "label_smoothing": 0.3, "reduction": "sum"},
        [0.7 * 1 + 0.7, 0.7 * 4 + 0.7, 0.7 * 2 + 0.7, 0.7 * 4 + 0.7],
    ),
    "ignored labels": ({"target": torch.tensor([0, -100, 1, -100])}, [0.5, 0.0, 0.5, 0.0]),
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_curvature_of_cross_entropy_is_a_multiple_of_that_of_softmax(name):
    arguments, scales = CROSS_ENTROPIES[name]
    outputs = drawn(4, 3)
    curvature = output_curvature(lambda f: F.cross_entropy(f, **arguments), outputs)
    expected = torch.tensor(scales, dtype=torch.float64).view(4, 1, 1) * softmax_curvature(outputs)
    torch.testing.assert_close(curvature.matrices, expected)


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_factors_of_cross_entropy_multiply_to_its_curvature(name):
    arguments, _ = CROSS_ENTROPIES[name]
    assert_factored(output_curvature(lambda f: F.cross_entropy(f, **arguments), drawn(4, 3)))


def saturated_logits(k, c, digits):
    """Class x mod c has 1 - p near 10**-digits, the others share the rest unevenly."""
    logits = drawn(k, c) - digits * math.log(10)
    logits[torch.arange(k), torch.arange(k) % c] = 0.0
    return logits


@pytest.mark.parametrize("digits", [0.1, 5, 9, 12])
@pytest.mark.parametrize("c", [2, 3, 10])
def test_factor_of_a_nearly_saturated_softmax_has_one_rank_less_than_classes(c, digits):
    outputs = saturated_logits(6, c, digits)
    targets = torch.arange(6) % c
    curvature = output_curvature(lambda f: F.cross_entropy(f, targets), outputs)
    ranks = [np.linalg.matrix_rank(factor.numpy(), rtol=default_rtol(c, c)) for factor in curvature.factors]
    assert ranks == [c - 1] * 6


def test_one_completely_saturated_input_does_not_spoil_the_factors_of_the_others():
    outputs = saturated_logits(5, 3, 9)
    outputs[0] = 0.0
    outputs[1] = torch.tensor([0.0, 2000.0, 0.0], dtype=torch.float64)  # p is exactly (0, 1, 0).
    curvature = output_curvature(lambda f: F.cross_entropy(f, torch.arange(5) % 3), outputs)
    ranks = [np.linalg.matrix_rank(factor.numpy(), rtol=default_rtol(3, 3)) for factor in curvature.factors]
    assert ranks == [2, 0, 2, 2, 2]


def test_a_loss_on_saturated_inputs_does_not_couple_them():
    outputs = saturated_logits(6, 3, 9)
    curvature = output_curvature(lambda f: F.cross_entropy(f, torch.arange(6) % 3), outputs)
    assert curvature.matrices.shape == (6, 3, 3)


def weighted_squares(outputs, targets):
    return ((outputs - targets).square() * torch.tensor([1.0, 3.0])).sum()


def distances_to_the_mean(outputs, targets):
    return (outputs - targets - (outputs - targets).mean(1, keepdim=True)).square().sum()


@pytest.mark.parametrize("lead", [0.0, 27.0, 28.0, 100.0, 800.0])
@pytest.mark.parametrize(
    ("loss_fn", "nullity"),
    # The layer has 4 parameters, which 3 inputs see all; distances to the mean see the difference of the outputs only.
    [(weighted_squares, 0), (nn.MSELoss(), 0), (nn.SmoothL1Loss(beta=1e4), 0), (distances_to_the_mean, 2)],
    ids=["weighted squares", "squares", "smooth", "centred"],
)
def test_no_other_loss_is_taken_for_a_softmax_where_one_output_leads(loss_fn, nullity, lead):
    module, inputs = linear([[1.0], [2.0]], [lead, 0.0])
    targets = module(inputs).detach()
    record = measure_basin(module, inputs, targets, loss_fn=loss_fn)
    assert (record.hessian_nullity, record.gauss_newton_nullity, record.hessian_certified) == (nullity, nullity, True)


@pytest.mark.parametrize("lead", [0.0, 10.0, 40.0])
def test_a_softmax_of_another_temperature_keeps_its_own_curvature(lead):
    # 4 e^(-2d) / (1 + e^(-2d))² by the difference d of the outputs, and both weights and biases move it: 4 times that.
    module, inputs = linear([[0.0], [0.0]], [lead, 0.0])[0], torch.ones(1, 1, dtype=torch.float64)
    record = measure_basin(
        module, inputs, torch.zeros(1), loss_fn=lambda f, _: F.softplus(2 * (f[:, 1] - f[:, 0])).sum()
    )
    expected = 16 * mpmath.exp(-2 * lead) / (1 + mpmath.exp(-2 * lead)) ** 2
    assert record.hessian_largest == pytest.approx(float(expected), rel=1e-9, abs=0)


# At 55 the rows of the softmax are 1e-12 of the others: seen at a tolerance of 5e-15.
@pytest.mark.parametrize("lead", [0.0, 14.0, 40.0, 55.0])
def test_a_softmax_over_some_of_the_outputs_has_one_rank_less_than_these(lead):
    module, inputs = linear([[0.1, 0.2], [0.3, 0.1], [0.2, 0.4], [1.0, 1.0]], [lead, 0.0, 1.0, 0.0], num_inputs=6)

    def some_and_squares(outputs, targets):
        return F.cross_entropy(outputs[:, :3], targets) + outputs[:, 3].square().mean()

    # 12 parameters. Of the 3 rows of the softmax the common shift is not seen: 3; the fourth row is seen.
    record = measure_basin(module, inputs, torch.zeros(6, dtype=torch.long), loss_fn=some_and_squares)
    assert record.gauss_newton_nullity == 3
    assert record.hessian_nullity_lower == 3


def test_two_heads_have_a_softmax_each():
    module, inputs = linear([[0.1, 0.2]] * 5, [20.0, 0.0, 1.0, 30.0, 0.0], num_inputs=6)

    def two_heads(outputs, targets):
        return F.cross_entropy(outputs[:, :3], targets) + 0.5 * F.cross_entropy(outputs[:, 3:], targets)

    record = measure_basin(module, inputs, torch.zeros(6, dtype=torch.long), loss_fn=two_heads)
    assert record.gauss_newton_nullity == 6  # The shift of each head, along each of 3 parameters.


def mpmath_hessian(module, inputs, labels):
    """Of the mean cross-entropy of a network with one hidden layer of tanh, by differences of its gradient."""
    hidden, head = ([part.weight.tolist(), part.bias.tolist()] for part in (module[0], module[2]))
    numbers = [hidden[0], hidden[1], head[0], head[1]]
    point = [mpmath.mpf(v) for part in numbers for row in part for v in (row if isinstance(row, list) else [row])]
    d_hidden, d_in = module[0].weight.shape
    d_out = len(head[1])

    def gradient(theta):
        rows = [theta[r * d_in : (r + 1) * d_in] for r in range(d_hidden)]
        shift = theta[d_hidden * d_in : d_hidden * (d_in + 1)]
        rest = theta[d_hidden * (d_in + 1) :]
        out = [rest[r * d_hidden : (r + 1) * d_hidden] for r in range(d_out)]
        total = [mpmath.mpf(0)] * len(theta)
        for x, label in zip(inputs.tolist(), labels.tolist(), strict=True):
            units = [mpmath.tanh(mpmath.fdot(row, x) + b) for row, b in zip(rows, shift, strict=True)]
            logits = [mpmath.fdot(row, units) + b for row, b in zip(out, rest[d_out * d_hidden :], strict=True)]
            shares = [mpmath.exp(logit - max(logits)) for logit in logits]
            pull = [share / sum(shares) / len(inputs) for share in shares]
            pull[label] = -sum(pull[:label] + pull[label + 1 :])
            back = [
                sum(p * row[j] for p, row in zip(pull, out, strict=True)) * (1 - units[j] ** 2) for j in range(d_hidden)
            ]
            parts = [b * v for b in back for v in x] + back + [p * u for p in pull for u in units] + pull
            total = [sum(pair) for pair in zip(total, parts, strict=True)]
        return total

    step, columns = mpmath.mpf(10) ** -40, []
    for index in range(len(point)):
        ends = [[v + sign * step * (i == index) for i, v in enumerate(point)] for sign in (1, -1)]
        columns.append([(a - b) / (2 * step) for a, b in zip(*map(gradient, ends), strict=True)])
    return mpmath.matrix(columns)


@pytest.mark.parametrize("scale", [1, 30, 60, 300])
def test_a_saturated_classifier_has_the_hessian_of_120_digits(scale):
    # The loss is 1.1, 4e-10, 0 and 0 in float64; of p - 1 nothing is left in the last two.
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    inputs = drawn(3, 2, seed=5)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=index))
        module[2].weight.mul_(scale)
        module[2].bias.copy_(scale * torch.tensor([2.0, 0.1, 0.0]))
    labels = module(inputs).argmax(1)
    with mpmath.workdps(120):
        eigenvalues = list(mpmath.eigsy(mpmath_hessian(module, inputs, labels), eigvals_only=True))
        largest = max(abs(value) for value in eigenvalues)
        threshold = len(eigenvalues) * torch.finfo(torch.float64).eps * largest
        zero = sum(abs(value) <= threshold for value in eigenvalues)
        negative = sum(value < -threshold for value in eigenvalues)
    record = measure_basin(module, inputs, labels, loss_fn=nn.CrossEntropyLoss(), hessian="dense")
    assert (record.hessian_nullity_strict, record.hessian_negative) == (zero, negative)
    assert record.hessian_largest == pytest.approx(float(largest), rel=1e-12, abs=0)
