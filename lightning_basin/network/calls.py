"""Calls of a user's module on the inputs of a probe."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.remedies import cause, is_out_of_memory, remedy
from lightning_basin.network.trace import as_plain
from lightning_basin.probe import Probe
from lightning_basin.tensors import dense_form, described, map_tensors, tensors_of

ModuleBehavior = Callable[[nn.Module, Any], Tensor]
"""A function of a module and the inputs of a probe that returns the outputs, one row per input."""

LossFunction = Callable[[Tensor, Any], Tensor]
"""A function of the outputs and the targets of a probe that returns a scalar."""


def call_module(module: nn.Module, inputs: Any) -> Any:
    """Call a module on the inputs of a probe, unpacked as its ``forward`` takes them.

    A dict whose keys are parameters of ``forward`` becomes keyword arguments. A tuple or list that fits the positional
    parameters becomes positional arguments. Anything else is passed as one argument.
    """
    signature = inspect.signature(module.forward)
    names = set(signature.parameters)
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        # With **kwargs every dict would bind: then one key must name a parameter, or no single argument be possible.
        if _binds(signature, **inputs) and (names & set(inputs) or not _binds(signature, inputs)):
            return module(**inputs)
    elif isinstance(inputs, tuple | list) and _binds(signature, *inputs):
        return module(*inputs)
    return module(inputs)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def call_behavior(behavior: ModuleBehavior, module: nn.Module, probe: Probe, dtype: torch.dtype) -> Any:
    """Call a behavior on the inputs of a probe; what it raises becomes a ValueError, unless memory has run out."""
    try:
        inputs = map_tensors(Tensor.clone, probe.inputs)  # A module may write to its input.
        with RaisedPrecision(dtype):
            return behavior(module, inputs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"calling the module on the inputs failed with {cause(error)}; {remedy(error, tensors_of(probe.inputs))}"
        ) from error


def checked_outputs(outputs: Any, num_inputs: int) -> Tensor:
    """Return what a behavior returned, as a plain tensor with one row per input, or refuse it."""
    hint = "pass behavior=lambda module, inputs: ... that returns one row of outputs per input"
    if not isinstance(outputs, Tensor):
        raise TypeError(f"the outputs must be a tensor, got {described(outputs)}: {hint}")
    if (dense := dense_form(outputs)) is not None:
        raise TypeError(f"the outputs must be dense, got {dense[0]}: pass a behavior that returns outputs.{dense[1]}")
    rows: Tensor = as_plain(outputs)
    if not rows.is_floating_point():
        result = "torch.view_as_real of them" if rows.is_complex() else "the numbers from which they are made"
        raise TypeError(
            f"the outputs must be floating point numbers, got {rows.dtype}: pass behavior=lambda module, "
            f"inputs: ... that returns {result}"
        )
    if rows.ndim == 0 or rows.shape[0] != num_inputs:
        raise ValueError(
            f"the outputs must have one row for each of the {num_inputs} inputs, got shape {tuple(rows.shape)}: {hint}"
        )
    return rows
