"""What a module trains, read from its ``training_step``: the arguments of the losses that it calls.

The step is run on a copy while a mode watches. The argument of a loss that has a gradient is the outputs, the others
are the targets, and what leads from the batch to the outputs is the behavior that is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.callback.silence import collectives_refused
from lightning_basin.callback.step_loss import RunLoss, StepLoss, targets_of
from lightning_basin.callback.step_run import StepRun, batch_size, contributing_calls, watch_step
from lightning_basin.callback.step_watch import Call, StepWatch
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.layers import parameters_in_graph
from lightning_basin.network.network import Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import replicas
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.probe import Probe, split_batch
from lightning_basin.tensors import float64_device, map_tensors, tensors_of


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What one run of a training step showed.

    Attributes:
        calls: Positions of what has the outputs, among all calls.
        probe: The whole batch as inputs, and what the loss takes as targets.
        outputs: What the losses took as outputs, or a module returned, shape ``(k, ...)``, detached.
        loss: The loss of these; ``None`` where it is no function of outputs and targets alone.
        value: The loss that the step returned.
        names: Names of the losses, or of the module that returned the outputs.
        is_whole: Whether ``loss`` is all that the step returned.
        is_of_a_module: Whether a module returned the outputs; the loss then takes the whole batch as targets.
        reached: Names of the parameters that are in the graph of the outputs.
    """

    calls: tuple[int, ...]
    probe: Probe
    outputs: Tensor
    loss: StepLoss | RunLoss | None
    value: float
    names: tuple[str, ...]
    is_whole: bool
    is_of_a_module: bool
    reached: frozenset[str]

    @property
    def targets(self) -> Any:
        """What another loss gets as targets: the second of a pair where no loss that was called says them."""
        targets = self.probe.targets
        if self.is_of_a_module:
            return targets[1] if isinstance(targets, tuple | list) and len(targets) == 2 else targets  # noqa: PLR2004
        return targets[0] if len(targets) == 1 else targets

    @property
    def loss_in_words(self) -> str:
        """What is known of the loss."""
        named = " + ".join(dict.fromkeys(self.names))
        if self.loss is None:
            return "no loss, as it is no function of outputs and targets that is the same in every batch"
        if self.is_of_a_module:
            return "loss: " + ("all of what" if self.is_whole else "part of what") + " the step makes of them"
        return f"loss: all of what the step returns ({named})" if self.is_whole else f"loss: {named}, part of the whole"

    def __str__(self) -> str:
        """One sentence."""
        outputs = str(tuple(self.outputs.shape))
        targets = ", ".join(str(tuple(target.shape)) for target in tensors_of(self.probe.targets)) or "none"
        if self.is_of_a_module:
            outputs, targets = f"{outputs} of {self.names[0]}", "the rest of the batch"
        return (
            f"BasinMonitor reads training_step: outputs {outputs}, targets {targets}, {self.loss_in_words}. "
            f"HINT: for something else pass behavior=, batch_fn= and loss_fn="
        )


def outputs_of_step(module: nn.Module, batch: Any, *, calls: Sequence[int]) -> Tensor:
    """Run a training step up to its outputs.

    Args:
        module: A copy with a ``training_step``.
        batch: As the step takes it; the first tensor has the k inputs along its first axis.
        calls: Positions of what has the outputs, among all calls.

    Returns:
        The outputs: a single tensor of k rows as it is; else all side by side, shape ``(k, c)``.

    Raises:
        ValueError: If the step calls fewer losses or modules, or their outputs have no rows of k inputs.
    """
    if not torch.is_grad_enabled():  # By their gradients outputs are known.
        with torch.enable_grad():
            return outputs_of_step(module, batch, calls=calls).detach()
    watch = StepWatch(last=max(calls))
    watch_step(watch, module, map_tensors(Tensor.clone, batch))
    if len(watch.calls) <= max(calls):
        raise ValueError(
            f"training_step must call {max(calls) + 1} losses or modules as at first, but calls {len(watch.calls)}"
        )
    return _joined(_distinct([watch.calls[index] for index in calls]), batch_size(batch))


