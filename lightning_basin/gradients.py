"""Behavioral gradients of each layer, by the cheapest way that is right.

The operations that use a layer's parameters say what its gradients are. Nothing is concluded from them alone: what
every way gives must reproduce a random combination of all rows that plain autograd computes, else the next is taken.
Where that combination is no larger than what rounding leaves of terms that cancel, the gradients are zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from typing import Literal, TypeVar

import torch
from torch import Generator, Tensor

from lightning_basin.functional.duplicates import largest_entry
from lightning_basin.functional.jacobian import behavioral_gradients, gradient_rows
from lightning_basin.functional.sketch import DenseGradients, LayerGradients, StackedGradients
from lightning_basin.layers import Chunk, Layer, Network, Trace, TracedProbe, agreement_rtol
from lightning_basin.naming import escaped
from lightning_basin.operations import ElementwiseUse, Leaving, ProductUse, Source, Use
from lightning_basin.probe import tensors_of
from lightning_basin.rounding import rounding_noise
from lightning_basin.structured import (
    Cuts,
    InputAxis,
    MeasuredUse,
    PiecewiseGradients,
    UsesSize,
    activations_of_inputs,
    can_be_cut,
    concatenated,
    gradients_from_uses,
    possible_input_axes,
    signal_of_inputs,
)

_Item = TypeVar("_Item")

GradientMethod = Literal["factors", "chunks", "pieces", "rows"]
"""How the gradients of a layer are found.

