"""How an operation can use a parameter.

Two forms are enough: a `ProductUse` multiplies and sums (matrix products, convolutions, look-ups), an `ElementwiseUse`
scales, shifts or copies (normalizations, biases, positional embeddings, class tokens).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Source:
    """What operations use: a parameter, or a tensor that was computed from parameters and constants alone.

    Attributes:
        name: The name of the parameter; ``None`` for a computed tensor.
        tensor: The tensor, attached to the graph.
    """

    name: str | None
    tensor: Tensor


@dataclass(eq=False)
class OperationOutput:
    """The output of an operation, as a place in the graph: the tensor itself may be overwritten later.

    Attributes:
        shape: The shape of the tensor.
        edge: The place in the graph; ``None`` where no parameter can be reached from it.
    """

    shape: torch.Size = torch.Size()  # noqa: RUF009  # immutable
    edge: GradientEdge | None = None


@dataclass(frozen=True, eq=False)
class ProductUse:
    """An operation whose output is a sum of products of a parameter with input activations.

    Attributes:
        source: The parameter.
        positions: The positions in the parameter of the elements of the matrix, shape ``(d_out, d_in)``.
        output: The output of the operation.
        read_activations: The function that returns the input activations, shape ``(n, t, d_in)``; the n rows belong to
            the k inputs.
        arrange: The function from a derivative by the output to the output gradients, shape ``(n, t, d_out)``.
        num_activations: The number of elements of the input activations.
    """

    source: Source
    positions: Tensor
    output: OperationOutput
    read_activations: Callable[[], Tensor]
    arrange: Callable[[Tensor], Tensor]
    num_activations: int


@dataclass(frozen=True, eq=False)
class ElementwiseUse:
    """An operation that scales, shifts or copies, repeating its parameter along some axes of the output.

    Attributes:
        source: The parameter.
        positions: The positions in the parameter of the elements that are used, with one axis for each axis of the
            output, of length 1 where the parameter is repeated.
        output: The output of the operation.
        contributions: The function from an output derivative to that by the repeated parameter, with the same axes.
        shifts: The product to which this is added, as a bias is; ``None`` for none.
    """

    source: Source
    positions: Tensor
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
        output: The output of the operation.
        earlier: The uses that were recorded before.
        find_source: The function from a tensor to the source that it is (a view of), with the positions of its elements
            there; ``None`` for a tensor without a source.
    """

    output: OperationOutput
    earlier: Sequence[Use]
    find_source: Callable[[Any], tuple[Source, Tensor] | None]

    def product(
        self,
        parameter: Any,
        matrix_of: Callable[[Tensor], Tensor],
        *,
        read_activations: Callable[[], Tensor],
        arrange: Callable[[Tensor], Tensor],
        num_activations: int,
    ) -> list[ProductUse]:
        """Return the use of a tensor as a matrix; none where the tensor has no source.

        Args:
            parameter: The tensor.
            matrix_of: The function from the tensor to the matrix, which is given the positions of the elements.
            read_activations: The function that returns the input activations.
            arrange: The function from a derivative by the output to the output gradients of the matrix.
            num_activations: The number of elements of the input activations.
        """
        if (found := self.find_source(parameter)) is None:
            return []
        source, positions = found
        return [ProductUse(source, matrix_of(positions), self.output, read_activations, arrange, num_activations)]

    def elementwise(
        self,
        parameter: Any,
        num_axes: int,
        contributions: Callable[[Tensor], Tensor],
        *,
        axis: int | None = None,
        shifts: ProductUse | None = None,
    ) -> list[ElementwiseUse]:
        """Return the use of a tensor along the last axes of the output, or along one; none without a source.

        Args:
            parameter: The tensor.
            num_axes: The number of axes of the output.
            contributions: The function from a derivative by the output to that by the repeated tensor.
            axis: The axis of the output along which a vector stands; ``None`` for the last axes.
            shifts: The product to which the tensor is added; ``None`` for none.
        """
        found = self.find_source(parameter)
        if found is None or found[1].ndim > num_axes:
            return []
        source, positions = found
        if axis is not None:
            positions = positions.view(-1, *(1,) * (num_axes - axis - 1))
        positions = positions.view((1,) * (num_axes - positions.ndim) + tuple(positions.shape))
        return [ElementwiseUse(source, positions, self.output, contributions, shifts)]

    def bias(
        self, bias: Any, num_axes: int, products: Sequence[ProductUse], *, axis: int | None = None
    ) -> list[ElementwiseUse]:
        """Return the use of a bias that the operation adds to its product; none without a source.

        Args:
            bias: The tensor.
            num_axes: The number of axes of the output.
            products: The products of the operation.
            axis: The axis of the output along which the bias stands; ``None`` for the last axes.
        """
        shifts = products[0] if len(products) == 1 else None
        return self.elementwise(bias, num_axes, lambda derivative: derivative, axis=axis, shifts=shifts)
