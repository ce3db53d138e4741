"""Numbers of duplicated activations and dead units, by layer and of the network."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.duplicates import dead_units, duplicate_classes, duplicated_activations, num_classes
from lightning_basin.probe import Probe
from lightning_basin.quantities.activations import LayerActivations
from lightning_basin.quantities.training_set import streamed_classes
from lightning_basin.record import MergedInput


@dataclass(frozen=True, eq=False)
class DuplicateCounts:
    """Numbers of duplicated activations and dead units, by layer and of the network, and the inputs that merged."""

    layers: Mapping[str, Mapping[str, Any]]
    network: Mapping[str, Any]


def measure_duplicates(evaluation: Evaluation, activations: Mapping[str, LayerActivations]) -> DuplicateCounts:
    """Count duplicated activations and dead units of each layer and of the network.

    Args:
        evaluation: The network on the probe.
        activations: What enters and leaves each layer, by name.
    """
    probe, trace, rtol = evaluation.probe, evaluation.trace, evaluation.settings.resolved_duplicate_rtol
    classes: dict[str | None, Tensor] = {
        name: found for name, layer in activations.items() if (found := layer.classes(rtol)) is not None
    }
    layers = {name: _layer_duplicates(layer, classes.get(name), rtol) for name, layer in activations.items()}
    after_first = [layers[name] for name in list(activations)[trace.num_first :]]
    outputs = trace.outputs.detach().reshape(probe.size, -1)
    output_classes = duplicate_classes(outputs, rtol=rtol)
    totals: dict[str, Any] = {
        quantity: max((layer[quantity] for layer in after_first if quantity in layer), default=0)
        for quantity in ("duplicated_activations", "duplicated_activations_exact")
    }
    totals |= {
        "dead_units": sum(layer.get("dead_units", 0) for layer in layers.values()),
        "output_duplicated_activations": probe.size - num_classes(output_classes),
        "output_duplicated_activations_exact": duplicated_activations(outputs, rtol=0.0),
        "merged_inputs": merged_inputs_of(classes | {None: output_classes}),
    }
    return DuplicateCounts(layers=layers, network=totals)


def merged_inputs_of(classes: Mapping[str | None, Tensor]) -> tuple[MergedInput, ...]:
    """Each input that is not the first of its class, at the first layer where it is not."""
    merged: dict[int, MergedInput] = {}
    for layer, first in classes.items():
        for index in (first != torch.arange(first.numel())).nonzero().squeeze(1).tolist():
            merged.setdefault(index, MergedInput(index, int(first[index]), layer))
    return tuple(merged[index] for index in sorted(merged))


def with_training_set(
    duplicates: DuplicateCounts, evaluation: Evaluation, training_set: Iterable[Probe]
) -> DuplicateCounts:
    """Count duplicates over a whole training set too, outside of the evaluation: its items are read as in training.

    Args:
        duplicates: What was counted on the probe.
        evaluation: The network on the probe.
        training_set: The training set, in parts; iterated over several times.

    Warns:
        UserWarning: If the training set cannot be evaluated; it is left out then.
    """
    rtol = evaluation.settings.resolved_duplicate_rtol
    try:
        classes = streamed_classes(evaluation.network, training_set, rtol=rtol)
    except Exception as error:  # Whatever a data set raises: the probe has been measured.
        warnings.warn(f"the training set is left out. {type(error).__name__}: {error}", stacklevel=4)
        return duplicates
    return _with_classes(duplicates, classes, evaluation.trace.num_first)


def _with_classes(duplicates: DuplicateCounts, classes: Mapping[str | None, Tensor], num_first: int) -> DuplicateCounts:
    """What was counted on the probe, and the same over the whole training set beside it."""
    counts = {name: first.numel() - num_classes(first) for name, first in classes.items()}
    first_layers = list(duplicates.layers)[:num_first]
    later = [count for name, count in counts.items() if name is not None and name not in first_layers]
    layers = {
        name: {**counted, "train_duplicated_activations": counts[name]} if name in counts else counted
        for name, counted in duplicates.layers.items()
    }
    totals = {
        "train_duplicated_activations": max(later, default=0),
        "train_num_inputs": classes[None].numel(),
        "train_output_duplicated_activations": counts[None],
        "train_merged_inputs": merged_inputs_of(classes),
    }
    return replace(duplicates, layers=layers, network={**duplicates.network, **totals})


def _layer_duplicates(layer: LayerActivations, classes: Tensor | None, rtol: float) -> dict[str, int]:
    counted = {}
    exact = layer.classes(0.0)
    if classes is not None and exact is not None:
        counted["duplicated_activations"] = classes.numel() - num_classes(classes)
        counted["duplicated_activations_exact"] = exact.numel() - num_classes(exact)
    if layer.leaving is not None:
        counted["dead_units"] = dead_units(layer.leaving, rtol=rtol)
    return counted


def block_duplicates(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a block: the largest number of duplicates over its layers, and all its dead units."""
    found = {}
    for quantity, combine in (
        ("duplicated_activations", max),
        ("duplicated_activations_exact", max),
        ("train_duplicated_activations", max),
        ("dead_units", sum),
    ):
        values = [member[quantity] for member in members if quantity in member]
        if values:
            found[quantity] = combine(values)
    return found
