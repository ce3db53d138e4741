"""The activations of each layer, input by input, and the rank of its input activations."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.activations import activation_ranks
from lightning_basin.functional.duplicates import largest_elements, search_classes
from lightning_basin.functional.reading import Array, Reading
from lightning_basin.gradients.assemble import concatenate
from lightning_basin.network.input_layout import (
    InputLayout,
    Rows,
    by_parts,
    entering_of,
    input_layout,
    leaving_of,
    real_elements,
)
from lightning_basin.network.network import Network
from lightning_basin.network.runs import run_regrouped
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.quantities.scopes import Scope

_CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError)  # errors of modules that cannot run a single input
_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)  # layers whose units are on the second axis


@dataclass(frozen=True, eq=False)
class InputActivations:
    """What enters a layer, or leaves the network: one row per input.

    Attributes:
        rows: The activations, flattened, float64, shape ``(k, d)``.
        scales: The largest magnitude in the tensor of each element of an activation, shape ``(d,)``; 0 for integers,
            which are compared exactly.
        largest: The largest finite magnitude of all elements.
    """

    rows: Tensor
    scales: Array
    largest: float
    _classes: dict[float, Array] = field(default_factory=dict, init=False, repr=False)

    def classes(self, rtol: float) -> Array:
        """Return the smallest index of each input's class at a tolerance that has been searched, shape ``(k,)``."""
        return self._classes[rtol]

    def search(self, rtols: Sequence[float]) -> Reading[None]:
        """Find the classes at some tolerances and keep them, beside other computations of `read_together`."""
        unknown = sorted(set(rtols) - set(self._classes), reverse=True)
        if unknown:
            classes = yield from search_classes(self.rows, unknown, scales=self.scales, largest=self.largest)
            self._classes.update(zip(unknown, classes, strict=True))


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: The layer's input activations, the same object for all layers that the same tensors enter; ``None``
            where no tensor that enters has rows for each input.
        leaving: The layer's outputs with the units last, shape ``(k, positions, units)``; ``None`` where they have no
            rows for each input.
    """

    entering: InputActivations | None
    leaving: Tensor | None


def measure_activations(evaluation: Evaluation) -> dict[str, LayerActivations]:
    """Return the activations of each called layer on the probe, by name, in the order of first entry."""
    return layer_activations(evaluation.network, evaluation.probe, evaluation.trace, evaluation.layout)


def layer_activations(
    network: Network, probe: Probe, trace: Trace, layout: InputLayout | None = None
) -> dict[str, LayerActivations]:
    """Return the activations of each called layer, by name, in the order of first entry.

    A tensor with adjacent rows for each input is sliced. A tensor that all inputs share is left out. Any other tensor
    is collected from runs of single inputs. Without a layout, other batches are run to find it.
    """
    if layout is None:
        layout = input_layout(network, probe, trace, run_regrouped(network, probe) if probe.size > 1 else [])
    with torch.no_grad():
        return _ActivationReader(network, probe, trace, layout).activations()


def measure_activation_ranks(
    evaluation: Evaluation, scopes: Sequence[Scope], activations: Mapping[str, LayerActivations]
) -> dict[Scope, dict[str, Any]]:
    """Measure the rank of the input activations of each layer."""
    layers = {scope: activations[scope.name] for scope in scopes if scope.kind == "layer" and scope.name in activations}
    entering = {scope: layer.entering for scope, layer in layers.items() if layer.entering is not None}
    distinct = distinct_activations(entering.values())
    ranks = activation_ranks(
        [measured.rows for measured in distinct],
        rtol=evaluation.settings.rtol,
        epsilon=torch.finfo(evaluation.network.dtype).eps,
    )
    known = {id(measured): rank for measured, rank in zip(distinct, ranks, strict=True)}
    return {
        scope: dict(zip(("activation_rank", "activation_rank_gap"), known[id(measured)], strict=True))
        for scope, measured in entering.items()
    }


def distinct_activations(activations: Iterable[InputActivations | None]) -> list[InputActivations]:
    """List activations once that enter several layers, and leave out what is ``None``."""
    return list({id(entering): entering for entering in activations if entering is not None}.values())


def activations_of(tensors: Sequence[Tensor]) -> InputActivations:
    """Take tensors, side by side, as what is known of each input."""
    return _side_by_side([tensors])[0]


class _ActivationReader:
    """Reads the activations of each input from traced tensors."""

    def __init__(self, network: Network, probe: Probe, trace: Trace, layout: InputLayout) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._layout = layout
        self._singles: list[Trace] | None = None

    def activations(self) -> dict[str, LayerActivations]:
        places: dict[str, Hashable] = {}
        tensors: dict[Hashable, list[Tensor]] = {}
        for name, entering in self._trace.entering.items():
            # What enters several layers, as the queries, keys and values of attention, is looked at once.
            rows = self._layout.entering[name]
            place = places[name] = (*map(id, entering), name if rows is None else tuple(rows))
            if place not in tensors:
                tensors[place] = self._by_input(partial(entering_of, name), rows)
        known = [place for place, held in tensors.items() if held]
        inputs = dict(zip(known, _side_by_side([tensors[place] for place in known]), strict=True))
        return {
            name: LayerActivations(entering=inputs.get(place), leaving=self._leaving(name))
            for name, place in places.items()
        }

    def _leaving(self, name: str) -> Tensor | None:
        leaving = self._by_input(partial(leaving_of, name), self._layout.leaving[name])
        return _units_last(self._network.module.get_submodule(name), leaving)

    def _by_input(self, read: Callable[[Trace], list[Tensor]], rows: Rows) -> list[Tensor]:
        """The tensors with rows for each input, each in the shape ``(k, rows, ...)``."""
        if rows is None:
            return self._collected(read)
        tensors = map(by_parts, read(self._trace))
        return [  # Without a graph, as no gradients are recorded here.
            tensor.reshape(self._probe.size, count, *tensor.shape[1:])
            for tensor, count in zip(tensors, rows, strict=True)
            if count
        ]

    def _collected(self, read: Callable[[Trace], list[Tensor]]) -> list[Tensor]:
        """Tensors of runs of single inputs, stacked; none where the runs differ in shape."""
        if self._singles is None:
            try:
                self._singles = [
                    self._network.trace_layers(self._probe.select([index])) for index in range(self._probe.size)
                ]
            except _CANNOT_RUN:
                self._singles = []
        shapes = {tuple(tensor.shape for tensor in read(run)) for run in self._singles}
        if len(shapes) != 1 or len(self._singles) < self._probe.size:
            return []
        columns = zip(*(read(run) for run in self._singles), strict=True)
        return [torch.stack([by_parts(tensor) for tensor in column]) for column in columns]


def _side_by_side(tensors: Sequence[Sequence[Tensor]]) -> list[InputActivations]:
    """The activations of each of some layers, whose tensors stand side by side."""
    rows = [[real_elements(tensor).flatten(1) for tensor in of_layer] for of_layer in tensors]
    largest = iter(largest_elements([elements for of_layer in rows for elements in of_layer]))
    activations = []
    for of_layer, elements in zip(tensors, rows, strict=True):
        magnitudes = [next(largest) for _ in of_layer]
        # Integers are compared exactly.
        scales = [
            magnitude if tensor.is_floating_point() else 0.0
            for tensor, magnitude in zip(of_layer, magnitudes, strict=True)
        ]
        widths = [flat.shape[1] for flat in elements]
        activations.append(InputActivations(concatenate(elements, 1), np.repeat(scales, widths), max(magnitudes)))
    return activations


def _units_last(layer: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """The outputs of all calls in the shape ``(k, positions, units)``."""
    if not tensors:
        return None
    ordered = []
    for tensor in tensors:
        numbers = real_elements(tensor if tensor.ndim > 2 else tensor.unsqueeze(2))  # noqa: PLR2004 - a single unit
        # The tensors have one axis more than the layer's outputs, the rows of an input: channels were second without.
        axis = 2 - numbers.ndim if isinstance(layer, _CHANNELS_SECOND) else -1
        ordered.append((numbers.movedim(axis, -1) if axis != -1 else numbers).flatten(1, -2))
    return concatenate(ordered, 1) if len({tensor.shape[-1] for tensor in ordered}) == 1 else ordered[0]
