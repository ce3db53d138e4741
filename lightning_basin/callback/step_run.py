"""Run the training step of a copy, without any effect."""

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.callback.silence import collectives_refused, quiet_step
from lightning_basin.callback.step_watch import Call, LastCall, StepWatch
from lightning_basin.network.isolation import at_rest, isolated_evaluation
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import device_of, perturb, replicas
from lightning_basin.operations.recorder import OperationSequence
from lightning_basin.probe import Probe
from lightning_basin.tensors import map_tensors, tensors_of

_PERTURBATION = 1e-3
"""How far parameters move, relative to the largest element of each: a loss of the outputs alone must not notice."""


def trained_parameters(module: nn.Module, batch: Any, trainer: Any, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of the parameters to which a training step gives a gradient; none where it cannot run alone."""
    device = device_of(module, dtype)
    try:
        with isolated_evaluation(device, dtype), at_rest(module):
            probe = Probe(batch).to(device, dtype)
            (replica,) = replicas(module, dtype=dtype, training=True)
            with collectives_refused(trainer), RaisedPrecision(dtype):
                for objective in objectives_of(*run_step(replica, probe.inputs, trainer)):
                    torch.autograd.backward(objective, retain_graph=True)
            return frozenset(name for name, parameter in replica.named_parameters() if parameter.grad is not None)
    except Exception:  # Whatever a step raises that is run by itself.
        return frozenset()


@dataclass(frozen=True, eq=False)
class StepRun:
    """One run of the training step of a copy.

    Attributes:
        probe: The whole batch as inputs.
        objectives: The losses that the step minimizes, one after the other.
        operations: The operations of the step in their order; empty where they were not recorded.
    """

    replica: nn.Module
    probe: Probe
    calls: list[Call]
    objectives: list[Tensor]
    operations: list[Hashable] = field(default_factory=list)

    @classmethod
    def recorded(cls, module: nn.Module, probe: Probe, trainer: Any) -> "StepRun":
        """Run the step as `of` does, and record its operations where this is possible."""
        try:
            with OperationSequence() as sequence:
                run = cls.of(module, probe, trainer)
        except Exception:  # Torch 2.13 makes no tensor of a subclass while operations are recorded.
            return cls.of(module, probe, trainer)
        return replace(run, operations=sequence.operations)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        probe: Probe,
        trainer: Any,
        *,
        batch_idx: int = 0,
        is_moved: bool = False,
        given: Mapping[int, Tensor] | None = None,
    ) -> "StepRun":
        """Run the step of a copy: also of another batch, with moved parameters, or with outputs that are given."""
        (replica,) = replicas(module)
        if is_moved:
            perturb(replica, _PERTURBATION)
        watch, result = run_step(
            replica, map_tensors(Tensor.clone, probe.inputs), trainer, batch_idx=batch_idx, given=given
        )
        objectives = [objective for objective in objectives_of(watch, result) if objective.requires_grad]
        if not objectives:
            raise ValueError("training_step must return a loss or call a backward pass, but did neither")
        return cls(replica, probe, watch.calls, objectives)

    @property
    def total(self) -> Tensor:
        """The loss that the first optimizer minimizes."""
        return self.objectives[0]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the copy, by name."""
        return {name: parameter for name, parameter in self.replica.named_parameters() if parameter.requires_grad}


def run_step(
    module: nn.Module, batch: Any, trainer: Any, *, batch_idx: int = 0, given: Mapping[int, Tensor] | None = None
) -> tuple[StepWatch, Any]:
    """Run the step of a copy to its end, without any effect; return what it called, and what it returned."""
    watch = StepWatch(given=given)
    quiet_step(module, trainer, watch.objectives)
    return watch, watch_step(watch, module, batch, batch_idx)


def watch_step(watch: StepWatch, module: nn.Module, batch: Any, batch_idx: int = 0) -> Any:
    """Run the step of a copy under a watch; return what it returns, ``None`` where the watch ends it."""
    try:
        with watch.modules(module), watch:
            step: Any = module.training_step
            return step(*_arguments(step, batch, batch_idx))
    except LastCall:
        return None


def _arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> list[Any]:
    """Return the batch, its index if the step asks for one, and 0 for every other index."""
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError("a training_step that takes its batches itself (dataloader_iter) cannot be read")
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters.values() if parameter.kind in by_position]
    has_more = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters.values())
    takes_index = len(positional) > 1 or has_more  # As in lightning 2.6.
    others = [0 for parameter in positional[2:] if parameter.default is inspect.Parameter.empty]
    return [batch, *([batch_idx] if takes_index else []), *others]


def batch_size(batch: Any) -> int:
    """Return the number of inputs in a batch."""
    return int(tensors_of(batch)[0].shape[0])


def objectives_of(watch: StepWatch, result: Any) -> list[Tensor]:
    """Return what training minimizes: what the step hands to its own backward passes, else its result."""
    if isinstance(result, Mapping):
        result = result.get("loss")
    return [item for item in watch.objectives or [result] if isinstance(item, Tensor) and item.numel() == 1]


def contributing_calls(run: StepRun) -> list[int]:
    """Return the positions of the losses on which the total depends."""
    losses = {
        index: call.value
        for index, call in enumerate(run.calls)
        if call.is_loss and call.value.requires_grad and call.outputs
    }
    if not losses:
        return []
    ones = torch.ones_like(run.total)
    gradients = torch.autograd.grad(run.total, [*losses.values()], ones, retain_graph=True, allow_unused=True)
    return [
        index
        for index, gradient in zip(losses, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    ]
