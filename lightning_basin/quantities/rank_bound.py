"""The largest rank that the duplicated activations of a network leave possible.

No other quantity depends on this file. `gradient_rank_bound` has the theorem and its bounds B2, B3 and B4. Here their
premises are checked on a network: which parameters act before a layer, whether merged inputs have the same gradients
behind it, and whether everything before it acts through one earlier layer, the passage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn

from lightning_basin.evaluation import Evaluation
from lightning_basin.functional.duplicates import duplicate_classes, num_classes
from lightning_basin.functional.hessian import flat_vector
from lightning_basin.functional.rank import GradientRank
from lightning_basin.functional.rank_bound import (
    MergedDirections,
    class_means,
    gradient_rank_bound,
    merged_directions,
    merged_linear_directions,
)
from lightning_basin.functional.reading import read_together
from lightning_basin.network.layers import reached_parameters
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.runs import Chunk, ProbeRuns
from lightning_basin.quantities.activations import LayerActivations, distinct_activations
from lightning_basin.tensors import as_result, float64_device

_MAX_SIGNAL_ELEMENTS = 2**24  # most float64 elements in the signals of a passage: 128 MiB
_NUM_COMBINATIONS = 3  # random combinations of all rows that show whether merged inputs have the same gradients

_Cut = tuple[Tensor, MergedDirections]


def measure_rank_bound(evaluation: Evaluation, activations: Mapping[str, LayerActivations], rank: GradientRank) -> int:
    """Find the tightest bound over nested cuts.

    Layers are looked at until the bound is the rank, those with the fewest distinct activations first.
    """
    num_parameters = sum(layer.num_parameters for layer in evaluation.network.layers)
    num_inputs, num_outputs = evaluation.probe.size, evaluation.num_outputs
    bound = min(num_parameters, evaluation.num_rows)
    candidates = _candidates(activations, num_inputs, rank.rtol)
    # The errors of all cuts that are used add up: each may use up its share of the tolerance.
    share = 1.0 / max(1, len(candidates))
    merging = [place for place, (_, classes) in enumerate(candidates) if num_classes(classes) < num_inputs]
    cuts: dict[int, list[_Cut]] = {}
    for place in sorted(merging, key=lambda place: num_classes(candidates[place][1])):
        if bound == rank.rank:  # No bound is below the rank.
            break
        name, classes = candidates[place]
        cuts[place] = _cuts_before(evaluation, name, classes, rank, share)
        in_order = [cut for _, cuts_there in sorted(cuts.items()) for cut in cuts_there]
        bound = min(bound, gradient_rank_bound(num_parameters, num_inputs, num_outputs, in_order))
    return bound


def _candidates(activations: Mapping[str, LayerActivations], num_inputs: int, rtol: float) -> list[tuple[str, Tensor]]:
    """The classes of inputs that each layer merges, in the order of entry; of some layers also the equal inputs."""
    searched = distinct_activations(layer.entering for layer in activations.values())
    read_together(known.search([rtol, 0.0]) for known in searched)
    candidates = []
    for name, layer in activations.items():
        if layer.entering is None:  # All inputs share an activation that is not known input by input.
            candidates.append((name, torch.zeros(num_inputs, dtype=torch.int64)))
            continue
        classes, exact = layer.entering.classes(rtol), layer.entering.classes(0.0)
        candidates.append((name, torch.from_numpy(classes)))
        # Where the inputs of a class turn out to differ too much, equal inputs may still be merged.
        if not np.array_equal(exact, classes):
            candidates.append((name, torch.from_numpy(exact)))
    return candidates


def _cuts_before(evaluation: Evaluation, name: str, classes: Tensor, rank: GradientRank, share: float) -> list[_Cut]:
    """The cuts before a layer: none where more than its input crosses; else one, and one through a passage."""
    runs, parameters = evaluation.runs, evaluation.network.parameters()
    is_before = [False] * len(parameters)
    for chunk in runs.chunks():
        reached = reached_parameters(chunk.trace.entering.get(name, []), parameters)
        is_before = [any(pair) for pair in zip(is_before, reached, strict=True)]
    # Half of the tolerance is for B4, and half of the rest for what three combinations may miss.
    tolerance = share * rank.rtol * rank.largest / 4
    if merging_error(runs, classes, is_before) > tolerance:
        return []
    before = [parameter for parameter, is_used in zip(parameters, is_before, strict=True) if is_used]
    num_before = sum(parameter.numel() for parameter in before)
    cuts: list[_Cut] = [(classes, lambda _: num_before)]
    passage = _find_passage(evaluation, name, before)
    if passage is not None:
        # The tighter bounds ask for the same signals before the cut as well.
        equal_signals = duplicate_classes(passage.signals.flatten(1), rtol=rank.rtol)
        classes = _first_of_equal(classes * len(classes) + equal_signals)
        if merging_error(runs, classes, is_before, passage) <= tolerance:
            cuts.append((classes, partial(_directions_through, passage, classes, num_before, rank, share)))
    return cuts


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer through which all parameters before a cut act on the outputs.

    Attributes:
        name: The name of the layer.
        signals: The derivative of each output by the layer's output, shape ``(k, c, units)``.
        inputs: The layer's input activations, shape ``(k, features)``, where it is a linear layer and nothing else is
            trained before the cut; ``None`` otherwise.
    """

    name: str
    signals: Tensor
    inputs: Tensor | None


