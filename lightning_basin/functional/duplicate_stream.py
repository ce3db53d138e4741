"""Which inputs a layer no longer distinguishes, for more activations than can be held at once."""

import numpy as np
import torch
from torch import Tensor

from lightning_basin.functional.duplicates import activation_rows, check_duplicate_rtol, join_classes, search_classes
from lightning_basin.functional.neighbors import (
    NUM_DIRECTIONS,
    Places,
    has_several,
    random_directions,
    rounding_of_distances,
)
from lightning_basin.functional.reading import Array, read_together


class DuplicateSearch:
    """The classes of `duplicate_classes` over several passes of the same activations, chunk by chunk.

    The first pass keeps where each input lies along a few random directions, and the largest element of all. Only
    inputs that are near along all of them can be the same, directly or through others: such inputs are a group. The
    second pass compares the inputs of each group with the first one of every class that was met before, which is held.
    Where a group still has several classes, as the links of a chain, further passes hold all of its inputs in turn. So
    O(k) elements are kept, and ``max_elements`` at most of activations.

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
        self._directions = torch.empty(0, NUM_DIRECTIONS)
        self._first_positions: list[Tensor] = []  # along the directions, until the first pass is over
        self._largest = self._scales = torch.empty(0)  # magnitude of each element
        self._num_seen = self._num_passes = 0
        self._places: Places | None = None
        self._members: Array = np.empty(0, dtype=np.int64)  # inputs with a near one, group by group
        self._groups: Array = np.empty(0, dtype=np.int64)  # of these inputs
        self._group_of: Array = np.empty(0, dtype=np.int64)  # of each input
        self._is_open: Array = np.empty(0, dtype=bool)  # inputs of groups with several classes
        self._is_compared: Array = np.empty(0, dtype=bool)  # inputs that have been held
        self._held: Array = np.empty(0, dtype=np.int64)
        self._held_rows = torch.empty(0)
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
        if self._places is None and not self._first_positions:
            self._directions = random_directions(rows.shape[1], rows.device)
            self._largest, self._scales = rows.new_zeros(2, rows.shape[1])
            self._held_rows = rows[:0]
        if rows.shape[1] != len(self._directions):
            raise ValueError(
                f"all inputs must have activations of one length, got {rows.shape[1]} after {len(self._directions)}"
            )
        finite, positions = rows, (rows @ self._directions).cpu()
        if not bool(positions.isfinite().all()):  # Infinite elements are compared exactly.
            finite = rows.where(rows.isfinite(), 0.0)
            positions = (finite @ self._directions).cpu()
        if self._places is None:
            self._first_positions.append(positions)
            if rows.numel():
                largest = finite.abs().amax(0)
                self._largest = self._largest.maximum(largest)
                self._scales = self._scales.maximum(largest.amax() if scales is None else scales.to(rows))
        else:
            self._check_repeated(positions.numpy(), self._places)
            self._compare(rows)
        self._num_seen += len(rows)

    def finish_pass(self) -> bool:
        """End a pass, and return whether another one over the same activations is needed.

        Raises:
            ValueError: If it had fewer inputs than the first.
        """
        if self._places is None:
            self._places = self._find_groups()
        elif self._num_seen != self.classes.numel():
            raise ValueError(f"each pass must have the same inputs, got {self._num_seen} after {self.classes.numel()}")
        self._is_compared[self._held] = True
        self._held, self._held_rows = self._held[:0], self._held_rows[:0]
        self._num_seen = 0
        self._num_passes += 1
        self._is_open[:] = False
        if self._members.size:
            self._is_open[self._members] = has_several(self.classes.numpy()[self._members], self._groups)
        return bool((self._is_open & ~self._is_compared).any())

    @property
    def _largest_of_all(self) -> float:
        return float(self._largest.max()) if self._largest.numel() else 0.0

    def _find_groups(self) -> Places:
        positions = torch.cat(self._first_positions).numpy() if self._first_positions else np.empty((0, NUM_DIRECTIONS))
        self._first_positions.clear()
        count, width = len(positions), max(1, len(self._directions))
        self.classes = torch.arange(count)
        self._group_of, self._is_open, self._is_compared = np.full(count, -1), *np.zeros((2, count), dtype=bool)
        rounding = rounding_of_distances(width, self._largest_of_all)
        places = Places(positions, np.arange(count), float(self._scales.sum()) / width, rounding)
        self._members, self._groups = places.near_groups(places.members, np.zeros(count), self._rtol)
        self._group_of[self._members] = self._groups
        return places

    def _check_repeated(self, positions: Array, places: Places) -> None:
        before = places.positions[self._num_seen : self._num_seen + len(positions)]
        scale = (self._largest @ self._directions.abs()).cpu().numpy()
        if positions.shape != before.shape or (np.abs(positions - before) > self._repeated_rtol * scale).any():
            raise ValueError(
                "each pass must give the same inputs in the same order, but the activations of two passes differ"
            )

    def _compare(self, rows: Tensor) -> None:
        """Join inputs that are the same as one another or as one that is held, and hold what is to be met again."""
        indices = np.arange(self._num_seen, self._num_seen + len(rows))
        indices = indices[self._is_open[indices]]
        if not indices.size:
            return
        is_near = np.isin(self._group_of[self._held], self._group_of[indices])
        chosen = rows[torch.from_numpy(indices - self._num_seen).to(rows.device)]
        near = self._held_rows[torch.from_numpy(is_near).to(rows.device)]
        compared, num_near = np.concatenate([self._held[is_near], indices]), len(near)
        search = search_classes(
            torch.cat([near, chosen]), [self._rtol], scales=self._scales.cpu().numpy(), largest=self._largest_of_all
        )
        ((first,),) = read_together([search])
        pairs = torch.from_numpy(compared), torch.from_numpy(compared[first])
        self.classes = join_classes(self.classes, *pairs)
        # The first time one of each class is enough, as most inputs near to a member are members too.
        is_first = first[num_near:] == np.arange(num_near, len(compared))
        is_held = is_first if self._num_passes == 1 else ~self._is_compared[indices]
        room = max(1, self._max_elements // max(1, rows.shape[1])) - len(self._held)
        held = np.flatnonzero(is_held)[:room]
        self._held = np.concatenate([self._held, indices[held]])
        self._held_rows = torch.cat([self._held_rows, chosen[torch.from_numpy(held).to(rows.device)]])
