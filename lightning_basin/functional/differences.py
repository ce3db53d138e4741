"""Whether differences of a function contradict a derivative of it.

A difference over a step h is off by the third derivative times h², by rounding over h, and by what happens at kinks
within reach. All three errors change with h. Only a wrong derivative is missed by the same amount at every h, so that
no bound on third derivatives, rounding or kinks is needed.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

STEPS = (1e-6, 1e-5, 1e-7, 1e-4, 1e-8, 1e-3, 1e-9, 1e-2, 1e-10)
"""Steps relative to the size of what is moved; in smooth networks the first one is right to some 1e-9.

It meets few kinks of rectifiers, of which there are more within a longer step.
"""

_RTOL = 1e-5  # error of a derivative that is confirmed; one in float64 is right to 1e-12, with float32 inside to 1e-6
_NUM_STEADY = 3  # neighbouring steps that must show the same error
_STEADY_RTOL = 0.1  # by which fraction of the error differences over neighbouring steps may differ
_LEAST_SHARE = 1e-9  # of all blocks: smaller blocks are not judged, as saturated units may have lost their digits
_LEAST_VALUE_SHARE = 1e-12  # of the function itself: blocks smaller than this are not judged either
_JUMP_SHARE = 1e-2  # of an error: if the derivatives of both sides differ by more, the point is a kink


def contradicted_blocks(derivative: Sequence[Tensor], function: Callable[[float], Sequence[Tensor]]) -> list[int]:
    """Find the blocks of a directional derivative that are wrong, as differences over all steps show alike.

    A block that one step confirms is right. Where none does and they do not agree among themselves, nothing is known.
    Nor is it at a kink that is met exactly, as by a rectifier of a zero, where each side has a derivative of its own.
    The function takes a step, and returns its value there in the same blocks.
    """
    differences: dict[float, list[Tensor]] = {}
    undecided = list(range(len(derivative)))
    for step in STEPS:
        ends = function(step), function(-step)
        differences[step] = [(after - before) / (2 * step) for after, before in zip(*ends, strict=True)]
        undecided = _far_blocks(undecided, differences[step], derivative)
        if not undecided:
            return []
    middle = function(0.0)
    scale = max(_norms([*derivative, *differences[STEPS[0]]]))
    least = max(_LEAST_SHARE * scale, _LEAST_VALUE_SHARE * max(_norms(middle)))
    steps = sorted(STEPS)
    wrong = []
    for index in undecided:
        slopes = [differences[step][index] for step in steps]
        steady = _steady_index(slopes, derivative[index])
        if steady is None or max(_norms([derivative[index], slopes[steady]])) <= least:
            continue
        after, before = (function(sign * steps[steady])[index] for sign in (1, -1))
        jump = float(((after - middle[index]) - (middle[index] - before)).norm()) / steps[steady]
        if jump <= _JUMP_SHARE * float((slopes[steady] - derivative[index]).norm()):
            wrong.append(index)
    return wrong


def _far_blocks(blocks: Sequence[int], difference: Sequence[Tensor], derivative: Sequence[Tensor]) -> list[int]:
    """Select the blocks in which a difference does not confirm a derivative."""
    pairs = [(difference[index], derivative[index]) for index in blocks]
    sizes = _norms([tensor for one, other in pairs for tensor in (one - other, one, other)])
    triples = zip(blocks, sizes[::3], sizes[1::3], sizes[2::3], strict=True)
    return [index for index, error, *both in triples if not error <= _RTOL * max(both)]


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in one transfer from the device."""
    return [float(norm) for norm in torch.stack([tensor.norm() for tensor in tensors]).tolist()]


def _steady_index(slopes: Sequence[Tensor], derivative: Tensor) -> int | None:
    """The last of the smallest three steps in a row that show the same error; differences of zero count if all are."""
    if not any(bool(slope.any()) for slope in slopes):
        return _NUM_STEADY - 1
    for first in range(len(slopes) - _NUM_STEADY + 1):
        row = slopes[first : first + _NUM_STEADY]
        errors = [float((slope - derivative).norm()) for slope in row]
        changes = [float((after - before).norm()) for before, after in pairwise(row)]
        if bool(row[0].any()) and max(changes) <= _STEADY_RTOL * min(errors):
            return first + _NUM_STEADY - 1
    return None


def relative_direction(parameters: Sequence[Tensor], *, seed: int) -> Tensor:
    """Draw a direction that moves each parameter by its own size, or, where it is zero, by the size of all."""
    generator = torch.Generator().manual_seed(seed)
    flat = [parameter.detach().flatten() for parameter in parameters]
    usual_size = torch.cat(flat).square().mean().sqrt()
    usual_size = torch.where(usual_size > 0, usual_size, 1.0)
    parts = []
    for part in flat:
        noise = torch.randn(len(part), generator=generator, dtype=torch.float64).to(part)
        size = part.square().mean().sqrt()  # It stays on the device, for which nothing has to wait.
        parts.append(noise * torch.where(size > 0, size, usual_size))
    return torch.cat(parts)