def merging_error(runs: ProbeRuns, classes: Tensor, is_before: Sequence[bool], passage: Passage | None = None) -> float:
    """Measure how far the gradients are from those of merged inputs: the norm of their deviation inside the classes.

    Behind a layer, inputs of a class must have the same gradients: their deviation from the class's mean is an error of
    G. So is the deviation of the signals before the layer, times the derivative of the passage by its parameters;
    without a passage, gradients before the layer may differ at will. Where the whole error is below a tolerance,
    replacing the gradients by their means moves no singular value past it (Weyl, 1912). Three random combinations of
    all rows, of standard normal weights, see the error of all inputs at once, and the largest norm counts: each sees
    less than a hundredth of the error with a probability of one in a hundred.
    """
    network, generator = runs.network, Generator().manual_seed(0)
    marked = list(zip(network.parameters(), is_before, strict=True))
    before = [parameter for parameter, is_used in marked if is_used]
    behind = [parameter for parameter, is_used in marked if not is_used]
    outputs = network.rows(runs.full_trace.outputs)
    shape, device = (_NUM_COMBINATIONS, *outputs.shape), float64_device(outputs.device)
    combinations = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    classes = classes.to(device)
    deviations = [weights - class_means(weights, classes) for weights in combinations]
    signals = None if passage is None else passage.signals - class_means(passage.signals, classes)
    norms = []
    for weights, deviation in zip(combinations, deviations, strict=True):  # Each is as large as the network.
        errors: list[Tensor] = []
        for chunk in runs.chunks():
            rows, indices = network.rows(chunk.trace.outputs), chunk.indices.to(device)
            terms = [_combined_gradient(rows, behind, deviation[indices])]
            if passage is not None and signals is not None:
                left = chunk.trace.leaving[passage.name][0]
                combined = torch.einsum("kc,kcu->ku", weights[indices], signals[indices])
                terms.append(_combined_gradient(left, before, combined.view_as(left)))
            terms = [as_result(term) for term in terms]
            errors = [error.add_(term) for error, term in zip(errors, terms, strict=True)] if errors else terms
        norms.append(torch.stack(torch._foreach_norm(errors)).norm())
    return float(torch.stack(norms).max())