def read_training_step(module: nn.Module, batch: Any, trainer: Any, calls: Sequence[int] | None = None) -> TrainingStep:
    """Run the training step of a copy of a module, and read from it what is trained.

    Args:
        module: Stays as it is.
        batch: A batch of training, or several in one.
        trainer: Of the run; the copy finds it, and logs nothing; ``None`` outside of a fit.
        calls: Positions of what has the outputs; ``None`` takes the arguments of the losses that the result is made of.
            Where this is no sum of such losses, it takes what one module with parameters returns to the step.

    Raises:
        ValueError: If the step cannot be run so, draws random numbers, or makes its loss of neither.
    """
    device = float64_device(next((parameter.device for parameter in module.parameters()), torch.device("cpu")))
    probe = Probe(batch).to(device, torch.float64)
    with isolated_evaluation(device), at_rest(module), collectives_refused(trainer), RaisedPrecision(torch.float64):
        runs = (
            StepRun.of(module, probe, trainer),
            StepRun.of(module, probe, trainer, batch_idx=1),
            StepRun.of(module, probe, trainer, is_moved=True),
        )
        if calls is not None:
            return _understood(module, trainer, runs, calls)
        found, problem = None, ValueError("training_step calls no loss of torch, nor a module that makes a number")
        losses = contributing_calls(runs[0])
        if losses:
            try:
                found = _understood(module, trainer, runs, losses)
            except ValueError as error:
                problem = error
        if found is not None and found.loss is not None and found.is_whole:
            return found
        try:
            other = _understood(module, trainer, runs, _returned(module, trainer, runs[0]))
        except Exception as error:  # Whatever a step raises that is run on other values than those of its modules.
            if found is None:
                raise ValueError(f"{problem}; and {error}") from error
            return found
        if found is None and other.loss is None:
            raise ValueError(
                f"{problem}; and what it makes of the outputs of {other.names[0]} is {other.loss_in_words}"
            )
        return other if other.is_whole else found or other


def agrees_with(
    step: TrainingStep,
    module: nn.Module,
    batch: Any,
    behavior: Any,
    loss_fn: Callable[..., Any] | None,
    *,
    with_loss: bool,
) -> bool:
    """Whether a training step trains just what a module makes of the first of a pair, compared with the second.

    Args:
        step: What the step shows of the batch.
        module: Stays as it is.
        batch: The batch.
        behavior: From the module and inputs to outputs.
        loss_fn: The loss that stands on the module, if any.
        with_loss: Whether the losses must agree too.
    """
    device = float64_device(step.outputs.device)
    try:
        inputs, targets = split_batch(batch)
        probe = Probe(inputs, targets).to(device, torch.float64)
        with isolated_evaluation(device), at_rest(module):
            replica, loss_fn, behavior = replicas(module, loss_fn, behavior)
            network = Network(replica, behavior)
            outputs = network.outputs(probe)
            if not _is_close(outputs.detach(), step.outputs):
                return False
            if not step.reached <= parameters_in_graph(outputs, dict(replica.named_parameters())):
                return False
            if not with_loss or (loss_fn is None and step.loss is None):
                return True
            if loss_fn is None:
                return False
            with RaisedPrecision(torch.float64):
                value = loss_fn(outputs, probe.targets).detach()
            return _is_close(value, value.new_tensor(step.value))
    except Exception:  # Whatever a module or a loss raises that is not called in this way.
        return False


def _is_close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(
        ((first - second).abs() <= agreement_rtol(torch.float64) * second.abs().max()).all()
    )


def _understood(module: nn.Module, trainer: Any, runs: Sequence[StepRun], calls: Sequence[int]) -> TrainingStep:
    """What a run shows, compared with others: with another index of the batch, and with other parameters."""
    found, again, moved = (_seen(module, trainer, run, calls) for run in runs)
    if not _is_close(again.outputs, found.outputs):
        raise ValueError("training_step draws random numbers, or its outputs change with the index of the batch")
    if not all(_gives(module, found, other) for other in (again, moved)):
        return replace(found, loss=None, is_whole=False)
    return replace(found, is_whole=found.is_whole and again.is_whole and moved.is_whole)


def _gives(module: nn.Module, found: TrainingStep, other: TrainingStep) -> bool:
    """Whether the loss of one run is also that of another, as a function of outputs and targets is."""
    if found.loss is None or other.loss is None:
        return False
    if isinstance(found.loss, StepLoss) and isinstance(other.loss, StepLoss):
        if not _have_equal_constants(found, other):
            return False
        expected = float(other.loss(other.outputs, other.probe.targets).detach())
    else:
        expected = other.value
    _, loss = replicas(module, found.loss)  # Of a copy that has run no step.
    return _is_close(loss(other.outputs, found.probe.targets).detach(), other.outputs.new_tensor(expected))


