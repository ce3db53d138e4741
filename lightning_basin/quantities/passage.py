"""What inputs that a layer merges have in common: the signals behind it, and the layer before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightning_basin.functional.duplicates import class_means
from lightning_basin.network.input_layout import real_elements
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.network.runs import TracedProbe
from lightning_basin.network.trace import Trace
from lightning_basin.probe import Probe
from lightning_basin.quantities.activations import LayerActivations, _units_last

_SIGNALS = 2**24  # float64 numbers in the signals of one layer: 128 MiB

_NUM_COMBINATIONS = 3  # of all rows, that show whether merged inputs have the same gradients


def parameters_before(network: Network, trace: Trace, name: str) -> list[bool]:
    """For each parameter whether what enters a layer depends on it.

    Args:
        network: That was traced.
        trace: Of the probe.
        name: Of a layer; one that was not called, on these inputs, depends on none.
    """
    attached = [tensor for tensor in trace.entering.get(name, []) if tensor.requires_grad]
    parameters = network.parameters()
    if not attached:
        return [False] * len(parameters)
    ones = [torch.ones_like(tensor) for tensor in attached]
    gradients = torch.autograd.grad(attached, parameters, ones, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def merging_error(
    traced: TracedProbe, classes: Tensor, before: Sequence[bool], through: "Passage | None" = None
) -> float:
    """How far gradients are from being those of merged inputs: the norm of what tells inputs of one class apart.

    Behind a layer, inputs of a class must have the same gradients: what these deviate from their mean is an error of G.
    So is what the signals before it deviate from theirs, times the derivatives by the parameters they act on. Where
    the whole error is below a tolerance, replacing the gradients by their means moves no singular value past it (Weyl,
    1912). Three random combinations of all rows see it, over all inputs at once: it takes a chance of one in a hundred
    for each to see less than a hundredth.

    Args:
        traced: The network on the probe.
        classes: First member of each input's class, shape ``(k,)``.
        before: For each parameter whether its gradients are taken to differ within the classes.
        through: What all parameters before act through; ``None`` where nothing is taken to be the same before.

    Returns:
        The largest norm over the combinations, of standard normal weights.
    """
    network, generator = traced.network, Generator().manual_seed(0)
    parameters = network.parameters()
    apart = None if through is None else through.signals - class_means(through.signals, classes)
    behind = [not used for used in before]
    outputs = network.rows(traced.whole.outputs)
    shape = (_NUM_COMBINATIONS, *outputs.shape)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(outputs.device)
    within = [weights - class_means(weights, classes) for weights in drawn]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    combined = [drawn.new_zeros(num_parameters) for _ in drawn]
    for chunk in traced.chunks():
        rows, part = network.rows(chunk.trace.outputs), chunk.indices.to(drawn.device)
        for total, weights, deviations in zip(combined, drawn, within, strict=True):
            total += _gradient(rows, parameters, deviations[part], behind)
            if through is not None and apart is not None:
                by_left = torch.einsum("kc,kcu->ku", weights[part], apart[part])
                left = chunk.trace.leaving[through.name][0]
                total += _gradient(left, parameters, by_left.view_as(left), before)
    return max(float(total.norm()) for total in combined)


def _gradient(tensor: Tensor, parameters: Sequence[Tensor], weights: Tensor, wanted: Sequence[bool]) -> Tensor:
    """Of a weighted sum by all parameters side by side; zero for those that are not wanted."""
    chosen = [parameter for parameter, is_wanted in zip(parameters, wanted, strict=True) if is_wanted]
    found = iter([parameter.new_zeros(()) for parameter in chosen])
    if chosen and tensor.requires_grad:
        weights = weights.to(tensor)
        found = iter(torch.autograd.grad(tensor, chosen, weights, retain_graph=True, materialize_grads=True))
    parts = zip(parameters, wanted, strict=True)
    return torch.cat(
        [(next(found) if used else parameter.new_zeros(())).expand_as(parameter).flatten() for parameter, used in parts]
    )


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer that all parameters before a cut act through.

    Attributes:
        name: Of the layer.
        signals: Derivative of each output by what leaves the layer, shape ``(k, c, units)``.
        inputs: What enters it, shape ``(k, features)``, where it is a linear layer and nothing else is trained before
            the cut; ``None`` otherwise.
    """

    name: str
    signals: Tensor
    inputs: Tensor | None


