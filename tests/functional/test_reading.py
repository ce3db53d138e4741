import pytest
import torch

from lightning_basin.functional.reading import read, read_together
from tests.counting import Dispatched


def test_tensors_are_read_with_their_shapes_and_dtypes():
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor(3), torch.tensor([True, False]), torch.ones(2, 0), torch.eye(2)]
    arrays = read(tensors)
    assert [array.tolist() for array in arrays] == [[[1.0, 2.0]], 3, [True, False], [[], []], [[1.0, 0.0], [0.0, 1.0]]]
    assert [str(array.dtype) for array in arrays] == ["float32", "int64", "bool", "float32", "float32"]


def test_tensors_of_one_dtype_are_one_transfer():
    with Dispatched() as dispatched:
        read([torch.ones(2), torch.ones(3, 4), torch.ones(())])
    assert dispatched.results["cat"] == 1


def test_a_transposed_tensor_that_needs_a_gradient_is_read():
    (array,) = read([torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True).mT])
    assert array.tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_nothing_is_read_of_nothing():
    assert read([]) == []
    assert read_together([]) == []


def counted_down(start):
    """Reads a number, one less each time, down to zero; returns all it has read."""
    found, number = [], torch.tensor(start)
    while not found or found[-1] > 0:
        (array,) = yield [number]
        found.append(int(array))
        number = number - 1
    return found


def test_computations_of_different_lengths_return_their_results_in_order():
    starts = [2, 0, 3]
    assert read_together(map(counted_down, starts)) == [[2, 1, 0], [0], [3, 2, 1, 0]]


def test_computations_side_by_side_wait_once_for_each_step():
    with Dispatched() as dispatched:
        read_together(counted_down(4) for _ in range(10))
    assert dispatched.results["cat"] == 5


def test_a_computation_that_reads_nothing_returns_at_once():
    def constant():
        return 7
        yield

    assert read_together([constant(), counted_down(0)]) == [7, [0]]


def test_an_error_of_one_computation_is_raised():
    def failing():
        yield [torch.ones(1)]
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        read_together([failing(), counted_down(3)])
