"""What a module trains, read from its ``training_step``: the arguments of the losses that it calls.

The step is run on a copy while a mode watches. The argument of a loss that has a gradient is the outputs, the others
are the targets, and what leads from the batch to the outputs is the behavior that is measured.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_basin.batches import split_batch
from lightning_basin.callback.silence import collectives_refused, quiet_step
from lightning_basin.callback.step_losses import LastCall, LossCall, LossWatch, Place
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.layers import find_layers, parameters_in_graph
from lightning_basin.network.network import Network
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import replicas
from lightning_basin.network.rounding import agreement_rtol
from lightning_basin.probe import Probe
from lightning_basin.tensors import float64_device, map_tensors, tensors_of

_PERTURBATION = 1e-3  # relative, of all parameters: targets and weights of a loss must not notice


@dataclass(frozen=True, eq=False)
class StepLoss:
    """The loss of a training step as a function of the outputs that it was called with.

    Attributes:
        calls: Functions with positional and keyword arguments, in which places stand for outputs and targets.
        weights: What each value is multiplied by before all are summed.
        num_inputs: k.
    """

    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]
    weights: tuple[Tensor, ...]
    num_inputs: int

    @classmethod
    def of(cls, calls: Sequence[LossCall], weights: tuple[Tensor, ...], num_inputs: int) -> "StepLoss":
        """From the calls of one run."""
        places: dict[int, Place] = {}
        for is_output, tensors in ((True, outputs_of(calls)), (False, _targets_of(calls, num_inputs))):
            places |= {id(tensor): Place(is_output, index, tensor.shape) for index, tensor in enumerate(tensors)}

        def placed(collection: Any) -> Any:
            return map_tensors(lambda tensor: places.get(id(tensor), tensor), collection)

        return cls(
            tuple((call.function, placed(call.args), placed(call.kwargs)) for call in calls), weights, num_inputs
        )

    def __call__(self, outputs: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The loss of other outputs, shape ``(k, ...)``, and targets, each of k rows."""
        shapes: dict[int, torch.Size] = {}
        self._filled(lambda place: shapes.setdefault(place.index, place.shape) if place.is_output else None)
        sizes = [shapes[index].numel() // self.num_inputs for index in sorted(shapes)]
        parts = torch.split(outputs.reshape(self.num_inputs, -1), sizes, 1)
        filled = self._filled(lambda place: (parts if place.is_output else targets)[place.index].reshape(place.shape))
        values = [function(*args, **kwargs) for function, args, kwargs in filled]
        return torch.stack([(weight * value).sum() for weight, value in zip(self.weights, values, strict=True)]).sum()

    def _filled(self, fill: Callable[[Place], Any]) -> list[Any]:
        """The calls with something in each place."""
        return [
            (function, apply_to_collection(args, Place, fill), apply_to_collection(kwargs, Place, fill))
            for function, args, kwargs in self.calls
        ]


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What one run of a training step showed.

    Attributes:
        calls: Positions of the losses that count, among all that are called.
        probe: The whole batch as inputs, and what the losses took as targets.
        outputs: What the losses took as outputs, shape ``(k, ...)``, detached.
        loss: The loss of these; ``None`` where it is no function of outputs and targets alone.
        value: The loss that the step returned; ``None`` where it returned none.
        names: Names of the losses.
        is_whole: Whether ``loss`` is all that the step returned.
        trained: Names of the parameters to which the step gives a gradient.
        reached: Names of those that are in the graph of the outputs.
    """

    calls: tuple[int, ...]
    probe: Probe
    outputs: Tensor
    loss: StepLoss | None
    value: float | None
    names: tuple[str, ...]
    is_whole: bool
    trained: frozenset[str]
    reached: frozenset[str]

    def unseen_layers(self, module: nn.Module) -> list[str]:
        """Names of the layers to which the step gives gradients, and on which the outputs do not depend."""
        unseen = self.trained - self.reached
        return [layer.name for layer in find_layers(module) if not unseen.isdisjoint(layer.parameters)]

    def __str__(self) -> str:
        """One sentence."""
        named = " + ".join(dict.fromkeys(self.names))
        targets = ", ".join(str(tuple(target.shape)) for target in tensors_of(self.probe.targets)) or "none"
        loss = f"loss: all of what the step returns ({named})" if self.is_whole else f"loss: {named}, part of the whole"
        if self.loss is None:
            loss = f"no loss, as {named} is part of it in another way than added, or its targets depend on parameters"
        return (
            f"BasinMonitor reads training_step: outputs {tuple(self.outputs.shape)}, targets {targets}, {loss}. "
            f"HINT: for something else pass behavior=, batch_fn= and loss_fn="
        )


def outputs_of_step(module: nn.Module, batch: Any, *, calls: Sequence[int]) -> Tensor:
    """Run a training step up to its losses.

    Args:
        module: A copy with a ``training_step``.
        batch: As the step takes it; the first tensor has the k inputs along its first axis.
        calls: Positions of the losses that count.

    Returns:
        What these losses take as outputs: a single tensor of k rows as it is; else all side by side, shape ``(k, c)``.

    Raises:
        ValueError: If the step calls fewer losses, or their outputs have no rows of k inputs.
    """
    watch = _run(module, batch, last=max(calls))[0]
    if len(watch.calls) <= max(calls):
        raise ValueError(f"training_step must call {max(calls) + 1} losses as at first, but calls {len(watch.calls)}")
    return _joined([watch.calls[index] for index in calls], _size_of(batch))


def read_training_step(module: nn.Module, batch: Any, trainer: Any, calls: Sequence[int] | None = None) -> TrainingStep:
    """Run the training step of a copy of a module, and read from it what is trained.

    Args:
        module: Stays as it is.
        batch: A batch of training, or several in one.
        trainer: Of the run; the copy finds it, and logs nothing; ``None`` outside of a fit.
        calls: Positions of the losses that count; ``None`` takes those that the result is made of.

    Raises:
        ValueError: If the step cannot be run so, draws random numbers, or calls no loss that a gradient reaches.
    """
    device = float64_device(next((parameter.device for parameter in module.parameters()), torch.device("cpu")))
    probe = Probe(batch).to(device, torch.float64)
    with isolated_evaluation(device), at_rest(module):
        found = _read(module, probe, trainer, calls)
        if not _is_close(_read(module, probe, trainer, found.calls).outputs, found.outputs):
            raise ValueError("training_step draws random numbers")
        other = _read(module, probe, trainer, found.calls, perturbation=_PERTURBATION)
    if found.loss is None or other.loss is None or not _have_equal_constants(found, other):
        return TrainingStep(**{**vars(found), "loss": None, "is_whole": False})
    return found


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
            if step.value is None:  # Nothing says that another loss than that of the module is trained.
                return True
            with RaisedPrecision(torch.float64):
                value = loss_fn(outputs, probe.targets).detach()
            return _is_close(value, value.new_tensor(step.value))
    except Exception:  # Whatever a module or a loss raises that is not called in this way.
        return False


def _is_close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(
        ((first - second).abs() <= agreement_rtol(torch.float64) * second.abs().max()).all()
    )


def _read(
    module: nn.Module, probe: Probe, trainer: Any, calls: Sequence[int] | None, *, perturbation: float = 0.0
) -> TrainingStep:
    (replica,) = replicas(module)
    if perturbation:
        with torch.no_grad():
            for parameter in replica.parameters():
                parameter.mul_(1 + perturbation)
    objectives: list[Tensor] = []
    quiet_step(replica, trainer, objectives)
    with collectives_refused(trainer), RaisedPrecision(torch.float64):
        watch, result = _run(replica, map_tensors(Tensor.clone, probe.inputs))
    total = _total(result, objectives)
    if calls is None:
        calls = _contributing(watch.calls, total)
    if not calls or max(calls) >= len(watch.calls):
        raise ValueError("training_step calls no loss of torch, nor a module that makes a number of outputs")
    chosen = [watch.calls[index] for index in calls]
    outputs = _joined(chosen, probe.size)
    if outputs.shape[0] != probe.size:
        raise ValueError(f"the losses must take one row of outputs per input, got shape {tuple(outputs.shape)}")
    weights, is_whole = _weights(chosen, total)
    targets = tuple(
        target.reshape(probe.size, -1) if target.shape[0] != probe.size else target
        for target in _targets_of(chosen, probe.size)
    )
    trained = {name: parameter for name, parameter in replica.named_parameters() if parameter.requires_grad}
    return TrainingStep(
        calls=tuple(calls),
        probe=Probe(probe.inputs, targets),
        outputs=outputs.detach(),
        loss=None if weights is None else StepLoss.of(chosen, weights, probe.size),
        value=None if total is None else float(total.detach()),
        names=tuple(call.name for call in chosen),
        is_whole=is_whole,
        trained=frozenset() if total is None else frozenset(parameters_in_graph(total, trained)),
        reached=frozenset(parameters_in_graph(outputs, trained)),
    )


def _run(module: nn.Module, batch: Any, last: int | None = None) -> tuple[LossWatch, Any]:
    """Run the step of a copy; what is raised behind the first loss does not matter, as the outputs are known."""
    watch, result = LossWatch(last), None
    try:
        with watch.modules(), watch:
            step: Any = module.training_step
            result = step(*_arguments(step, batch))
    except LastCall:
        pass
    except Exception:
        if not watch.calls:
            raise
    return watch, result


def _arguments(step: Callable[..., Any], batch: Any) -> list[Any]:
    """The batch, and 0 for every index that the step asks for."""
    signature = inspect.signature(step)
    if "dataloader_iter" in signature.parameters:
        raise ValueError("a training_step that takes its batches itself (dataloader_iter) cannot be read")
    required = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [batch, *(0 for parameter in required[1:] if parameter.default is inspect.Parameter.empty)]


def _size_of(batch: Any) -> int:
    return int(tensors_of(batch)[0].shape[0])


def _total(result: Any, objectives: Sequence[Tensor]) -> Tensor | None:
    """What training minimizes: the result of the step, or what it hands to its first manual backward pass."""
    if isinstance(result, dict):
        result = result.get("loss")
    if not isinstance(result, Tensor) and objectives:
        result = objectives[0]
    is_number = isinstance(result, Tensor) and result.numel() == 1 and result.requires_grad
    return result if is_number else None


def _contributing(calls: Sequence[LossCall], total: Tensor | None) -> list[int]:
    """Positions of the losses that the total depends on; the first one where it is not known."""
    if total is None:
        return list(range(len(calls)))[:1]
    values = [call.value for call in calls]
    if not values:
        return []
    found = torch.autograd.grad(total, values, torch.ones_like(total), retain_graph=True, allow_unused=True)
    return [index for index, gradient in enumerate(found) if gradient is not None and bool(gradient.any())]


def _weights(calls: Sequence[LossCall], total: Tensor | None) -> tuple[tuple[Tensor, ...] | None, bool]:
    """By what each value is multiplied in the total, and whether the sum is all of it; none for another function."""
    if total is None:
        is_number = len(calls) == 1 and calls[0].value.ndim == 0
        return ((calls[0].value.new_ones(()),) if is_number else None), False
    values, ones = [call.value for call in calls], torch.ones_like(total)
    found = torch.autograd.grad(total, values, ones, retain_graph=True, materialize_grads=True)
    weights = tuple(weight.detach() for weight in found)
    summed = torch.stack([(weight * value).sum() for weight, value in zip(weights, values, strict=True)]).sum()
    outputs = outputs_of(calls)
    wanted = torch.autograd.grad(total, outputs, ones, retain_graph=True, materialize_grads=True)
    got = torch.autograd.grad(summed, outputs, retain_graph=True, materialize_grads=True)
    rtol = agreement_rtol(torch.float64)
    scale = max(float(gradient.abs().max()) for gradient in (*wanted, *got))
    if any(float((a - b).abs().max()) > rtol * scale for a, b in zip(wanted, got, strict=True)):
        return None, False
    difference = abs(float(summed.detach()) - float(total.detach()))
    return weights, difference <= rtol * max(1.0, abs(float(total.detach())))


def outputs_of(calls: Sequence[LossCall]) -> list[Tensor]:
    """The tensors that have a gradient, each once."""
    return list({id(tensor): tensor for call in calls for tensor in call.outputs}.values())


def _targets_of(calls: Sequence[LossCall], num_inputs: int) -> list[Tensor]:
    """The other tensors that have rows of all inputs, each once; the rest are constants."""
    found = {}
    for call in calls:
        lengths = {output.shape[0] for output in call.outputs if output.ndim}
        for tensor in tensors_of((call.args, call.kwargs)):
            if not tensor.requires_grad and tensor.ndim and tensor.shape[0] in lengths:
                found[id(tensor)] = tensor
    return [tensor for tensor in found.values() if tensor.shape[0] % num_inputs == 0]


def _joined(calls: Sequence[LossCall], num_inputs: int) -> Tensor:
    outputs = outputs_of(calls)
    if len(outputs) == 1 and outputs[0].ndim and outputs[0].shape[0] == num_inputs:
        return outputs[0]
    for tensor in outputs:
        if tensor.ndim == 0 or tensor.shape[0] % num_inputs:
            raise ValueError(
                f"the losses must take rows of all {num_inputs} inputs, got outputs of shape {tuple(tensor.shape)}"
            )
    return torch.cat([tensor.reshape(num_inputs, -1) for tensor in outputs], 1)


def _have_equal_constants(first: TrainingStep, second: TrainingStep) -> bool:
    """Whether targets and weights of a loss are the same for other parameters."""
    assert first.loss is not None
    assert second.loss is not None
    pairs = zip(
        (*tensors_of(first.probe.targets), *first.loss.weights),
        (*tensors_of(second.probe.targets), *second.loss.weights),
        strict=True,
    )
    rtol = agreement_rtol(torch.float64)
    return all(a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol) for a, b in pairs)


def step_behavior(calls: Sequence[int]) -> Callable[[nn.Module, Any], Tensor]:
    """The behavior that runs a training step up to its losses; see `outputs_of_step`."""
    return partial(outputs_of_step, calls=tuple(calls))
