"""Gradients of known layer types, from what enters them and the derivatives by what leaves them.

No gradient with respect to a parameter is taken. Whether a layer acts as its type says is for the caller to check.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_basin.functional.sketch import DenseGradients, KhatriRaoGradients, LayerGradients, StackedGradients

_UNITS_LAST = (nn.LayerNorm, nn.RMSNorm)
_CHANNELS_SECOND = (_NormBase, nn.GroupNorm)
STRUCTURED = (nn.Linear, _ConvNd, nn.Embedding, nn.Bilinear, nn.PReLU, *_UNITS_LAST, *_CHANNELS_SECOND)
"""Layer types for which there is a formula."""


def structured_gradients(
    part: nn.Module, owned: frozenset[str], calls: Sequence[tuple[Sequence[Tensor], Tensor]], num_inputs: int
) -> LayerGradients:
    """Gradients of a layer with respect to its own parameters, summed over its calls.

    Args:
        part: One of the types in ``STRUCTURED``.
        owned: Names of the parameters that count, ``weight`` or ``bias`` or both.
        calls: For each call the tensors that entered, and the derivatives of all outputs by what left, with the c
            outputs along an axis in front.
        num_inputs: k; every tensor has a multiple of it along the axis of the batch.

    Raises:
        ValueError: If the parameters or what entered are not those of the type.
    """
    if not owned <= {"weight", "bias"}:
        raise ValueError(f"a {type(part).__name__} must own its weight and bias only, got {sorted(owned)}")
    if isinstance(part, (nn.PReLU, *_UNITS_LAST, *_CHANNELS_SECOND)):
        return _elementwise(part, owned, calls, num_inputs)
    if isinstance(part, _ConvNd) and (part.groups > 1 or isinstance(part, _ConvTransposeNd)):
        return _grouped(part, owned, calls, num_inputs)
    factors = [_factors(part, entering, signal, num_inputs) for entering, signal in calls]
    activations = torch.cat([entering for entering, _ in factors], dim=1)
    signals = torch.cat([signal for _, signal in factors], dim=2)
    if isinstance(part, nn.Embedding):
        return _embedding(part, activations, signals)
    columns = [activations] if "weight" in owned else []
    if "bias" in owned:
        columns.append(activations.new_ones(*activations.shape[:2], 1))
    return KhatriRaoGradients(torch.cat(columns, dim=2), signals, bias="bias" in owned)


def _factors(part: nn.Module, entering: Sequence[Tensor], signal: Tensor, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Activations ``(k, t, d_in)`` and signals ``(k, c, t, d_out)`` of one call."""
    if isinstance(part, nn.Bilinear):
        first, second = entering
        outer = first.unsqueeze(-1) * second.unsqueeze(-2)
        return outer.reshape(num_inputs, -1, first.shape[-1] * second.shape[-1]), _by_position(signal, num_inputs)
    (tensor,) = entering
    if isinstance(part, _ConvNd):
        patches = _patches(_padded(part, tensor), part)
        return patches.reshape(num_inputs, -1, patches.shape[-1]), _by_position(signal.movedim(2, -1), num_inputs)
    if isinstance(part, nn.Embedding):
        return tensor.reshape(num_inputs, -1), _by_position(signal, num_inputs)
    return tensor.reshape(num_inputs, -1, tensor.shape[-1]), _by_position(signal, num_inputs)


def _by_position(signal: Tensor, num_inputs: int) -> Tensor:
    """From ``(c, batch, ..., d)`` to ``(k, c, t, d)``."""
    return signal.reshape(signal.shape[0], num_inputs, -1, signal.shape[-1]).transpose(0, 1)


def _padded(part: _ConvNd, tensor: Tensor) -> Tensor:
    """The input of a convolution with its padding around it."""
    if part.padding_mode == "zeros":
        return F.pad(tensor, part._reversed_padding_repeated_twice)
    return F.pad(tensor, part._reversed_padding_repeated_twice, mode=part.padding_mode)


def _patches(tensor: Tensor, part: _ConvNd) -> Tensor:
    """What the kernel sees at each of its positions, shape ``(batch, positions, channels * kernel)``."""
    for axis, (size, stride, dilation) in enumerate(
        zip(part.kernel_size, part.stride, part.dilation, strict=True), start=2
    ):
        tensor = tensor.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    dimensions = len(part.kernel_size)
    positions = range(2, 2 + dimensions)
    kernel = range(2 + dimensions, 2 + 2 * dimensions)
    ordered = tensor.permute(0, *positions, 1, *kernel)
    return ordered.flatten(1 + dimensions).flatten(1, dimensions)


