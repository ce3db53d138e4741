"""Which inputs have the same activations, and units that are constant."""

import torch
from torch import Generator, Tensor


def duplicate_classes(activations: Tensor, *, rtol: float = 1e-6, scales: Tensor | None = None) -> Tensor:
    """Find for each input the first input whose activation is the same, transitively.

    Two activations are the same when ``max|a_i - a_j| <= rtol * max|a|``, the last maximum over all inputs. Sorted
    along a random direction, only neighbours within the tolerance are compared: O(k d + k log k) where few inputs
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
    num_inputs = rows.shape[0]
    if num_inputs == 0 or rows.shape[1] == 0:
        return torch.zeros(num_inputs, dtype=torch.int64)
    scales = largest_entry(rows).expand(rows.shape[1]) if scales is None else scales.to(rows)
    tolerances = rtol * scales
    classes = torch.arange(num_inputs)
    near = _with_near_rows(rows, tolerances)
    near = near[~rows[near].isnan().any(1)]
    if near.numel():
        members = near.cpu()
        classes[members] = members[_classes_of_near(rows[near], tolerances)]
    return classes


def finer_classes(classes: Tensor, activations: Tensor, *, rtol: float, scales: Tensor) -> Tensor:
    """Find the classes of `duplicate_classes` from those at a coarser tolerance: only their members are compared.

    Args:
        classes: The classes of the same activations and scales, at a tolerance at least as large.
        activations: The activations, as in `duplicate_classes`.
        rtol: The finer tolerance.
        scales: The scales, as in `duplicate_classes`.

    Example:
        >>> activations, scales = torch.tensor([[1.0], [5.0], [1.1], [1.0]]), torch.tensor([5.0])
        >>> classes = duplicate_classes(activations, rtol=0.1, scales=scales)
        >>> classes, finer_classes(classes, activations, rtol=0.0, scales=scales)
        (tensor([0, 1, 0, 0]), tensor([0, 1, 2, 0]))
    """
    members = (classes.bincount(minlength=classes.numel())[classes] > 1).nonzero().squeeze(1)
    finer = torch.arange(classes.numel())
    if members.numel():
        merged = activations[members.to(activations.device)]
        finer[members] = members[duplicate_classes(merged, rtol=rtol, scales=scales)]
    return finer


def check_duplicate_rtol(rtol: float) -> None:
    """Refuse a tolerance under which everything, or nothing, would be the same."""
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol must be inside [0, 1), got {rtol}")


def activation_rows(activations: Tensor) -> Tensor:
    """Return activations as they are compared: one row per input, in float64, shape ``(k, d)``.

    Raises:
        ValueError: If there is no axis of inputs.
    """
    if activations.ndim == 0:
        raise ValueError("activations must have one row per input, got a scalar")
    return activations.detach().unsqueeze(-1).flatten(1).to(torch.float64)


def largest_entry(rows: Tensor) -> Tensor:
    """Find the largest magnitude among finite elements, shape ``()``."""
    if not rows.numel():
        return rows.new_zeros(())
    largest = rows.abs().amax()
    return largest if bool(largest.isfinite()) else rows.abs().where(rows.isfinite(), 0.0).amax()


def largest_entries(rows: Tensor) -> Tensor:
    """Find the largest finite magnitude of each element over all rows, shape ``(d,)``."""
    largest = rows.abs().amax(0)
    return largest if bool(largest.isfinite().all()) else rows.abs().where(rows.isfinite(), 0.0).amax(0)


def are_same(left: Tensor, right: Tensor, tolerances: Tensor) -> Tensor:
    """Tell which pairs of rows, shape ``(n, d)``, differ in no element by more than its tolerance, shape ``(d,)``."""
    # Equality, too: the difference of two equal infinities is no number.
    return (((left - right).abs() <= tolerances) | (left == right)).all(1)


def projections(rows: Tensor, directions: Tensor) -> Tensor:
    """Find where rows lie along directions; infinite elements, which are compared exactly, count as zero."""
    positions = rows @ directions
    # Of most activations all are finite.
    return positions if bool(positions.isfinite().all()) else rows.where(rows.isfinite(), 0.0) @ directions


def _sorted_positions(rows: Tensor, tolerances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows lie along a direction, in order; whose these are; and how far apart two that are the same can lie."""
    directions = random_directions(rows.shape[1], 1).to(rows.device)
    positions, order = projections(rows, directions).squeeze(1).sort()
    window = largest_distances(directions, tolerances=tolerances, largest=largest_entries(rows))
    return positions, order, window


