"""Which inputs have the same activations, and units that are constant."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_basin.functional.neighbors import Places, place_rows
from lightning_basin.functional.reading import Array, Reading, read, read_together

_COMPARED_ELEMENTS = 2**20  # elements of rows that are compared or hashed at once: 8 MiB


def duplicate_classes(activations: Tensor, *, rtol: float = 1e-6, scales: Tensor | None = None) -> Tensor:
    """Find for each input the first input whose activation is the same, transitively.

    Two activations are the same when ``max|a_i - a_j| <= rtol * max|a|``, the last maximum over all inputs. Only
    inputs that are near each other along a few random directions are compared: O(k d + k log k) where few inputs
    merge, and a single product where none is near another. Infinities are compared exactly and have no part in the
    maximum; NaN is different from everything.

    Args:
        activations: One row per input, shape ``(k, d)``; further axes are flattened.
        rtol: The relative tolerance, relative to the largest element; 0 asks for equality.
        scales: The magnitude to which the tolerance of each element is relative instead, shape ``(d,)``; 0 asks for its
            equality.

    Returns:
        Smallest index of each input's class, int64, shape ``(k,)``.

    Raises:
        ValueError: If ``activations`` has no axis of inputs, or ``rtol`` is not inside ``[0, 1)``.

    Example:
        >>> duplicate_classes(torch.tensor([[1.0, 2.0], [5.0, 0.0], [1.0, 2.0]]))
        tensor([0, 1, 0])
    """
    check_duplicate_rtol(rtol)
    rows = activation_rows(activations)
    largest = float(largest_entry(rows))
    magnitudes = np.full(rows.shape[1], largest) if scales is None else read([scales.to(torch.float64)])[0]
    (classes,) = read_together([search_classes(rows, [rtol], scales=magnitudes, largest=largest)])
    return torch.from_numpy(classes[0])


def search_classes(rows: Tensor, rtols: Sequence[float], *, scales: Array, largest: float) -> Reading[list[Array]]:
    """Find the classes of `duplicate_classes` at several tolerances, beside other computations of `read_together`.

    The tolerances descend. The scales are those of `duplicate_classes`; the largest finite magnitude is that of all
    rows. The result is the smallest index of each input's class, int64, shape ``(k,)``, at each tolerance.
    """
    num_inputs, width = rows.shape
    if num_inputs == 0 or width == 0:
        return [np.zeros(num_inputs, dtype=np.int64) for _ in rtols]
    places = yield from place_rows(rows, mean_scale=float((scales / width).sum()), largest=largest)
    members, groups = places.near_groups(places.members, np.zeros(len(places.members)), rtols[0])
    equal = yield from _equal_rows(rows, members)
    is_first = equal[members] == members
    members, groups = members[is_first], groups[is_first]
    classes = []
    for rtol in rtols:
        joined = equal
        if rtol > 0.0 and members.size:
            merged = yield from _merged_rows(rows, places, members, groups, rtol, scales)
            joined, groups = merged[equal], merged[members]
        classes.append(joined)
    return classes


def check_duplicate_rtol(rtol: float) -> None:
    """Refuse a tolerance under which everything, or nothing, would be the same."""
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol must be inside [0, 1), got {rtol}")


def activation_rows(activations: Tensor) -> Tensor:
    """Return activations as they are compared: one row per input, in float64, shape ``(k, d)``."""
    if activations.ndim == 0:
        raise ValueError("activations must have one row per input, got a scalar")
    return activations.detach().unsqueeze(-1).flatten(1).to(torch.float64)


def largest_entry(rows: Tensor) -> Tensor:
    """Find the largest magnitude among finite elements, shape ``()``."""
    if not rows.numel():
        return rows.new_zeros(())
    lowest, highest = rows.aminmax()  # In one pass, without a copy of all magnitudes.
    largest = torch.maximum(-lowest, highest)
    return largest if bool(largest.isfinite()) else rows.abs().where(rows.isfinite(), 0.0).amax()


def largest_elements(tensors: Sequence[Tensor]) -> list[float]:
    """Find the largest magnitude among the finite elements of each of some tensors, which are read at once."""
    extremes = [bound for tensor in tensors for bound in (tensor if tensor.numel() else tensor.new_zeros(1)).aminmax()]
    bounds = read(extremes)
    magnitudes = [max(-lowest, highest) for lowest, highest in zip(bounds[::2], bounds[1::2], strict=True)]
    return [
        float(magnitude if np.isfinite(magnitude) else largest_entry(tensor))
        for magnitude, tensor in zip(magnitudes, tensors, strict=True)
    ]


def are_same(left: Tensor, right: Tensor, tolerances: Tensor) -> Tensor:
    """Tell which pairs of rows, shape ``(n, d)``, differ in no element by more than its tolerance, shape ``(d,)``."""
    # Equality, too: the difference of two equal infinities is no number.
    return (((left - right).abs_() <= tolerances) | (left == right)).all(1)


def _equal_rows(rows: Tensor, members: Array) -> Reading[Array]:
    """For each row the first one with equal elements, among the members; for others themselves, shape ``(k,)``."""
    first: Array = np.arange(len(rows), dtype=np.int64)
    if not members.size:
        return first
    pending = np.sort(members)
    (hashes,) = yield [_hashes(rows, pending)]
    while True:
        _, starts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        leaders = pending[starts][inverse]
        is_other = leaders != pending
        pending, leaders, hashes = pending[is_other], leaders[is_other], hashes[is_other]
        if not pending.size:
            return first
        (same,) = yield [_compared(rows, pending, leaders)]
        first[pending[same]] = leaders[same]
        pending, hashes = pending[~same], hashes[~same]  # Different rows of one hash.


def _hashes(rows: Tensor, members: Array) -> Tensor:
    """An integer for each row, the same for equal rows, and nearly always another one for others."""
    generator = torch.Generator(rows.device).manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, rows.shape[1:], generator=generator, device=rows.device) | 1
    hashes = []
    for chosen in _on_device(rows, members):
        bits = rows[chosen].add_(0.0).view(torch.int64)  # The sum of 0 and -0 is 0.
        # The last bits of most elements are zero, and would stay so in products.
        hashes.append((bits ^ (bits >> 32)).mul_(weights).sum(1))
    return torch.cat(hashes)


def _compared(rows: Tensor, left: Array, right: Array, tolerances: Tensor | None = None) -> Tensor:
    """Which pairs of rows are the same; without tolerances, which are equal."""
    same = []
    for here, there in zip(_on_device(rows, left), _on_device(rows, right), strict=True):
        pairs = rows[here], rows[there]
        same.append((pairs[0] == pairs[1]).all(1) if tolerances is None else are_same(*pairs, tolerances))
    return torch.cat(same)


def _on_device(rows: Tensor, indices: Array) -> Sequence[Tensor]:
    """Indices of rows on their device, as many at a time as are compared at once."""
    chosen = torch.from_numpy(indices).to(rows.device, non_blocking=True)
    return torch.split(chosen, max(1, _COMPARED_ELEMENTS // rows.shape[1]))


def _merged_rows(
    rows: Tensor, places: Places, members: Array, groups: Array, rtol: float, scales: Array
) -> Reading[Array]:
    """For each row the first one of its class within the tolerance, among the members, shape ``(k,)``."""
    labels: Array = np.arange(len(rows), dtype=np.int64)
    tolerances = torch.from_numpy(rtol * scales).to(rows.device, non_blocking=True)
    for left, right in places.near_pairs(members, groups, rtol, labels):
        (same,) = yield [_compared(rows, left, right, tolerances)]
        pairs = torch.from_numpy(left[same]), torch.from_numpy(right[same])
        labels[:] = join_classes(torch.from_numpy(labels), *pairs).numpy()
    return labels


def join_classes(classes: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Join the class of each ``left[i]`` with that of ``right[i]``; a class is named by the smallest index in it."""
    while True:
        of_left, of_right = classes[left], classes[right]
        if torch.equal(of_left, of_right):
            return classes
        # Only first members are redirected, and each to an earlier one: following them ends.
        lower, higher = torch.minimum(of_left, of_right), torch.maximum(of_left, of_right)
        classes = classes.scatter_reduce(0, higher, lower, "amin")
        while not torch.equal(classes, classes[classes]):
            classes = classes[classes]


