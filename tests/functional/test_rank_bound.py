import torch

from lightning_basin.functional.rank_bound import gradient_rank_bound, merged_directions, merged_linear_directions


def cut(num_distinct, num_directions):
    """Of 50 inputs the last ones are one class."""
    return torch.arange(50).clamp(max=num_distinct - 1), lambda kept: num_directions


def test_the_rank_bound_is_the_smallest_over_the_cuts():
    # 2 * 50 = 100, 10 + 2 * 30 = 70, 20 + 2 * 5 = 30 and 40 + 2 * 1 = 42.
    assert gradient_rank_bound(100, 50, 2, [cut(30, 10)]) == 70
    # Nested: the second cut merges what the first has left, at its own price.
    assert gradient_rank_bound(100, 50, 2, [cut(30, 10), cut(5, 20), cut(1, 40)]) == 30


def test_without_cuts_the_rank_is_bounded_by_the_numbers_of_parameters_and_rows():
    assert gradient_rank_bound(7, 3, 3, []) == 7
    assert gradient_rank_bound(70, 3, 3, []) == 9


def test_each_merged_input_adds_the_rank_of_the_signals_of_its_class():
    signals = torch.zeros(7, 2, 3)
    signals[:4, 0, 1] = 1.0  # A class of four with one output moved by one unit: 1 * 3.
    signals[5:] = torch.eye(2, 3)  # A class of two with two outputs moved by two units: 2 * 1. One input alone: 0.
    assert merged_directions(torch.tensor([0, 0, 0, 0, 4, 5, 5]), signals) == 3 + 2


def test_classes_whose_units_are_off_add_no_directions():
    assert merged_directions(torch.zeros(9, dtype=torch.int64), torch.zeros(9, 2, 3)) == 0


def test_directions_behind_a_linear_layer_are_the_product_of_two_ranks():
    # Differences span two axes of three; one of two units is on.
    inputs = torch.tensor([[0, 0, 5], [1, 0, 5], [0, 1, 5], [1, 1, 5], [7, 7, 7]], dtype=torch.float64)
    signals = torch.tensor([3.0, 0.0], dtype=torch.float64).expand(5, 1, 2)
    classes = torch.tensor([0, 0, 0, 0, 4])
    assert merged_linear_directions(classes, signals, inputs, tolerance=1e-14) == 2 * 1


def test_small_differences_above_the_tolerance_of_the_rank_count():
    # The differences are 1e-3 and 1e-11 in two directions.
    inputs = torch.tensor([[1.0, 0.0], [1.0, 1e-11], [1.0 + 1e-3, 0.0]], dtype=torch.float64)
    signals, classes = torch.ones(3, 1, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    assert merged_linear_directions(classes, signals, inputs, tolerance=1e-12) == 2
    assert merged_linear_directions(classes, signals, inputs, tolerance=1e-9) == 1


def test_without_merged_inputs_there_are_no_directions_inside_the_classes():
    classes, signals = torch.arange(3), torch.ones(3, 1, 2)
    assert merged_directions(classes, signals) == 0
    assert merged_linear_directions(classes, signals, torch.ones(3, 2), tolerance=1e-12) == 0
