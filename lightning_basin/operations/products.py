"""Matrix products and convolutions, as uses of the parameters among their arguments."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_basin.operations.uses import Call, Elements, Handler, ProductUse, Use, aten


def _bmm(call: Call, left: Tensor, right: Tensor) -> list[ProductUse]:
    if call.find_source(left) is None and call.find_source(right) is None:
        return []  # As in attention, whose batch may be long.
    return [use for index in range(left.shape[0]) for use in _matrix_product(call, left, right, index)]


def _matrix_product(call: Call, left: Tensor, right: Tensor, index: int | None = None) -> list[ProductUse]:
    """The product of two matrices, one of them a parameter; ``index`` takes one matrix from a batch."""
    first, second = left.detach(), right.detach()  # Either may be sparse.

    def select(batch: Tensor) -> Tensor:
        return batch if index is None else batch[index]

    def matrix(elements: Elements) -> Elements:
        return elements if index is None else _matrix_of_batch(elements, index)

    return call.product(
        right,
        lambda elements: matrix(elements).moved(0, 1),
        read_activations=lambda: select(first).to_dense().unsqueeze(1),
        arrange=lambda derivative: select(derivative).unsqueeze(1),
        num_activations=math.prod(first.shape[-2:]),
    ) or call.product(
        left,
        matrix,
        read_activations=lambda: select(second).to_dense().mT.unsqueeze(1),
        arrange=lambda derivative: select(derivative).mT.unsqueeze(1),
        num_activations=math.prod(second.shape[-2:]),
    )


def _matrix_of_batch(elements: Elements, index: int) -> Elements:
    matrix = elements.part(index, elements.sizes[0])
    return Elements(matrix.sizes[1:], matrix.sizes[1:], matrix.strides[1:], matrix.offset)


def _addmm(
    call: Call, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Sequence[Use]:
    if beta != 1 or alpha != 1:
        return []
    products = _matrix_product(call, left, right)
    return [*products, *call.bias(bias, 2, products)]


def _mv(call: Call, matrix: Tensor, vector: Tensor) -> Sequence[Use]:
    matrix = matrix.detach()
    return call.product(
        vector,
        lambda elements: elements.seen_as(1, elements.count),
        read_activations=lambda: matrix.unsqueeze(1),
        arrange=lambda derivative: derivative.view(-1, 1, 1),
        num_activations=matrix.numel(),
    )


def _trilinear(call: Call, first: Tensor, weight: Tensor, second: Tensor, *layout: Sequence[int]) -> Sequence[Use]:
    if tuple(map(tuple, layout)) != ((1, 3), (0,), (1, 2), (2, 3)):  # As F.bilinear calls it.
        return []
    first, second = first.detach(), second.detach()
    return call.product(
        weight,
        _by_units,
        read_activations=lambda: (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(1),
        arrange=lambda derivative: derivative.unsqueeze(1),
        num_activations=first.numel() * second.shape[1],
    )


def _convolution(
    call: Call,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001  # as torch calls it
    output_padding: Sequence[int],
    groups: int,
) -> Sequence[Use]:
    dimensions, inputs = weight.ndim - 2, inputs.detach()
    stride, padding, dilation = (tuple(sizes) * (dimensions // len(sizes)) for sizes in (stride, padding, dilation))
    kernel = _Kernel(tuple(weight.shape[2:]), stride, dilation, padding)
    use_of_group = _transposed_group if transposed else _group
    products = [use for group in range(groups) for use in use_of_group(call, inputs, weight, kernel, group, groups)]
    return [*products, *call.bias(bias, 2 + dimensions, products, axis=1)]


@dataclass(frozen=True)
class _Kernel:
    """The geometry of a convolution: lengths along each dimension, as torch names them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def patches(self, tensor: Tensor) -> Tensor:
        """Return what the kernel sees at each of its places, shape ``(n, *places, channels * size)``."""
        tensor = F.pad(tensor, [pad for padding in reversed(self.padding) for pad in (padding, padding)])
        sizes = zip(self.size, self.stride, self.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            tensor = tensor.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        dimensions = len(self.size)
        return tensor.movedim(1, 1 + dimensions).flatten(1 + dimensions)

    def num_places(self, spatial: Sequence[int]) -> int:
        """Count the places at which the kernel fits."""
        sizes = zip(spatial, self.size, self.stride, self.dilation, self.padding, strict=True)
        return math.prod(
            (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for length, size, stride, dilation, padding in sizes
        )


def _by_units(elements: Elements) -> Elements:
    """See a weight as a matrix whose rows are along its first axis."""
    return elements.seen_as(elements.sizes[0], math.prod(elements.sizes[1:]))


def _to_units(elements: Elements) -> Elements:
    """See a weight as a matrix whose columns are along its first axis."""
    return elements.moved(0, len(elements.sizes) - 1).seen_as(math.prod(elements.sizes[1:]), elements.sizes[0])


def _group(
    call: Call, inputs: Tensor, weight: Tensor, kernel: _Kernel, group: int, groups: int
) -> Sequence[ProductUse]:
    channels = inputs.chunk(groups, 1)[group]
    return call.product(
        weight,
        lambda elements: _by_units(elements.part(group, groups)),
        read_activations=lambda: kernel.patches(channels).flatten(1, -2),
        arrange=lambda derivative: derivative.chunk(groups, 1)[group].flatten(2).mT,
        num_activations=channels.shape[0] * kernel.num_places(inputs.shape[2:]) * weight[:1].numel(),
    )


def _transposed_group(
    call: Call, inputs: Tensor, weight: Tensor, kernel: _Kernel, group: int, groups: int
) -> Sequence[ProductUse]:
    """A transposed convolution writes a patch for each place of its input: the two sides change roles."""
    channels = inputs.chunk(groups, 1)[group]

    def arrange(derivative: Tensor) -> Tensor:
        patches = kernel.patches(derivative.chunk(groups, 1)[group])
        for axis, length in enumerate(inputs.shape[2:], start=1):  # No place sees what output_padding adds.
            patches = patches.narrow(axis, 0, length)
        return patches.flatten(1, -2)

    return call.product(
        weight,
        lambda elements: _to_units(elements.part(group, groups)),
        read_activations=lambda: channels.flatten(2).mT,
        arrange=arrange,
        num_activations=channels.numel(),
    )


HANDLERS: Mapping[Any, Handler] = {
    aten.mm.default: _matrix_product,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.mv.default: _mv,
    aten._trilinear.default: _trilinear,
    aten.convolution.default: _convolution,
}
"""The function that finds the uses, by operation."""
