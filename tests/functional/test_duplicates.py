import numpy as np
import pytest
import torch

from lightning_basin.functional.duplicates import (
    dead_units,
    duplicate_classes,
    duplicated_activations,
    join_classes,
    largest_elements,
    search_classes,
)
from lightning_basin.functional.reading import read_together
from tests.networks import drawn, planted


def classes_by_closure(activations, rtol):
    """All pairs compared, then joined until nothing changes: the smallest index in reach of each."""
    rows = activations.astype(np.float64).reshape(len(activations), -1)
    tolerance = rtol * np.abs(rows).max()
    same = np.abs(rows[:, None] - rows[None]).max(2) <= tolerance
    reach = same
    while True:
        further = (reach.astype(np.int64) @ same.astype(np.int64)) > 0
        if (further == reach).all():
            return reach.argmax(1).tolist()
        reach = further


@pytest.mark.parametrize("seed", range(20))
def test_classes_are_the_transitive_closure_of_all_pairs(seed):
    rows = planted(seed)
    assert duplicate_classes(torch.from_numpy(rows), rtol=1e-3).tolist() == classes_by_closure(rows, 1e-3)


@pytest.mark.parametrize("rtol", [1e-6, 1e-3, 0.03, 0.1, 0.3, 0.9])
def test_classes_are_the_closure_at_every_tolerance(rtol):
    rows = np.random.default_rng(0).standard_normal((80, 3))
    assert duplicate_classes(torch.from_numpy(rows), rtol=rtol).tolist() == classes_by_closure(rows, rtol)


@pytest.mark.parametrize("width", [1, 2, 50])
def test_classes_are_the_closure_at_every_width(width):
    rows = planted(7, d=width)
    assert duplicate_classes(torch.from_numpy(rows), rtol=1e-3).tolist() == classes_by_closure(rows, 1e-3)


def classes_by_definition(rows, rtol, scales):
    """All pairs compared as the definition has it, infinities and numbers that are none among them."""
    with np.errstate(invalid="ignore"):
        near = np.abs(rows[:, None] - rows[None]) <= rtol * scales
    same = (near | (rows[:, None] == rows[None])).all(2)
    classes = list(range(len(rows)))
    for i, j in sorted(zip(*np.nonzero(np.triu(same, 1)), strict=True)):
        joined = {classes[i], classes[j]}
        classes = [min(joined) if label in joined else label for label in classes]
    return classes


@pytest.mark.parametrize("num_merged", [0, 1, 12])
@pytest.mark.parametrize("seed", range(25))
def test_classes_are_those_of_the_definition_whatever_the_activations_hold(seed, num_merged):
    random = np.random.default_rng(seed)
    rtol, k, d = random.choice([0.0, 1e-15, 1e-9, 1e-3]), 30, int(random.integers(1, 7))
    rows = random.standard_normal((k, d)) * 10.0 ** random.integers(-12, 12, d)
    scales = np.abs(rows).max(0) * random.choice([0.0, 1.0], d)
    for index in range(num_merged):  # Copies that are equal, at the tolerance, and beyond it by the least.
        step = random.choice([0.0, 0.5, 1 - 1e-6, 1 + 1e-6, 3.0]) * rtol * scales
        rows[index] = rows[random.integers(k)] + random.choice([-1, 1], d) * step
    for value in (np.inf, -np.inf, np.nan):
        rows[random.integers(0, k, 2), random.integers(d)] = value
    rows = rows[random.permutation(k)]
    activations, by_entry = torch.from_numpy(rows), torch.from_numpy(scales)
    classes = duplicate_classes(activations, rtol=rtol, scales=by_entry)
    assert classes.tolist() == classes_by_definition(rows, rtol, scales)
    rtols, largest = [rtol, rtol / 2, 0.0], float(np.abs(rows).max(where=np.isfinite(rows), initial=0.0))
    (together,) = read_together([search_classes(activations, rtols, scales=scales, largest=largest)])
    assert [classes.tolist() for classes in together] == [classes_by_definition(rows, rtol, scales) for rtol in rtols]