def duplicated_activations(activations: Tensor, *, rtol: float = 1e-6) -> int:
    """Count the inputs that share their activation with an earlier one: k minus the number of distinct activations.

    Args:
        activations: One row per input, shape ``(k, d)``; further axes are flattened.
        rtol: The relative tolerance, relative to the largest element; 0 asks for equality.

    Raises:
        ValueError: If ``activations`` has no axis of inputs, or ``rtol`` is not inside ``[0, 1)``.

    Example:
        >>> duplicated_activations(torch.tensor([[1.0], [2.0], [1.0], [1.0 + 1e-9]]))
        2
    """
    classes = duplicate_classes(activations, rtol=rtol)
    return classes.numel() - num_classes(classes)


def dead_units(outputs: Tensor, *, rtol: float = 1e-6) -> int:
    """Count the outputs of a layer that are constant over the inputs, at every position.

    Args:
        outputs: The outputs of the layer, shape ``(k, ..., units)``.
        rtol: The fraction of the largest element of ``outputs`` by which a constant unit may move.

    Example:
        >>> dead_units(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
        1
    """
    (count,) = read_together([count_dead_units(outputs.detach().to(torch.float64), rtol=rtol)])
    return count


def count_dead_units(outputs: Tensor, *, rtol: float) -> Reading[int]:
    """Count what `dead_units` counts, beside other computations of `read_together`."""
    rows = outputs.flatten(1, -2) if outputs.ndim > 2 else outputs.unsqueeze(1)
    if rows.numel() == 0:
        return 0
    # Units that come before positions in memory, as channels do, are read in this order: ten times as fast.
    axis = int(rows.stride(1) < rows.stride(2))  # of the positions
    in_memory = rows.mT if axis else rows
    smallest, largest = yield [in_memory.amin(0), in_memory.amax(0)]
    scale = np.maximum(largest.max(), -smallest.min())
    if not np.isfinite(scale):
        (scale,) = yield [rows.abs().where(rows.isfinite(), 0.0).amax()]
    with np.errstate(invalid="ignore"):  # A unit may be infinite on all inputs.
        ranges = np.where(largest == smallest, 0.0, largest - smallest).max(axis)
    return int((ranges <= rtol * scale).sum())


def num_classes(classes: Tensor | Array) -> int:
    """Count the classes."""
    return len(set(classes.tolist()))
