"""Numbers of duplicated activations and dead units, by layer and of the network."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.duplicate_stream import DuplicateSearch
from lightning_basin.functional.duplicates import count_dead_units, num_classes
from lightning_basin.functional.reading import Array, Reading, read_together
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.probe import Probe
from lightning_basin.quantities.activations import (
    InputActivations,
    LayerActivations,
    activations_of,
    distinct_activations,
    layer_activations,
)
from lightning_basin.record import MergedInput
from lightning_basin.tensors import as_result


@dataclass(frozen=True, eq=False)
class DuplicateCounts:
    """The record's fields of duplicates, dead units and merged inputs, of each called layer and of the network."""

    layers: Mapping[str, Mapping[str, Any]]
    network: Mapping[str, Any]


def measure_duplicates(
    evaluation: Evaluation, activations: Mapping[str, LayerActivations], *, also_at: Sequence[float] = ()
) -> DuplicateCounts:
    """Count duplicated activations and dead units of each layer and of the network.

    At the tolerances ``also_at`` the classes are found on the way, for whoever asks for them later.
    """
    probe, trace, rtol = evaluation.probe, evaluation.trace, evaluation.settings.resolved_duplicate_rtol
    outputs = activations_of([trace.outputs.detach().reshape(probe.size, -1)])
    searched = distinct_activations([*(layer.entering for layer in activations.values()), outputs])
    leaving = {name: layer.leaving for name, layer in activations.items() if layer.leaving is not None}
    searches: list[Reading[Any]] = [known.search([rtol, *also_at, 0.0]) for known in searched]
    counts = read_together([*searches, *(count_dead_units(tensor, rtol=rtol) for tensor in leaving.values())])
    dead_units: dict[str, int] = dict(zip(leaving, counts[len(searches) :], strict=True))
    layers = {
        name: _num_duplicates(layer.entering, rtol) | ({"dead_units": dead_units[name]} if name in dead_units else {})
        for name, layer in activations.items()
    }
    entering = {name: layer.entering for name, layer in activations.items() if layer.entering is not None}
    classes: dict[str | None, Array] = {name: known.classes(rtol) for name, known in entering.items()}
    after_first = [layers[name] for name in list(activations)[trace.num_first :]]
    totals: dict[str, Any] = {
        quantity: max((layer[quantity] for layer in after_first if quantity in layer), default=0)
        for quantity in ("duplicated_activations", "duplicated_activations_exact")
    }
    totals |= {
        "dead_units": sum(dead_units.values()),
        **{f"output_{quantity}": count for quantity, count in _num_duplicates(outputs, rtol).items()},
        "merged_inputs": _merged_inputs(classes | {None: outputs.classes(rtol)}),
    }
    return DuplicateCounts(layers=layers, network=totals)


def with_training_set(
    duplicates: DuplicateCounts, evaluation: Evaluation, training_set: Iterable[Probe]
) -> DuplicateCounts:
    """Count duplicates over a whole training set too, outside of the evaluation: its items are read as in training.

    A training set that cannot be evaluated is left out, with a warning.
    """
    rtol = evaluation.settings.resolved_duplicate_rtol
    try:
        classes = streamed_classes(evaluation.network, training_set, rtol=rtol)
    except Exception as error:  # A data set may raise anything, and the probe has been measured.
        warnings.warn(f"the training set is left out. {type(error).__name__}: {error}", stacklevel=4)
        return duplicates
    counts = {name: first.numel() - num_classes(first) for name, first in classes.items()}
    first_layers = list(duplicates.layers)[: evaluation.trace.num_first]
    later = [count for name, count in counts.items() if name is not None and name not in first_layers]
    layers = {
        name: {**counted, "train_duplicated_activations": counts[name]} if name in counts else counted
        for name, counted in duplicates.layers.items()
    }
    totals = {
        "train_duplicated_activations": max(later, default=0),
        "train_num_inputs": classes[None].numel(),
        "train_output_duplicated_activations": counts[None],
        "train_merged_inputs": _merged_inputs({name: first.numpy() for name, first in classes.items()}),
    }
    return replace(duplicates, layers=layers, network={**duplicates.network, **totals})


