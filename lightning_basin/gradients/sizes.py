"""How many numbers the gradients of a layer take, in each of the ways to find them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from lightning_basin.gradients.pieces import Cuts, can_be_cut
from lightning_basin.network.layers import Layer
from lightning_basin.network.network import Network
from lightning_basin.network.trace import Trace
from lightning_basin.operations.uses import ElementwiseUse, ProductUse, Source, Use


@dataclass(frozen=True)
class UsesSize:
    """How many numbers the uses of a layer take, of which a measurement has other inputs than were traced.

    Attributes:
        uses: All of the layer.
        num_inputs: That will be measured, k.
        num_outputs: Per input, c.
        share: How many times as many as were traced.
    """

    uses: Sequence[Use]
    num_inputs: int
    num_outputs: int
    share: float

    @property
    def factors(self) -> int:
        """Of the whole layer."""
        return sum(self._factors(Cuts()))

    @property
    def entering(self) -> int:
        """Of what enters the largest product."""
        return int(
            self.share * max((use.num_activations for use in self.uses if isinstance(use, ProductUse)), default=0)
        )

    @property
    def most_cuts(self) -> Cuts:
        """Into single rows and columns."""
        products = [use.positions.shape for use in self.uses if isinstance(use, ProductUse)]
        others = [max(use.positions.shape, default=1) for use in self.uses if isinstance(use, ElementwiseUse)]
        return Cuts(max([1, *others, *(d_out for d_out, _ in products)]), max([1, *(d_in for _, d_in in products)]))

    def piece(self, cuts: Cuts) -> int:
        """Of the largest piece, with the random vectors that sketch it."""
        return sum(self._piece(cuts))

    def cuts(self, max_elements: int) -> Cuts:
        """The fewest pieces that are so small; or as many as there can be."""
        cuts, most = Cuts(), self.most_cuts
        while self.piece(cuts) > max_elements and cuts != most:
            along_outputs, along_inputs = self._piece(cuts)
            if cuts.inputs == most.inputs or (along_outputs >= along_inputs and cuts.outputs < most.outputs):
                cuts = replace(cuts, outputs=min(most.outputs, 2 * cuts.outputs))
            else:
                cuts = replace(cuts, inputs=min(most.inputs, 2 * cuts.inputs))
        return cuts

    def _piece(self, cuts: Cuts) -> tuple[int, int]:
        along_outputs, along_inputs = self._factors(cuts)
        widest = self.most_cuts
        vectors = 2 * self.num_inputs * self.num_outputs
        has_product = any(isinstance(use, ProductUse) for use in self.uses)
        along_outputs += has_product * vectors * -(-widest.outputs // cuts.outputs)
        along_inputs += has_product * vectors * -(-widest.inputs // cuts.inputs)
        return along_outputs, along_inputs

    def _factors(self, cuts: Cuts) -> tuple[int, int]:
        """Along the outputs of the matrices, and along what enters them."""
        along_outputs, along_inputs = 0.0, 0.0
        for use in self.uses:
            if isinstance(use, ElementwiseUse):
                along_outputs += self.num_inputs * self.num_outputs * -(-use.positions.numel() // cuts.outputs)
                continue
            d_out, d_in = use.positions.shape
            positions = self.share * use.num_activations / max(1, d_in)
            along_outputs += self.num_outputs * positions * -(-d_out // cuts.outputs)
            along_inputs += positions * -(-d_in // cuts.inputs)
        return int(along_outputs), int(along_inputs)


_Item = TypeVar("_Item")

GradientMethod = Literal["factors", "chunks", "pieces", "rows"]
"""How the gradients of a layer are found.

From the factors of all uses of its parameters; from those of some inputs at a time, multiplied out; from some rows and
columns of its matrices at a time; or from dense rows by automatic differentiation.
"""


@dataclass(frozen=True)
class LayerSize:
    """How many numbers the gradients of a layer take.

    Attributes:
        uses: Of its parameters; empty where these are not known.
        num_rows: m.
        num_parameters: Of the layer.
        can_be_cut: Whether the uses can be measured in pieces.
    """

    uses: UsesSize
    num_rows: int
    num_parameters: int
    can_be_cut: bool

    def method(self, max_elements: int) -> GradientMethod:
        """How the gradients are found where so many numbers may be held."""
        if self.uses.uses and self.peak <= max_elements:
            return "factors"
        if self.uses.uses and self._dense <= max_elements:
            return "chunks"
        if self.can_be_cut and self._smallest_piece <= max_elements:
            return "pieces"
        return "rows"

    @property
    def whole(self) -> int:
        """Numbers that are held of all of them; dense rows are added up where uses overlap."""
        if not self.uses.uses:
            return self._dense
        return self.uses.factors + (0 if self.can_be_cut else self._dense)

    @property
    def peak(self) -> int:
        """The same with the random vectors that sketch them."""
        return self.uses.piece(Cuts()) if self.can_be_cut else self.whole

    @property
    def smallest(self) -> int:
        """Numbers that must be held to find them in one way or another."""
        by_row = 3 * self.num_parameters + 2 * self.num_rows
        return min(self.peak, by_row, self._smallest_piece if self.can_be_cut else by_row)

    @property
    def _dense(self) -> int:
        return self.num_rows * self.num_parameters

    @property
    def _smallest_piece(self) -> int:
        return self.uses.piece(self.uses.most_cuts)


def layer_sizes(network: Network, trace: Trace, *, num_inputs: int, num_outputs: int) -> dict[str, LayerSize]:
    """How large the gradients of each layer are.

    Args:
        network: That was traced.
        trace: Of some inputs.
        num_inputs: That will be measured.
        num_outputs: Per input.
    """
    share = num_inputs / trace.outputs.shape[0]
    found = {}
    for layer, uses in uses_by_layer(network, trace).items():
        parameters = {name: network.named_parameters[name] for name in layer.parameters}
        found[layer.name] = LayerSize(
            UsesSize(list(uses.values()), num_inputs, num_outputs, share),
            num_rows=num_inputs * num_outputs,
            num_parameters=layer.num_parameters,
            can_be_cut=bool(uses) and can_be_cut(parameters, list(uses.values())),
        )
    return found


def uses_by_layer(network: Network, trace: Trace) -> dict[Layer, dict[int, Use]]:
    """Which of the recorded uses each layer's gradients are made of, by their position in the record."""
    owners = {name: layer for layer in network.layers for name in layer.parameters}
    found: dict[Layer, dict[int, Use]] = {layer: {} for layer in network.layers}
    reached: dict[int, set[Layer]] = {}
    for index, use in enumerate(trace.operations.uses):
        if use.leaving.edge is None:
            continue
        if id(use.source) not in reached:
            reached[id(use.source)] = _layers_behind(network, use.source, owners)
        for layer in reached[id(use.source)]:
            found[layer][index] = use
    return found


def _layers_behind(network: Network, source: Source, owners: Mapping[str, Layer]) -> set[Layer]:
    if source.name is not None:
        return {owners[source.name]}
    names = list(owners)
    parameters = [network.named_parameters[name] for name in names]
    gradients = torch.autograd.grad(source.tensor.sum(), parameters, retain_graph=True, allow_unused=True)
    return {owners[name] for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def groups_of(items: Sequence[_Item], size_of: Callable[[_Item], int], max_size: int) -> Iterator[list[_Item]]:
    """Neighbours whose sizes fit into memory together; one that is too large alone."""
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
