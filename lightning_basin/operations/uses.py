"""How an operation can use a parameter.

Two forms are enough: a `ProductUse` multiplies and sums (matrix products, convolutions, look-ups), an `ElementwiseUse`
scales, shifts or copies (normalizations, biases, positional embeddings, class tokens).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Source:
    """What operations use: a parameter, or a tensor without a name that was computed from parameters and constants."""

    name: str | None
    tensor: Tensor


@dataclass(eq=False)
class OperationOutput:
    """The output of an operation, as a place in the graph: the tensor itself may be overwritten later.

    There is no ``edge`` where no parameter can be reached from it.
    """

    shape: torch.Size = torch.Size()  # noqa: RUF009  # immutable
    edge: GradientEdge | None = None


@dataclass(frozen=True, eq=False)
class Elements:
    """The elements of a source that an operation uses: a view of its storage, or some rows of one.

    It holds no tensor of positions, so that questions about a whole parameter are answered without the device.

    Attributes:
        shape: The shape in which the operation uses the elements.
        sizes: The lengths of the axes of the view, with as many elements as ``shape``, unless rows are chosen.
        strides: The steps in storage along these axes.
        offset: The place of the first element in the storage of the source.
        rows: The rows of the view (along its first axis) that are the columns of a matrix; ``None`` for all elements.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def seen_as(self, *shape: int) -> "Elements":
        """Return the same elements, in the same order, in another shape."""
        return replace(self, shape=shape)

    def part(self, index: int, count: int) -> "Elements":
        """Return one of ``count`` equal parts along the first axis."""
        length = self.sizes[0] // count
        sizes = (length, *self.sizes[1:])
        return Elements(sizes, sizes, self.strides, self.offset + index * length * self.strides[0])

    def moved(self, axis: int, to: int) -> "Elements":
        """Return the elements with one axis of the view moved."""
        order = [*range(len(self.sizes))]
        order.insert(to, order.pop(axis))
        sizes = tuple(self.sizes[i] for i in order)
        return Elements(sizes, sizes, tuple(self.strides[i] for i in order), self.offset)

    def is_same(self, other: "Elements") -> bool:
        """Whether another use of the same source is of the same elements, in the same order and shape."""
        is_same_view = self.shape == other.shape and self.offset == other.offset and self._steps == other._steps
        if not is_same_view or self.rows is None or other.rows is None:
            return is_same_view and self.rows is other.rows
        return self.rows is other.rows or torch.equal(self.rows, other.rows)

    @property
    def span(self) -> range | None:
        """The places of the view in storage, where these have no gaps and no place twice; else ``None``."""
        length = 1
        for step, size in sorted((step, size) for size, step in self._steps):
            if step != length:
                return None
            length *= size
        return range(self.offset, self.offset + length)

    def positions(self, source: Tensor) -> Tensor:
        """Return the positions of the elements among those of the source in logical order, in the shape of use."""
        places = torch.tensor(self.offset, device=source.device)
        for axis, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            along = torch.arange(size, device=source.device) if axis or self.rows is None else self.rows
            places = places.unsqueeze(-1) + along * stride
        if not source.is_contiguous():
            places = _order(source)[places]
        return places.reshape(self.shape) if self.rows is None else places.reshape(self.shape[::-1]).mT

    @property
    def _steps(self) -> list[tuple[int, int]]:
        """The axes with more than one element, each as its length and its step in storage; neighbors are merged."""
        steps: list[tuple[int, int]] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if steps and size > 1 and steps[-1][1] == size * stride:
                steps[-1] = steps[-1][0] * size, stride
            elif size > 1:
                steps.append((size, stride))
        return steps


