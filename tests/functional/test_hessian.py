"""Hessians of functions whose second derivatives are known on paper, and their null spaces."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_basin.functional.hessian import hessian_matrix
from tests.networks import drawn


def test_hessian_of_a_quadratic_form_is_its_symmetric_part_twice():
    form = drawn(5, 5)
    point = drawn(5, seed=1).requires_grad_()
    torch.testing.assert_close(hessian_matrix(point @ form @ point, [point]), form + form.mT)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_the_size_of_chunks_does_not_change_the_hessian(chunk_size):
    form = drawn(5, 5)
    point = drawn(5, seed=1).requires_grad_()
    torch.testing.assert_close(hessian_matrix(point @ form @ point, [point], chunk_size=chunk_size), form + form.mT)


@pytest.mark.parametrize("shape", [(1,), ()], ids=["vectors", "scalars"])
def test_hessian_of_rosenbrocks_function_is_the_one_on_paper(shape):
    x, y = (torch.full(shape, value, dtype=torch.float64, requires_grad=True) for value in (-1.2, 1.0))
    loss = ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum()
    expected = torch.tensor([[2 - 400 + 1200 * 1.44, 480.0], [480.0, 200.0]], dtype=torch.float64)
    torch.testing.assert_close(hessian_matrix(loss, [x, y]), expected)


def test_rows_of_the_hessian_follow_the_order_of_the_parameters():
    first, second = drawn(2).requires_grad_(), drawn(1, 2, seed=1).requires_grad_()
    loss = (first.square() * torch.tensor([1.0, 2.0])).sum() + (second.square() * torch.tensor([3.0, 4.0])).sum()
    assert hessian_matrix(loss, [second, first]).tolist() == torch.diag(torch.tensor([6.0, 8.0, 2.0, 4.0])).tolist()


@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (2, 2), (64, 2)], ids=str)
def test_parameters_without_influence_have_zero_rows(shape):
    used, unused = drawn(1).requires_grad_(), drawn(*shape).requires_grad_()
    size = unused.numel()
    expected = torch.diag(torch.tensor([0.0] * size + [2.0], dtype=torch.float64))
    assert torch.equal(hessian_matrix(used.square().sum(), [unused, used]), expected)


def test_parameters_of_which_the_gradient_does_not_depend_have_zero_rows():
    # The loss is linear in the second parameter and does not mix it with the first.
    first, second = drawn(2).requires_grad_(), drawn(2, 2, seed=1).requires_grad_()
    hessian = hessian_matrix(first.square().sum() + second.sum(), [first, second])
    assert hessian.tolist() == torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0, 0.0])).tolist()


def test_hessian_of_the_mean_absolute_error_of_a_linear_map_is_zero():
    weight = drawn(3).requires_grad_()
    loss = F.l1_loss(drawn(6, 3, seed=1) @ weight, drawn(6, seed=2))
    assert torch.equal(hessian_matrix(loss, [weight]), torch.zeros(3, 3, dtype=torch.float64))


def test_hessian_of_a_piecewise_linear_function_is_zero():
    weight = drawn(3).requires_grad_()
    assert torch.equal(hessian_matrix(weight.relu().sum(), [weight]), torch.zeros(3, 3, dtype=torch.float64))


def test_hessian_of_a_constant_loss_is_zero():
    weight = drawn(2).requires_grad_()
    loss = 3.0 + (0 * weight).sum()
    assert torch.equal(hessian_matrix(loss, [weight]), torch.zeros(2, 2, dtype=torch.float64))


def test_hessian_matrix_leaves_no_gradient_and_no_graph():
    weight = drawn(2).requires_grad_()
    hessian = hessian_matrix(weight.pow(4).sum(), [weight])
    assert weight.grad is None
    assert not hessian.requires_grad


def layer_norm_loss(values, inputs, targets):
    """Mean squared error of v . LayerNorm(W x) with gain and shift, in numpy."""
    weight, gain, shift, head = np.split(values, [12, 16, 20])
    hidden = inputs @ weight.reshape(4, 3).T
    centred = hidden - hidden.mean(1, keepdims=True)
    normed = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
    return np.mean((np.tanh(normed * gain + shift) @ head - targets) ** 2)


def test_hessian_through_layer_norm_is_that_of_finite_differences():
    values, inputs, targets = drawn(24), drawn(5, 3, seed=1), drawn(5, seed=2)
    parameters = [part.clone().requires_grad_() for part in values.split([12, 4, 4, 4])]
    weight, gain, shift, head = parameters
    hidden = F.layer_norm(inputs @ weight.view(4, 3).mT, (4,), gain, shift)
    found = hessian_matrix(F.mse_loss(hidden.tanh() @ head, targets), parameters)
    step = 1e-3
    offsets = step * np.eye(24)

    def loss_at(offset):
        return layer_norm_loss(values.numpy() + offset, inputs.numpy(), targets.numpy())

    def second_difference(i, j, h):
        a, b = offsets[i] * h, offsets[j] * h
        return (loss_at(a + b) - loss_at(a - b) - loss_at(b - a) + loss_at(-a - b)) / (2 * step * h) ** 2

    # Richardson's extrapolation: the error is of fourth order in the step, 1e-12 times sixth derivatives near 1e4,
    # and rounding adds 1e-16 / step**2 = 1e-10.
    pairs = [(i, j) for i in range(24) for j in range(i + 1)]
    for i, j in pairs:
        expected = (4 * second_difference(i, j, 0.5) - second_difference(i, j, 1.0)) / 3
        assert abs(float(found[i, j]) - expected) < 1e-6


class _WrongDouble(torch.autograd.Function):
    """x -> x_0 x_1 with a first derivative that forgets that the factors depend on each other."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x[0] * x[1]

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.stack([x[1], x[0].detach()])


def test_a_wrong_second_derivative_is_refused():
    point = drawn(2).requires_grad_()
    with pytest.raises(RuntimeError, match=r"the Hessian must be symmetric, but entries differ by .* wrong second"):
        hessian_matrix(_WrongDouble.apply(point), [point])


class _RightDouble(torch.autograd.Function):
    """x -> x_0 x_1 without a rule for batched derivatives."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x[0] * x[1]

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.stack([x[1], x[0]])


def test_an_operation_that_cannot_be_batched_is_differentiated_column_by_column():
    point = drawn(2).requires_grad_()
    assert hessian_matrix(_RightDouble.apply(point), [point]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
