"""Which inputs a layer no longer distinguishes, for more activations than can be held at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import (
    activation_rows,
    are_same,
    check_duplicate_rtol,
    join_classes,
)
from lightning_basin.functional.neighbors import NUM_DIRECTIONS, random_directions, rounding_of_distances

_COMPARED_ELEMENTS = 2**20  # elements of activations compared at once: 8 MiB


@dataclass(frozen=True, eq=False)
class _Positions:
    """Where inputs lie along a few random directions. Only inputs that are near along all of them can be the same.

    Attributes:
        positions: The positions, shape ``(k, num_directions)``.
        windows: The largest distance of two inputs that are the same, along each direction.
    """

    positions: Tensor
    windows: Tensor

    def are_near(self, left: Tensor, right: Tensor) -> Tensor:
        """Whether inputs are near to others, both given by their indices."""
        return ((self.positions[left] - self.positions[right]).abs() <= self.windows).all(1)

    def near_pairs(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Find the places in two lists of inputs of all pairs that are near."""
        sorted_right, order = self.positions[right, 0].sort()
        here = self.positions[left, 0].contiguous()
        first = torch.searchsorted(sorted_right, here - self.windows[0])
        counts = torch.searchsorted(sorted_right, here + self.windows[0], right=True) - first
        places = torch.arange(left.numel()).repeat_interleave(counts)
        within = torch.arange(places.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        others = order[first.repeat_interleave(counts) + within]
        is_near = self.are_near(left[places], right[others])
        return places[is_near], others[is_near]

    def have_open_neighbor(self, classes: Tensor, is_done: Tensor, *, is_later: bool) -> Tensor:
        """Whether inputs that are not done have a near input of another class."""
        order = self.positions[:, 0].argsort()
        is_open = self._have_open_successor(order, classes, is_done, is_later=is_later)
        return is_open | self._have_open_successor(order.flip(0), classes, is_done, is_later=is_later)

    def _have_open_successor(self, order: Tensor, classes: Tensor, is_done: Tensor, *, is_later: bool) -> Tensor:
        """The same among the inputs that come later in an order, sorted along the first direction."""
        positions, classes = self.positions[order], classes[order]
        num_inputs = order.numel()
        is_open = torch.zeros(num_inputs, dtype=torch.bool)
        if num_inputs == 0:
            return is_open
        # From each place the first one behind it with another class: steps over large classes at once.
        changes = torch.full((num_inputs,), num_inputs)
        changes[:-1] = torch.where(classes[1:] != classes[:-1], torch.arange(1, num_inputs), num_inputs)
        changes = changes.flip(0).cummin(0).values.flip(0)
        active = (~is_done[order]).nonzero().squeeze(1)
        candidates = changes[active]
        while active.numel():
            inside = candidates < num_inputs
            active, candidates = active[inside], candidates[inside]
            distances = (positions[candidates] - positions[active]).abs()
            inside = distances[:, 0] <= self.windows[0]
            active, candidates, distances = active[inside], candidates[inside], distances[inside]
            is_neighbor = (distances <= self.windows).all(1)
            if is_later:
                is_neighbor &= order[candidates] > order[active]
            is_open[order[active[is_neighbor]]] = True
            active, candidates = active[~is_neighbor], candidates[~is_neighbor] + 1
            again = candidates < num_inputs
            active, candidates = active[again], candidates[again]
            same = classes[candidates] == classes[active]
            candidates = torch.where(same, changes[candidates], candidates)
        return is_open


class DuplicateSearch:
    """The classes of `duplicate_classes` over several passes of the same activations, chunk by chunk.

    The first pass keeps where each input lies along a few random directions, and the largest element of all. Only
    inputs that are near along all of them can be the same. Later passes compare just these: an input with a near one
    still to come is held, unless it is the same as one that is held already. Pairs of classes that this leaves open, as
    the links of a chain, are compared in further passes. So O(k) elements are kept, and ``max_elements`` at most of
    activations.

    Args:
        rtol: The relative tolerance, relative to the largest element of all inputs; 0 asks for equality.
        max_elements: The elements of activations that are held at once; fewer may take more passes.
        repeated_rtol: The fraction of the largest element to which two evaluations of one activation agree, 1e-14 or so
            in float64; another draw of an augmentation does not.

    Attributes:
        classes: For each input the smallest index of its class, int64 on the CPU; right once no pass is needed any
            more.

    Raises:
        ValueError: If ``rtol`` is not inside ``[0, 1)``.

    Example:
        >>> search = DuplicateSearch()
        >>> search.add(torch.tensor([[1.0], [2.0]]))
        >>> search.add(torch.tensor([[1.0]]))
        >>> search.finish_pass()
        True
        >>> search.add(torch.tensor([[1.0], [2.0]]))
        >>> search.add(torch.tensor([[1.0]]))
        >>> search.finish_pass(), search.classes
        (False, tensor([0, 1, 0]))
    """

    def __init__(self, *, rtol: float = 1e-6, max_elements: int = 2**24, repeated_rtol: float = 1e-9) -> None:
        check_duplicate_rtol(rtol)
        self._rtol, self._max_elements, self._repeated_rtol = rtol, max_elements, repeated_rtol
        self._directions: Tensor | None = None
        self._first_positions: list[Tensor] = []  # along the directions, until the first pass is over
        self._positions: _Positions | None = None
        self._largest = torch.empty(0)  # magnitude of each element
        self._scales = torch.empty(0)
        self._num_seen = 0
        self._num_passes = 0
        self._is_open = torch.empty(0, dtype=torch.bool)
        self._is_compared = torch.empty(0, dtype=torch.bool)
        self._held = torch.empty(0, dtype=torch.int64)
        self._held_rows = torch.empty(0, 0)
        self.classes = torch.empty(0, dtype=torch.int64)

    def add(self, activations: Tensor, scales: Tensor | None = None) -> None:
        """Look at the next inputs of a pass.

        Args:
            activations: One row per input, shape ``(chunk, d)``; further axes are flattened.
            scales: The scales of `duplicate_classes` for these inputs; the largest of all chunks count.

        Raises:
            ValueError: If they have another length than those before, or are not those of the first pass.
        """
        rows = activation_rows(activations)
        if self._directions is None:
            self._directions = random_directions(rows.shape[1], rows.device)
            self._largest, self._scales = rows.new_zeros(2, rows.shape[1])
        if rows.shape[1] != self._directions.shape[0]:
            raise ValueError(
                f"all inputs must have activations of one length, got {rows.shape[1]} after {self._directions.shape[0]}"
            )
        finite, positions = rows, (rows @ self._directions).cpu()
        if not bool(positions.isfinite().all()):  # Infinite elements are compared exactly.
            finite = rows.where(rows.isfinite(), 0.0)
            positions = (finite @ self._directions).cpu()
        if self._positions is None:
            self._first_positions.append(positions)
            if rows.numel():
                largest = finite.abs().amax(0)
                self._largest = self._largest.maximum(largest)
                self._scales = self._scales.maximum(largest.amax() if scales is None else scales.to(rows))
        else:
            self._check_repeated(positions, self._positions.positions[self._num_seen : self._num_seen + rows.shape[0]])
            self._compare(rows, self._positions)
        self._num_seen += rows.shape[0]

    def finish_pass(self) -> bool:
        """End a pass, and return whether another one over the same activations is needed.

        Raises:
            ValueError: If it had fewer inputs than the first.
        """
        if self._positions is None:
            self._positions = self._start_comparing()
        elif self._num_seen != self.classes.numel():
            raise ValueError(f"each pass must have the same inputs, got {self._num_seen} after {self.classes.numel()}")
        self._is_compared[self._held] = True
        self._held = self._held[:0]
        self._num_seen = 0
        self._num_passes += 1
        # In the second pass whoever has a near input is held, to find one soon.
        self._is_open = self._positions.have_open_neighbor(
            self.classes, self._is_compared, is_later=self._num_passes > 1
        )
        return bool(self._is_open.any())

    def _start_comparing(self) -> _Positions:
        positions = torch.cat(self._first_positions) if self._first_positions else torch.empty(0, NUM_DIRECTIONS)
        self._first_positions.clear()
        self.classes = torch.arange(len(positions))
        self._is_compared = torch.zeros(len(positions), dtype=torch.bool)
        if self._directions is None:
            return _Positions(positions, torch.empty(0))
        if self._directions.shape[0] == 0:  # Activations without elements are all the same.
            self.classes.zero_()
            return _Positions(positions, torch.zeros(NUM_DIRECTIONS))
        reach = ((self._rtol * self._scales) @ self._directions.abs()).cpu()
        windows = reach + rounding_of_distances(self._directions.shape[0], float(self._largest.amax()))
        return _Positions(positions, windows)

    def _check_repeated(self, positions: Tensor, before: Tensor) -> None:
        assert self._directions is not None
        scale = (self._largest @ self._directions.abs()).cpu()
        if positions.shape != before.shape or bool(((positions - before).abs() > self._repeated_rtol * scale).any()):
            raise ValueError(
                "each pass must give the same inputs in the same order, but the activations of two passes differ"
            )

    def _compare(self, rows: Tensor, positions: _Positions) -> None:
        """Join inputs with those held that are the same, and hold what later ones must be compared to."""
        indices = torch.arange(self._num_seen, self._num_seen + rows.shape[0])
        is_joined = torch.zeros(indices.numel(), dtype=torch.bool)
        places, held = positions.near_pairs(indices, self._held)
        for pairs in torch.split(torch.arange(places.numel()), max(1, _COMPARED_ELEMENTS // max(1, rows.shape[1]))):
            is_joined[self._join_same(rows, indices, places[pairs], held[pairs])] = True
        capacity = max(1, self._max_elements // max(1, rows.shape[1]))
        for place in self._is_open[indices].nonzero().squeeze(1).tolist():
            # The first time one of each class is enough, as most inputs near to a member are members too.
            if self._num_passes == 1 and bool(is_joined[place]):
                continue
            if self._held.numel() == capacity:
                return
            self._hold(indices[place : place + 1], rows[place])
            later = torch.arange(place + 1, rows.shape[0])
            later = later[positions.are_near(indices[later], indices[place : place + 1])]
            is_joined[self._join_same(rows, indices, later, torch.full_like(later, self._held.numel() - 1))] = True

    def _join_same(self, rows: Tensor, indices: Tensor, places: Tensor, held: Tensor) -> Tensor:
        """Compare pairs of a row of a chunk and an input held; return the places of rows that were of another class."""
        apart = self.classes[indices[places]] != self.classes[self._held[held]]
        places, held = places[apart], held[apart]
        if places.numel() == 0:
            return places
        left, right = rows[places.to(rows.device)], self._held_rows[held.to(rows.device)]
        same = are_same(left, right, self._rtol * self._scales).cpu()
        places, held = places[same], held[same]
        self.classes = join_classes(self.classes, self._held[held], indices[places])
        return places

    def _hold(self, index: Tensor, row: Tensor) -> None:
        count = self._held.numel()
        if count >= self._held_rows.shape[0]:  # Twice as much room, so that few copies are made.
            grown = row.new_empty(max(16, 2 * count), row.numel())
            grown[:count] = self._held_rows[:count].reshape(count, row.numel())
            self._held_rows = grown
        self._held_rows[count] = row
        self._held = torch.cat([self._held, index])
