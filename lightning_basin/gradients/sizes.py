"""How many elements the gradients of each layer take, and by which method they fit into memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from lightning_basin.gradients.assemble import num_summed_columns
from lightning_basin.network.layers import Layer, parameters_in_graph
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ElementwiseUse, ProductUse, Source, Use

GradientMethod = Literal["factors", "chunks", "rows"]
"""How the gradients of a layer are found.

``"factors"`` keeps the factors of all uses of its parameters. ``"chunks"`` multiplies these factors out to dense rows,
one chunk of inputs at a time. ``"rows"`` takes dense rows from automatic differentiation.
"""


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """How many elements the gradients of a layer take.

    Attributes:
        dense: Elements of the dense rows, m x N; 0 for a layer on which no output depends.
        factors: Elements of the factors of all uses; ``None`` where no use of the layer is known.
        held: Elements of the factors, and of the columns in which overlapping uses are added up as dense rows.
        peak: The same elements, and those of the random vectors that sketch the factors.
    """

    dense: int
    factors: int | None
    held: int
    peak: int

    def method(self, max_elements: int) -> GradientMethod:
        """Return the method for which so many elements are enough; ``"rows"`` where none is."""
        if self.factors is not None and self.peak <= max_elements:
            return "factors"
        return "chunks" if self.factors is not None and self.dense <= max_elements else "rows"

    def needed(self, max_elements: int) -> int:
        """Return the elements that this method takes."""
        return self.peak if self.method(max_elements) == "factors" else self.dense

    @property
    def least(self) -> int:
        """Elements that must be held to find the gradients by any method."""
        return self.dense if self.factors is None else min(self.peak, self.dense)


def layer_sizes(network: Network, trace: Trace, *, num_inputs: int, num_outputs: int) -> dict[str, LayerSize]:
    """Find how large the gradients of each layer are."""
    reached = parameters_in_graph(trace.outputs, network.named_parameters)
    sizes = {}
    for layer, recorded in find_uses(network, trace).items():
        dense = num_inputs * num_outputs * layer.num_parameters
        uses = list(recorded.values())
        if reached.isdisjoint(layer.parameters):
            sizes[layer.name] = LayerSize(dense=0, factors=0, held=0, peak=0)
        elif not uses:
            sizes[layer.name] = LayerSize(dense=dense, factors=None, held=dense, peak=dense)
        else:
            scale = num_inputs / trace.outputs.shape[0]
            factors = _num_factor_elements(uses, num_inputs, num_outputs, scale)
            summed = num_summed_columns({name: network.named_parameters[name] for name in layer.parameters}, uses)
            held = factors + min(dense, num_inputs * num_outputs * int(scale * summed))
            vectors = 2 * num_inputs * num_outputs * _widths(uses) if summed < layer.num_parameters else 0
            sizes[layer.name] = LayerSize(dense=dense, factors=factors, held=held, peak=held + vectors)
    return sizes


def _num_factor_elements(uses: Sequence[Use], num_inputs: int, num_outputs: int, scale: float) -> int:
    """Elements of the output gradients and input activations of all uses."""
    total = 0.0
    for use in uses:
        if isinstance(use, ElementwiseUse):
            total += num_inputs * num_outputs * use.elements.count
        else:
            d_out, d_in = use.elements.shape
            num_positions = scale * use.num_activations / max(1, d_in)
            # More inputs look up more rows.
            width = d_in if use.elements.rows is None else min(use.elements.sizes[0], scale * d_in)
            total += num_positions * (num_outputs * d_out + width)
    return int(total)


def _widths(uses: Sequence[Use]) -> int:
    """Elements of a pair of random vectors that sketches the widest product, one for each of its two factors."""
    shapes = [use.elements.shape for use in uses if isinstance(use, ProductUse)]
    return max((d_out for d_out, _ in shapes), default=0) + max((d_in for _, d_in in shapes), default=0)


def find_uses(network: Network, trace: Trace) -> dict[Layer, dict[int, Use]]:
    """Find the recorded uses of each layer's parameters, by their position in the record.

    A tensor that was computed from parameters of several layers is used by each of these layers.
    """
    owners = {name: layer for layer in network.layers for name in layer.parameters}
    uses: dict[Layer, dict[int, Use]] = {layer: {} for layer in network.layers}
    reached: dict[int, set[Layer]] = {}
    for index, use in enumerate(trace.operations.uses):
        if use.output.edge is None:
            continue
        if id(use.source) not in reached:
            reached[id(use.source)] = _layers_behind(network, use.source, owners)
        for layer in reached[id(use.source)]:
            uses[layer][index] = use
    return uses


def _layers_behind(network: Network, source: Source, owners: Mapping[str, Layer]) -> set[Layer]:
    """The layers whose parameters a source is, or was computed from."""
    if source.name is not None:
        return {owners[source.name]}
    names = list(owners)
    parameters = [network.named_parameters[name] for name in names]
    gradients = torch.autograd.grad(source.tensor.sum(), parameters, retain_graph=True, allow_unused=True)
    return {owners[name] for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


_Item = TypeVar("_Item")


def split_by_size(items: Sequence[_Item], size_of: Callable[[_Item], int], max_size: int) -> Iterator[list[_Item]]:
    """Split a sequence into groups of neighbours that fit into memory together; an item that is too large is alone."""
    group: list[_Item] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > max_size:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group
