import numpy as np
import pytest
import torch

from lightning_basin.functional.neighbors import NUM_DIRECTIONS, Places, place_rows, random_directions
from lightning_basin.functional.reading import read_together
from tests.functional.matrices import INFINITE
from tests.networks import drawn


def places_at(*positions, window=0.5):
    """Rows at these positions, the same along all directions or one for each."""
    along = np.array(positions, dtype=float).reshape(len(positions), -1)
    along = np.broadcast_to(along, (len(positions), NUM_DIRECTIONS)) if along.shape[1] == 1 else along
    return Places(along, np.arange(len(along)), reach=window, rounding=0.0)


def groups_of(places, groups=None):
    members, found = places.near_groups(
        places.members, np.zeros(len(places.members)) if groups is None else groups, 1.0
    )
    return [members[found == group].tolist() for group in np.unique(found)]


def pairs_of(places, labels=None):
    nothing = np.zeros(len(places.members))
    labels = places.members.copy() if labels is None else np.array(labels)
    batches = places.near_pairs(places.members, nothing, 1.0, labels)
    return sorted(tuple(sorted(pair)) for batch in batches for pair in np.stack(batch, 1).tolist())


def placed(rows, mean_scale=1.0):
    rows = torch.tensor(rows, dtype=torch.float64)
    largest = float(rows.where(rows.isfinite(), 0.0).abs().amax())
    (places,) = read_together([place_rows(rows, mean_scale=mean_scale, largest=largest)])
    return places


def test_directions_are_always_the_same_and_keep_positions_inside_of_float64():
    directions = random_directions(1000)
    assert torch.equal(directions, random_directions(1000))
    assert directions.abs().max() <= 1 / 1000
    largest = torch.full((3, 1000), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert (largest @ directions.abs()).isfinite().all()


def test_rows_are_split_at_gaps_and_those_alone_are_left_out():
    assert groups_of(places_at(10.0, 0.0, 20.0, 0.4, 10.5, 0.8)) == [[1, 3, 5], [0, 4]]


def test_a_gap_along_any_direction_splits():
    places = places_at([0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 9.0], [0.2, 0.0, 0.0, 9.0], [0.3, 7.0, 0.0, 0.0])
    assert groups_of(places) == [[1, 2]]


def test_groups_are_never_joined():
    assert groups_of(places_at(0.0, 0.1, 0.2, 0.3), groups=np.array([5, 2, 5, 2])) == [[1, 3], [0, 2]]


def test_no_rows_have_no_groups_and_no_pairs():
    places = Places(np.empty((0, NUM_DIRECTIONS)), np.empty(0, np.int64), 1.0, 0.0)
    assert (groups_of(places), pairs_of(places)) == ([], [])


def test_all_pairs_within_the_window_are_found():
    assert pairs_of(places_at(0.0, 1.0, 2.0, 3.0, 4.1, window=2.0)) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (3, 4)]


def test_pairs_must_be_near_along_all_directions():
    places = places_at([0.0, 0.0, 0.0, 0.0], [0.4, 0.6, 0.4, 0.4], [0.4, 0.3, 0.4, 0.4])
    assert pairs_of(places) == [(0, 2), (1, 2)]


def test_rows_of_one_class_are_not_paired():
    assert pairs_of(places_at(0.0, 0.1, 0.2), labels=[0, 1, 0]) == [(0, 1), (1, 2)]


def test_rows_that_were_joined_after_the_first_batch_are_not_paired_any_more():
    places, labels = places_at(*np.arange(50) / 100), np.arange(50)
    batches = places.near_pairs(places.members, np.zeros(50), 1.0, labels)
    left, _ = next(batches)
    assert len(left) == 49  # All neighbors.
    labels[:] = 0
    assert list(batches) == []


def test_pairs_come_in_batches_of_bounded_size():
    places = places_at(*np.arange(1000) / 1e6)
    sizes = [len(left) for left, _ in places.near_pairs(places.members, np.zeros(1000), 1.0, np.arange(1000))]
    assert sum(sizes) == 1000 * 999 // 2
    assert max(sizes) < 2**16 + 1000


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_rows_at_the_tolerance_are_near(width):
    row = drawn(width)
    places = placed(torch.stack([row, row + 0.25, row - 0.25]).tolist(), mean_scale=0.25)
    assert {(0, 1), (0, 2)} <= set(pairs_of(places))


def test_infinite_elements_count_as_zero_and_rows_with_nan_are_no_members():
    nan = float("nan")
    places = placed([[1.0, INFINITE], [nan, 2.0], [1.0, 0.0], [1.0, -INFINITE]])
    assert places.members.tolist() == [0, 2, 3]
    assert np.ptp(places.positions[[0, 2, 3]], axis=0).tolist() == [0.0] * NUM_DIRECTIONS