def test_equal_rows_whose_projections_leave_the_range_of_float64_are_one_class():
    rows = torch.full((3, 40), 1.7e308, dtype=torch.float64)
    rows[1, 0] = 0.0
    assert duplicate_classes(rows, rtol=0.0).tolist() == [0, 1, 0]


def test_a_chain_joins_inputs_that_are_not_the_same_themselves():
    activations = torch.tensor([[1.0], [1.0 + 1.6e-6], [1.0 + 0.8e-6]], dtype=torch.float64)
    assert duplicate_classes(activations).tolist() == [0, 0, 0]


def test_a_chain_with_a_missing_link_stays_apart():
    activations = torch.tensor([[1.0], [1.0 + 1.6e-6]], dtype=torch.float64)
    assert duplicate_classes(activations).tolist() == [0, 1]


def test_the_tolerance_is_relative_to_the_largest_entry_of_all_inputs():
    activations = torch.tensor([[1.0], [2.0], [1e7]])
    assert duplicate_classes(activations).tolist() == [0, 0, 2]


def test_a_difference_at_the_tolerance_is_the_same():
    activations = torch.tensor([[0.0], [0.25], [1.0]], dtype=torch.float64)
    assert duplicate_classes(activations, rtol=0.25).tolist() == [0, 0, 2]


def test_one_entry_that_differs_tells_two_inputs_apart():
    activations = torch.ones(2, 100, dtype=torch.float64)
    activations[1, 63] += 2e-6
    assert duplicate_classes(activations).tolist() == [0, 1]


def test_without_tolerance_only_equal_inputs_are_the_same():
    activations = torch.tensor([[1.0], [1.0 + 2.0**-52], [1.0]], dtype=torch.float64)
    assert duplicate_classes(activations, rtol=0.0).tolist() == [0, 1, 0]


def test_zero_and_minus_zero_are_equal():
    assert duplicate_classes(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]), rtol=0.0).tolist() == [0, 0]


@pytest.mark.parametrize("rtol", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_inputs_are_one_class(value, rtol):
    assert duplicate_classes(torch.full((5, 4), value), rtol=rtol).tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_and_booleans_are_compared_as_numbers(dtype):
    activations = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]], dtype=dtype)
    assert duplicate_classes(activations).tolist() == [0, 1, 0, 3]


def test_further_axes_belong_to_the_activation():
    activations = torch.zeros(3, 2, 2)
    activations[1, 1, 1] = 1.0
    assert duplicate_classes(activations).tolist() == [0, 1, 0]


def test_a_vector_is_one_number_per_input():
    assert duplicate_classes(torch.tensor([2.0, 1.0, 2.0])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(3, 0), (1, 4)])
def test_activations_without_entries_and_single_inputs_are_one_class(shape):
    assert duplicate_classes(torch.ones(shape)).tolist() == [0] * shape[0]


def test_no_inputs_have_no_classes():
    classes = duplicate_classes(torch.ones(0, 4))
    assert (classes.tolist(), classes.dtype) == ([], torch.int64)


def test_classes_are_int64_and_keep_no_graph():
    classes = duplicate_classes(torch.ones(3, 2, requires_grad=True))
    assert classes.dtype == torch.int64
    assert not classes.requires_grad


def test_the_search_draws_from_no_global_generator():
    before = torch.random.get_rng_state()
    duplicate_classes(torch.rand(9, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("jitter", [0.0, 1e-8])
@pytest.mark.parametrize("distinct", [1, 500, 10_000])
def test_twenty_thousand_inputs_are_sorted_into_their_classes_in_seconds(distinct, jitter):
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(distinct, 20, generator=generator, dtype=torch.float64)
    members = torch.arange(20_000) % distinct
    noise = jitter * torch.rand(20_000, 20, generator=generator, dtype=torch.float64)
    classes = duplicate_classes(prototypes[members] + noise)
    assert torch.equal(classes, members)


def test_activations_without_an_axis_of_inputs_are_refused():
    with pytest.raises(ValueError, match="activations must have one row per input, got a scalar"):
        duplicate_classes(torch.tensor(1.0))


@pytest.mark.parametrize("rtol", [-1e-9, 1.0, float("nan")])
@pytest.mark.parametrize("function", [duplicate_classes, duplicated_activations])
def test_a_tolerance_outside_of_the_half_open_unit_interval_is_refused(function, rtol):
    with pytest.raises(ValueError, match=r"rtol must be inside \[0, 1\), got"):
        function(torch.ones(2, 2), rtol=rtol)


@pytest.mark.parametrize("seed", range(3))
def test_duplicated_activations_are_the_inputs_beyond_the_classes(seed):
    rows = planted(seed)
    expected = len(rows) - len(set(classes_by_closure(rows, 1e-3)))
    assert duplicated_activations(torch.from_numpy(rows), rtol=1e-3) == expected


def test_distinct_inputs_are_not_duplicated():
    assert duplicated_activations(torch.arange(5.0).unsqueeze(1)) == 0


def test_units_that_are_constant_over_the_inputs_are_dead():
    outputs = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 2.0], [0.0, 5.0, 3.0]])
    assert dead_units(outputs) == 2


