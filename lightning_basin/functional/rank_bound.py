"""How large the rank of the gradients can be where inputs have merged."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import _first_members

DirectionsOfMerged = Callable[[Tensor], int]
"""From indices of some inputs to the number of directions of the differences of gradients inside their classes."""


def gradient_rank_bound(num_parameters: int, num_outputs: int, cuts: Iterable[tuple[int, int]]) -> int:
    """The largest rank of the behavioral gradients that merged inputs leave possible.

    Cut the network where an activation is all that crosses. Behind the cut, inputs with the same activation have
    the same gradient, so that at most ``num_outputs * distinct`` rows differ there. Before it the gradients of merged
    inputs still differ, along ``num_before`` directions at most: the number of parameters there (bound B2), or what
    `merged_directions` (B3) or `merged_linear_directions` (B4) leave of it.
    ``rank <= min over cuts of num_before + num_outputs * distinct``.

    Args:
        num_parameters: All trainable parameters, a bound by itself.
        num_outputs: Outputs per input, c.
        cuts: For each cut the number of directions before it and of distinct activations that cross it.

    Example:
        The 16-1-16-1 network that has merged 64 inputs to 8 behind its first layer of 17 parameters:

        >>> gradient_rank_bound(66, 1, [(0, 64), (17, 8), (49, 8)])
        25
    """
    return min([num_parameters, *(before + num_outputs * distinct for before, distinct in cuts)])


def nested_rank_bound(num_inputs: int, num_outputs: int, cuts: Sequence[tuple[Tensor, DirectionsOfMerged]]) -> int:
    """The largest rank that inputs leave possible which merge at one cut after the other, each class at its own.

    Take a set S of inputs, with rows G_S of the gradients, and one cut. Let R be the first member of each class in S.
    Each row of G_S is that of a member of R plus a difference inside a class, so that
    ``rank(G_S) <= directions(S) + rank(G_R)`` with the directions of the differences in S. The same holds for R and
    any further cut: what an early cut has merged cheaply, a later one need not pay for.

    Args:
        num_inputs: k.
        num_outputs: Outputs per input, c.
        cuts: In the order in which they are crossed; for each the first member of each input's class, shape ``(k,)``,
            and from indices of some inputs the largest number of directions of differences inside their classes.

    Example:
        Of five inputs two merge at a first cut behind one parameter, and the others at a second one behind three:

        >>> first = torch.tensor([0, 0, 2, 3, 4]), lambda kept: 1
        >>> second = torch.tensor([0, 0, 2, 2, 2]), lambda kept: 3
        >>> nested_rank_bound(5, 2, [first, second])
        7
    """
    costs = [(0, torch.arange(num_inputs))]
    for classes, directions in cuts:
        ways = []
        for cost, kept in costs:
            first = _first_members(classes[kept]) == torch.arange(kept.numel())
            num_merged = kept.numel() - int(first.sum())
            if num_merged:
                ways.append((cost + min(directions(kept), num_outputs * num_merged), kept[first]))
        if ways:
            costs.append(min(ways, key=lambda way: way[0] + num_outputs * way[1].numel()))
    return min(cost + num_outputs * kept.numel() for cost, kept in costs)


def merged_directions(classes: Tensor, signals: Tensor) -> int:
    """Along how many directions gradients before a cut can differ inside the classes: bound B3.

    They pass through a layer before the cut. Inputs of a class share the derivative of their c outputs by what leaves
    that layer, a matrix whose rank is at most the number of its rows, or units, with an entry other than zero. Each
    input beyond the first of its class adds at most that many directions: none where every unit is off.

    Args:
        classes: First member of each input's class, shape ``(k,)``; inputs of one class have the same ``signals``.
        signals: Derivative of each output by what leaves the layer, shape ``(k, c, units)``.

    Example:
        Three inputs are one class; one unit of two is on, and moves both outputs:

        >>> merged_directions(torch.tensor([0, 0, 0]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]).expand(3, 2, 2))
        2
    """
    # On for any member counts for all: rounding may have left a zero for one of them.
    is_on = torch.zeros(signals.shape, dtype=torch.float64, device=signals.device)
    is_on.index_add_(0, classes.to(signals.device), (signals != 0).to(torch.float64))
    ranks = torch.minimum(is_on.any(2).sum(1), is_on.any(1).sum(1)).cpu()
    return int(ranks[classes].sum() - ranks.sum())


def merged_linear_directions(classes: Tensor, signals: Tensor, inputs: Tensor, *, rtol: float) -> int:
    """Along how many directions gradients before a cut can differ inside the classes, behind a linear layer: bound B4.

    Where all that is trained before the cut is one linear layer, the gradients of two inputs of a class differ by
    ``signals ⊗ difference of the inputs``, so that they span at most the rank of the one times the rank of the other.

    Both ranks are counted at a tolerance below that of the gradients: what it drops moves the gradients G by less than
    half of ``rtol`` times the norm of their largest row, hence no singular value of G past ``rtol * sigma_max(G)``.

    Args:
        classes: First member of each input's class, shape ``(k,)``; inputs of one class have the same ``signals``.
        signals: Derivative of each output by what leaves the linear layer, shape ``(k, c, units)``.
        inputs: The layer's input activations, shape ``(k, features)``.
        rtol: Tolerance at which the rank of the gradients is counted, relative to their largest singular value.

    Example:
        One unit has merged four corners of a square into its two sides, whose inner differences are parallel:

        >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        >>> signals = torch.ones(4, 1, 1, dtype=torch.float64)
        >>> merged_linear_directions(torch.tensor([0, 0, 2, 2]), signals, corners, rtol=1e-12)
        1
    """
    classes = classes.to(inputs.device)
    merged = (classes != torch.arange(classes.numel(), device=classes.device)).nonzero().squeeze(1)
    if merged.numel() == 0:
        return 0
    first, position = torch.unique(classes[merged], return_inverse=True)
    differences = inputs[merged] - inputs[classes[merged]]
    # A row of the gradients is the product of a row of each: the norm of any is at most sigma_max.
    tolerance = rtol * float((signals.norm(dim=2).amax(1) * inputs.norm(dim=1)).max()) / 4
    # Each factor is weighted by the other, so that what is dropped from it weighs what it weighs in the product.
    lengths = torch.zeros_like(differences[: first.numel(), 0])
    lengths = lengths.index_add_(0, position, differences.square().sum(1)).sqrt()
    of_signals = _rank_above((signals[first] * lengths[:, None, None]).flatten(0, 1), tolerance)
    strengths = signals[first].flatten(1).norm(dim=1)
    return of_signals * _rank_above(differences * strengths[position, None], tolerance)


_DECOMPOSED = 512  # largest shorter side of a matrix whose rank is worth its singular values: about a second


def _rank_above(matrix: Tensor, tolerance: float) -> int:
    """The smallest rank that leaves at most ``tolerance`` in Frobenius norm, or a larger number."""
    is_zero = matrix == 0
    rank = min(int((~is_zero).any(1).sum()), int((~is_zero).any(0).sum()))
    if rank > _DECOMPOSED:
        return rank
    left_out = torch.linalg.svdvals(matrix).square().flip(0).cumsum(0).sqrt()
    return min(rank, int((left_out > tolerance).sum()))
