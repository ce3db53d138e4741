"""The outputs of a training step: what its losses take, or one of its modules returns to it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.callback.step_run import batch_size, watch_step
from lightning_basin.callback.step_watch import Call, StepWatch
from lightning_basin.tensors import map_tensors


def step_behavior(calls: Sequence[int]) -> Callable[[nn.Module, Any], Tensor]:
    """Return the behavior that runs a training step up to its outputs.

    Args:
        calls: The positions, among all calls of the step, of those that have the outputs.

    Returns:
        A function of a copy with a ``training_step``, and of a batch of k inputs. It returns a single tensor of k rows
        as it is, else all side by side, shape ``(k, c)``; it raises a ValueError if the step calls fewer losses or
        modules than at first, or their outputs have no rows of k inputs.
    """
    return partial(_outputs_of_step, calls=tuple(calls))


def _outputs_of_step(module: nn.Module, batch: Any, *, calls: Sequence[int]) -> Tensor:
    if not torch.is_grad_enabled():  # By their gradients outputs are known.
        with torch.enable_grad():
            return _outputs_of_step(module, batch, calls=calls).detach()
    watch = StepWatch(last=max(calls))
    watch_step(watch, module, map_tensors(Tensor.clone, batch))
    return join_outputs(distinct_outputs(select_calls(watch.calls, calls)), batch_size(batch))


def select_calls(calls: Sequence[Call], positions: Sequence[int]) -> list[Call]:
    """Return the calls at some positions.

    Raises:
        ValueError: If there are fewer calls.
    """
    if len(calls) <= max(positions):
        raise ValueError(
            f"training_step must call {max(positions) + 1} losses or modules as at first, but calls {len(calls)}"
        )
    return [calls[position] for position in positions]


def distinct_outputs(calls: Sequence[Call]) -> list[Tensor]:
    """Return the tensors of some calls that have a gradient, each once."""
    return list({id(tensor): tensor for call in calls for tensor in call.outputs}.values())


def join_outputs(outputs: Sequence[Tensor], num_inputs: int) -> Tensor:
    """Return a single tensor of ``num_inputs`` rows as it is, else all tensors side by side, shape ``(num_inputs, c)``.

    Raises:
        ValueError: If there is no tensor, or one whose rows are not those of ``num_inputs`` inputs.
    """
    if len(outputs) == 1 and outputs[0].ndim and outputs[0].shape[0] == num_inputs:
        return outputs[0]
    if not outputs:
        raise ValueError("outputs must have a gradient, got none")
    for tensor in outputs:
        if tensor.ndim == 0 or tensor.shape[0] % num_inputs:
            raise ValueError(f"outputs must have rows of all {num_inputs} inputs, got shape {tuple(tensor.shape)}")
    return torch.cat([tensor.reshape(num_inputs, -1) for tensor in outputs], 1)
