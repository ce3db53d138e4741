import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from tests.networks import drawn


def rows_of_matrix(inputs, num_outputs):
    """Derivative of x -> W x by W, row by row: e_j (x) x."""
    return torch.from_numpy(np.concatenate([np.kron(np.eye(num_outputs), x) for x in inputs.numpy()[:, None]]))


LINEAR_MAPS = {
    "linear": lambda weight, x: nn.functional.linear(x, weight),
    "transposed": lambda weight, x: x @ weight.mT,
    "einsum": lambda weight, x: torch.einsum("ni,oi->no", x, weight),
    "elementwise": lambda weight, x: (weight * x.unsqueeze(1)).sum(2),
}


@pytest.mark.parametrize("name", LINEAR_MAPS)
def test_gradient_of_a_linear_map_is_the_input_in_the_row_of_its_output(name):
    inputs = drawn(4, 3)

    def behavior(parameters, tensors):
        return LINEAR_MAPS[name](parameters["weight"], tensors[0])

    found = behavioral_gradients(behavior, {"weight": drawn(2, 3)}, [inputs])
    torch.testing.assert_close(found, rows_of_matrix(inputs, 2))


def test_gradient_by_a_matrix_that_is_used_transposed_keeps_the_order_of_its_entries():
    inputs = drawn(3, 6)

    def behavior(parameters, tensors):
        return (parameters["weight"].mT.flatten() * tensors[0]).sum(1, keepdim=True)

    found = behavioral_gradients(behavior, {"weight": drawn(2, 3)}, [inputs])
    # Entry (i, j) of the weight meets entry (j, i) of the input read as 3 x 2.
    torch.testing.assert_close(found, inputs.view(3, 3, 2).mT.reshape(3, 6))


def test_gradient_by_a_parameter_with_permuted_axes_keeps_the_order_of_its_entries():
    inputs = drawn(2, 4)

    def behavior(parameters, tensors):
        return tensors[0] @ parameters["weight"].permute(2, 0, 1).reshape(4, 6)

    found = behavioral_gradients(behavior, {"weight": torch.zeros(2, 3, 4, dtype=torch.float64)}, [inputs])
    # Output (a, b) is the sum over i of x_i w[a, b, i].
    torch.testing.assert_close(found, rows_of_matrix(inputs, 6))


def test_gradient_of_a_quadratic_function_is_linear_in_the_parameters():
    weight, inputs = drawn(3), drawn(5, 3)

    def behavior(parameters, tensors):
        return (tensors[0] @ parameters["weight"]).square()

    expected = 2 * (inputs @ weight).unsqueeze(1) * inputs
    torch.testing.assert_close(behavioral_gradients(behavior, {"weight": weight}, [inputs]), expected)


def test_columns_follow_the_order_of_the_parameters_and_scalars_take_one():
    inputs = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    parameters = {"shift": torch.tensor(5.0), "scale": torch.tensor([7.0]), "power": torch.tensor(2.0)}
    parameters = {name: value.double() for name, value in parameters.items()}

    def behavior(values, tensors):
        return values["scale"] * tensors[0] ** values["power"] + values["shift"]

    # Derivatives 1, x^2 and 7 x^2 log x.
    expected = torch.tensor([[1.0, 4.0, 28 * np.log(2)], [1.0, 9.0, 63 * np.log(3)]], dtype=torch.float64)
    torch.testing.assert_close(behavioral_gradients(behavior, parameters, [inputs]), expected)


def test_several_input_tensors_are_split_together():
    left, right = drawn(4, 2), drawn(4, 3, seed=1)

    def behavior(parameters, tensors):
        return torch.einsum("ni,ij,nj->n", tensors[0], parameters["form"], tensors[1])

    expected = torch.from_numpy(np.stack([np.kron(a, b) for a, b in zip(left.numpy(), right.numpy(), strict=True)]))
    torch.testing.assert_close(behavioral_gradients(behavior, {"form": drawn(2, 3)}, [left, right]), expected)


def test_rows_are_ordered_by_input_then_output_also_for_outputs_with_several_axes():
    inputs = torch.tensor([1.0, 10.0], dtype=torch.float64)

    def behavior(parameters, tensors):
        factors = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
        return parameters["weight"] * tensors[0].view(-1, 1, 1) * factors

    found = behavioral_gradients(behavior, {"weight": torch.ones((), dtype=torch.float64)}, [inputs])
    expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert found.squeeze(1).tolist() == expected


def test_a_parameter_without_influence_has_zero_columns():
    def behavior(parameters, tensors):
        return parameters["used"] * tensors[0]

    parameters = {"unused": torch.ones(2, dtype=torch.float64), "used": torch.ones(1, dtype=torch.float64)}
    found = behavioral_gradients(behavior, parameters, [torch.tensor([[3.0]], dtype=torch.float64)])
    assert found.tolist() == [[0.0, 0.0, 3.0]]


def test_integer_inputs_select_rows():
    def behavior(parameters, tensors):
        return parameters["table"][tensors[0]]

    found = behavioral_gradients(behavior, {"table": drawn(3)}, [torch.tensor([[2], [0]])])
    assert found.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_inputs_that_do_not_fit_into_one_chunk_are_all_differentiated():
    # Gradients of one input take 6e6 numbers: the third input is in the second chunk of 2**24.
    size = 3_000_000
    inputs = torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64)

    def behavior(parameters, tensors):
        return tensors[0] * parameters["weight"].sum()

    found = behavioral_gradients(behavior, {"weight": torch.zeros(size, dtype=torch.float64)}, [inputs])
    assert found.shape == (3, size)
    assert torch.equal(found, inputs.expand(3, size))


def test_behavioral_gradients_keep_no_graph():
    weight = drawn(3).requires_grad_()
    other = torch.ones((), dtype=torch.float64, requires_grad=True)

    def behavior(parameters, tensors):
        return other * (tensors[0] @ parameters["weight"]).square()

    found = behavioral_gradients(behavior, {"weight": weight}, [drawn(2, 3)])
    assert not found.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize(("parameters", "inputs"), [({}, [torch.ones(1)]), ({"weight": torch.ones(1)}, [])])
def test_nothing_to_differentiate_is_refused(parameters, inputs):
    with pytest.raises(ValueError, match="need at least one parameter and one input tensor, got"):
        behavioral_gradients(lambda values, tensors: tensors[0], parameters, inputs)


def test_gradient_rows_of_a_product_are_the_factors():
    first = torch.tensor(2.0, requires_grad=True)
    second = torch.tensor([3.0, 5.0], requires_grad=True)
    assert gradient_rows(first * second, [first, second]).tolist() == [[3.0, 2.0, 0.0], [5.0, 0.0, 2.0]]


def test_gradient_rows_are_zero_where_nothing_depends():
    used = torch.ones(1, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    assert gradient_rows(2 * used, [unused, used]).tolist() == [[0.0, 0.0, 2.0]]


def test_gradient_rows_keep_no_graph_and_leave_no_gradient():
    weight = drawn(3).requires_grad_()
    found = gradient_rows(weight.square(), [weight])
    assert not found.requires_grad
    assert weight.grad is None


def test_gradient_rows_can_be_taken_twice():
    weight = drawn(3).requires_grad_()
    outputs = weight.square()
    assert torch.equal(gradient_rows(outputs, [weight]), gradient_rows(outputs, [weight]))
