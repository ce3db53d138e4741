"""Look-ups, as products with one-hot activations. Only rows of the table that occur can have gradients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_basin.operations.uses import Call, Handler, Use, aten


def _embedding(
    call: Call,
    table: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    sparse: bool = False,  # noqa: FBT001, FBT002
) -> Sequence[Use]:
    flat = indices.flatten()
    weights = (flat != padding_idx).to(table.dtype)
    return _lookup(call, table, flat, torch.arange(flat.numel(), device=flat.device), weights, flat.numel())


def _embedding_bag(
    call: Call,
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
    mode: int = 0,
    sparse: bool = False,  # noqa: FBT001, FBT002
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: FBT001, FBT002
    padding_idx: int = -1,
) -> Sequence[Use]:
    modes = {"sum": 0, "mean": 1}
    if mode not in modes.values():  # The largest element of a bag is no sum of products.
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
    return _lookup(call, table, indices, bags, weights, num_bags)


def _index(call: Call, table: Tensor, indices: Sequence[Tensor | None]) -> Sequence[Use]:
    first = indices[0]
    if len(indices) != 1 or first is None or first.dtype != torch.int64:
        return []
    flat = first.flatten() % table.shape[0]
    places = torch.arange(flat.numel(), device=flat.device)
    return _lookup(call, table, flat, places, flat.new_ones(flat.shape, dtype=table.dtype), flat.numel())


def _index_select(call: Call, table: Tensor, axis: int, indices: Tensor) -> Sequence[Use]:
    return _index(call, table, [indices]) if axis == 0 else []


def _lookup(call: Call, table: Tensor, indices: Tensor, rows: Tensor, weights: Tensor, num_rows: int) -> Sequence[Use]:
    """Row ``rows[i]`` of the output is (a sum of) ``weights[i]`` times row ``indices[i]`` of the table."""
    used, places = torch.unique(indices, return_inverse=True)

    def read_activations() -> Tensor:
        counted = weights.new_zeros(num_rows, used.numel())
        return counted.index_put_((rows, places), weights, accumulate=True).unsqueeze(1)

    return call.product(
        table,
        # Some rows of the table, as the columns of a matrix.
        lambda elements: replace(elements, shape=(math.prod(elements.sizes[1:]), used.numel()), rows=used),
        read_activations=read_activations,
        arrange=lambda derivative: derivative.reshape(num_rows, 1, math.prod(table.shape[1:])),
        num_activations=num_rows * used.numel(),
    )


HANDLERS: Mapping[Any, Handler] = {
    aten.embedding.default: _embedding,
    aten._embedding_bag.default: _embedding_bag,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
}
"""The function that finds the uses, by operation."""
