"""What a module trains, read from its ``training_step``: the arguments of the losses that it calls.

The step is run on a copy while a mode watches. The argument of a loss that has a gradient is the outputs, the others
are the targets, and what leads from the batch to the outputs is the behavior that is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.callback.described_step import (
    KnownStep,
    RunLoss,
    StepLoss,
    TrainingStep,
    distinct_outputs,
    join_outputs,
    select_calls,
    targets_of,
)
from lightning_basin.callback.silence import collectives_refused
from lightning_basin.callback.step_run import StepRun, contributing_calls
from lightning_basin.callback.step_watch import Call
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.layers import parameters_in_graph
from lightning_basin.network.network import Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import device_of, replicas
from lightning_basin.network.rounding import agree, agreement_rtol
from lightning_basin.probe import Probe, split_batch
from lightning_basin.tensors import float64_device, tensors_of


def read_training_step(
    module: nn.Module, batch: Any, trainer: Any, calls: Sequence[int] | None = None, *, known: KnownStep | None = None
) -> TrainingStep:
    """Run the training step of a copy of a module, and read from it what is trained.

    ``calls`` are the positions, among all calls, of those that have the outputs. ``None`` takes the arguments of the
    losses of which the result is the sum; where it is no such sum, what one module with parameters returns. Where what
    is ``known`` of an earlier reading still holds, one run is enough. A step that cannot be run so, draws random
    numbers, or makes its loss of neither raises a ValueError.
    """
    device = device_of(module)
    probe = Probe(batch).to(device, torch.float64)
    with isolated_evaluation(device), at_rest(module), collectives_refused(trainer), RaisedPrecision(torch.float64):
        run = StepRun.recorded(module, probe, trainer)
        if known is not None and known.operations == run.operations:
            step = _describe_run(module, trainer, run, known.calls)
            if step.known is not None and step.names == known.names:
                return step
        runs = (run, StepRun.of(module, probe, trainer, batch_idx=1), StepRun.of(module, probe, trainer, is_moved=True))
        if calls is not None:
            return _compare_runs(module, trainer, runs, calls)
        by_losses, problem = None, "training_step calls no loss of torch, nor a module that makes a number"
        losses = contributing_calls(runs[0])
        if losses:
            try:
                by_losses = _compare_runs(module, trainer, runs, losses)
            except ValueError as error:
                problem = str(error)
        if by_losses is not None and by_losses.loss is not None and by_losses.is_whole:
            return by_losses
        try:
            by_module = _compare_runs(module, trainer, runs, _returned_calls(module, trainer, runs[0]))
        except Exception as error:  # Whatever a step raises that is run on other values than those of its modules.
            if by_losses is None:
                raise ValueError(problem if problem == str(error) else f"{problem}; and {error}") from error
            return by_losses
        if by_losses is None and by_module.loss is None:
            raise ValueError(
                f"{problem}; and what it makes of the outputs of {by_module.names[0]} is {by_module.loss_in_words}"
            )
        return by_module if by_module.is_whole else by_losses or by_module


def agrees_with(
    step: TrainingStep,
    module: nn.Module,
    batch: Any,
    behavior: Any,
    loss_fn: Callable[..., Any] | None,
    *,
    with_loss: bool,
) -> bool:
    """Whether a training step trains just what a module makes of the first of a pair, compared with the second."""
    device = float64_device(step.outputs.device)
    try:
        inputs, targets = split_batch(batch)
        probe = Probe(inputs, targets).to(device, torch.float64)
        with isolated_evaluation(device), at_rest(module):
            replica, loss_fn, behavior = replicas(module, loss_fn, behavior)
            network = Network(replica, behavior)
            outputs = network.outputs(probe)
            if not agree(outputs.detach(), step.outputs):
                return False
            if not step.reached <= parameters_in_graph(outputs, dict(replica.named_parameters())):
                return False
            if not with_loss or (loss_fn is None and step.loss is None):
                return True
            if loss_fn is None:
                return False
            with RaisedPrecision(torch.float64):
                value = loss_fn(outputs, probe.targets).detach()
            return agree(value, value.new_tensor(step.value))
    except Exception:  # Whatever a module or a loss raises that is not called in this way.
        return False


def _compare_runs(module: nn.Module, trainer: Any, runs: Sequence[StepRun], calls: Sequence[int]) -> TrainingStep:
    """Return what a run shows, compared with one of another batch index and with one of other parameters."""
    step, of_index, of_parameters = (_describe_run(module, trainer, run, calls) for run in runs)
    if not agree(of_index.outputs, step.outputs):
        raise ValueError("training_step draws random numbers, or its outputs change with the index of the batch")
    if not all(_has_same_loss(module, step, other) for other in (of_index, of_parameters)):
        return replace(step, loss=None, is_whole=False)
    return replace(step, is_whole=step.is_whole and of_index.is_whole and of_parameters.is_whole)


def _has_same_loss(module: nn.Module, step: TrainingStep, other: TrainingStep) -> bool:
    """Whether the loss of one run is also that of another, as a function of outputs and targets is."""
    if step.loss is None or other.loss is None:
        return False
    if isinstance(step.loss, StepLoss) and isinstance(other.loss, StepLoss):
        if not _have_equal_constants(step, other):
            return False
        expected = float(other.loss(other.outputs, other.probe.targets).detach())
    else:
        expected = other.value
    _, loss = replicas(module, step.loss)  # Of a copy that has run no step.
    return agree(loss(other.outputs, step.probe.targets).detach(), other.outputs.new_tensor(expected))


def _describe_run(module: nn.Module, trainer: Any, run: StepRun, calls: Sequence[int]) -> TrainingStep:
    """Return what one run shows, where the outputs are those of some calls."""
    probe, chosen = run.probe, select_calls(run.calls, calls)
    tensors = distinct_outputs(chosen)
    outputs = join_outputs(tensors, probe.size)
    if outputs.shape[0] != probe.size:
        raise ValueError(f"a loss must take one row of outputs per input, got shape {tuple(outputs.shape)}")
    loss: StepLoss | RunLoss | None
    if chosen[0].is_loss:
        counted = [run.calls[index] for index in contributing_calls(run)]
        weights, is_whole = _weights(counted, tensors, run.total)
        loss = None if weights is None else StepLoss.of(counted, weights, tensors, probe.size)
        targets: Any = tuple(
            target.reshape(probe.size, -1) if target.shape[0] != probe.size else target
            for target in targets_of(counted, probe.size)
        )
    else:
        shapes = tuple(tensor.shape for tensor in tensors)
        loss, is_whole, targets = RunLoss(module, trainer, tuple(calls), shapes, probe.size), True, probe.inputs
    # A step with several optimizers minimizes the same for each, or there is more than was read.
    is_whole = is_whole and all(agree(other.detach(), run.total.detach()) for other in run.objectives)
    return TrainingStep(
        calls=tuple(calls),
        probe=Probe(probe.inputs, targets),
        outputs=outputs.detach(),
        loss=loss,
        value=float(run.total.detach()),
        names=tuple(call.name for call in chosen),
        is_whole=is_whole,
        is_of_a_module=not chosen[0].is_loss,
        reached=frozenset(parameters_in_graph(outputs, run.parameters)),
        operations=run.operations,
    )


def _returned_calls(module: nn.Module, trainer: Any, run: StepRun) -> list[int]:
    """Return the positions of the tensors that one module returns, if the step makes all of its loss of them alone."""
    calls = {index: call for index, call in enumerate(run.calls) if not call.is_loss and call.value.requires_grad}
    given = {index: call.value.detach().requires_grad_() for index, call in calls.items()}
    cut = StepRun.of(module, run.probe, trainer, given=given)
    sources = [*given.values(), *cut.parameters.values()]
    gradients = torch.autograd.grad(cut.total, sources, torch.ones_like(cut.total), allow_unused=True)
    if any(gradient is not None for gradient in gradients[len(given) :]):
        raise ValueError("the loss takes parameters otherwise than through modules that training_step calls")
    positions = [index for index, gradient in zip(given, gradients, strict=False) if gradient is not None]
    modules = {id(calls[index].function): calls[index].name for index in positions}
    if len(modules) != 1:
        raise ValueError(f"the loss must be made of what one module returns, but is made of {[*modules.values()]}")
    for index in positions:
        others = [calls[other].value.sum() for other in positions if other != index]
        if any(
            gradient is not None
            for total in others
            for gradient in torch.autograd.grad(total, calls[index].value, retain_graph=True, allow_unused=True)
        ):
            raise ValueError("an output must not enter the module that makes the others")
    return positions


def _weights(calls: Sequence[Call], outputs: Sequence[Tensor], total: Tensor) -> tuple[tuple[Tensor, ...] | None, bool]:
    """Return the factor of each loss in the total, ``None`` for another function, and whether they are all of it."""
    known = {id(output) for output in outputs}
    if not calls or any(id(output) not in known for call in calls for output in call.outputs):
        return None, False
    values, ones = [call.value for call in calls], torch.ones_like(total)
    factors = torch.autograd.grad(total, values, ones, retain_graph=True, materialize_grads=True)
    weights = tuple(factor.detach() for factor in factors)
    weighted = torch.stack([(weight * value).sum() for weight, value in zip(weights, values, strict=True)]).sum()
    of_total = torch.autograd.grad(total, outputs, ones, retain_graph=True, materialize_grads=True)
    of_weighted = torch.autograd.grad(weighted, outputs, retain_graph=True, materialize_grads=True)
    rtol = agreement_rtol(torch.float64)
    scale = max(float(gradient.abs().max()) for gradient in (*of_total, *of_weighted))
    if any(float((a - b).abs().max()) > rtol * scale for a, b in zip(of_total, of_weighted, strict=True)):
        return None, False
    difference = abs(float(weighted.detach()) - float(total.detach()))
    return weights, difference <= rtol * max(1.0, abs(float(total.detach())))


def _have_equal_constants(first: TrainingStep, second: TrainingStep) -> bool:
    """Whether targets and weights of a loss are the same in two runs."""
    constants = []
    for step in (first, second):
        assert isinstance(step.loss, StepLoss)
        constants.append([*tensors_of(step.probe.targets), *step.loss.weights])
    rtol = agreement_rtol(torch.float64)
    return len(constants[0]) == len(constants[1]) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol, equal_nan=True)
        for a, b in zip(*constants, strict=True)
    )
