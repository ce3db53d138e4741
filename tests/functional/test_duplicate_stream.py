import pytest
import torch

from lightning_basin.functional import DuplicateSearch, duplicate_classes
from tests.networks import drawn, planted

RTOLS = [0.0, 1e-6, 1e-3, 0.03, 0.3]


def classes_of(chunks, **options):
    """The classes over as many passes as are needed; ``chunks`` gives the activations anew each time."""
    search = DuplicateSearch(**options)
    while True:
        for chunk in chunks():
            search.add(chunk)
        if not search.finish_pass():
            return search.classes


def streamed(rows, chunk_size, **options):
    return classes_of(lambda: rows.split(chunk_size), **options)


def chain(num_links, step):
    """Links in random order, each a step from the next one: one class at a tolerance of a step."""
    order = torch.randperm(num_links, generator=torch.Generator().manual_seed(0))
    return (1.0 - step * order.double()).unsqueeze(1).expand(-1, 5)


@pytest.mark.parametrize("chunk_size", [1, 7, 60])
@pytest.mark.parametrize("rtol", RTOLS)
@pytest.mark.parametrize("width", [1, 5, 50])
def test_classes_are_those_of_the_whole_matrix(width, rtol, chunk_size):
    for seed in range(5):  # Copies beside the tolerance, to both sides, and chains.
        rows = torch.from_numpy(planted(seed, d=width))
        assert torch.equal(streamed(rows, chunk_size, rtol=rtol), duplicate_classes(rows, rtol=rtol))


@pytest.mark.parametrize("max_elements", [1, 10, 100])
@pytest.mark.parametrize("rtol", RTOLS)
def test_classes_do_not_depend_on_how_much_is_held(rtol, max_elements):
    rows = torch.from_numpy(planted(3))
    assert torch.equal(streamed(rows, 8, rtol=rtol, max_elements=max_elements), duplicate_classes(rows, rtol=rtol))


@pytest.mark.parametrize(("rtol", "expected"), [(1.01e-4, 1), (0.99e-4, 300)])
def test_a_chain_is_one_class_and_falls_apart_where_the_steps_are_wider_than_the_tolerance(rtol, expected):
    classes = streamed(chain(300, 1e-4), 32, rtol=rtol)
    assert classes.unique().numel() == expected


def test_differences_at_the_tolerance_and_one_rounding_beyond_are_told_apart():
    rows = torch.tensor([[0.0], [0.25], [0.5 + 2.0**-53], [1.0]], dtype=torch.float64)
    assert streamed(rows, 1, rtol=0.25).tolist() == duplicate_classes(rows, rtol=0.25).tolist() == [0, 0, 2, 3]


def test_the_largest_entry_may_come_last():
    rows = torch.tensor([[1.0], [2.0], [1e7]])
    assert streamed(rows, 1).tolist() == [0, 0, 2]


def test_links_that_arrive_after_what_they_join_are_found():
    rows = torch.tensor([[1.0], [1.0 + 1.6e-6], [1.0 + 0.8e-6]], dtype=torch.float64)
    assert streamed(rows, 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_constant_activations_are_one_class(value, rtol):
    assert streamed(torch.full((9, 4), value), 2, rtol=rtol).tolist() == [0] * 9


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (3, 0), (1, 0)])
def test_single_inputs_no_inputs_and_activations_without_entries(shape):
    rows = torch.ones(shape)
    assert streamed(rows, 2).tolist() == duplicate_classes(rows).tolist()


def test_no_chunks_have_no_classes():
    assert classes_of(list).tolist() == []


def test_zero_and_minus_zero_are_equal():
    assert streamed(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]), 1, rtol=0.0).tolist() == [0, 0]


def test_further_axes_belong_to_the_activation():
    rows = torch.zeros(3, 2, 2)
    rows[1, 1, 1] = 1.0
    assert streamed(rows, 2).tolist() == [0, 1, 0]


def test_distinct_inputs_are_looked_at_once():
    search = DuplicateSearch()
    search.add(drawn(500, 20))
    assert not search.finish_pass()


def test_one_input_of_a_large_class_is_held():
    rows = torch.ones(2000, 6, dtype=torch.float64) + 1e-8 * drawn(2000, 6)
    # Two passes, although no more than two inputs fit.
    search = DuplicateSearch(max_elements=12)
    for _ in range(2):
        for chunk in rows.split(100):
            search.add(chunk)
        is_open = search.finish_pass()
    assert not is_open
    assert search.classes.tolist() == [0] * 2000


@pytest.mark.parametrize("distinct", [1, 50, 2000])
def test_memory_does_not_grow_with_the_length_of_activations(distinct):
    # 2000 inputs of 3000 entries are 6 million numbers. Allowed: twice what may be held, and a few for each input.
    search = DuplicateSearch(max_elements=8 * 3000)
    is_open = True
    while is_open:
        for members in (torch.arange(2000) % distinct).split(50):
            search.add(members.unsqueeze(1) + torch.arange(3000.0, dtype=torch.float64))
            kept = sum(tensor.numel() for tensor in tensors_in(vars(search)))
            assert kept <= 2 * 8 * 3000 + 4 * 3000 + 20 * 2000
        is_open = search.finish_pass()
    assert search.classes.unique().numel() == distinct


def tensors_in(attributes):
    for value in attributes.values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, torch.Tensor))


def test_passes_that_differ_are_refused():
    passes = iter([torch.ones(4, 2), torch.ones(4, 2) + 0.1])
    with pytest.raises(ValueError, match="the activations of two passes differ"):
        classes_of(lambda: [next(passes)])


@pytest.mark.parametrize("number", [3, 5])
def test_a_pass_with_another_number_of_inputs_is_refused(number):
    passes = iter([torch.ones(4, 2), torch.ones(number, 2)])
    with pytest.raises(ValueError, match="each pass must"):
        classes_of(lambda: [next(passes)])


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_infinities_are_compared_exactly(chunk):
    infinite, nan = float("inf"), float("nan")
    rows = torch.tensor([[1.0, infinite], [2.0, -infinite], [1.0, infinite], [1.0, -infinite], [1.0, nan], [1.0, nan]])
    assert streamed(rows, chunk).tolist() == [0, 1, 0, 3, 4, 5]


def test_scales_are_the_largest_of_all_chunks():
    rows = torch.tensor([[1.0, 5e6], [1.0 + 1e-7, 5e6 + 1], [9.0, 0.0]], dtype=torch.float64)
    search = DuplicateSearch()
    for _ in range(2):
        for row, scale in zip(rows, ([0.0, 5e6], [0.0, 0.0], [9.0, 0.0]), strict=True):
            search.add(row.unsqueeze(0), torch.tensor(scale))
        search.finish_pass()
    assert search.classes.tolist() == [0, 0, 2]


def test_activations_of_another_length_are_refused():
    search = DuplicateSearch()
    search.add(torch.ones(2, 3))
    with pytest.raises(ValueError, match="activations of one length, got 4 after 3"):
        search.add(torch.ones(2, 4))


@pytest.mark.parametrize("rtol", [-1e-9, 1.0, float("nan")])
def test_a_tolerance_outside_of_the_half_open_unit_interval_is_refused(rtol):
    with pytest.raises(ValueError, match=r"rtol must be inside \[0, 1\), got"):
        DuplicateSearch(rtol=rtol)


def test_the_search_draws_from_no_global_generator():
    before = torch.random.get_rng_state()
    streamed(drawn(9, 2), 4)
    assert torch.equal(torch.random.get_rng_state(), before)
