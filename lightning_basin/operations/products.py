"""Matrix products and convolutions, as uses of the parameters among their arguments.

Every handler takes the recorder, the place of the result and the operation's arguments, and returns the uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lightning_basin.operations.elementwise import shift
from lightning_basin.operations.uses import Leaving, ProductUse, Recording, Source, Use


def _mm(recorder: Recording, leaving: Leaving, left: Tensor, right: Tensor) -> list[Use]:
    return _product(
        recorder, leaving, left, right, operand=lambda tensor: tensor.detach().to_dense(), result=lambda signal: signal
    )


def _product(
    recorder: Recording,
    leaving: Leaving,
    left: Tensor,
    right: Tensor,
    *,
    operand: Callable[[Tensor], Tensor],
    result: Callable[[Tensor], Tensor],
    index: int | None = None,
) -> list[Use]:
    """The product of two matrices, one of them a parameter; ``operand`` and ``result`` select it from a batch."""
    for parameter, other, is_right in ((right, left, True), (left, right, False)):
        found = recorder.placed(parameter)
        if found is None:
            continue
        source, positions = found
        positions = positions if index is None else positions[index]
        entering = operand(other)

        if is_right:
            return [
                ProductUse(
                    source,
                    positions.mT,
                    leaving,
                    lambda entering=entering: entering.unsqueeze(1),  # type: ignore[misc]
                    lambda signal: result(signal).unsqueeze(1),
                    entering.numel(),
                )
            ]
        return [
            ProductUse(
                source,
                positions,
                leaving,
                lambda entering=entering: entering.mT.unsqueeze(1),  # type: ignore[misc]
                lambda signal: result(signal).mT.unsqueeze(1),
                entering.numel(),
            )
        ]
    return []


def _bmm(recorder: Recording, leaving: Leaving, left: Tensor, right: Tensor) -> list[Use]:
    uses = []
    for index in range(left.shape[0]):
        uses += _product(
            recorder,
            leaving,
            left,
            right,
            operand=lambda tensor, index=index: tensor[index].detach(),  # type: ignore[misc]
            result=lambda signal, index=index: signal[index],  # type: ignore[misc]
            index=index,
        )
    return uses


def _addmm(
    recorder: Recording,
    leaving: Leaving,
    bias: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> list[Use]:
    if beta != 1 or alpha != 1:
        return []
    products = _mm(recorder, leaving, left, right)
    return [*products, *shift(recorder, leaving, bias, 2, products)]


def _mv(recorder: Recording, leaving: Leaving, matrix: Tensor, vector: Tensor) -> list[Use]:
    found = recorder.placed(vector)
    if found is None:
        return []
    source, positions = found
    entering = matrix.detach()
    return [
        ProductUse(
            source,
            positions.unsqueeze(0),
            leaving,
            lambda: entering.unsqueeze(1),
            lambda signal: signal.view(-1, 1, 1),
            entering.numel(),
        )
    ]


def _trilinear(
    recorder: Recording, leaving: Leaving, first: Tensor, weight: Tensor, second: Tensor, *layout: Sequence[int]
) -> list[Use]:
    found = recorder.placed(weight)
    if found is None or tuple(map(tuple, layout)) != ((1, 3), (0,), (1, 2), (2, 3)):  # As F.bilinear calls it.
        return []
    source, positions = found
    first, second = first.detach(), second.detach()
    return [
        ProductUse(
            source,
            positions.flatten(1),
            leaving,
            lambda: (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(1),
            lambda signal: signal.unsqueeze(1),
            first.numel() * second.shape[1],
        )
    ]


def _convolution(
    recorder: Recording,
    leaving: Leaving,
    entering: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001  # as torch calls it
    output_padding: Sequence[int],
    groups: int,
) -> list[Use]:
    dimensions = weight.ndim - 2
    stride, padding, dilation = (tuple(sizes) * (dimensions // len(sizes)) for sizes in (stride, padding, dilation))
    kernel = _Kernel(tuple(weight.shape[2:]), stride, dilation, padding)
    products: list[Use] = []
    found = recorder.placed(weight)
    if found is not None:
        source, positions = found
        entering = entering.detach()
        for group in range(groups):
            chosen = positions.chunk(groups)[group].flatten(1)
            if transposed:
                products.append(_transposed_group(source, chosen.mT, leaving, entering, kernel, group, groups))
            else:
                products.append(_group(source, chosen, leaving, entering, kernel, group, groups))
    return [*products, *shift(recorder, leaving, bias, 2 + dimensions, products, axis=1)]


@dataclass(frozen=True)
class _Kernel:
    """The geometry of a convolution, each along all its dimensions."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def patches(self, tensor: Tensor) -> Tensor:
        """What the kernel sees at each of its places, shape ``(n, *places, channels * size)``."""
        tensor = F.pad(tensor, [pad for padding in reversed(self.padding) for pad in (padding, padding)])
        sizes = zip(self.size, self.stride, self.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            tensor = tensor.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        dimensions = len(self.size)
        return tensor.movedim(1, 1 + dimensions).flatten(1 + dimensions)

    def num_places(self, spatial: Sequence[int]) -> int:
        """At how many places the kernel fits."""
        count = 1
        for length, size, stride, dilation, padding in zip(
            spatial, self.size, self.stride, self.dilation, self.padding, strict=True
        ):
            count *= (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
        return count


def _group(
    source: Source, positions: Tensor, leaving: Leaving, entering: Tensor, kernel: _Kernel, group: int, groups: int
) -> ProductUse:
    channels = entering.chunk(groups, 1)[group]
    num_places = kernel.num_places(entering.shape[2:])
    return ProductUse(
        source,
        positions,
        leaving,
        lambda: kernel.patches(channels).flatten(1, -2),
        lambda signal: signal.chunk(groups, 1)[group].flatten(2).mT,
        channels.shape[0] * num_places * positions.shape[1],
    )


def _transposed_group(
    source: Source, positions: Tensor, leaving: Leaving, entering: Tensor, kernel: _Kernel, group: int, groups: int
) -> ProductUse:
    """A transposed convolution writes a patch for each place of what enters: the two sides change roles."""
    channels = entering.chunk(groups, 1)[group]

    def signals(signal: Tensor) -> Tensor:
        seen = kernel.patches(signal.chunk(groups, 1)[group])
        for axis, length in enumerate(entering.shape[2:], start=1):  # No place sees what output_padding adds.
            seen = seen.narrow(axis, 0, length)
        return seen.flatten(1, -2)

    return ProductUse(source, positions, leaving, lambda: channels.flatten(2).mT, signals, channels.numel())