From the factors of all uses of its parameters; from those of some inputs at a time, multiplied out; from some rows and
columns of its matrices at a time; or from dense rows by automatic differentiation.
"""

GROUP_ELEMENTS = 2**27
"""Float64 numbers in the gradients, or their factors, that are held at once: 1 GiB."""

_ROUNDING = 4  # rounding units, times the root of the number of rows: by so much sums over all rows may differ
_NOISE_MARGIN = 8  # of a measured noise: three evaluations may by chance show so much less than there is
_CLEAR_RTOL = 1e-3  # of a combination: what rounding of its terms can be where it is clearly not all of it
_NUM_CHOICES = 3  # of inputs whose derivatives may tell where the inputs are; one does, unless a layer is dead


@dataclass(frozen=True, eq=False)
class MeasuredGradients:
    """Behavioral gradients of one layer.

    Attributes:
        layer: Whose.
        gradients: Rows ordered by input, then output, in the network's ``gradient_dtype``.
        structured: Whether they come from the operations that use the layer, and not from dense rows.
        note: What a reader should know about how they were obtained.
    """

    layer: Layer
    gradients: LayerGradients
    structured: bool
    note: str | None = None


def layer_gradients(
    traced: TracedProbe,
    check: "AutogradCheck",
    *,
    layers: Sequence[Layer] | None = None,
    max_elements: int = GROUP_ELEMENTS,
) -> Iterator[MeasuredGradients]:
    """Behavioral gradients of each layer in turn, checked against autograd.

    Args:
        traced: The network on the probe.
        check: Of this network and probe.
        layers: Whose; ``None`` means all.
        max_elements: Numbers that may be held at once, in factors or in dense rows.

    Raises:
        RuntimeError: If no way of computing a layer's gradients agrees with autograd.
    """
    layers = traced.network.layers if layers is None else layers
    waiting: list[tuple[Layer, str | None]] = []
    for layer, gradients in _structured_gradients(traced, check, layers, max_elements):
        if gradients is None:
            waiting.append((layer, None))
        elif (measured := check.measured(layer, gradients, structured=True)) is not None:
            yield measured
        else:
            waiting.append(
                (layer, f"layer {escaped(layer.name)!r} is measured row by row: its parameters are used in other ways")
            )
    for group in _groups(waiting, lambda item: item[0].num_parameters * check.num_rows, max_elements):
        if sum(layer.num_parameters for layer, _ in group) * check.num_rows <= max_elements:
            yield from _dense_gradients(traced, group, check)
        else:
            yield _dense_in_pieces(traced, *group[0], check, max_elements)


class AutogradCheck:
    """One random combination of all rows of every layer's gradients, which each way must reproduce.

    What the operations that use a layer give may differ by rounding only, so that no use is missed, however weak.

    Args:
        traced: The network on the probe.
        generator: On the CPU; for the combination, with standard normal weights.
    """

    def __init__(self, traced: TracedProbe, generator: Generator) -> None:
        network, outputs = traced.network, traced.network.rows(traced.whole.outputs)
        parameters = network.parameters()
        sizes = [chunk.probe.size for chunk in traced.chunks()]
        drawn = [torch.randn(size, outputs.shape[1], generator=generator, dtype=torch.float64) for size in sizes]
        weights = torch.cat(drawn).to(outputs.device)
        combined: list[Tensor | None] = [None] * len(parameters)
        for found in traced.each(_combined_rows, weights):
            combined = [_sum(total, part) for total, part in zip(combined, found, strict=True)]
        self._traced = traced
        self._drawn = weights
        self._weights = weights.flatten()
        names = [name for layer in network.layers for name in layer.parameters]
        self._expected = dict(zip(names, combined, strict=True))
        self._shapes = dict(zip(names, parameters, strict=True))
        if not all(bool(gradient.isfinite().all()) for gradient in combined if gradient is not None):
            _refuse_infinite_gradients(traced)

    @property
    def num_rows(self) -> int:
        """Outputs on all inputs, m."""
        return self._weights.numel()

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._weights.device

    def norm(self, layers: Iterable[Layer]) -> float:
        """Of the combination by the parameters of some layers; its mean square is that of the Frobenius norm."""
        found = [self._expected[name] for layer in layers for name in layer.parameters]
        norms = [combined.norm() for combined in found if combined is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    def is_unused(self, layer: Layer) -> bool:
        """Whether no output depends on the layer."""
        return all(self._expected[name] is None for name in layer.parameters)

    def measured(
        self, layer: Layer, gradients: LayerGradients, *, structured: bool, note: str | None = None
    ) -> MeasuredGradients | None:
        """Gradients that have the combination which autograd finds; zero ones if that is rounding; ``None`` for others.

        Args:
            layer: Whose they are.
            gradients: To check.
            structured: Whether they come from the operations that use the layer.
            note: What a reader should know about them.
        """
        dtype = self._traced.network.dtype
        sizes = [self._shapes[name].numel() for name in layer.parameters]
        found = torch.split(gradients.combination(self._weights), sizes)
        pairs = list(zip(found, self._wanted(layer), strict=True))
        differences = [largest_entry(combined - wanted) for combined, wanted in pairs]
        scales = [largest_entry(wanted) for _, wanted in pairs]
        rounding = _ROUNDING * len(self._weights) ** 0.5 * torch.finfo(dtype).eps
        loosest = [agreement_rtol(dtype) * scale for scale in scales]
        tolerances = [rounding * scale for scale in scales] if structured else loosest
        is_close = _none_exceeds(differences, tolerances)
        if not is_close and structured:  # Terms may cancel in a parameter, as in the bias of a key before a softmax.
            unit = _ROUNDING * torch.finfo(dtype).eps
            terms = torch.split(gradients.magnitudes().combination(self._weights.abs()), sizes)
            roundings = [unit * largest_entry(magnitudes) for magnitudes in terms]
            is_close = _none_exceeds(differences, list(map(max, tolerances, roundings)))
            # What is no more than rounding as a whole is nothing.
            is_close &= unit * _norm(terms) <= _CLEAR_RTOL * _norm([wanted for _, wanted in pairs])
        if not is_close:
            noise = [self._noise[name] for name in layer.parameters]
            if _norm([wanted for _, wanted in pairs]) <= _NOISE_MARGIN * _norm(noise):
                empty = _no_gradients(layer, self.num_rows, self.device)
                return MeasuredGradients(layer, empty, structured, _without_effect(layer))
            noisy = [_NOISE_MARGIN * largest_entry(deviation) for deviation in noise]
            # Rounding that spoils nine digits is not told from a formula that is wrong.
            limits = map(min, noisy, loosest) if structured else noisy
            is_close = _none_exceeds(differences, list(map(max, tolerances, limits)))
        return MeasuredGradients(layer, gradients, structured, note) if is_close else None

    def _wanted(self, layer: Layer) -> list[Tensor]:
        """The combination by each parameter, flattened."""
        return [
            (self._weights.new_zeros(self._shapes[name].shape) if wanted is None else wanted).flatten()
            for name in layer.parameters
            for wanted in [self._expected[name]]
        ]

    @cached_property
    def _noise(self) -> dict[str, Tensor]:
        """How far rounding may have moved the combination, by the name of each parameter."""
        noise = rounding_noise(self._combined, self._traced.network.dtype)
        return dict(zip(self._expected, noise, strict=True))

    def _combined(self) -> list[Tensor]:
        network = self._traced.network
        parameters = network.parameters()
        combined = [self._weights.new_zeros(parameter.shape) for parameter in parameters]
        for chunk in self._traced.chunks():
            outputs = network.rows(network.outputs(chunk.probe))
            if outputs.requires_grad:
                weights = self._drawn[chunk.indices.to(self.device)].to(outputs)
                found = torch.autograd.grad(outputs, parameters, weights, materialize_grads=True)
                combined = [total + gradient for total, gradient in zip(combined, found, strict=True)]
        return combined


def _refuse_infinite_gradients(traced: TracedProbe) -> None:
    """Say on which inputs, and in which layers, gradients of finite outputs are not finite.

    Raises:
        ValueError: Always.
    """
    network, parameters = traced.network, traced.network.parameters()
    owners = [layer.name for layer in network.layers for _ in layer.parameters]
    layers: dict[str, None] = {}
    inputs: list[int] = []
    for index in range(traced.probe.size):
        try:  # Alone, as what is not finite spoils all inputs of a batch.
            row = network.rows(network.outputs(traced.probe.select([index])))
        except (TypeError, ValueError):  # Some modules cannot run one.
            row = network.rows(network.outputs(traced.probe))[index]
        found = torch.autograd.grad(row.sum(), parameters, allow_unused=True)
        is_bad = [gradient is not None and not bool(gradient.isfinite().all()) for gradient in found]
        layers |= {name: None for name, bad in zip(owners, is_bad, strict=True) if bad}
        inputs += [index] if any(is_bad) else []
    raise ValueError(
        f"gradients must be finite, but are NaN or infinite in the layers {list(layers)} on {len(inputs)} of the "
        f"{traced.probe.size} inputs, the first of them input {inputs[0] if inputs else 0}, although all outputs are "
        f"finite: keep sqrt, log, division and norm away from 0 also where torch.where or a mask does not take them "
        f"(by clamp, before), attention away from sets that are all padding, or leave these inputs out"
    )


def _none_exceeds(values: Sequence[Tensor], limits: Sequence[Tensor]) -> bool:
    return all(bool(value <= limit) for value, limit in zip(values, limits, strict=True))


def _without_effect(layer: Layer) -> str:
    name = escaped(layer.name)
    return f"layer {name!r} has no effect: its gradients are the rounding of terms that cancel, and count as zero"


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def _no_gradients(layer: Layer, num_rows: int, device: torch.device) -> LayerGradients:
    return StackedGradients((), (), num_rows=num_rows, num_columns=layer.num_parameters, device=device)


def _combined_rows(network: Network, chunk: Chunk, weights: Tensor) -> list[Tensor | None]:
    """By each parameter the derivative of the outputs with some weights; ``None`` where none depends on it."""
    outputs, parameters = network.rows(chunk.trace.outputs), network.parameters()
    if not outputs.requires_grad:
        return [None] * len(parameters)
    weights = weights[chunk.indices.to(weights.device)].to(outputs)
    return list(torch.autograd.grad(outputs, parameters, weights, retain_graph=True, allow_unused=True))


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    part = part.to(torch.float64)
    return part if total is None else total + part


def _structured_gradients(
    traced: TracedProbe, check: AutogradCheck, layers: Sequence[Layer], max_elements: int
) -> Iterator[tuple[Layer, LayerGradients | None]]:
    """Gradients of layers whose uses are known, from one backward pass for each output; ``None`` for other layers."""
    network, num_inputs = traced.network, traced.probe.size
    sizes = layer_sizes(network, _first_trace(traced), num_inputs=num_inputs, num_outputs=check.num_rows // num_inputs)
    planned = []
    for layer in layers:
        size = sizes[layer.name]
        method = size.method(max_elements)
        if check.is_unused(layer):
            yield layer, _no_gradients(layer, check.num_rows, check.device)
        elif method == "factors":
            planned.append((layer, size.whole))
        elif method == "chunks":
            yield layer, _chunk_by_chunk(traced, layer)
        elif method == "pieces":
            yield layer, _in_pieces(traced, layer, size.uses.cuts(max_elements), check)
        else:
            yield layer, None
    for group in _groups(planned, lambda item: item[1], max_elements):
        measured = _measured_uses(traced, {layer: Cuts() for layer, _ in group}, 0)
        for layer, _ in group:
            found = measured.pop(layer)
            yield layer, None if found is None else _from_uses(network, layer, found, check.num_rows)


def _from_uses(network: Network, layer: Layer, found: Sequence[MeasuredUse], num_rows: int) -> LayerGradients:
    parameters = {name: network.named_parameters[name] for name in layer.parameters}
    return gradients_from_uses(parameters, found, num_rows=num_rows)


def _chunk_by_chunk(traced: TracedProbe, layer: Layer) -> DenseGradients | None:
    """Dense rows, where these are smaller than their factors; ``None`` where inputs cannot be told apart."""
    chunks = traced.each(_rows_from_uses, layer)
    rows = [chunk for chunk in chunks if chunk is not None]
    return DenseGradients(concatenated(rows)) if len(rows) == len(chunks) else None


def _rows_from_uses(network: Network, chunk: Chunk, layer: Layer) -> Tensor | None:
    uses = _uses_by_layer(network, chunk.trace)[layer]
    found = _all_of(_measured_in_chunk(network, chunk.trace, uses), uses)
    num_rows = network.rows(chunk.trace.outputs).numel()
    return None if found is None else _from_uses(network, layer, found, num_rows).rows()


def _in_pieces(traced: TracedProbe, layer: Layer, cuts: Cuts, check: AutogradCheck) -> LayerGradients | None:
    """Gradients whose factors cannot all be held; ``None`` where what chunks of inputs use does not fit together."""
    first = _uses_by_layer(traced.network, _first_trace(traced))[layer]
    if any(entries != _used_entries(first.values()) for entries in traced.each(_entries_told_apart, layer)):
        return None
    numbers = [number for number in range(cuts.outputs * cuts.inputs) if cuts.piece(first, number)]
    del first  # And the graph that it holds.

    def pieces() -> Iterator[LayerGradients]:
        for number in numbers:
            found = _measured_uses(traced, {layer: cuts}, number)[layer]
            if found is None:
                raise RuntimeError(f"two evaluations of layer {escaped(layer.name)!r} use its parameters differently")
            yield _from_uses(traced.network, layer, found, check.num_rows)

    return PiecewiseGradients(
        (), (), num_rows=check.num_rows, num_columns=layer.num_parameters, device=check.device, pieces=pieces
    )


def _entries_told_apart(network: Network, chunk: Chunk, layer: Layer) -> list[bytes] | None:
    """The entries that a layer uses, where it is clear what belongs to which input."""
    uses = _uses_by_layer(network, chunk.trace)[layer]
    is_clear = set(_input_axes(network.rows(chunk.trace.outputs), uses)) == set(uses)
    return _used_entries(uses.values()) if is_clear else None


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
    for layer, uses in _uses_by_layer(network, trace).items():
        parameters = {name: network.named_parameters[name] for name in layer.parameters}
        found[layer.name] = LayerSize(
            UsesSize(list(uses.values()), num_inputs, num_outputs, share),
            num_rows=num_inputs * num_outputs,
            num_parameters=layer.num_parameters,
            can_be_cut=bool(uses) and can_be_cut(parameters, list(uses.values())),
        )
    return found


def _uses_by_layer(network: Network, trace: Trace) -> dict[Layer, dict[int, Use]]:
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


@dataclass(frozen=True, eq=False)
class _Piece:
    """What was measured of the uses of one layer on some inputs: of `MeasuredUse` what can be sent.

    Attributes:
        measured: Signals and activations of each use.
        entries: See `_used_entries`; of what is not split over chunks nothing.
    """

    measured: list[tuple[Tensor, Tensor | None]]
    entries: list[bytes]


def _measured_uses(
    traced: TracedProbe, layers: Mapping[Layer, Cuts], number: int
) -> dict[Layer, list[MeasuredUse] | None]:
    """What entered the operations of some layers and the derivatives by what left them, over all chunks of inputs.

    Args:
        traced: The network on the probe.
        layers: How each is cut.
        number: Of the piece to measure.
    """
    chunks = traced.each(_measured_pieces, layers, number, traced.probe.size)
    by_layer = _uses_by_layer(traced.network, _first_trace(traced))
    return {
        layer: _joined(list(cuts.piece(by_layer[layer], number).values()), [chunk[layer] for chunk in chunks])
        for layer, cuts in layers.items()
    }


def _measured_pieces(
    network: Network, chunk: Chunk, layers: Mapping[Layer, Cuts], number: int, num_inputs: int
) -> dict[Layer, _Piece | None]:
    by_layer = _uses_by_layer(network, chunk.trace)
    pieces = {layer: cuts.piece(by_layer[layer], number) for layer, cuts in layers.items()}
    # A tensor that was computed from parameters of several layers is used by each of them.
    uses = {index: use for piece in pieces.values() for index, use in piece.items()}
    measured = _measured_in_chunk(network, chunk.trace, uses)
    found: dict[Layer, _Piece | None] = {}
    for layer, piece in pieces.items():
        parts = _all_of(measured, piece)
        entries = _used_entries(piece.values()) if chunk.probe.size < num_inputs else []
        found[layer] = None
        if parts is not None:
            found[layer] = _Piece([(part.signals, part.activations) for part in parts], entries)
    return found


def _joined(uses: Sequence[Use], pieces: Sequence[_Piece | None]) -> list[MeasuredUse] | None:
    """The same uses over all chunks of inputs; ``None`` where these differ, or some could not be measured."""
    found = [piece for piece in pieces if piece is not None]
    is_split = len(pieces) > 1
    if len(found) < len(pieces) or (is_split and any(piece.entries != _used_entries(uses) for piece in found)):
        return None
    joined = []
    for use, parts in zip(uses, zip(*(piece.measured for piece in found), strict=True), strict=True):
        signals = [signals for signals, _ in parts]
        entering = [activations for _, activations in parts if activations is not None]
        joined.append(MeasuredUse(use, concatenated(signals), concatenated(entering) if entering else None))
    return joined


def _used_entries(uses: Iterable[Use]) -> list[bytes]:
    """A fingerprint of which entries of a parameter each use takes: the same where two evaluations are alike."""
    positions = [use.positions.cpu().contiguous() for use in uses]
    return [sha256(f"{tuple(entries.shape)}".encode() + entries.numpy().tobytes()).digest() for entries in positions]


def _first_trace(traced: TracedProbe) -> Trace:
    """Of the first inputs, from which the uses of all can be told."""
    return next(traced.chunks()).trace


def _all_of(measured: Mapping[int, MeasuredUse], wanted: Mapping[int, Use]) -> list[MeasuredUse] | None:
    return [measured[index] for index in wanted] if set(wanted) <= set(measured) else None


def _measured_in_chunk(network: Network, trace: Trace, uses: Mapping[int, Use]) -> dict[int, MeasuredUse]:
    """The uses of which it is clear what belongs to which input."""
    outputs, dtype = network.rows(trace.outputs), network.gradient_dtype
    num_inputs = outputs.shape[0]
    edges = _edges(uses)
    layouts = _input_axes(outputs, uses)
    biases = _biases(uses, layouts)
    signals: dict[int, Tensor] = {}
    for j in range(outputs.shape[1]):
        by_edge = _derivatives(outputs[:, j].sum(), edges)
        for index, layout in layouts.items():
            if index not in biases:
                signal = by_edge[id(uses[index].leaving)]
                found = signal_of_inputs(uses[index], signal, layout, num_inputs, dtype)
                if j == 0:  # Written where they stay, as twice the memory takes twice the time.
                    signals[index] = found.new_empty(num_inputs, outputs.shape[1], *found.shape[1:])
                signals[index][:, j] = found
    measured = {}
    for index in list(signals):
        use, layout = uses[index], layouts[index]
        entering = activations_of_inputs(use, layout, num_inputs, dtype) if isinstance(use, ProductUse) else None
        measured[index] = MeasuredUse(use, signals.pop(index), entering)
    for index, product in biases.items():
        measured[index] = MeasuredUse(uses[index], _summed_positions(measured[product].signals), None)
    return measured


def _biases(uses: Mapping[int, Use], layouts: Mapping[int, InputAxis]) -> dict[int, int]:
    """Biases by the products that the same operation adds them to, whose derivatives are theirs."""
    products = {id(use): index for index, use in uses.items() if index in layouts and isinstance(use, ProductUse)}
    return {
        index: products[id(use.shifts)]
        for index, use in uses.items()
        if index in layouts
        and isinstance(use, ElementwiseUse)
        and use.shifts is not None
        and id(use.shifts) in products
        and use.shifts.leaving is use.leaving
        and use.positions.numel() == use.shifts.positions.shape[0]
    }


def _summed_positions(signals: Tensor) -> Tensor:
    """Of products, shape ``(k, c, t, d_out)``; with one position they are not copied."""
    return signals.squeeze(2) if signals.shape[2] == 1 else signals.sum(2)


def _edges(uses: Mapping[int, Use]) -> list[Leaving]:
    return list({id(use.leaving): use.leaving for use in uses.values()}.values())


def _input_axes(outputs: Tensor, uses: Mapping[int, Use]) -> dict[int, InputAxis]:
    """Where the inputs are in what left each operation, seen from the outputs of some of them."""
    edges = _edges(uses)
    generator = Generator().manual_seed(0)
    num_inputs = outputs.shape[0]
    weights = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    layouts: dict[int, list[InputAxis]] = {}
    for chosen in _choices(num_inputs, generator):
        chosen = chosen.to(outputs.device)
        by_edge = _derivatives((outputs * weights)[chosen].sum(), edges)
        for index, use in uses.items():
            possible = possible_input_axes(use, by_edge[id(use.leaving)], chosen)
            layouts[index] = [layout for layout in layouts.get(index, possible) if layout in possible]
        if all(len(possible) <= 1 for possible in layouts.values()):
            break
    return {index: possible[0] for index, possible in layouts.items() if possible}


def _choices(num_inputs: int, generator: Generator) -> Iterator[Tensor]:
    """Some of the inputs, then all others, and so on."""
    for _ in range(_NUM_CHOICES):
        chosen = torch.randint(0, 2, (num_inputs,), generator=generator).bool()
        chosen[0], chosen[-1] = True, num_inputs == 1
        yield chosen
        if num_inputs > 1:
            yield ~chosen


def _derivatives(output: Tensor, places: Sequence[Leaving]) -> dict[int, Tensor]:
    """Derivatives of a number by what left some operations, by the identity of the place."""
    edges = {id(leaving): leaving.edge for leaving in places if leaving.edge is not None}
    shapes = {id(leaving): leaving.shape for leaving in places}
    found: Sequence[Tensor | None] = [None] * len(edges)
    if edges and output.requires_grad:  # Else no input of a chunk has entered the layers, or no parameter is used.
        found = torch.autograd.grad(output, list(edges.values()), retain_graph=True, allow_unused=True)
    return {
        place: output.new_zeros(shapes[place]) if gradient is None else gradient
        for place, gradient in zip(edges, found, strict=True)
    }


def _dense_gradients(
    traced: TracedProbe, group: Sequence[tuple[Layer, str | None]], check: AutogradCheck
) -> Iterator[MeasuredGradients]:
    layers = [layer for layer, _ in group]
    pending = dict(group)
    for rows_of in _ROUTES:
        try:
            matrix = concatenated(traced.each(rows_of, layers)).to(traced.network.gradient_dtype)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # vmap, or a batch of one, is beyond some modules; the next way asks for less.
            if rows_of is _ROUTES[-1]:
                raise
            continue
        blocks = torch.split(matrix, [layer.num_parameters for layer in layers], dim=1)
        for layer, gradients in zip(layers, map(DenseGradients, blocks), strict=True):
            if layer not in pending:
                continue
            measured = check.measured(layer, gradients, structured=False, note=pending[layer])
            if measured is not None:
                del pending[layer]
                yield measured
        if not pending:
            return
    raise RuntimeError(_disagreement([layer.name for layer in pending]))


def _rows_at_once(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """All inputs of a chunk in one batched differentiation."""
    names = [name for layer in layers for name in layer.parameters]
    parameters = {name: network.named_parameters[name].detach() for name in names}

    def behavior(values: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return network.functional(chunk.probe, tensors, values)

    return behavioral_gradients(behavior, parameters, tensors_of(chunk.probe.inputs))


def _outputs_one_by_one(network: Network, chunk: Chunk) -> Iterator[Tensor]:
    """A forward pass for each input."""
    for index in range(chunk.probe.size):
        yield network.rows(network.outputs(chunk.probe.select([index])))


def _outputs_of_batch(network: Network, chunk: Chunk) -> Iterator[Tensor]:
    """All inputs at once: always possible, and the slowest to differentiate."""
    yield network.rows(chunk.trace.outputs)


def _rows_one_by_one(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """A backward pass for each output of each input."""
    parameters = network.parameters(layers)
    return torch.cat([gradient_rows(outputs, parameters) for outputs in _outputs_one_by_one(network, chunk)])


def _rows_of_batch(network: Network, chunk: Chunk, layers: Sequence[Layer]) -> Tensor:
    """A backward pass through the whole batch for each row."""
    parameters = network.parameters(layers)
    return torch.cat([gradient_rows(outputs, parameters) for outputs in _outputs_of_batch(network, chunk)])


_ROUTES: Sequence[Callable[[Network, Chunk, Sequence[Layer]], Tensor]] = (
    _rows_at_once,
    _rows_one_by_one,
    _rows_of_batch,
)


def _dense_in_pieces(
    traced: TracedProbe, layer: Layer, note: str | None, check: AutogradCheck, max_elements: int
) -> MeasuredGradients:
    """Some columns at a time, where not all of them can be held."""
    width = max(1, max_elements // (2 * check.num_rows))
    for outputs_of in (_outputs_one_by_one, _outputs_of_batch):
        pieces = partial(_columns_by_row, traced, layer, outputs_of, width)
        gradients = PiecewiseGradients(
            (), (), num_rows=check.num_rows, num_columns=layer.num_parameters, device=check.device, pieces=pieces
        )
        try:
            measured = check.measured(layer, gradients, structured=False, note=note)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # As above: a batch of one.
            if outputs_of is _outputs_of_batch:
                raise
            continue
        if measured is not None:
            return measured
    raise RuntimeError(_disagreement([layer.name]))


def _columns_by_row(
    traced: TracedProbe, layer: Layer, outputs_of: Callable[[Network, Chunk], Iterator[Tensor]], width: int
) -> Iterator[LayerGradients]:
    positions = torch.arange(layer.num_parameters, device=traced.network.parameters([layer])[0].device)
    for columns in torch.split(positions, width):
        rows = concatenated(traced.each(_some_columns, layer, outputs_of, columns))
        yield StackedGradients(
            (DenseGradients(rows.to(traced.network.gradient_dtype)),),
            (columns,),
            num_rows=len(rows),
            num_columns=layer.num_parameters,
            device=rows.device,
        )


def _some_columns(
    network: Network,
    chunk: Chunk,
    layer: Layer,
    outputs_of: Callable[[Network, Chunk], Iterator[Tensor]],
    columns: Tensor,
) -> Tensor:
    parameters = network.parameters([layer])
    rows = [
        gradient_rows(output.reshape(1), parameters)[0, columns]
        for outputs in outputs_of(network, chunk)
        for output in outputs.flatten()
    ]
    return torch.stack(rows)


def _disagreement(names: Sequence[str]) -> str:
    return (
        f"the gradients of layers {[*map(escaped, names)]} cannot be computed: two evaluations of them disagree; a "
        f"hook on a tensor that changes gradients, or a backward pass that draws random numbers, has this effect"
    )


def _groups(items: Sequence[_Item], size_of: Callable[[_Item], int], max_size: int) -> Iterator[list[_Item]]:
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
