"""Second derivatives of losses by the outputs: algebra on paper, and mpmath where outputs are saturated."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.output_curvature import output_curvature
from lightning_basin.functional.rank import default_rtol
from lightning_basin.quantities.hessian import quadratic_model
from tests.networks import drawn


def linear(weight, bias, num_inputs=3, seed=0):
    """A linear layer with inputs that see all of its parameters: the rank of a loss is that of its curvature."""
    module = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        module.bias.copy_(torch.tensor(bias))
    return module, drawn(num_inputs, len(weight[0]), seed=seed)


# --- losses of which the derivatives are known on paper --------------------------------------------------------------


def softmax_curvature(logits):
    """diag(p) - p p^T of each row, in numpy."""
    exponentials = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    p = exponentials / exponentials.sum(1, keepdims=True)
    return torch.from_numpy(np.stack([np.diag(row) - np.outer(row, row) for row in p]))


def assert_factored(curvature):
    torch.testing.assert_close(curvature.factors.mT @ curvature.factors, curvature.matrices)


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 2.0), ("mean", 2 / 12)])
def test_curvature_of_the_squared_error_is_a_multiple_of_the_identity(reduction, scale):
    curvature = output_curvature(lambda f: F.mse_loss(f, torch.zeros_like(f), reduction=reduction), drawn(4, 3))
    torch.testing.assert_close(curvature.matrices, scale * torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    assert_factored(curvature)


def test_residual_of_a_perfect_fit_is_zero():
    outputs = drawn(4, 3)
    assert output_curvature(lambda f: F.mse_loss(f, outputs), outputs).residual_is_zero


def test_residual_of_one_wrong_output_is_not_zero():
    outputs, targets = drawn(4, 3), drawn(4, 3)
    targets[2, 1] += 1e-12
    assert not output_curvature(lambda f: F.mse_loss(f, targets), outputs).residual_is_zero


def test_curvature_of_the_huber_loss_is_one_inside_and_zero_outside():
    outputs = torch.tensor([[0.2, 3.0], [-5.0, -0.3]], dtype=torch.float64)
    curvature = output_curvature(lambda f: F.huber_loss(f, torch.zeros_like(f), reduction="sum"), outputs)
    expected = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(curvature.matrices, expected)
    assert_factored(curvature)


def test_curvature_of_the_absolute_error_is_zero():
    curvature = output_curvature(lambda f: F.l1_loss(f, torch.zeros_like(f)), drawn(3, 2))
    assert torch.equal(curvature.matrices, torch.zeros(3, 2, 2, dtype=torch.float64))
    assert torch.equal(curvature.factors, torch.zeros(3, 2, 2, dtype=torch.float64))
    assert not curvature.residual_is_zero


def test_curvature_of_a_loss_that_ignores_the_outputs_is_zero():
    curvature = output_curvature(lambda f: torch.zeros((), dtype=torch.float64), drawn(3, 2))
    assert torch.equal(curvature.matrices, torch.zeros(3, 2, 2, dtype=torch.float64))
    assert curvature.residual_is_zero


@pytest.mark.parametrize("width", [1, 3])
def test_curvature_of_binary_cross_entropy_is_the_variance_of_each_label(width):
    outputs = drawn(4, width)
    loss_fn = nn.BCEWithLogitsLoss(reduction="sum")
    curvature = output_curvature(lambda f: loss_fn(f, torch.full_like(f, 0.25)), outputs)
    p = 1 / (1 + np.exp(-outputs.numpy()))
    expected = np.stack([np.diag(row) for row in p * (1 - p)])
    torch.testing.assert_close(curvature.matrices, torch.from_numpy(expected))
    assert_factored(curvature)


def test_factors_of_independent_labels_keep_the_small_ones():
    # p (1 - p) = exp(-32) up to 1e-14: below the largest by 14 digits, its square root by 7.
    outputs = torch.tensor([[0.0, -32.0]], dtype=torch.float64)
    curvature = output_curvature(
        lambda f: F.binary_cross_entropy_with_logits(f, torch.zeros_like(f), reduction="sum"), outputs
    )
    found = torch.linalg.svdvals(curvature.factors[0])
    torch.testing.assert_close(found, torch.tensor([0.5, math.exp(-16)], dtype=torch.float64))


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


def test_curvature_of_cross_entropy_over_positions_is_one_block_per_input():
    outputs = drawn(2, 3, 2)  # Three classes at two positions.
    targets = torch.tensor([[0, 1], [2, 2]])
    curvature = output_curvature(lambda f: F.cross_entropy(f, targets, reduction="sum"), outputs)
    expected = np.zeros((2, 3, 2, 3, 2))
    for position in range(2):
        expected[:, :, position, :, position] = softmax_curvature(outputs[:, :, position]).numpy()
    torch.testing.assert_close(curvature.matrices, torch.from_numpy(expected.reshape(2, 6, 6)))
    assert_factored(curvature)


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


def test_a_loss_that_couples_the_inputs_has_one_block():
    outputs = drawn(3, 2)
    curvature = output_curvature(lambda f: f.sum().square(), outputs)
    assert curvature.matrices.shape == (1, 6, 6)
    torch.testing.assert_close(curvature.matrices, torch.full((1, 6, 6), 2.0, dtype=torch.float64))
    assert_factored(curvature)


def test_curvature_of_a_variance_over_inputs_is_the_centring_matrix():
    curvature = output_curvature(lambda f: f.var(dim=0, correction=0).sum(), drawn(4, 1))
    expected = 2 / 4 * (torch.eye(4, dtype=torch.float64) - 0.25)
    torch.testing.assert_close(curvature.matrices, expected.unsqueeze(0))
    assert_factored(curvature)


def test_a_loss_that_is_not_convex_has_no_factors():
    curvature = output_curvature(lambda f: (f[:, 0] * f[:, 1]).sum(), drawn(3, 2))
    torch.testing.assert_close(curvature.matrices, torch.eye(2, dtype=torch.float64).flip(0).expand(3, 2, 2))
    assert curvature.factors is None


def test_a_loss_that_is_concave_on_one_input_has_no_factors():
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert output_curvature(lambda f: (signs * f.square()).sum(), drawn(2, 1)).factors is None


def test_output_curvature_leaves_the_outputs_as_they_were():
    outputs = drawn(3, 2)
    before = outputs.clone()
    output_curvature(lambda f: f.square().sum(), outputs)
    assert torch.equal(outputs, before)
    assert not outputs.requires_grad


@pytest.mark.parametrize("blocks", [drawn(3, 2, 2), drawn(1, 6, 6)], ids=["by input", "coupled"])
def test_weighted_rows_multiply_by_the_block_diagonal(blocks):
    gradients = drawn(6, 4, seed=1)
    expected = torch.block_diag(*blocks).numpy() @ gradients.numpy()
    torch.testing.assert_close(weighted_rows(gradients, blocks), torch.from_numpy(expected))


# --- a softmax is one at any outputs ----------------------------------------------------------------------------------


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


def test_a_slope_of_hard_labels_keeps_its_digits():
    outputs = torch.tensor([[40.0, 0.0, 1.0], [0.0, 90.0, 3.0]], dtype=torch.float64)
    found = output_curvature(lambda f: F.cross_entropy(f, torch.tensor([0, 1]), reduction="sum"), outputs)
    others = [[mpmath.exp(-40), mpmath.exp(-39)], [mpmath.exp(-90), mpmath.exp(-87)]]
    whole = [1 + sum(row) for row in others]
    expected = [
        [-sum(others[0]) / whole[0], others[0][0] / whole[0], others[0][1] / whole[0]],
        [others[1][0] / whole[1], -sum(others[1]) / whole[1], others[1][1] / whole[1]],
    ]
    torch.testing.assert_close(
        found.slope,
        torch.tensor([[float(v) for v in row] for row in expected], dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )
    assert found.rounding == 0.0


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


# --- couplings between inputs ----------------------------------------------------------------------------------------


def interaction(outputs, _):
    return (outputs[0] - outputs[1] - outputs[2] + outputs[3]).square().sum()


def test_a_contrast_of_inputs_couples_them():
    module, inputs = linear([[1.0]], [0.0])[0], torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    # w (0 - 1 - 3 + 7) squared: 18 along the weight, nothing along the bias.
    record = measure_basin(module, inputs, torch.zeros(4, 1), loss_fn=interaction)
    assert (record.hessian_nullity, record.hessian_certified) == (1, True)
    assert record.hessian_largest == pytest.approx(18.0)
    assert not record.notes


def all_pairs(outputs, _):
    return (outputs[:, None] - outputs[None]).square().sum()


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_of_differences_between_inputs_does_not_see_the_bias(seed):
    module = nn.Linear(1, 1).double()
    inputs = 1 + 0.05 * drawn(7, 1, seed=seed)
    record = measure_basin(module, inputs, torch.zeros(7, 1), loss_fn=all_pairs)
    assert (record.hessian_nullity, record.gauss_newton_nullity, record.hessian_certified) == (1, 1, True)


# --- scale -----------------------------------------------------------------------------------------------------------


def products_of_outputs(outputs, _):
    return (outputs[:, 0] * outputs[:, 1]).sum()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-14, 1.0, 1e100, 1e250])
@pytest.mark.parametrize("mode", ["dense", "bracket"])
def test_what_is_known_of_a_hessian_does_not_depend_on_the_scale_of_the_loss(scale, mode):
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, targets = drawn(4, 2), drawn(4, 2, seed=1)

    def measured(factor):
        def loss_fn(f, y):
            return (f - y).square().mean() * factor

        return measure_basin(module, inputs, targets, loss_fn=loss_fn, hessian=mode)

    found, expected = measured(scale), measured(1.0)
    names = ["hessian_nullity", "hessian_nullity_lower", "hessian_nullity_upper", "hessian_nullity_strict"]
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert found.hessian_largest == pytest.approx(scale * expected.hessian_largest, rel=1e-3, abs=0)
    # The bound takes more or fewer products where rounding differs: it is one within a factor of two.
    assert 0.5 <= found.residual_curvature / expected.residual_curvature <= 2.0


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_a_saddle_is_none_at_no_scale(scale):
    module, inputs = linear([[1.0, 2.0], [0.5, 1.0]], [0.0, 0.0])
    record = measure_basin(module, inputs, torch.zeros(3), loss_fn=lambda f, y: scale * products_of_outputs(f, y))
    assert (record.hessian_nullity, record.hessian_negative, record.hessian_certified) == (0, 3, None)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_tolerance_that_keeps_the_bracket_open_is_named_and_no_training_advised():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = drawn(5, 3)
    targets = module(inputs).detach() + 1e-9 * drawn(5, 3, seed=1)
    smallest = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket").smallest_curvature
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket", rtol=2 * smallest)
    assert record.hessian_certified is False
    assert record.hessian_resolving_loss is None
    assert f"against the tolerance {2 * smallest:.1e}" in str(record)


def test_at_a_perfect_fit_a_tolerance_counts_the_same_in_the_hessian_and_its_gauss_newton_part():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = drawn(5, 3)
    exact = measure_basin(module, inputs, module(inputs).detach(), loss_fn=nn.MSELoss(), hessian="bracket")
    rtol = 1.5 * exact.smallest_curvature  # Above the smallest curvature, below the next.
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=nn.MSELoss(), rtol=rtol)
    assert record.hessian_nullity == record.gauss_newton_nullity > exact.hessian_nullity
    assert record.smallest_curvature > rtol


@pytest.mark.filterwarnings("ignore:the Hessian is left out")
def test_slopes_that_are_not_finite_leave_the_hessian_out():
    module, inputs = linear([[1.0]], [0.0], num_inputs=4)
    targets = torch.tensor([[float("nan")], [1.0], [2.0], [3.0]])
    with pytest.warns(UserWarning, match="derivative of the loss by the outputs must be finite"):
        record = measure_basin(module, inputs, targets, loss_fn=lambda f, y: (f - y).square().nanmean())
    assert record.loss is not None
    assert record.hessian_nullity is None


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        hidden = inputs.new_zeros(len(inputs), 4)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            chosen = (sign * inputs[:, 0] > 0).nonzero().squeeze(1)
            if len(chosen):
                hidden = hidden.index_copy(0, chosen, expert(inputs[chosen]).tanh())
        return self.head(hidden)


def test_an_expert_that_some_inputs_do_not_use_is_no_lost_derivative(monkeypatch):
    module = Experts().double()
    inputs = drawn(20, 3)
    inputs = inputs[inputs[:, 0].argsort()]
    targets = module(inputs).detach() + 1e-9 * drawn(20, 2, seed=1)
    expected = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    monkeypatch.setattr(quadratic_model, "_GRAPH_ELEMENTS", 100)  # Chunks of few inputs.
    found = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert found.hessian_nullity == expected.hessian_nullity
    assert found.hessian_certified


class ScaledError(nn.Module):
    """A loss with a parameter of its own, which is not one of the network."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs, targets):
        return self.scale * (outputs - targets).square().mean() + self.scale**2


def test_parameters_of_the_loss_are_not_those_of_the_network():
    module, inputs = linear([[1.0], [2.0]], [0.0, 1.0])
    record = measure_basin(module, inputs, module(inputs).detach(), loss_fn=ScaledError(), hessian="bracket")
    assert (record.hessian_nullity, record.hessian_certified, record.notes) == (0, True, ())
