"""Second derivatives of losses by the outputs: algebra on paper, and mpmath where outputs are saturated."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin.functional.jacobian import weighted_rows
from lightning_basin.functional.output_curvature import output_curvature
from tests.functional.curvatures import assert_factored, softmax_curvature
from tests.networks import drawn


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


def test_curvature_of_cross_entropy_over_positions_is_one_block_per_input():
    outputs = drawn(2, 3, 2)  # Three classes at two positions.
    targets = torch.tensor([[0, 1], [2, 2]])
    curvature = output_curvature(lambda f: F.cross_entropy(f, targets, reduction="sum"), outputs)
    expected = np.zeros((2, 3, 2, 3, 2))
    for position in range(2):
        expected[:, :, position, :, position] = softmax_curvature(outputs[:, :, position]).numpy()
    torch.testing.assert_close(curvature.matrices, torch.from_numpy(expected.reshape(2, 6, 6)))
    assert_factored(curvature)


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