def _with_near_rows(rows: Tensor, tolerances: Tensor) -> Tensor:
    """Indices of the rows that are near others along a random direction, in order: no others can be the same as any."""
    positions, order, window = _sorted_positions(rows, tolerances)
    is_near = ~(positions.diff() > window)  # Of positions beyond float64 the difference is no number.
    if not bool(is_near.any()):
        return order[:0]
    nothing = is_near.new_zeros(1)
    return order[torch.cat([is_near, nothing]) | torch.cat([nothing, is_near])].sort().values


def _classes_of_near(rows: Tensor, tolerances: Tensor) -> Tensor:
    """Smallest index of each row's class, of rows of which many may be the same and none holds NaN."""
    # Bitwise equal rows first, by sorting: large classes then cost nothing below.
    rows, members = torch.unique(rows, dim=0, return_inverse=True)
    labels = torch.arange(rows.shape[0], device=rows.device)
    if rows.shape[0] > 1 and bool(tolerances.any()):
        labels = _merged(rows, tolerances)
    return _first_members(labels[members]).cpu()


def _merged(rows: Tensor, tolerances: Tensor) -> Tensor:
    """Label of each row's class under the transitive closure of ``|difference| <= tolerances``."""
    num_rows = rows.shape[0]
    position, order, window = _sorted_positions(rows, tolerances)
    ordered = rows[order]
    labels = torch.arange(num_rows, device=rows.device)
    for offset in range(1, num_rows):
        near = (~(position[offset:] - position[:-offset] > window)).nonzero().squeeze(1)  # Both may be infinite.
        if near.numel() == 0:
            break
        near = near[labels[near] != labels[near + offset]]
        same = are_same(ordered[near], ordered[near + offset], tolerances)
        labels = join_classes(labels, near[same], near[same] + offset)
    merged = torch.empty_like(labels)
    merged[order] = labels
    return merged


def random_directions(width: int, count: int) -> Tensor:
    """Draw the directions along which activations are sorted, always the same, shape ``(width, count)``."""
    return torch.randn(count, width, generator=Generator().manual_seed(0), dtype=torch.float64).mT


def largest_distances(directions: Tensor, *, tolerances: Tensor, largest: Tensor) -> Tensor:
    """Bound the distance of two rows within the tolerance along each direction, rounding included.

    Args:
        directions: The directions as columns, shape ``(d, directions)``.
        tolerances: The largest difference of each element, shape ``(d,)``.
        largest: The magnitude of each element, shape ``(d,)``.
    """
    rounding = 4 * directions.shape[0] * torch.finfo(torch.float64).eps * largest
    return (tolerances + rounding) @ directions.abs()


def join_classes(classes: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Join the class of each ``left[i]`` with that of ``right[i]``.

    Args:
        classes: The smallest index of the class of each input, shape ``(k,)``.
        left: The indices of some inputs.
        right: The indices of as many others.

    Example:
        >>> join_classes(torch.arange(4), torch.tensor([0, 2]), torch.tensor([2, 3]))
        tensor([0, 1, 0, 0])
    """
    while True:
        of_left, of_right = classes[left], classes[right]
        if torch.equal(of_left, of_right):
            return classes
        # Only first members are redirected, and each to an earlier one: following them ends.
        lower, higher = torch.minimum(of_left, of_right), torch.maximum(of_left, of_right)
        classes = classes.scatter_reduce(0, higher, lower, "amin")
        while not torch.equal(classes, classes[classes]):
            classes = classes[classes]


def _first_members(labels: Tensor) -> Tensor:
    """Replace each label by the smallest index that carries it."""
    _, inverse = torch.unique(labels, return_inverse=True)
    indices = torch.arange(labels.numel(), device=labels.device)
    first = torch.full_like(indices, labels.numel()).scatter_reduce_(0, inverse, indices, "amin")
    return first[inverse]


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
    return classes.numel() - len(set(classes.tolist()))


def dead_units(outputs: Tensor, *, rtol: float = 1e-6) -> int:
    """Count the outputs of a layer that are constant over the inputs, at every position.

    Args:
        outputs: The outputs of the layer, shape ``(k, ..., units)``.
        rtol: The fraction of the largest element of ``outputs`` by which a constant unit may move.

    Example:
        >>> dead_units(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
        1
    """
    rows = outputs.detach().flatten(1, -2) if outputs.ndim > 2 else outputs.detach().unsqueeze(1)
    if rows.numel() == 0:
        return 0
    smallest, largest = rows.amin(0), rows.amax(0)
    constant = (largest - smallest <= rtol * largest_entry(rows)) | (largest == smallest)
    return int(constant.all(0).sum())


def num_classes(classes: Tensor) -> int:
    """Count the classes."""
    return len(set(classes.tolist()))