def test_a_unit_is_alive_if_it_moves_at_any_position():
    outputs = torch.zeros(2, 3, 2)
    outputs[:, :, 1] = torch.tensor([1.0, 2.0, 3.0])  # Differs between positions, not between inputs.
    assert dead_units(outputs) == 2
    outputs[1, 2, 0] = 1.0
    assert dead_units(outputs) == 1


def test_a_unit_that_moves_by_less_than_the_tolerance_is_dead():
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.5e-6]], dtype=torch.float64)
    assert dead_units(outputs) == 2
    assert dead_units(outputs, rtol=1e-7) == 1


@pytest.mark.parametrize(("shape", "expected"), [((4, 3), 3), ((1, 3), 3), ((0, 3), 0), ((3, 0), 0)])
def test_dead_units_of_zeros_are_all_of_them(shape, expected):
    assert dead_units(torch.zeros(shape)) == expected


def test_classes_are_joined_along_chains_in_any_order():
    classes = join_classes(torch.arange(7), torch.tensor([5, 2, 3, 6]), torch.tensor([3, 5, 2, 1]))
    assert classes.tolist() == [0, 1, 2, 2, 4, 2, 1]


def test_joining_nothing_leaves_the_classes():
    nothing = torch.empty(0, dtype=torch.int64)
    assert join_classes(torch.tensor([0, 0, 2]), nothing, nothing).tolist() == [0, 0, 2]


INFINITE = float("inf")


@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_infinities_are_compared_exactly_and_have_no_part_in_the_scale(rtol):
    rows = torch.tensor([[1.0, -INFINITE], [2.0, -INFINITE], [1.0, -INFINITE], [1.0, INFINITE], [1.0, 0.0]])
    assert duplicate_classes(rows, rtol=rtol).tolist() == [0, 1, 0, 3, 4]


def test_what_is_no_number_is_different_from_everything():
    rows = torch.tensor([[1.0], [float("nan")], [1.0], [float("nan")]])
    assert duplicate_classes(rows).tolist() == [0, 1, 0, 3]


def test_each_entry_may_have_a_scale_of_its_own():
    rows = torch.tensor([[1e7, 0.5], [1e7, 0.5 + 1e-7], [1e7 - 1, 0.5], [1e7, 0.4]], dtype=torch.float64)
    assert duplicate_classes(rows).tolist() == [0, 0, 0, 0]
    assert duplicate_classes(rows, scales=torch.tensor([0.0, 0.5])).tolist() == [0, 0, 2, 3]


def test_units_that_are_infinite_on_every_input_are_dead_and_no_others():
    assert dead_units(torch.tensor([[1.0, -INFINITE], [2.0, -INFINITE]])) == 1


