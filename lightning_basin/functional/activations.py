"""The rank of activations: how many dimensions of what enters a layer the inputs span."""

import torch
from torch import Tensor

from lightning_basin.functional.duplicates import activation_rows
from lightning_basin.functional.rank import EPSILON, default_rtol, numerical_rank, rank_gap
from lightning_basin.functional.spectrum import sketched_spectrum


def activation_rank(
    activations: Tensor, *, rtol: float | None = None, epsilon: float = EPSILON
) -> tuple[int | None, float | None]:
    """The rank of activations, one row per input, and its gap in digits (see `rank_gap`).

    Args:
        activations: The activations of one layer, shape ``(k, d)``; further axes are flattened.
        rtol: The relative tolerance on singular values; ``None`` means ``max(k, d) * epsilon``.
        epsilon: The rounding of the activations, relative to the largest.

    Returns:
        The rank, and the gap, which is ``None`` at rank 0. Both are ``None`` where an activation is infinite, NaN, or
        too large to be squared in float64.

    Raises:
        ValueError: If ``activations`` has no axis of inputs, or ``rtol`` is not inside ``(0, 1)``.

    Example:
        >>> activation_rank(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]))[0]
        1
    """
    rows = activation_rows(activations)
    num_inputs, num_features = rows.shape
    wide = rows if num_inputs <= num_features else rows.mT
    gram = wide @ wide.mT
    if not bool(torch.isfinite(gram).all()):
        return None, None
    # The Gram matrix costs a fraction of what a decomposition of wide rows costs, and most often it decides.
    sigmas = sketched_spectrum(gram, lambda: wide, num_columns=wide.shape[1], epsilon=epsilon).singular_values
    rank = numerical_rank(sigmas, rtol=default_rtol(num_inputs, num_features, epsilon) if rtol is None else rtol)
    return rank, rank_gap(sigmas, rank, epsilon=epsilon)
