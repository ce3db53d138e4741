"""The rank of activations: how many dimensions of what enters a layer the inputs span."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_basin.functional.duplicates import activation_rows
from lightning_basin.functional.rank import (
    EPSILON,
    GRAM_RESOLUTION,
    LEAST_OF_GRAM,
    check_rtol,
    default_rtol,
    singular_values,
)
from lightning_basin.functional.reading import Array, read

_STACKED_ELEMENTS = 2**22  # elements of square matrices that are decomposed together: 32 MiB


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
    return activation_ranks([activation_rows(activations)], rtol=rtol, epsilon=epsilon)[0]


def activation_ranks(
    activations: Sequence[Tensor], *, rtol: float | None = None, epsilon: float = EPSILON
) -> list[tuple[int | None, float | None]]:
    """The rank of the activations of each of several layers, and its gap, as `activation_rank` has them.

    The singular values are those of `sketched_spectrum`, with the activations themselves in place of a sketch. On an
    accelerator matrices of one size are decomposed together, and the results of all layers are read at once.
    """
    check_rtol(rtol)
    wide = [rows if rows.shape[0] <= rows.shape[1] else rows.mT for rows in activations]
    # The Gram matrix costs a fraction of what a decomposition of wide rows costs, and most often it decides.
    spectra = [np.sqrt(values[::-1].clip(min=0.0)) for values in read(_eigenvalues_of_grams(wide))]
    num_resolved = [int((sigmas > np.maximum(GRAM_RESOLUTION * sigmas[:1], LEAST_OF_GRAM)).sum()) for sigmas in spectra]
    places = [
        place
        for place, (sigmas, resolved) in enumerate(zip(spectra, num_resolved, strict=True))
        if resolved < len(sigmas) and np.isfinite(sigmas).all() and epsilon < GRAM_RESOLUTION
    ]
    for place, sigmas in zip(places, read([singular_values(wide[place]) for place in places]), strict=True):
        above, below = spectra[place][: num_resolved[place]], sigmas[num_resolved[place] :]
        spectra[place] = np.concatenate([above, below.clip(max=above.min(initial=np.inf))])
    rtols = [default_rtol(len(rows), rows.shape[1], epsilon) if rtol is None else rtol for rows in activations]
    return [_rank_and_gap(sigmas, used, epsilon) for sigmas, used in zip(spectra, rtols, strict=True)]


def _eigenvalues_of_grams(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The ascending eigenvalues of each matrix times its transpose; NaN where elements leave the range of float64."""
    by_size: dict[tuple[int, torch.device], list[int]] = {}
    for place, matrix in enumerate(matrices):
        by_size.setdefault((len(matrix), matrix.device), []).append(place)
    eigenvalues: dict[int, Tensor] = {}
    for (size, device), places in by_size.items():
        # A CPU takes one after the other anyway, and beside others in memory the last bits would depend on these.
        count = 1 if device.type == "cpu" else max(1, _STACKED_ELEMENTS // max(1, size**2))
        for chosen in (places[start : start + count] for start in range(0, len(places), count)):
            grams = [matrices[place] @ matrices[place].mT for place in chosen]
            stack = torch.stack(grams) if len(grams) > 1 else grams[0].unsqueeze(0)
            # Zero, or NaN where an element is not finite: `eigvalsh` refuses such a matrix.
            marks = stack.diagonal(dim1=1, dim2=2).mul(0.0).sum(1, keepdim=True)
            values = torch.linalg.eigvalsh(stack.nan_to_num_(0.0, 0.0, 0.0)) + marks
            eigenvalues |= zip(chosen, values.unbind(), strict=True)
    return [eigenvalues[place] for place in range(len(matrices))]


def _rank_and_gap(sigmas: Array, rtol: float, epsilon: float) -> tuple[int | None, float | None]:
    """What `numerical_rank` and `rank_gap` find, of descending singular values that have been read."""
    if np.isnan(sigmas).any():
        return None, None
    rank = int((sigmas > rtol * sigmas[:1]).sum())
    if rank == 0:
        return 0, None
    following = max([*sigmas[rank : rank + 1], epsilon * sigmas[0], math.ulp(0.0)])
    return rank, math.log10(sigmas[rank - 1] / following)