def _combined_gradient(tensor: Tensor, parameters: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The gradient of a weighted sum of a tensor's elements by some parameters, in one vector."""
    if not parameters or not tensor.requires_grad:
        return tensor.new_zeros(sum(parameter.numel() for parameter in parameters))
    return flat_vector(
        torch.autograd.grad(tensor, parameters, weights.to(tensor), retain_graph=True, materialize_grads=True)
    )


def _find_passage(evaluation: Evaluation, cut: str, before: Sequence[Tensor]) -> Passage | None:
    """The layer called last before a cut, if everything trained before the cut acts on the outputs through it alone.

    Returns:
        The passage; ``None`` where there is no such layer, where its outputs are not laid out input by input, and where
        its signals have more than 2**24 elements.
    """
    names, layout = list(evaluation.trace.entering), evaluation.layout
    name = names[max(0, names.index(cut) - 1)]
    if name == cut or layout is None or layout.leaving[name] != [1]:
        return None
    if evaluation.num_outputs * evaluation.trace.leaving[name][0].numel() > _MAX_SIGNAL_ELEMENTS:
        return None
    signals, inputs = [], []
    for chunk in evaluation.runs.chunks():
        left = chunk.trace.leaving.get(name, [])
        # Beside a skip connection, and where a weight is used on both sides of the cut, there is a way around.
        if len(left) != 1 or not _is_only_way(left[0], chunk.trace.outputs, before):
            return None
        signals.append(_signals(evaluation.network.rows(chunk.trace.outputs), left[0]))
        inputs.append(_linear_inputs(evaluation, chunk, name, before, signals[-1]))
    known = [tensor for tensor in inputs if tensor is not None]
    return Passage(name, torch.cat(signals), torch.cat(known) if len(known) == len(inputs) else None)


def _is_only_way(left: Tensor, outputs: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of the outputs leads to parameters only through one tensor."""
    if left.grad_fn is None or left.is_complex() or not outputs.requires_grad:
        return False
    return not any(reached_parameters([outputs], parameters, barrier=left))


def _signals(rows: Tensor, left: Tensor) -> Tensor:
    """The derivative of each output by a layer's output, shape ``(k, c, units)``; zero where it is not used."""
    derivatives = [
        torch.autograd.grad(column.sum(), left, retain_graph=True, materialize_grads=True)[0]
        for column in rows.unbind(1)
    ]
    return as_result(torch.stack(derivatives, 1).reshape(*rows.shape, -1))


def _linear_inputs(
    evaluation: Evaluation, chunk: Chunk, name: str, before: Sequence[Tensor], signals: Tensor
) -> Tensor | None:
    """The input activations of a passage that is one linear layer, holds all parameters before the cut, and acts so."""
    layer, entering = evaluation.network.module.get_submodule(name), chunk.trace.entering[name]
    if type(layer) is not nn.Linear or len(entering) != 1 or entering[0].ndim != 2:  # noqa: PLR2004 - a matrix
        return None
    if {id(parameter) for parameter in before} - {id(layer.bias)} != {id(layer.weight)}:
        return None
    rows, inputs = evaluation.network.rows(chunk.trace.outputs), as_result(entering[0].detach())
    generator = Generator().manual_seed(0)
    weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    expected = as_result(_combined_gradient(rows, [layer.weight], weights).view_as(layer.weight))
    product = (weights.to(signals).unsqueeze(2) * signals).sum(1).mT @ inputs
    tolerance = agreement_rtol(evaluation.network.dtype) * expected.abs().max()
    return inputs if bool(((product - expected).abs() <= tolerance).all()) else None


def _directions_through(
    passage: Passage, classes: Tensor, num_before: int, rank: GradientRank, share: float, kept: Tensor
) -> int:
    """Bound the directions by B2, B3 and B4, for the inputs that are kept."""
    signals = passage.signals[kept.to(passage.signals.device)]
    members = _first_of_equal(classes[kept])
    directions = min(num_before, merged_directions(members, signals))
    if passage.inputs is None or directions == 0:
        return directions
    inputs = passage.inputs[kept.to(passage.inputs.device)]
    tolerance = share * rank.rtol * rank.largest
    return min(directions, merged_linear_directions(members, signals, inputs, tolerance=tolerance))


def _first_of_equal(labels: Tensor) -> Tensor:
    """The first index with the same label as each, for integers on the CPU."""
    _, first, inverse = np.unique(labels.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first[inverse])