@pytest.mark.parametrize("largest", [1e300, 1e308, 1.7e308])
def test_near_ties_of_numbers_whose_projections_leave_float64_are_found(largest):
    rows = torch.rand(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * largest
    rows[4], rows[5] = rows[1] * (1 - 1e-9), rows[1] * (1 - 1e-9)
    assert duplicate_classes(rows).tolist() == [0, 1, 2, 3, 1, 1]


def searched(rows, rtols):
    largest = float(rows.abs().amax())
    (classes,) = read_together([search_classes(rows, rtols, scales=np.full(rows.shape[1], largest), largest=largest)])
    return [found.tolist() for found in classes]


def test_classes_at_several_tolerances_are_found_in_one_search():
    # The largest element is 1: steps of 1e-3, 1e-7 and none.
    rows = torch.tensor([[1.0], [0.999], [0.5], [0.5 + 1e-7], [0.5], [0.999]], dtype=torch.float64)
    expected = [[0, 0, 2, 2, 2, 0], [0, 1, 2, 2, 2, 1], [0, 1, 2, 3, 2, 1]]
    assert searched(rows, [1e-2, 1e-6, 0.0]) == expected
    assert [searched(rows, [rtol])[0] for rtol in (1e-2, 1e-6, 0.0)] == expected


def test_different_rows_of_one_hash_stay_apart():
    # All bits of these two numbers differ, whose hashes are then the same. They are compared at a tolerance of 3.6.
    first, last = 1.0, -3.9999999999999996
    rows = torch.tensor([[first], [-1.5], [last], [first], [last], [first]], dtype=torch.float64)
    assert searched(rows, [0.9, 0.0]) == [[0] * 6, [0, 1, 2, 0, 2, 0]]


@pytest.mark.parametrize("num_distinct", [1, 4])
def test_few_wide_rows_are_compared_exactly(num_distinct):
    rows = drawn(num_distinct, 150_000).repeat(8 // num_distinct, 1)
    rows[-1, 77_777] += 1e-9
    nearly = [index % num_distinct for index in range(8)]
    assert searched(rows, [1e-6, 0.0]) == [nearly, [*nearly[:-1], 7]]


@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_many_numbers_are_sorted_into_their_classes(rtol):
    # The tolerance is a fortieth of the distance of two neighbors.
    numbers = (torch.arange(50_000) * 7919) % 25_000
    expected = torch.empty(25_000, dtype=torch.int64)
    expected[numbers[:25_000]] = torch.arange(25_000)
    assert torch.equal(duplicate_classes(numbers, rtol=rtol), expected[numbers])


def test_a_long_chain_is_one_class():
    order = (torch.arange(20_000) * 7919) % 20_000  # Neighbors are 1 of 19,999 apart, and the tolerance is 2.
    assert duplicate_classes(order, rtol=1e-4).tolist() == [0] * 20_000


def test_rows_that_differ_by_roundings_have_the_classes_of_their_bits():
    rows = torch.ones(60, 40, dtype=torch.float64)
    rows[:, 3] += 2.0**-52 * (torch.arange(60) % 3)
    assert searched(rows, [1e-6, 0.0]) == [[0] * 60, [index % 3 for index in range(60)]]


@pytest.mark.parametrize("scale", [1e-320, 1e-308, 1e-200])
def test_numbers_whose_products_underflow_are_compared(scale):
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], dtype=torch.float64) * scale
    assert duplicate_classes(rows).tolist() == [0, 1, 0]


def test_what_is_no_number_is_in_no_class_of_any_size():
    rows = torch.full((200, 3), float("nan"))
    rows[::2] = 5.0
    assert duplicate_classes(rows).tolist() == [index if index % 2 else 0 for index in range(200)]


def test_the_largest_elements_of_tensors_are_finite():
    tensors = [torch.tensor([-3.0, 2.0]), torch.tensor([[1.0, -INFINITE]]), torch.tensor([float("nan"), 4.0])]
    nothing = [torch.empty(0, 2), torch.tensor([INFINITE])]
    assert largest_elements([*tensors, *nothing]) == [3.0, 1.0, 4.0, 0.0, 0.0]


def test_dead_units_of_integers_are_counted_as_numbers():
    outputs = torch.tensor([[200, 0, 7], [200, 1, 7]], dtype=torch.uint8)
    assert dead_units(outputs) == 2


@pytest.mark.parametrize("value", [7.0, INFINITE])
def test_units_may_come_before_positions_in_memory(value):
    # Of three channels at four positions one is constant, one moves at the last position, and one at all.
    channels = torch.zeros(2, 3, 4, dtype=torch.float64)
    channels[:, 0] = value
    channels[1, 1, 3] = 1.0
    channels[:, 2] = torch.tensor([[1.0], [2.0]])
    assert dead_units(channels.mT) == dead_units(channels.mT.contiguous()) == 1