def _seen(module: nn.Module, trainer: Any, run: StepRun, calls: Sequence[int]) -> TrainingStep:
    """What one run shows, where the outputs are those of some calls."""
    if max(calls) >= len(run.calls):
        raise ValueError(f"training_step must call {max(calls) + 1} losses or modules, but calls {len(run.calls)}")
    probe, chosen = run.probe, [run.calls[index] for index in calls]
    tensors = _distinct(chosen)
    outputs = _joined(tensors, probe.size)
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
    is_whole = is_whole and all(_is_close(other.detach(), run.total.detach()) for other in run.objectives)
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
    )


def _returned(module: nn.Module, trainer: Any, run: StepRun) -> list[int]:
    """Positions of the tensors that one module returns, and of which alone the step makes all of its loss.

    Raises:
        ValueError: If there is no such module.
    """
    calls = {index: call for index, call in enumerate(run.calls) if not call.is_loss and call.value.requires_grad}
    given = {index: call.value.detach().requires_grad_() for index, call in calls.items()}
    parted = StepRun.of(module, run.probe, trainer, given=given)
    sources = [*given.values(), *parted.parameters.values()]
    found = torch.autograd.grad(parted.total, sources, torch.ones_like(parted.total), allow_unused=True)
    positions = [index for index, gradient in zip(given, found, strict=False) if gradient is not None]
    if any(gradient is not None for gradient in found[len(given) :]):
        raise ValueError("the loss takes parameters otherwise than through modules that training_step calls")
    modules = {id(calls[index].function): calls[index].name for index in positions}
    if len(modules) != 1:
        raise ValueError(f"the loss must be made of what one module returns, but is made of {[*modules.values()]}")
    for index in positions:
        others = [calls[other].value for other in positions if other != index]
        sums = [other.sum() for other in others]
        if sums and any(
            gradient is not None
            for total in sums
            for gradient in torch.autograd.grad(total, calls[index].value, retain_graph=True, allow_unused=True)
        ):
            raise ValueError("an output must not enter the module that makes the others")
    return positions


def _weights(calls: Sequence[Call], outputs: Sequence[Tensor], total: Tensor) -> tuple[tuple[Tensor, ...] | None, bool]:
    """By what each value is multiplied in the total, and whether the sum is all of it; none for another function."""
    known = {id(output) for output in outputs}
    if not calls or any(id(output) not in known for call in calls for output in call.outputs):
        return None, False
    values, ones = [call.value for call in calls], torch.ones_like(total)
    found = torch.autograd.grad(total, values, ones, retain_graph=True, materialize_grads=True)
    weights = tuple(weight.detach() for weight in found)
    summed = torch.stack([(weight * value).sum() for weight, value in zip(weights, values, strict=True)]).sum()
    wanted = torch.autograd.grad(total, outputs, ones, retain_graph=True, materialize_grads=True)
    got = torch.autograd.grad(summed, outputs, retain_graph=True, materialize_grads=True)
    rtol = agreement_rtol(torch.float64)
    scale = max(float(gradient.abs().max()) for gradient in (*wanted, *got))
    if any(float((a - b).abs().max()) > rtol * scale for a, b in zip(wanted, got, strict=True)):
        return None, False
    difference = abs(float(summed.detach()) - float(total.detach()))
    return weights, difference <= rtol * max(1.0, abs(float(total.detach())))


def _distinct(calls: Sequence[Call]) -> list[Tensor]:
    """The tensors that have a gradient, each once."""
    return list({id(tensor): tensor for call in calls for tensor in call.outputs}.values())


def _joined(outputs: Sequence[Tensor], num_inputs: int) -> Tensor:
    if len(outputs) == 1 and outputs[0].ndim and outputs[0].shape[0] == num_inputs:
        return outputs[0]
    if not outputs:
        raise ValueError("outputs must have a gradient, got none")
    for tensor in outputs:
        if tensor.ndim == 0 or tensor.shape[0] % num_inputs:
            raise ValueError(f"outputs must have rows of all {num_inputs} inputs, got shape {tuple(tensor.shape)}")
    return torch.cat([tensor.reshape(num_inputs, -1) for tensor in outputs], 1)


def _have_equal_constants(first: TrainingStep, second: TrainingStep) -> bool:
    """Whether targets and weights of a loss are the same in two runs."""
    constants = []
    for step in (first, second):
        assert isinstance(step.loss, StepLoss)
        constants.append([*tensors_of(step.probe.targets), *step.loss.weights])
    rtol = agreement_rtol(torch.float64)
    return len(constants[0]) == len(constants[1]) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol)
        for a, b in zip(*constants, strict=True)
    )


def step_behavior(calls: Sequence[int]) -> Callable[[nn.Module, Any], Tensor]:
    """The behavior that runs a training step up to its losses; see `outputs_of_step`."""
    return partial(outputs_of_step, calls=tuple(calls))