def _merged_inputs(classes: Mapping[str | None, Array]) -> tuple[MergedInput, ...]:
    """Each input that is not the first of its class, at the first layer where it is not."""
    merged: dict[int, MergedInput] = {}
    for layer, first in classes.items():
        for index in np.flatnonzero(first != np.arange(len(first))).tolist():
            merged.setdefault(index, MergedInput(index, int(first[index]), layer))
    return tuple(merged[index] for index in sorted(merged))


def _num_duplicates(activations: InputActivations | None, rtol: float) -> dict[str, int]:
    """The record's fields of duplicates; none where activations are not known input by input."""
    if activations is None:
        return {}
    return {
        quantity: len(activations.rows) - num_classes(activations.classes(tolerance))
        for quantity, tolerance in (("duplicated_activations", rtol), ("duplicated_activations_exact", 0.0))
    }


def block_duplicates(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the counts of a block's layers: the largest number of duplicates, and the sum of dead units."""
    combined = {}
    for quantity, combine in (
        ("duplicated_activations", max),
        ("duplicated_activations_exact", max),
        ("train_duplicated_activations", max),
        ("dead_units", sum),
    ):
        values = [member[quantity] for member in members if quantity in member]
        if values:
            combined[quantity] = combine(values)
    return combined


_EVALUATED_ELEMENTS = 2**25  # most float64 elements in the activations that are evaluated at once: 256 MiB
_HELD_ELEMENTS = 2**26  # most float64 elements in the activations that the searches of all layers hold: 512 MiB


def streamed_classes(network: Network, probes: Iterable[Probe], *, rtol: float) -> dict[str | None, Tensor]:
    """Find the classes of equal activations over more inputs than fit into memory, by `DuplicateSearch`.

    The probes are iterated over several times, and read outside of `isolated_evaluation`, as in training. Return the
    smallest index of each input's class for each layer whose activation is known input by input, in the order of first
    entry, and last, as ``None``, for the outputs.
    """
    stream = _ActivationStream(network, probes)
    searches = {
        name: DuplicateSearch(
            rtol=rtol, max_elements=_HELD_ELEMENTS // len(stream.names), repeated_rtol=agreement_rtol(network.dtype)
        )
        for name in stream.names
    }
    unfinished = searches
    while unfinished:
        for activations in stream:
            for name, search in unfinished.items():
                search.add(*activations[name])
        unfinished = {name: search for name, search in unfinished.items() if search.finish_pass()}
    return {name: search.classes for name, search in searches.items()}


class _ActivationStream:
    """The input activations of each layer and the outputs, chunk by chunk, evaluated anew at each iteration."""

    def __init__(self, network: Network, probes: Iterable[Probe]) -> None:
        self._network = network
        self._probes = probes
        first = next(iter(probes), None)
        if first is None:
            raise ValueError("there must be at least one input to look for duplicates in, got none")
        activations = self._evaluated(first.select([0]))
        self.names = list(activations)
        self._chunk_size = max(2, _EVALUATED_ELEMENTS // sum(tensor.numel() for tensor, _ in activations.values()))

    def __iter__(self) -> Iterator[dict[str | None, tuple[Tensor, Tensor | None]]]:
        for probe in self._probes:
            for indices in torch.split(torch.arange(probe.size), self._chunk_size):
                yield self._evaluated(probe.select(indices))

    def _evaluated(self, probe: Probe) -> dict[str | None, tuple[Tensor, Tensor | None]]:
        size, device = probe.size, self._network.parameters()[0].device
        if size == 1:  # A single input does not show which axis counts the inputs: it is run twice.
            probe = probe.select([0, 0])
        with isolated_evaluation(device, self._network.dtype), torch.no_grad():
            probe = probe.to(device, self._network.dtype)
            trace = self._network.trace(probe)
            layers = layer_activations(self._network, probe, trace)
        activations: dict[str | None, tuple[Tensor, Tensor | None]] = {
            name: (layer.entering.rows[:size], torch.from_numpy(layer.entering.scales))
            for name, layer in layers.items()
            if layer.entering is not None
        }
        return activations | {None: (as_result(trace.outputs[:size].unsqueeze(-1).flatten(1)), None)}