def _grouped(
    part: _ConvNd, owned: frozenset[str], calls: Sequence[tuple[Sequence[Tensor], Tensor]], num_inputs: int
) -> LayerGradients:
    """Convolutions whose channels fall into groups, and transposed ones: a block for each group, then the bias."""
    blocks: list[LayerGradients] = []
    if "weight" in owned:
        for group in range(part.groups):
            factors = [_group_factors(part, group, tensor, signal, num_inputs) for (tensor,), signal in calls]
            activations = torch.cat([entering for entering, _ in factors], dim=1)
            signals = torch.cat([signal for _, signal in factors], dim=2)
            transposed = isinstance(part, _ConvTransposeNd)
            blocks.append(KhatriRaoGradients(activations, signals, bias=False, transposed=transposed))
    if "bias" in owned:
        sums = [_by_position(signal.movedim(2, -1), num_inputs).sum(2) for _, signal in calls]
        blocks.append(DenseGradients(torch.stack(sums).sum(0).flatten(0, 1)))
    return StackedGradients(tuple(blocks))


def _group_factors(part: _ConvNd, group: int, tensor: Tensor, signal: Tensor, num_inputs: int) -> tuple[Tensor, Tensor]:
    entering = tensor.chunk(part.groups, dim=1)[group]
    leaving = signal.chunk(part.groups, dim=2)[group]
    if not isinstance(part, _ConvTransposeNd):
        patches = _patches(_padded(part, entering), part)
        return patches.reshape(num_inputs, -1, patches.shape[-1]), _by_position(leaving.movedim(2, -1), num_inputs)
    # A transposed convolution writes each input's patch to the output: the roles of the two sides are exchanged.
    flat = leaving.flatten(0, 1)
    paddings = cast("tuple[int, ...]", part.padding)  # A word, "same" or "valid", only where not transposed.
    pads = [pad for padding in reversed(paddings) for pad in (padding, padding)]
    seen = _patches(F.pad(flat, pads), part)
    spatial = entering.shape[2:]
    counts = [
        (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
        for length, padding, dilation, size, stride in zip(
            leaving.shape[3:], paddings, part.dilation, part.kernel_size, part.stride, strict=True
        )
    ]
    seen = seen.view(flat.shape[0], *counts, -1)
    for axis, length in enumerate(spatial, start=1):  # What output_padding adds is seen by no input.
        seen = seen.narrow(axis, 0, length)
    signals = seen.reshape(leaving.shape[0], leaving.shape[1], -1, seen.shape[-1])
    activations = entering.movedim(1, -1)
    return activations.reshape(num_inputs, -1, activations.shape[-1]), _by_position(signals, num_inputs)


def _embedding(part: nn.Embedding, tokens: Tensor, signals: Tensor) -> KhatriRaoGradients:
    """One-hot activations, over those tokens only that occur: the others have zero gradients."""
    used, position = torch.unique(tokens, return_inverse=True)
    one_hot = F.one_hot(position, used.numel()).to(signals.dtype)
    if part.padding_idx is not None:
        one_hot = one_hot * (tokens != part.padding_idx).unsqueeze(-1)
    return KhatriRaoGradients(
        one_hot, signals, bias=False, transposed=True, used_columns=used, num_activations=part.num_embeddings
    )


def _elementwise(
    part: nn.Module, owned: frozenset[str], calls: Sequence[tuple[Sequence[Tensor], Tensor]], num_inputs: int
) -> DenseGradients:
    """Layers that scale and shift units one by one: normalisations, PReLU."""
    blocks: dict[str, Tensor] = {}
    for (tensor,), signal in calls:
        unscaled, units = _unscaled(part, tensor), _num_units(part)
        if isinstance(part, (nn.PReLU, *_CHANNELS_SECOND)) and tensor.ndim > 1:
            unscaled, signal = unscaled.movedim(1, -1), signal.movedim(2, -1)
        entering = unscaled.reshape(num_inputs, 1, -1, units)
        by_unit = signal.reshape(signal.shape[0], num_inputs, -1, units).transpose(0, 1)
        for name, product in (("weight", entering * by_unit), ("bias", by_unit)):
            total = product.sum(2)
            blocks[name] = blocks[name] + total if name in blocks else total
    return DenseGradients(
        torch.cat([blocks[name].flatten(0, 1) for name in ("weight", "bias") if name in owned], dim=1)
    )


def _num_units(part: nn.Module) -> int:
    weight = part.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _unscaled(part: nn.Module, tensor: Tensor) -> Tensor:
    """What the layer's weight is multiplied with."""
    if isinstance(part, nn.PReLU):
        return tensor.clamp(max=0)
    names = dict(part.named_parameters(recurse=False))
    neutral = {name: torch.full_like(value, float(name == "weight")) for name, value in names.items()}
    unscaled: Tensor = functional_call(part, neutral, (tensor,))
    return unscaled
