"""The activations of each layer, input by input, and the rank of its input activations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.activations import activation_rank
from lightning_basin.functional.duplicates import duplicate_classes, finer_classes, largest_entry
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
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: The layer's input activations, flattened, shape ``(k, d)``; ``None`` where no tensor that enters has
            rows for each input.
        scales: The largest magnitude in the tensor of each element of an activation, shape ``(d,)``; 0 for integers,
            which are compared exactly.
        leaving: The layer's outputs with the units last, shape ``(k, positions, units)``; ``None`` where they have no
            rows for each input.
    """

    entering: Tensor | None
    scales: Tensor | None
    leaving: Tensor | None
    _classes: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def classes(self, rtol: float) -> Tensor | None:
        """Return the classes of inputs with the same activation, as `duplicate_classes` does, and keep them.

        Args:
            rtol: The tolerance, relative to the largest magnitude.
        """
        if self.entering is None or self.scales is None:
            return None
        if rtol not in self._classes:
            coarser = min((known for known in self._classes if known > rtol), default=None)
            self._classes[rtol] = (
                duplicate_classes(self.entering, rtol=rtol, scales=self.scales)
                if coarser is None
                else finer_classes(self._classes[coarser], self.entering, rtol=rtol, scales=self.scales)
            )
        return self._classes[rtol]


def measure_activations(evaluation: Evaluation) -> dict[str, LayerActivations]:
    """Return the activations of each called layer on the probe, by name, in the order of first entry."""
    return layer_activations(evaluation.network, evaluation.probe, evaluation.trace, evaluation.layout)


def layer_activations(
    network: Network, probe: Probe, trace: Trace, layout: InputLayout | None = None
) -> dict[str, LayerActivations]:
    """Return the activations of each called layer, by name, in the order of first entry.

    A tensor with adjacent rows for each input is sliced. A tensor that all inputs share is left out. Any other tensor
    is collected from runs of single inputs.

    Args:
        network: The network.
        probe: The inputs.
        trace: The trace of the network on the probe.
        layout: The places of the inputs in the trace; ``None`` runs other batches to find them.
    """
    if layout is None:
        layout = input_layout(network, probe, trace, run_regrouped(network, probe) if probe.size > 1 else [])
    with torch.no_grad():
        return _ActivationReader(network, probe, trace, layout).activations()


def measure_activation_ranks(
    evaluation: Evaluation, scopes: Sequence[Scope], activations: Mapping[str, LayerActivations]
) -> dict[Scope, dict[str, Any]]:
    """Measure the rank of the input activations of each layer.

    Args:
        evaluation: The network on the probe.
        scopes: The scopes to report; blocks and the network have no such rank.
        activations: The activations of each called layer, by name.

    Returns:
        The record's fields of the rank, for each layer whose input activations are known.
    """
    epsilon = torch.finfo(evaluation.network.dtype).eps
    fields = {}
    for scope in scopes:
        layer = activations.get(scope.name) if scope.kind == "layer" else None
        if layer is not None and layer.entering is not None:
            rank, gap = activation_rank(layer.entering, rtol=evaluation.settings.rtol, epsilon=epsilon)
            fields[scope] = {"activation_rank": rank, "activation_rank_gap": gap}
    return fields


class _ActivationReader:
    """Reads the activations of each input from traced tensors."""

    def __init__(self, network: Network, probe: Probe, trace: Trace, layout: InputLayout) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._layout = layout
        self._singles: list[Trace] | None = None

    def activations(self) -> dict[str, LayerActivations]:
        activations = {}
        for name in self._trace.entering:
            entering = self._by_input(partial(entering_of, name), self._layout.entering[name])
            leaving = self._by_input(partial(leaving_of, name), self._layout.leaving[name])
            rows = [real_elements(tensor).flatten(1) for tensor in entering]
            activations[name] = LayerActivations(
                entering=concatenate(rows, 1) if rows else None,
                scales=torch.cat([_scales(tensor) for tensor in entering]) if entering else None,
                leaving=_units_last(self._network.module.get_submodule(name), leaving),
            )
        return activations

    def _by_input(self, read: Callable[[Trace], list[Tensor]], rows: Rows) -> list[Tensor]:
        """The tensors with rows for each input, each in the shape ``(k, rows, ...)``."""
        if rows is None:
            return self._collected(read)
        tensors = [by_parts(tensor.detach()) for tensor in read(self._trace)]
        return [
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


def _scales(tensor: Tensor) -> Tensor:
    """The scale on which each element of an activation is compared: the largest magnitude, 0 for integers."""
    scale = largest_entry(real_elements(tensor)) if tensor.is_floating_point() else real_elements(tensor).new_zeros(())
    return scale.expand(tensor[:1].numel())


def _units_last(layer: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """The outputs of all calls in the shape ``(k, positions, units)``."""
    if not tensors:
        return None
    ordered = []
    for tensor in tensors:
        numbers = real_elements(tensor if tensor.ndim > 2 else tensor.unsqueeze(2))  # noqa: PLR2004 - a single unit
        # The tensors have one axis more than the layer's outputs, the rows of an input: channels were second without.
        axis = 2 - numbers.ndim if isinstance(layer, _CHANNELS_SECOND) else -1
        ordered.append(numbers.movedim(axis, -1).flatten(1, -2))
    return concatenate(ordered, 1) if len({tensor.shape[-1] for tensor in ordered}) == 1 else ordered[0]
