"""Which inputs a layer no longer tells apart, and how much rank that costs."""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor


def duplicate_classes(activations: Tensor, *, rtol: float = 1e-6) -> Tensor:
    """For each input the first input whose activation is the same, transitively.

    Two activations are the same when ``max|a_i - a_j| <= rtol * max|a|``, the last maximum over all inputs. Sorted
    along a random direction, only neighbours within the tolerance are compared: O(k d + k log k) where few inputs
    merge.

    Args:
        activations: One row per input, shape ``(k, d)``; further axes are flattened.
        rtol: Relative to the largest entry; 0 asks for equality.

    Returns:
        Smallest index of each input's class, int64, shape ``(k,)``.

    Raises:
        ValueError: If ``activations`` has no axis of inputs, or ``rtol`` is not inside ``[0, 1)``.

    Example:
        >>> duplicate_classes(torch.tensor([[1.0, 2.0], [5.0, 0.0], [1.0, 2.0]]))
        tensor([0, 1, 0])
    """
    if activations.ndim == 0:
        raise ValueError("activations must have one row per input, got a scalar")
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol must be inside [0, 1), got {rtol}")
    num_inputs = activations.shape[0]
    rows = activations.detach().unsqueeze(-1).flatten(1).to(torch.float64)
    if num_inputs == 0 or rows.shape[1] == 0:
        return torch.zeros(num_inputs, dtype=torch.int64)
    # Bitwise equal rows first, by sorting: large classes then cost nothing below.
    rows, members = torch.unique(rows, dim=0, return_inverse=True)
    labels = torch.arange(rows.shape[0], device=rows.device)
    if rtol > 0.0 and rows.shape[0] > 1:
        labels = _merged(rows, tolerance=rtol * float(rows.abs().max()))
    return _first_members(labels[members]).cpu()


def _merged(rows: Tensor, *, tolerance: float) -> Tensor:
    """Label of each row's class under the transitive closure of ``max|difference| <= tolerance``."""
    num_rows, width = rows.shape
    direction = torch.randn(width, generator=Generator().manual_seed(0), dtype=torch.float64).to(rows.device)
    position, order = (rows @ direction).sort()
    # Rows within the tolerance lie at most this far apart along the direction; the last term is rounding.
    rounding = 4 * width * torch.finfo(torch.float64).eps * float(rows.abs().max())
    window = float(direction.abs().sum()) * (tolerance + rounding)
    ordered = rows[order]
    labels = torch.arange(num_rows, device=rows.device)
    for offset in range(1, num_rows):
        near = (position[offset:] - position[:-offset] <= window).nonzero().squeeze(1)
        if near.numel() == 0:
            break
        near = near[labels[near] != labels[near + offset]]
        same = (ordered[near] - ordered[near + offset]).abs().amax(1) <= tolerance
        for index in near[same].tolist():
            labels[labels == labels[index + offset]] = int(labels[index])
    merged = torch.empty_like(labels)
    merged[order] = labels
    return merged


def _first_members(labels: Tensor) -> Tensor:
    """Replace each label by the smallest index that carries it."""
    _, inverse = torch.unique(labels, return_inverse=True)
    indices = torch.arange(labels.numel(), device=labels.device)
    first = torch.full_like(indices, labels.numel()).scatter_reduce_(0, inverse, indices, "amin")
    return first[inverse]


def duplicated_activations(activations: Tensor, *, rtol: float = 1e-6) -> int:
    """How many inputs share their activation with an earlier one: k minus the number of distinct activations.

    Args:
        activations: One row per input, shape ``(k, d)``; further axes are flattened.
        rtol: Relative to the largest entry; 0 asks for equality.

    Raises:
        ValueError: See `duplicate_classes`.

    Example:
        >>> duplicated_activations(torch.tensor([[1.0], [2.0], [1.0], [1.0 + 1e-9]]))
        2
    """
    classes = duplicate_classes(activations, rtol=rtol)
    return classes.numel() - len(set(classes.tolist()))


def dead_units(outputs: Tensor, *, rtol: float = 1e-6) -> int:
    """How many outputs of a layer are constant over the inputs, at every position.

    Args:
        outputs: Of a layer, shape ``(k, ..., units)``.
        rtol: A unit is constant when it moves by at most ``rtol`` times the largest entry of ``outputs``.

    Example:
        >>> dead_units(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
        1
    """
    rows = outputs.detach().flatten(1, -2) if outputs.ndim > 2 else outputs.detach().unsqueeze(1)
    if rows.numel() == 0:
        return 0
    spread = (rows.amax(0) - rows.amin(0)).amax(0)
    return int((spread <= rtol * rows.abs().max()).sum())


def gradient_rank_bound(num_parameters: int, num_outputs: int, cuts: Iterable[tuple[int, int]]) -> int:
    """The largest rank of the behavioral gradients that merged inputs leave possible.

    Cut the network where an activation is all that crosses. Behind the cut, inputs with the same activation have
    the same gradient, so that at most ``num_outputs * distinct`` rows differ there; before it there are
    ``num_before`` columns: ``rank <= min over cuts of num_before + num_outputs * distinct`` (bound B2 of the
    theory page of the documentation).

    Args:
        num_parameters: All trainable parameters, a bound by itself.
        num_outputs: Outputs per input, c.
        cuts: For each cut the number of parameters used before it and of distinct activations that cross it.

    Example:
        The 16-1-16-1 network that has merged 64 inputs to 8 behind its first layer of 17 parameters:

        >>> gradient_rank_bound(66, 1, [(0, 64), (17, 8), (49, 8)])
        25
    """
    return min([num_parameters, *(before + num_outputs * distinct for before, distinct in cuts)])
