"""How an operation can use a parameter.

Two forms are enough: a `ProductUse` multiplies and sums (matrix products, convolutions, look-ups), an `ElementwiseUse`
scales, shifts or copies (normalisations, biases, positional embeddings, class tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Source:
    """What operations use: a parameter, or a tensor that was computed from parameters and constants alone.

    Attributes:
        name: Of the parameter; ``None`` for a tensor computed from some.
        tensor: Attached to the graph.
    """

    name: str | None
    tensor: Tensor


@dataclass(eq=False)
class Leaving:
    """What left one operation, as a place in the graph: the tensor itself may be overwritten later.

    Attributes:
        shape: Of the tensor.
        edge: ``None`` where no parameter can be reached from it.
    """

    shape: torch.Size = torch.Size()  # noqa: RUF009  # immutable
    edge: GradientEdge | None = None


@dataclass(frozen=True, eq=False)
class ProductUse:
    """An operation whose result is a sum of products of a parameter with what enters.

    Attributes:
        source: The parameter.
        positions: Which of its entries stand in the matrix that multiplies, shape ``(d_out, d_in)``.
        leaving: The result of the operation.
        activations: Returns what is multiplied, shape ``(n, t, d_in)``; the n rows belong to the k inputs.
        signals: From a derivative by the result to that by what leaves, shape ``(n, t, d_out)``.
        num_activations: Entries of what ``activations`` returns.
    """

    source: Source
    positions: Tensor
    leaving: Leaving
    activations: Callable[[], Tensor]
    signals: Callable[[Tensor], Tensor]
    num_activations: int


@dataclass(frozen=True, eq=False)
class ElementwiseUse:
    """An operation that scales, shifts or copies, repeating its parameter along some axes of the result.

    Attributes:
        source: The parameter.
        positions: Which of its entries are used, with one axis for each of the result, of length 1 where repeated.
        leaving: The result of the operation.
        contributions: From a derivative by the result to that by the repeated parameter, with the same axes.
        shifts: The product to which this is added, as a bias is.
    """

    source: Source
    positions: Tensor
    leaving: Leaving
    contributions: Callable[[Tensor], Tensor]
    shifts: ProductUse | None = None


Use = ProductUse | ElementwiseUse


@dataclass(eq=False)
class Operations:
    """What was recorded.

    Attributes:
        uses: In the order of the forward pass.
        num_elements: Numbers in all results that depend on a parameter: the size of the graph.
    """

    uses: list[Use] = field(default_factory=list)
    num_elements: int = 0


class Recording(Protocol):
    """What a handler of an operation may ask of the recorder.

    Attributes:
        operations: What was recorded so far.
    """

    operations: Operations

    def placed(self, tensor: Any) -> tuple[Source, Tensor] | None:
        """The source that a tensor is (a view of), with the entries that it shows; ``None`` for what has none."""
