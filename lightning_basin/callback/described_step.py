"""What a training step trains, in the words of a measurement: outputs, targets and a loss."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_basin.callback.step_run import batch_size, objectives_of, run_step, watch_step
from lightning_basin.callback.step_watch import Call, Place, StepWatch
from lightning_basin.probe import Probe
from lightning_basin.tensors import map_tensors, tensors_of


def step_behavior(calls: Sequence[int]) -> Callable[[nn.Module, Any], Tensor]:
    """Return the behavior that runs a training step up to its outputs, as `join_outputs` arranges them."""
    return partial(_outputs_of_step, calls=tuple(calls))


def _outputs_of_step(module: nn.Module, batch: Any, *, calls: Sequence[int]) -> Tensor:
    if not torch.is_grad_enabled():  # By their gradients outputs are known.
        with torch.enable_grad():
            return _outputs_of_step(module, batch, calls=calls).detach()
    watch = StepWatch(last=max(calls))
    watch_step(watch, module, map_tensors(Tensor.clone, batch))
    return join_outputs(distinct_outputs(select_calls(watch.calls, calls)), batch_size(batch))


def select_calls(calls: Sequence[Call], positions: Sequence[int]) -> list[Call]:
    """Return the calls at some positions."""
    if len(calls) <= max(positions):
        raise ValueError(
            f"training_step must call {max(positions) + 1} losses or modules as at first, but calls {len(calls)}"
        )
    return [calls[position] for position in positions]


def distinct_outputs(calls: Sequence[Call]) -> list[Tensor]:
    """Return the tensors of some calls that have a gradient, each once."""
    return list({id(tensor): tensor for call in calls for tensor in call.outputs}.values())


def join_outputs(outputs: Sequence[Tensor], num_inputs: int) -> Tensor:
    """Return a single tensor with one row per input as it is, else all side by side, shape ``(num_inputs, c)``."""
    if len(outputs) == 1 and outputs[0].ndim and outputs[0].shape[0] == num_inputs:
        return outputs[0]
    if not outputs:
        raise ValueError("outputs must have a gradient, got none")
    for tensor in outputs:
        if tensor.ndim == 0 or tensor.shape[0] % num_inputs:
            raise ValueError(f"outputs must have rows of all {num_inputs} inputs, got shape {tuple(tensor.shape)}")
    return torch.cat([tensor.reshape(num_inputs, -1) for tensor in outputs], 1)


@dataclass(frozen=True, eq=False)
class StepLoss:
    """The losses that a training step calls, as a function of the outputs that it calls them with.

    In the arguments of ``calls`` places stand for outputs and targets. ``weights`` are the factors of the values in the
    sum, ``shapes`` those of the outputs.
    """

    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]
    weights: tuple[Tensor, ...]
    shapes: tuple[torch.Size, ...]
    num_inputs: int

    @classmethod
    def of(
        cls, calls: Sequence[Call], weights: tuple[Tensor, ...], outputs: Sequence[Tensor], num_inputs: int
    ) -> "StepLoss":
        """Make the loss from the calls of one run."""
        places: dict[int, Place] = {}
        for is_output, tensors in ((True, outputs), (False, targets_of(calls, num_inputs))):
            places |= {id(tensor): Place(is_output, index, tensor.shape) for index, tensor in enumerate(tensors)}

        def placed(collection: Any) -> Any:
            return map_tensors(lambda tensor: places.get(id(tensor), tensor), collection)

        filled = tuple((call.function, placed(call.args), placed(call.kwargs)) for call in calls)
        return cls(filled, weights, tuple(tensor.shape for tensor in outputs), num_inputs)

    def __call__(self, outputs: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Return the loss of other outputs, shape ``(k, ...)``, and targets, each of k rows."""
        separate = _split_outputs(outputs, self.shapes, self.num_inputs)

        def fill(place: Place) -> Tensor:
            return (separate if place.is_output else targets)[place.index].reshape(place.shape)

        values = [
            function(*apply_to_collection(args, Place, fill), **apply_to_collection(kwargs, Place, fill))
            for function, args, kwargs in self.calls
        ]
        return torch.stack([(weight * value).sum() for weight, value in zip(self.weights, values, strict=True)]).sum()


@dataclass(frozen=True, eq=False)
class RunLoss:
    """All that a training step computes, by whatever code, as a function of what one of its modules returns to it.

    ``calls`` are the positions of the outputs among all calls, ``shapes`` their shapes. Measured together, loss and
    behavior have one copy of ``module``.
    """

    module: nn.Module
    trainer: Any
    calls: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    num_inputs: int

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of other outputs, shape ``(k, ...)``: the step is run with these in their place."""
        separate = _split_outputs(outputs, self.shapes, self.num_inputs)
        given = {
            index: tensor.reshape(shape) for index, tensor, shape in zip(self.calls, separate, self.shapes, strict=True)
        }
        watch, result = run_step(self.module, map_tensors(Tensor.clone, batch), self.trainer, given=given)
        objectives = objectives_of(watch, result)
        if not objectives:
            raise ValueError("training_step must return a loss for the whole probe, but returns none")
        return objectives[0].reshape(())


def _split_outputs(outputs: Tensor, shapes: Sequence[torch.Size], num_inputs: int) -> tuple[Tensor, ...]:
    """Return what `join_outputs` put side by side, as one row of each tensor for every input."""
    return torch.split(outputs.reshape(num_inputs, -1), [shape.numel() // num_inputs for shape in shapes], 1)


def targets_of(calls: Sequence[Call], num_inputs: int) -> list[Tensor]:
    """Return the tensors without a gradient that have rows of all inputs, each once; the others are constants."""
    targets = {}
    for call in calls:
        lengths = {output.shape[0] for output in call.outputs if output.ndim}
        for tensor in tensors_of((call.args, call.kwargs)):
            if not tensor.requires_grad and tensor.ndim and tensor.shape[0] in lengths:
                targets[id(tensor)] = tensor
    return [tensor for tensor in targets.values() if tensor.shape[0] % num_inputs == 0]


@dataclass(frozen=True, eq=False)
class KnownStep:
    """What is kept of a `TrainingStep` of which three runs have shown that its loss is a function of its outputs."""

    calls: tuple[int, ...]
    names: tuple[str, ...]
    operations: list[Hashable]


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What one run of a training step showed.

    Attributes:
        calls: The positions, among all calls, of those that have the outputs.
        probe: The whole batch as inputs, with the loss's targets.
        outputs: The outputs that the losses took, or a module returned, shape ``(k, ...)``, detached.
        loss: The loss of the outputs; ``None`` where it is no function of outputs and targets alone.
        names: The names of the losses, or of the module that returned the outputs.
        is_whole: Whether ``loss`` is all that the step returned.
        is_of_a_module: Whether a module returned the outputs; the loss then takes the whole batch as targets.
        reached: The names of the parameters that are in the graph of the outputs.
        operations: The operations of the step in their order; empty where they were not recorded.
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
    operations: list[Hashable]

    @property
    def known(self) -> KnownStep | None:
        """What a later reading may take over: that the loss is all that the step returns, and a function of outputs."""
        is_known = self.is_whole and self.loss is not None and self.operations
        return KnownStep(self.calls, self.names, self.operations) if is_known else None

    @property
    def targets(self) -> Any:
        """The targets for another loss: the second of a pair where no loss that was called says them."""
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
            return "loss: " + ("all" if self.is_whole else "some") + " of what the step makes of them"
        return (
            f"loss: all of what the step returns ({named})"
            if self.is_whole
            else f"loss: {named}, not all of what it returns"
        )

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