def passage(
    network: Network,
    probe: Probe,
    trace: Trace,
    activations: dict[str, LayerActivations],
    cut: str,
    before: Sequence[bool],
) -> Passage | None:
    """The layer called last before a cut, if everything trained before the cut acts on the outputs through it alone.

    The graph of the outputs tells: no such parameter may be reached on a way around what leaves the layer. A weight
    that is used on both sides of the cut is, and so is one beside a skip connection.

    Args:
        network: That was traced.
        probe: The inputs.
        trace: Of the probe.
        activations: Of the probe.
        cut: Name of the layer whose input is all that crosses.
        before: For each parameter whether it is used before the cut, by these inputs or by others that merge with them.

    Returns:
        ``None`` where there is no such layer, where what leaves it is not laid out input by input, and where its
        signals are more than 2**24 numbers.
    """
    called = list(activations)
    position = called.index(cut) if cut in called else 0  # Not where no input of a chunk enters it.
    if position == 0 or not trace.outputs.requires_grad:
        return None
    name = called[position - 1]
    left = trace.leaving.get(name, [])
    rows = network.rows(trace.outputs)
    if len(left) != 1 or not left[0].requires_grad or rows.shape[1] * left[0].numel() > _SIGNALS:
        return None
    part, arranged = network.module.get_submodule(name), activations[name].leaving
    if left[0].shape[:1] != (probe.size,):
        return None
    by_input = _units_last(part, [real_elements(left[0].detach()).unsqueeze(1)])
    if arranged is None or by_input is None or not torch.equal(by_input, arranged):
        return None
    used = [parameter for parameter, is_used in zip(network.parameters(), before, strict=True) if is_used]
    if _reached_around(trace.outputs, left[0], used):
        return None
    signals = torch.stack([_derivative(row.sum(), left[0]) for row in rows.unbind(1)], 1).flatten(2).to(torch.float64)
    inputs = _linear_inputs(part, trace.entering[name], used, rows, signals, rtol=agreement_rtol(network.dtype))
    return Passage(name, signals, inputs)


def _derivative(output: Tensor, passed: Tensor) -> Tensor:
    """Of a number by a tensor: zero where a module makes no use of it."""
    (derivative,) = torch.autograd.grad(output, passed, retain_graph=True, materialize_grads=True)
    return derivative


def joined_passages(chunks: Sequence[Passage | None]) -> Passage | None:
    """The passage of all inputs from those of chunks of them; ``None`` where one of these is."""
    found = [chunk for chunk in chunks if chunk is not None]
    if len(found) < len(chunks) or sum(chunk.signals.numel() for chunk in found) > _SIGNALS:
        return None
    inputs = [chunk.inputs for chunk in found if chunk.inputs is not None]
    if len({chunk.name for chunk in found}) != 1:
        return None
    signals = torch.cat([chunk.signals for chunk in found])
    return Passage(found[0].name, signals, torch.cat(inputs) if len(inputs) == len(found) else None)


def _reached_around(outputs: Tensor, passed: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the graph of the outputs leads to any parameter on a way that does not pass a tensor."""
    wanted = {id(parameter) for parameter in parameters}
    waiting, seen = [outputs.grad_fn], {outputs.grad_fn}
    while waiting:
        node = waiting.pop()
        for following, number in () if node is None else node.next_functions:
            if following is None or following in seen or (following, number) == (passed.grad_fn, passed.output_nr):
                continue
            if id(getattr(following, "variable", None)) in wanted:
                return True
            seen.add(following)
            waiting.append(following)
    return False


def _linear_inputs(
    part: nn.Module,
    entering: Sequence[Tensor],
    before: Sequence[Tensor],
    rows: Tensor,
    signals: Tensor,
    *,
    rtol: float,
) -> Tensor | None:
    """What enters a linear layer, if its parameters are all there are before a cut, and it acts as such a layer."""
    if type(part) is not nn.Linear or len(entering) != 1 or entering[0].ndim != 2:  # noqa: PLR2004 - a matrix
        return None
    others = {id(parameter) for parameter in before} - {id(part.bias)}
    if others != {id(part.weight)}:
        return None
    generator = Generator().manual_seed(0)
    weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    (expected,) = torch.autograd.grad(rows, part.weight, weights, retain_graph=True, materialize_grads=True)
    inputs = real_elements(entering[0].detach())
    found = (weights.unsqueeze(2) * signals).sum(1).mT @ inputs
    if bool(((found - expected).abs() > rtol * expected.abs().max()).any()):
        return None
    return inputs
