"""How large the rank of the gradients can be where inputs have merged."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_basin.functional.reading import read

MergedDirections = Callable[[Tensor], int]
"""From the indices of some inputs to the number of directions in which gradients differ inside the inputs' classes."""


def gradient_rank_bound(
    num_parameters: int, num_inputs: int, num_outputs: int, cuts: Sequence[tuple[Tensor, MergedDirections]]
) -> int:
    """Compute the largest rank of the behavioral gradients that merged inputs leave possible.

    Cut the network where an activation is all that crosses. Behind the cut, inputs with the same activation have the
    same gradient. Before it, the gradients of merged inputs still differ, along some directions: at most as many as
    there are parameters before the cut (bound B2), and often fewer, by `merged_directions` (B3) and
    `merged_linear_directions` (B4). Hence the rank is at most ``directions + num_outputs * distinct``.

    Inputs may merge at one cut after the other. Take a set S of inputs, with rows G_S of the gradients, and one cut.
    Let R be the first member of each class in S. Each row of G_S is the row of a member of R plus a difference inside a
    class, so that ``rank(G_S) <= directions(S) + rank(G_R)``. The same holds for R and any further cut: an input that
    an early cut has merged cheaply costs nothing at a later one.

    Args:
        num_parameters: The number of trainable parameters, N, a bound by itself.
        num_inputs: The number of inputs, k.
        num_outputs: The number of outputs per input, c.
        cuts: The cuts in the order in which they are crossed. Each is the first member of each input's class, shape
            ``(k,)``, and a function that bounds the directions.

    Example:
        Of five inputs two merge at a first cut behind one parameter, and the others at a second one behind three:

        >>> first = torch.tensor([0, 0, 2, 3, 4]), lambda kept: 1
        >>> second = torch.tensor([0, 0, 2, 2, 2]), lambda kept: 3
        >>> gradient_rank_bound(50, 5, 2, [second]), gradient_rank_bound(50, 5, 2, [first, second])
        (7, 7)
    """
    inputs = torch.arange(num_inputs)
    # For each set S that is left: its cost, and its members.
    costs, kept = [0], torch.ones(1, num_inputs, dtype=torch.bool)
    for classes, directions in cuts:
        first = _first_members(kept, classes)
        num_merged = (kept.sum(1) - first.sum(1)).tolist()
        ways = [
            (cost + min(directions(inputs[members]), num_outputs * merged), left)
            for cost, members, merged, left in zip(costs, kept, num_merged, first, strict=True)
            if merged
        ]
        if ways:
            cost, left = min(ways, key=lambda way: way[0] + num_outputs * int(way[1].sum()))
            costs, kept = [*costs, cost], torch.cat([kept, left.unsqueeze(0)])
    bounds = (cost + num_outputs * num_left for cost, num_left in zip(costs, kept.sum(1).tolist(), strict=True))
    return int(min(num_parameters, *bounds))


def _first_members(kept: Tensor, classes: Tensor) -> Tensor:
    """The first member of each class in each of some sets of inputs, all of shape ``(sets, k)``."""
    num_inputs = classes.numel()
    classes = classes.expand(kept.shape)
    positions = torch.arange(num_inputs).where(kept, num_inputs)
    first = positions.new_full(kept.shape, num_inputs).scatter_reduce(1, classes, positions, "amin")
    return kept & (first.gather(1, classes) == positions)


def merged_directions(classes: Tensor, signals: Tensor) -> int:
    """Count the directions along which gradients before a cut can differ inside the classes: bound B3.

    The gradients pass through a layer before the cut. Inputs of a class share the derivative of their c outputs by the
    layer's output, a matrix whose rank is at most the number of its rows, or units, with an element other than zero.
    Each input beyond the first of its class adds at most that many directions: none where every unit is off.

    Args:
        classes: The first member of each input's class, shape ``(k,)``; inputs of one class have the same ``signals``.
        signals: The derivative of each output by the layer's output, shape ``(k, c, units)``.

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


def merged_linear_directions(classes: Tensor, signals: Tensor, inputs: Tensor, *, tolerance: float) -> int:
    """Count the directions along which gradients before a cut can differ, behind a linear layer: bound B4.

    Where one linear layer is all that is trained before the cut, the gradients of two inputs of a class differ by
    ``signals ⊗ difference of the inputs``. All differences span at most the rank of the first factor times the rank of
    the second.

    Both ranks are counted at a tolerance below that of the gradients: the parts below it move the gradients by at most
    half of ``tolerance``, hence no singular value from zero to above it.

    Args:
        classes: The first member of each input's class, shape ``(k,)``; inputs of one class have the same ``signals``.
        signals: The derivative of each output by the linear layer's output, shape ``(k, c, units)``.
        inputs: The linear layer's input activations, shape ``(k, features)``.
        tolerance: The size of a singular value of the gradients above which it counts towards their rank. The rounding
            of both ranks grows with the largest singular value of the gradients: a tolerance that is taken relative to
            that value is above it, one relative to a single row may not be.

    Example:
        One unit has merged four corners of a square into its two sides, whose inner differences are parallel:

        >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        >>> signals = torch.ones(4, 1, 1, dtype=torch.float64)
        >>> merged_linear_directions(torch.tensor([0, 0, 2, 2]), signals, corners, tolerance=1e-12)
        1
    """
    classes = classes.cpu()
    merged = (classes != torch.arange(classes.numel())).nonzero().squeeze(1)
    if merged.numel() == 0:
        return 0
    first, position = torch.unique(classes[merged], return_inverse=True)
    merged, first_of_merged, first, position = (
        indices.to(inputs.device) for indices in (merged, classes[merged], first, position)
    )
    differences = inputs[merged] - inputs[first_of_merged]
    # Each factor is weighted by the other: what the rank drops from a factor then weighs as much in the product.
    lengths = torch.zeros_like(differences[: first.numel(), 0])
    lengths = lengths.index_add_(0, position, differences.square().sum(1)).sqrt()
    weighted_signals = (signals[first] * lengths[:, None, None]).flatten(0, 1)
    strengths = signals[first].flatten(1).norm(dim=1)
    rank_of_signals, rank_of_differences = _ranks_above(
        [weighted_signals, differences * strengths[position, None]], tolerance / 4
    )
    return rank_of_signals * rank_of_differences


_MAX_DECOMPOSED = 512  # longest shorter side of a matrix whose rank is worth its singular values: about a second


def _ranks_above(matrices: Sequence[Tensor], tolerance: float) -> list[int]:
    """The smallest rank of each matrix that leaves at most ``tolerance`` in Frobenius norm, or a larger number."""
    counts = read([(matrix != 0).any(axis).sum() for matrix in matrices for axis in (0, 1)])
    ranks = [int(min(shape)) for shape in zip(counts[::2], counts[1::2], strict=True)]
    small = [place for place, rank in enumerate(ranks) if rank <= _MAX_DECOMPOSED]
    dropped = [torch.linalg.svdvals(matrices[place]).square().flip(0).cumsum(0).sqrt() for place in small]
    for place, above in zip(small, read([(norms > tolerance).sum() for norms in dropped]), strict=True):
        ranks[place] = min(ranks[place], int(above))
    return ranks


def class_means(values: Tensor, classes: Tensor) -> Tensor:
    """Replace each input's values, shape ``(k, ...)``, by their mean over its class."""
    classes = classes.to(values.device)
    sums = torch.zeros_like(values).index_add_(0, classes, values)[classes]
    counts = torch.zeros_like(classes).index_add_(0, classes, torch.ones_like(classes))[classes]
    return sums / counts.view(-1, *(1,) * (values.ndim - 1))
