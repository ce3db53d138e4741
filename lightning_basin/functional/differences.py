"""Whether differences of a function contradict a derivative of it.

A difference over a step h is off by the third derivative times h², by rounding over h, and by what happens at kinks
within reach. All of these change with h. Only a derivative that is wrong is missed by the same amount at every h, so
that no bound on third derivatives, rounding or kinks is needed.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

STEPS = (1e-5, 1e-4, 1e-6, 1e-3, 1e-7, 1e-2, 1e-8, 1e-9, 1e-10)
"""Relative to the size of what is moved; in smooth networks the first one is right to some 1e-9."""

_RTOL = 1e-5  # to which a derivative is confirmed; one in float64 is right to some 1e-12, with float32 inside to 1e-6
_IN_A_ROW = 3  # steps that must show the same error
_STEADY = 0.1  # fraction of the error by which differences over neighbouring steps may differ
_LEAST_SHARE = 1e-9  # of all blocks: what is below is not judged, as its digits may be lost in saturated units
_LEAST_VALUE_SHARE = 1e-12  # the same of the function itself
_JUMP_SHARE = 1e-2  # of an error: if the derivatives of both sides differ by more, the point is a kink


def contradicted(claimed: Sequence[Tensor], function: Callable[[float], Sequence[Tensor]]) -> list[int]:
    """Which blocks of a directional derivative are wrong, as differences of the function over all steps show alike.

    A block that one step confirms is right. Where none does and they do not agree among themselves, nothing is known.
    Neither at a kink that is met exactly, as of a rectifier of a zero, where both sides have a derivative each.

    Args:
        claimed: The derivative at 0, in blocks that are judged each on their own.
        function: Of a step, in the same blocks.

    Returns:
        Indices of the wrong blocks, ascending.

    Example:
        >>> point = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> contradicted([2 * point, 3 * point], lambda step: [(point * (1 + step)) ** 2 / point] * 2)
        [1]
    """
    differences: dict[float, list[Tensor]] = {}
    open_blocks = list(range(len(claimed)))
    for step in STEPS:
        ends = function(step), function(-step)
        differences[step] = [(after - before) / (2 * step) for after, before in zip(*ends, strict=True)]
        open_blocks = [index for index in open_blocks if not _is_near(differences[step][index], claimed[index])]
        if not open_blocks:
            return []
    middle = function(0.0)
    scale = max(float(block.norm()) for block in [*claimed, *differences[STEPS[0]]])
    least = max(_LEAST_SHARE * scale, _LEAST_VALUE_SHARE * max(float(block.norm()) for block in middle))
    steps = sorted(STEPS)
    found = []
    for index in open_blocks:
        values = [differences[step][index] for step in steps]
        steady = _steady(values, claimed[index])
        if steady is None or max(float(claimed[index].norm()), float(values[steady].norm())) <= least:
            continue
        after, before = (function(sign * steps[steady])[index] for sign in (1, -1))
        jump = float(((after - middle[index]) - (middle[index] - before)).norm()) / steps[steady]
        if jump <= _JUMP_SHARE * float((values[steady] - claimed[index]).norm()):
            found.append(index)
    return found


def _is_near(difference: Tensor, claimed: Tensor) -> bool:
    return float((difference - claimed).norm()) <= _RTOL * max(float(difference.norm()), float(claimed.norm()))


def _steady(values: Sequence[Tensor], claimed: Tensor) -> int | None:
    """The last of the smallest three steps in a row that show the same error; differences of zero count if all are.

    Args:
        values: Differences, by ascending steps.
        claimed: The derivative.
    """
    if not any(bool(value.any()) for value in values):
        return _IN_A_ROW - 1
    for first in range(len(values) - _IN_A_ROW + 1):
        row = values[first : first + _IN_A_ROW]
        errors = [float((value - claimed).norm()) for value in row]
        changes = [float((after - before).norm()) for before, after in pairwise(row)]
        if bool(row[0].any()) and max(changes) <= _STEADY * min(errors):
            return first + _IN_A_ROW - 1
    return None


def relative_direction(parameters: Sequence[Tensor], *, seed: int) -> Tensor:
    """A random direction that moves every parameter by its own size, shape ``(N,)``; one of zeros by that of others."""
    generator = torch.Generator().manual_seed(seed)
    everything = torch.cat([parameter.detach().flatten() for parameter in parameters])
    usual = float(everything.square().mean().sqrt()) or 1.0
    parts = []
    for parameter in parameters:
        drawn = torch.randn(parameter.numel(), generator=generator, dtype=torch.float64)
        size = float(parameter.detach().square().mean().sqrt()) if parameter.numel() else 0.0
        parts.append(drawn.to(parameter) * (size or usual))
    return torch.cat(parts)
