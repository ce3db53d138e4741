"""Rows that may be the same, found by where they lie along a few random directions.

Rows within a tolerance of each other lie near along every direction, so that none is overlooked. Others are rarely near
along all of them. Only the positions leave the device; the rows are looked at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Generator, Tensor

from lightning_basin.functional.reading import Array, Reading

NUM_DIRECTIONS = 4
"""Random directions along which rows are placed: nearly no distinct rows are near along all of so many."""

_WAITING_PAIRS = 2**16  # pairs that are collected before they are compared

_FLOAT64 = torch.finfo(torch.float64)


def random_directions(width: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw directions, always the same on a device, shape ``(width, NUM_DIRECTIONS)``.

    No element is larger than ``1 / width``, so that the position of a row is no larger than its largest element.
    """
    generator = Generator(device).manual_seed(0)
    # Each direction is contiguous, as rows are, which halves the time of their products.
    directions = torch.empty(NUM_DIRECTIONS, width, dtype=torch.float64, device=device)
    return directions.uniform_(-1.0 / max(1, width), 1.0 / max(1, width), generator=generator).mT


def rounding_of_distances(width: int, largest: float) -> float:
    """Bound the rounding of the distance of two rows along a direction; it is above zero where products underflow."""
    return 4 * width * _FLOAT64.eps * largest + _FLOAT64.tiny


def place_rows(rows: Tensor, *, mean_scale: float, largest: float) -> Reading["Places"]:
    """Find where rows lie along random directions; elements that are not finite count as zero.

    ``mean_scale`` is the mean over all elements of the magnitudes to which their tolerances are relative.
    """
    directions = random_directions(rows.shape[1], rows.device)
    (positions,) = yield [rows @ directions]
    members = np.arange(len(rows))
    if not np.isfinite(positions).all():
        finite = rows.where(rows.isfinite(), 0.0)
        positions, has_nan = yield [finite @ directions, rows.isnan().any(1)]
        members = np.flatnonzero(~has_nan)
    return Places(positions, members, mean_scale, rounding_of_distances(rows.shape[1], largest))


@dataclass(frozen=True, eq=False)
class Places:
    """Where rows lie along random directions.

    Attributes:
        positions: The positions, shape ``(k, NUM_DIRECTIONS)``.
        members: The indices of the rows that can equal another: none of their elements is NaN.
        reach: The largest distance along a direction of two rows whose elements differ by the scales.
        rounding: The rounding of a distance.
    """

    positions: Array
    members: Array
    reach: float
    rounding: float

    def near_groups(self, members: Array, groups: Array, rtol: float) -> tuple[Array, Array]:
        """Split groups of rows wherever there is a gap that no two rows within the tolerance can span.

        Return the rows that are not alone, group by group and in the order of the last direction; and their groups.
        """
        window = self._window(rtol)
        for along in self.positions.T:
            order = np.lexsort((along[members], groups))
            members, groups = members[order], groups[order]
            is_first = np.ones(len(members) + 1, dtype=bool)
            is_first[1:-1] = (np.diff(groups) != 0) | (np.diff(along[members]) > window)
            is_beside_others = ~(is_first[:-1] & is_first[1:])
            members, groups = members[is_beside_others], is_first[:-1].cumsum()[is_beside_others]
            if not members.size:
                break
        return members, groups

    def near_pairs(self, members: Array, groups: Array, rtol: float, labels: Array) -> Iterator[tuple[Array, Array]]:
        """Yield all pairs of rows of one group that may be within the tolerance of each other, in batches.

        Where the caller joins classes between two batches, in the labels of all rows, rows of one class are not paired
        any more.
        """
        window = self._window(rtol)
        members, groups = self.near_groups(members, groups, rtol)
        positions = self.positions[members]
        active = np.arange(len(members))
        waiting, num_waiting, limit = [], 0, 1
        for offset in count(1):
            active = active[: np.searchsorted(active, len(members) - offset)]
            active = active[groups[active] == groups[active + offset]]
            distances = np.abs(positions[active + offset] - positions[active])
            # Inside of a group rows are in the order of the last direction.
            is_within = distances[:, -1] <= window
            active, distances = active[is_within], distances[is_within]
            if not active.size:
                break
            near = active[(distances <= window).all(1)]
            waiting.append(_open_pairs(members[near], members[near + offset], labels))
            num_waiting += waiting[-1].shape[1]
            # Most rows of a class are neighbors: few pairs at first leave the fewest to compare.
            if num_waiting >= limit:
                yield from _batches(waiting, labels)
                waiting, num_waiting, limit = [], 0, min(2 * num_waiting, _WAITING_PAIRS)
                active = active[has_several(labels[members], groups)[active]]
        yield from _batches(waiting, labels)

    def _window(self, rtol: float) -> float:
        """The largest distance along a direction of two rows within a tolerance."""
        return rtol * self.reach + self.rounding


def _open_pairs(left: Array, right: Array, labels: Array) -> Array:
    """The pairs of two lists of rows whose classes differ, shape ``(2, pairs)``."""
    is_open = labels[left] != labels[right]
    return np.stack([left[is_open], right[is_open]])


def _batches(waiting: Sequence[Array], labels: Array) -> Iterator[tuple[Array, Array]]:
    """All pairs whose classes still differ, as one batch if there are any."""
    if waiting:
        left, right = np.concatenate(waiting, axis=1)
        left, right = _open_pairs(left, right, labels)
        if left.size:
            yield left, right


def has_several(labels: Array, groups: Array) -> Array:
    """Whether the group of each row, of rows that are in the order of groups, has rows of several classes."""
    is_first = np.append(True, np.diff(groups) != 0)
    starts = np.flatnonzero(is_first)
    has_several = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    of_row: Array = has_several[is_first.cumsum() - 1]
    return of_row
