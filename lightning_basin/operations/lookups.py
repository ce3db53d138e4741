"""Look-ups, as products with one-hot activations. Only rows of the table that occur can have gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_basin.operations.uses import Leaving, ProductUse, Recording, Use


def _embedding(
    recorder: Recording,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    sparse: bool = False,  # noqa: FBT001, FBT002
) -> list[Use]:
    flat = indices.flatten()
    weights = (flat != padding_idx).to(table.dtype)
    return _lookup(
        recorder, leaving, table, flat, torch.arange(flat.numel(), device=flat.device), weights, flat.numel()
    )


def _embedding_bag(
    recorder: Recording,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    mode: int = 0,
    sparse: bool = False,  # noqa: FBT001, FBT002
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: FBT001, FBT002
    padding_idx: int = -1,
) -> list[Use]:
    modes = {"sum": 0, "mean": 1}
    if mode not in modes.values():  # The largest entry of a bag is no sum of products.
        return []
    num_bags = offsets.numel() - int(include_last_offset)
    places = torch.arange(indices.numel(), device=indices.device)
    bags = torch.searchsorted(offsets[:num_bags].contiguous(), places, right=True) - 1
    weights = (indices != padding_idx).to(table.dtype)
    if mode == modes["mean"]:
        counts = weights.new_zeros(num_bags).index_add_(0, bags, weights)
        weights = weights / counts[bags].clamp(min=1)
    if per_sample_weights is not None:
        weights = weights * per_sample_weights.detach()
    return _lookup(recorder, leaving, table, indices, bags, weights, num_bags)


def _index(recorder: Recording, leaving: Leaving, table: Tensor, indices: Sequence[Tensor | None]) -> list[Use]:
    first = indices[0]
    if len(indices) != 1 or first is None or first.dtype != torch.int64:
        return []
    flat = first.flatten() % table.shape[0]
    places = torch.arange(flat.numel(), device=flat.device)
    return _lookup(recorder, leaving, table, flat, places, flat.new_ones(flat.shape, dtype=table.dtype), flat.numel())


def _index_select(recorder: Recording, leaving: Leaving, table: Tensor, axis: int, indices: Tensor) -> list[Use]:
    return _index(recorder, leaving, table, [indices]) if axis == 0 else []


def _lookup(
    recorder: Recording,
    leaving: Leaving,
    table: Tensor,
    indices: Tensor,
    rows: Tensor,
    weights: Tensor,
    num_rows: int,
) -> list[Use]:
    """Row ``rows[i]`` of the result is (a sum of) ``weights[i]`` times row ``indices[i]`` of the table."""
    found = recorder.placed(table)
    if found is None:
        return []
    source, positions = found
    used, places = torch.unique(indices, return_inverse=True)

    def activations() -> Tensor:
        counted = weights.new_zeros(num_rows, used.numel())
        return counted.index_put_((rows, places), weights, accumulate=True).unsqueeze(1)

    return [
        ProductUse(
            source,
            positions.flatten(1)[used].mT,
            leaving,
            activations,
            lambda signal: signal.reshape(num_rows, 1, -1),
            num_rows * used.numel(),
        )
    ]