def _order(tensor: Tensor) -> Tensor:
    """The position of each element of a tensor's storage among its elements in logical order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    stored = torch.zeros(extent, dtype=torch.int64, device=tensor.device)
    stored.as_strided(tensor.shape, tensor.stride()).copy_(
        torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    )
    return stored


@dataclass(frozen=True, eq=False)
class ProductUse:
    """An operation whose output is a sum of products of a parameter with input activations.

    Attributes:
        source: The parameter.
        elements: The elements of the parameter that are the matrix, shape ``(d_out, d_in)``.
        output: The output of the operation.
        read_activations: The function that returns the input activations, shape ``(n, t, d_in)``; the n rows belong to
            the k inputs.
        arrange: The function from a derivative by the output to the output gradients, shape ``(n, t, d_out)``.
        num_activations: The number of elements of the input activations.
    """

    source: Source
    elements: Elements
    output: OperationOutput
    read_activations: Callable[[], Tensor]
    arrange: Callable[[Tensor], Tensor]
    num_activations: int


@dataclass(frozen=True, eq=False)
class ElementwiseUse:
    """An operation that scales, shifts or copies, repeating its parameter along some axes of the output.

    Attributes:
        source: The parameter.
        elements: The elements of the parameter that are used, with one axis for each axis of the output, of length 1
            where the parameter is repeated.
        output: The output of the operation.
        contributions: The function from an output derivative to that by the repeated parameter, with the same axes.
        shifts: The product to which this is added, as a bias is; ``None`` for none.
    """

    source: Source
    elements: Elements
    output: OperationOutput
    contributions: Callable[[Tensor], Tensor]
    shifts: ProductUse | None = None


Use = ProductUse | ElementwiseUse

Handler = Callable[..., Sequence[Use]]
"""From a `Call` and the arguments of its operation to the uses of parameters among these."""


@dataclass(eq=False)
class Operations:
    """The operations of a forward pass.

    Attributes:
        uses: The uses of parameters, in the order of the forward pass.
        num_elements: The number of elements in all outputs that depend on a parameter: the size of the graph.
        sequence: All operations in their order, as `described_operation` describes them.
    """

    uses: list[Use] = field(default_factory=list)
    num_elements: int = 0
    sequence: list[Hashable] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operation, for the function that finds its uses.

    Attributes:
        earlier: The uses that were recorded before.
        find_source: The function from a tensor to the source that it is (a view of), with its elements there; ``None``
            for a tensor without a source.
    """

    output: OperationOutput
    earlier: Sequence[Use]
    find_source: Callable[[Any], tuple[Source, Elements] | None]

    def product(
        self,
        parameter: Any,
        matrix_of: Callable[[Elements], Elements],
        *,
        read_activations: Callable[[], Tensor],
        arrange: Callable[[Tensor], Tensor],
        num_activations: int,
    ) -> list[ProductUse]:
        """Return the use of a tensor as a matrix, whose elements ``matrix_of`` chooses; none where it has no source."""
        if (found := self.find_source(parameter)) is None:
            return []
        source, elements = found
        return [ProductUse(source, matrix_of(elements), self.output, read_activations, arrange, num_activations)]

    def elementwise(
        self,
        parameter: Any,
        num_axes: int,
        contributions: Callable[[Tensor], Tensor],
        *,
        axis: int | None = None,
        shifts: ProductUse | None = None,
    ) -> list[ElementwiseUse]:
        """Return the use of a tensor along the last axes of the output, or along one axis; none without a source."""
        found = self.find_source(parameter)
        if found is None or len(found[1].shape) > num_axes:
            return []
        source, elements = found
        shape = elements.shape if axis is None else (elements.count, *(1,) * (num_axes - axis - 1))
        elements = elements.seen_as(*(1,) * (num_axes - len(shape)), *shape)
        return [ElementwiseUse(source, elements, self.output, contributions, shifts)]

    def bias(
        self, bias: Any, num_axes: int, products: Sequence[ProductUse], *, axis: int | None = None
    ) -> list[ElementwiseUse]:
        """Return the use of a bias that the operation adds to its product; none without a source."""
        shifts = products[0] if len(products) == 1 else None
        return self.elementwise(bias, num_axes, lambda derivative: derivative, axis=axis, shifts=shifts)
