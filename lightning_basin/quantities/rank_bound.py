"""The largest rank that the duplicated activations of a network leave possible."""

from functools import partial
from operator import or_

import torch
from torch import Tensor

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.duplicates import duplicate_classes, num_classes
from lightning_basin.functional.rank import GradientRank
from lightning_basin.functional.rank_bound import (
    DirectionsOfMerged,
    gradient_rank_bound,
    merged_directions,
    merged_linear_directions,
    nested_rank_bound,
)
from lightning_basin.quantities.activations import LayerActivations, layer_activations
from lightning_basin.quantities.passage import Passage, joined_passages, merging_error, parameters_before, passage


def measure_rank_bound(
    evaluation: Evaluation, activations: dict[str, LayerActivations], rank: GradientRank
) -> int | None:
    """The tightest bound over nested cuts; layers are looked at until it is the rank, those with fewest classes first.

    Args:
        evaluation: Of the probe.
        activations: Of the probe.
        rank: Of the network: the gradients of merged inputs may differ by less than decides it.
    """
    probe, num_outputs = evaluation.probe, evaluation.num_outputs
    # What all inputs share is the same for all.
    shared = torch.zeros(probe.size, dtype=torch.int64)
    candidates: list[tuple[str, Tensor]] = []
    for name, layer in activations.items():
        classes = layer.classes(rank.rtol)
        candidates.append((name, shared if classes is None else classes))
        # Where these are not the same enough, those that are equal may be.
        if classes is not None and num_classes(classes) < probe.size:
            exact = layer.classes(0.0)
            if exact is not None and not torch.equal(exact, classes):
                candidates.append((name, exact))
    num_parameters = sum(layer.num_parameters for layer in evaluation.network.layers)
    bound = gradient_rank_bound(num_parameters, num_outputs, [(0, probe.size)])
    if rank.rank == bound:  # And none is below the rank.
        return bound
    every = torch.arange(probe.size)
    cuts: dict[int, list[_Cut]] = {}
    # Errors of all cuts that are used add up: each has its part of the tolerance.
    share = 1.0 / max(1, len(candidates))
    merging = [place for place, (_, classes) in enumerate(candidates) if num_classes(classes) < probe.size]
    for place in sorted(merging, key=lambda place: num_classes(candidates[place][1])):
        name, classes = candidates[place]
        cuts[place] = _cuts_at(evaluation, activations, name, classes, rank, share)
        for classes, directions in cuts[place]:
            bound = gradient_rank_bound(bound, num_outputs, [(directions(every), num_classes(classes))])
        in_order = [cut for _, found in sorted(cuts.items()) for cut in found]
        bound = min(bound, nested_rank_bound(probe.size, num_outputs, in_order))
        if rank.rank == bound:
            break
    return bound


_Cut = tuple[Tensor, DirectionsOfMerged]


def _cuts_at(
    evaluation: Evaluation,
    activations: dict[str, LayerActivations],
    name: str,
    classes: Tensor,
    rank: GradientRank,
    share: float,
) -> list[_Cut]:
    """Classes of inputs that are merged where a layer begins, and how much rank lies before it inside of them.

    Args:
        evaluation: Of the probe.
        activations: Of the probe.
        name: Of the layer.
        classes: First member of each input's class, by what enters the layer.
        rank: Of the network.
        share: Fraction of the tolerance of the rank that merging these inputs may use up.

    Returns:
        None where more than what enters the layer crosses it; else one or two.
    """
    network, traced = evaluation.network, evaluation.traced
    used = [False] * len(network.parameters())
    for chunk in traced.chunks():
        used = list(map(or_, used, parameters_before(network, chunk.trace, name)))
    # Half of the tolerance is for B4, and as much again for what three combinations may miss.
    tolerance = share * rank.rtol * rank.largest / 4
    if merging_error(traced, classes, used) > tolerance:
        return []
    parameters = zip(network.parameters(), used, strict=True)
    num_before = sum(parameter.numel() for parameter, is_used in parameters if is_used)
    cuts: list[_Cut] = [(classes, lambda _: num_before)]
    passages: list[Passage | None] = []
    for chunk in traced.chunks():
        few = activations if traced.is_whole else layer_activations(network, chunk.probe, chunk.trace)
        passages.append(passage(network, chunk.probe, chunk.trace, few, name, used))
    through = joined_passages(passages)
    if through is not None:
        # What the tighter bounds ask of a class: the same signals before the cut as well.
        alike = duplicate_classes(through.signals.flatten(1), rtol=rank.rtol)
        classes = duplicate_classes(torch.stack([classes, alike], dim=1), rtol=0.0)
        if merging_error(traced, classes, used, through) <= tolerance:
            cuts.append((classes, partial(_directions_through, classes, through, num_before, rank, share)))
    return cuts


def _directions_through(
    classes: Tensor, through: Passage, num_before: int, rank: GradientRank, share: float, kept: Tensor
) -> int:
    """Bounds B2, B3 and B4 for some of the inputs."""
    signals = through.signals[kept.to(through.signals.device)]
    members = duplicate_classes(classes[kept].unsqueeze(1), rtol=0.0)
    directions = min(num_before, merged_directions(members, signals))
    if through.inputs is None or directions == 0:
        return directions
    inputs = through.inputs[kept.to(through.inputs.device)]
    # B4 takes its tolerance from the largest row; probabilities have smaller gradients than the outputs.
    largest_row = float((signals.norm(dim=2).amax(1) * inputs.norm(dim=1)).max())
    rtol = share * rank.rtol * (min(1.0, rank.largest / largest_row) if largest_row > 0.0 else 1.0)
    return min(directions, merged_linear_directions(members, signals, inputs, rtol=rtol))
