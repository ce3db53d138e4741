"""What enters and leaves each layer, input by input."""

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
from lightning_basin.gradients.assemble import concatenated
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

_CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError)  # so few inputs: some modules raise one of these

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Activations of one layer, ordered by input.

    Attributes:
        entering: Everything that enters, flattened, shape ``(k, d)``; ``None`` where nothing that enters has one
            part per input.
        scales: The largest magnitude in the tensor that each entry belongs to, shape ``(d,)``; 0 for integers, which
            are compared exactly.
        leaving: Outputs with the units last, shape ``(k, positions, units)``; ``None`` likewise.
    """

    entering: Tensor | None
    scales: Tensor | None
    leaving: Tensor | None
    _known: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def classes(self, rtol: float) -> Tensor | None:
        """See `duplicate_classes`; ``None`` where nothing that enters has one part per input."""
        if self.entering is None or self.scales is None:
            return None
        if rtol not in self._known:
            coarser = min((known for known in self._known if known > rtol), default=None)
            self._known[rtol] = (
                duplicate_classes(self.entering, rtol=rtol, scales=self.scales)
                if coarser is None
                else finer_classes(self._known[coarser], self.entering, rtol=rtol, scales=self.scales)
            )
        return self._known[rtol]


def measure_activations(evaluation: Evaluation) -> dict[str, LayerActivations]:
    """Return what enters and leaves each called layer on the probe, in the order of first entry."""
    return layer_activations(evaluation.network, evaluation.probe, evaluation.trace, evaluation.layout)


def layer_activations(
    network: Network, probe: Probe, trace: Trace, layout: InputLayout | None = None
) -> dict[str, LayerActivations]:
    """What enters and leaves each called layer, input by input, in the order of first entry.

    A tensor whose rows are those of its inputs is sliced, one that stays as it is is shared, any other is collected
    from runs of single inputs.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        layout: Of the trace; ``None`` runs other batches to find it.
    """
    if layout is None:
        layout = input_layout(network, probe, trace, run_regrouped(network, probe) if probe.size > 1 else [])
    with torch.no_grad():
        return _LaidOut(network, probe, trace, layout).activations()


def measure_activation_ranks(
    evaluation: Evaluation, scopes: Sequence[Scope], activations: Mapping[str, LayerActivations]
) -> dict[Scope, dict[str, Any]]:
    """Find the rank of the input activations of each layer.

    Args:
        evaluation: The network on the probe.
        scopes: The scopes to report; blocks and the network have no such rank.
        activations: The activations of each called layer, by name.

    Returns:
        What a record says of the rank, by field, for each layer whose input activations are known.
    """
    epsilon = torch.finfo(evaluation.network.dtype).eps
    fields = {}
    for scope in scopes:
        layer = activations.get(scope.name) if scope.kind == "layer" else None
        if layer is not None and layer.entering is not None:
            rank, gap = activation_rank(layer.entering, rtol=evaluation.settings.rtol, epsilon=epsilon)
            fields[scope] = {"activation_rank": rank, "activation_rank_gap": gap}
    return fields


class _LaidOut:
    """Cuts traced tensors into the parts of the inputs."""

    def __init__(self, network: Network, probe: Probe, trace: Trace, layout: InputLayout) -> None:
        self._network = network
        self._probe = probe
        self._trace = trace
        self._layout = layout
        self._singles: list[Trace] | None = None

    def activations(self) -> dict[str, LayerActivations]:
        found = {}
        for name in self._trace.entering:
            entering = self._by_input(partial(entering_of, name), self._layout.entering[name])
            leaving = self._by_input(partial(leaving_of, name), self._layout.leaving[name])
            part = self._network.module.get_submodule(name)
            found[name] = LayerActivations(
                entering=concatenated([real_elements(tensor).flatten(1) for tensor in entering], 1)
                if entering
                else None,
                scales=torch.cat([_scales(tensor) for tensor in entering]) if entering else None,
                leaving=_units_last(part, leaving),
            )
        return found

    def _by_input(self, of: Callable[[Trace], list[Tensor]], rows: Rows) -> list[Tensor]:
        """The tensors that have a part per input, each as ``(k, rows, ...)``."""
        if rows is None:
            return self._collected(of)
        tensors = [by_parts(tensor.detach()) for tensor in of(self._trace)]
        return [
            tensor.reshape(self._probe.size, count, *tensor.shape[1:])
            for tensor, count in zip(tensors, rows, strict=True)
            if count
        ]

    def _collected(self, of: Callable[[Trace], list[Tensor]]) -> list[Tensor]:
        """Tensors put together from runs of single inputs; none where these differ in shape."""
        if self._singles is None:
            try:
                self._singles = [
                    self._network.trace_layers(self._probe.select([index])) for index in range(self._probe.size)
                ]
            except _CANNOT_RUN:
                self._singles = []
        shapes = {tuple(tensor.shape for tensor in of(run)) for run in self._singles}
        if len(shapes) != 1 or len(self._singles) < self._probe.size:
            return []
        columns = zip(*(of(run) for run in self._singles), strict=True)
        return [torch.stack([by_parts(tensor) for tensor in column]) for column in columns]


def _scales(tensor: Tensor) -> Tensor:
    """What each entry of an input's part is compared relative to: the largest of the tensor, 0 for integers."""
    scale = largest_entry(real_elements(tensor)) if tensor.is_floating_point() else real_elements(tensor).new_zeros(())
    return scale.expand(tensor[:1].numel())


def _units_last(part: nn.Module, tensors: Sequence[Tensor]) -> Tensor | None:
    """Outputs of all calls as ``(k, positions, units)``."""
    if not tensors:
        return None
    moved = []
    for tensor in tensors:
        # Traced tensors carry one axis more, the rows per input; channels were second without it.
        axis = 2 - tensor.ndim if isinstance(part, _CHANNELS_SECOND) else -1
        ordered = real_elements(tensor).movedim(axis, -1)
        moved.append(ordered.flatten(1, -2))
    return concatenated(moved, 1) if len({tensor.shape[-1] for tensor in moved}) == 1 else moved[0]
