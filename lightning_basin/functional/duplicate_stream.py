"""Which inputs a layer no longer tells apart, of more activations than can be held at once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import (
    activation_rows,
    are_same,
    check_duplicate_rtol,
    joined_classes,
    largest_distances,
    largest_entries,
    largest_entry,
    projections,
    random_directions,
)

_NUM_DIRECTIONS = 4
"""Of distinct inputs nearly none are near along all of so many directions."""

_COMPARED_ELEMENTS = 2**20  # entries of activations compared at once: 8 MiB


class DuplicateSearch:
    """The classes of `duplicate_classes` over several passes of the same activations, chunk by chunk.

    The first pass keeps where each input lies along a few random directions, and the largest entry of all. Only inputs
    that are near along all of them can be the same. Later passes compare just these: an input with such a neighbour
    still to come is held, unless it is the same as one that is held already. Pairs of classes that this leaves open,
    as the links of a chain, are compared in further passes. So O(k) numbers are kept, and ``max_elements`` at most of
    activations.

    Args:
        rtol: Relative to the largest entry of all inputs; 0 asks for equality.
        max_elements: Entries of activations held at once; fewer may take more passes.
        repeated_rtol: To which fraction of the largest entry two evaluations of one activation agree, 1e-14 or so in
            float64; another draw of an augmentation does not.

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
        self._rtol = rtol
        self._max_elements = max_elements
        self._repeated_rtol = repeated_rtol
        self._directions: Tensor | None = None
        self._found: list[Tensor] = []  # positions along the directions, until the first pass is over
        self._positions: Tensor | None = None
        self._largest = torch.empty(0)  # magnitude of each entry
        self._scales = torch.empty(0)
        self._num_seen = 0
        self._num_passes = 0
        self._windows = torch.empty(0)
        self._wanted = torch.empty(0, dtype=torch.bool)
        self._compared = torch.empty(0, dtype=torch.bool)
        self._held = torch.empty(0, dtype=torch.int64)
        self._held_rows = torch.empty(0, 0)
        self.classes = torch.empty(0, dtype=torch.int64)
        """For each input the smallest index of its class, int64 on the CPU; right once no pass is needed any more."""

    def add(self, activations: Tensor, scales: Tensor | None = None) -> None:
        """Look at the next inputs of a pass.

        Args:
            activations: One row per input, shape ``(chunk, d)``; further axes are flattened.
            scales: See `duplicate_classes`, as far as these inputs show them: the largest of all chunks count.

        Raises:
            ValueError: If they have another length than those before, or are not those of the first pass.
        """
        rows = activation_rows(activations)
        if self._directions is None:
            self._directions = random_directions(rows.shape[1], _NUM_DIRECTIONS).to(rows.device)
            self._largest, self._scales = rows.new_zeros(2, rows.shape[1])
        if rows.shape[1] != self._directions.shape[0]:
            raise ValueError(
                f"all inputs must have activations of one length, got {rows.shape[1]} after {self._directions.shape[0]}"
            )
        positions = projections(rows, self._directions).cpu()
        if self._positions is None:
            self._found.append(positions)
            if rows.numel():
                self._largest = self._largest.maximum(largest_entries(rows))
                self._scales = self._scales.maximum(largest_entry(rows) if scales is None else scales.to(rows))
        else:
            self._check_repeated(positions, self._positions[self._num_seen : self._num_seen + rows.shape[0]])
            self._compare(rows)
        self._num_seen += rows.shape[0]

    def finish_pass(self) -> bool:
        """End a pass; whether another one over the same activations is needed.

        Raises:
            ValueError: If it had fewer inputs than the first.
        """
        if self._positions is None:
            self._start_comparing()
        elif self._num_seen != self._positions.shape[0]:
            raise ValueError(f"each pass must have the same inputs, got {self._num_seen} after {len(self._positions)}")
        self._compared[self._held] = True
        self._held = self._held[:0]
        self._num_seen = 0
        self._num_passes += 1
        self._wanted = self._open_inputs()
        return bool(self._wanted.any())

    def _start_comparing(self) -> None:
        self._positions = torch.cat(self._found) if self._found else torch.empty(0, _NUM_DIRECTIONS)
        self._found = []
        num_inputs = self._positions.shape[0]
        self.classes = torch.arange(num_inputs)
        self._compared = torch.zeros(num_inputs, dtype=torch.bool)
        if self._directions is not None:
            tolerances = self._rtol * self._scales
            self._windows = largest_distances(self._directions, tolerances=tolerances, largest=self._largest).cpu()
            if self._directions.shape[0] == 0:  # Activations without entries are all the same.
                self.classes.zero_()

    def _check_repeated(self, positions: Tensor, before: Tensor) -> None:
        assert self._directions is not None
        scale = (self._largest @ self._directions.abs()).cpu()
        if positions.shape != before.shape or bool(((positions - before).abs() > self._repeated_rtol * scale).any()):
            raise ValueError(
                "each pass must give the same inputs in the same order, but the activations of two passes differ"
            )

    def _open_inputs(self) -> Tensor:
        """Inputs that have not been compared with a later one that is near, and in another class."""
        assert self._positions is not None
        order = self._positions[:, 0].argsort()
        wanted = self._with_near_successor(order)
        return wanted | self._with_near_successor(order.flip(0))

    def _with_near_successor(self, order: Tensor) -> Tensor:
        """Those inputs for which such a one comes after them in ``order``, sorted along the first direction."""
        assert self._positions is not None
        positions, classes = self._positions[order], self.classes[order]
        num_inputs = order.numel()
        wanted = torch.zeros(num_inputs, dtype=torch.bool)
        if num_inputs == 0:
            return wanted
        # From each place the first one behind it with another class: steps over large classes at once.
        changes = torch.full((num_inputs,), num_inputs)
        changes[:-1] = torch.where(classes[1:] != classes[:-1], torch.arange(1, num_inputs), num_inputs)
        changes = changes.flip(0).cummin(0).values.flip(0)
        active = (~self._compared[order]).nonzero().squeeze(1)
        candidates = changes[active]
        while active.numel():
            inside = candidates < num_inputs
            active, candidates = active[inside], candidates[inside]
            distances = (positions[candidates] - positions[active]).abs()
            inside = distances[:, 0] <= self._windows[0]
            active, candidates, distances = active[inside], candidates[inside], distances[inside]
            is_open = (distances <= self._windows).all(1)
            if self._num_passes > 1:  # Before, whoever has a neighbour, to find one soon.
                is_open &= order[candidates] > order[active]
            wanted[order[active[is_open]]] = True
            active, candidates = active[~is_open], candidates[~is_open] + 1
            again = candidates < num_inputs
            active, candidates = active[again], candidates[again]
            same = classes[candidates] == classes[active]
            candidates = torch.where(same, changes[candidates], candidates)
        return wanted

    def _compare(self, rows: Tensor) -> None:
        """Join inputs with those held that are the same, and hold what later ones must be compared to."""
        indices = torch.arange(self._num_seen, self._num_seen + rows.shape[0])
        joined = torch.zeros(indices.numel(), dtype=torch.bool)
        places, held = self._near_pairs(indices)
        for pairs in torch.split(torch.arange(places.numel()), max(1, _COMPARED_ELEMENTS // max(1, rows.shape[1]))):
            joined[self._join_same(rows, indices, places[pairs], held[pairs])] = True
        capacity = max(1, self._max_elements // max(1, rows.shape[1]))
        for place in self._wanted[indices].nonzero().squeeze(1).tolist():
            # The first time one of each class is enough, as most inputs near to a member are members too.
            if self._num_passes == 1 and bool(joined[place]):
                continue
            if self._held.numel() == capacity:
                return
            self._hold(indices[place : place + 1], rows[place])
            later = torch.arange(place + 1, rows.shape[0])
            distances = (self._positions_of(indices[later]) - self._positions_of(indices[place])).abs()
            later = later[(distances <= self._windows).all(1)]
            joined[self._join_same(rows, indices, later, torch.full_like(later, self._held.numel() - 1))] = True

    def _positions_of(self, indices: Tensor) -> Tensor:
        assert self._positions is not None
        return self._positions[indices]

    def _near_pairs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Places in a chunk, and among the inputs held, of all pairs that may be the same."""
        sorted_held, order = self._positions_of(self._held)[:, 0].sort()
        here = self._positions_of(indices)[:, 0].contiguous()
        first = torch.searchsorted(sorted_held, here - self._windows[0])
        counts = torch.searchsorted(sorted_held, here + self._windows[0], right=True) - first
        places = torch.arange(indices.numel()).repeat_interleave(counts)
        within = torch.arange(places.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        held = order[first.repeat_interleave(counts) + within]
        distances = (self._positions_of(indices[places]) - self._positions_of(self._held[held])).abs()
        near = (distances <= self._windows).all(1)
        return places[near], held[near]

    def _join_same(self, rows: Tensor, indices: Tensor, places: Tensor, held: Tensor) -> Tensor:
        """Compare pairs of a row of a chunk and an input held; places of rows whose class was another's."""
        apart = self.classes[indices[places]] != self.classes[self._held[held]]
        places, held = places[apart], held[apart]
        if places.numel() == 0:
            return places
        left, right = rows[places.to(rows.device)], self._held_rows[held.to(rows.device)]
        same = are_same(left, right, self._rtol * self._scales).cpu()
        places, held = places[same], held[same]
        self.classes = joined_classes(self.classes, self._held[held], indices[places])
        return places

    def _hold(self, index: Tensor, row: Tensor) -> None:
        count = self._held.numel()
        if count >= self._held_rows.shape[0]:  # Twice as much room, so that few copies are made.
            grown = row.new_empty(max(16, 2 * count), row.numel())
            grown[:count] = self._held_rows[:count].reshape(count, row.numel())
            self._held_rows = grown
        self._held_rows[count] = row
        self._held = torch.cat([self._held, index])


def streamed_duplicate_classes(
    chunks: Callable[[], Iterable[Tensor]], *, rtol: float = 1e-6, max_elements: int = 2**24
) -> Tensor:
    """`duplicate_classes` of activations that are too many to be held at once.

    Args:
        chunks: Gives the activations, chunks of shape ``(chunk, d)``, anew each time it is called.
        rtol: Relative to the largest entry of all inputs; 0 asks for equality.
        max_elements: Entries of activations held at once; fewer may take more passes.

    Returns:
        Smallest index of each input's class, int64, shape ``(k,)``.

    Raises:
        ValueError: See `DuplicateSearch`.

    Example:
        >>> streamed_duplicate_classes(lambda: iter([torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0]])]))
        tensor([0, 1, 0])
    """
    search = DuplicateSearch(rtol=rtol, max_elements=max_elements)
    while True:
        for chunk in chunks():
            search.add(chunk)
        if not search.finish_pass():
            return search.classes
