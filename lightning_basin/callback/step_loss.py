"""The loss of a training step as a function of outputs and targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_basin.callback.step_run import objectives_of, run_step
from lightning_basin.callback.step_watch import Call, Place
from lightning_basin.tensors import map_tensors, tensors_of


@dataclass(frozen=True, eq=False)
class StepLoss:
    """The losses that a training step calls, as a function of the outputs that it calls them with.

    Attributes:
        calls: The functions with positional and keyword arguments, in which places stand for outputs and targets.
        weights: The factors of the values in the sum.
        shapes: The shapes of the outputs.
        num_inputs: The number of inputs, k.
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

    Attributes:
        module: The module with the step; measured together, loss and behavior have one copy of it.
        trainer: The trainer; ``None`` outside of a fit.
        calls: The positions of the outputs among all calls.
        shapes: The shapes of the outputs.
        num_inputs: The number of inputs, k.
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
