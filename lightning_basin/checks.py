"""What arguments must be: what is of another kind, or out of range, is refused in one sentence before work begins."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_basin.probe import Probe


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is an integer, or any real number where ``kind`` is ``float``; truth is no number."""
    return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    """Whether a value is true or false, and not only taken for it."""
    return isinstance(value, bool | np.bool_)


def check_number(
    name: str,
    value: Any,
    requirement: str,
    holds: Callable[[Any], bool],
    *,
    kind: type = int,
    is_optional: bool = False,
) -> None:
    """Refuse what is no number, or out of range."""
    if is_optional and value is None:
        return
    if not is_number(value, kind):
        noun = "an integer" if kind is int else "a number"
        raise TypeError(f"{name} must be {noun}{' or None' if is_optional else ''}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {requirement}, got {value!r}")


def check_flag(name: str, value: Any, *, is_optional: bool = False) -> None:
    """Refuse what is neither true nor false."""
    if not (is_flag(value) or (is_optional and value is None)):
        raise TypeError(f"{name} must be True{', False or None' if is_optional else ' or False'}, got {value!r}")


def check_function(name: str, value: Any, kind: str, words: Sequence[str]) -> None:
    """Refuse what is neither a function nor one of some words; a class can be called too, and is not meant."""
    requirement = f"{name} must be {kind}{', ' if len(words) > 1 else ' or '}{' or '.join(map(repr, words))}"
    if isinstance(value, str) and value not in words:
        raise ValueError(f"{requirement}, got {value!r}")
    if isinstance(value, type):
        raise TypeError(f"{requirement}, got {_named(value)}: pass an instance of it")
    if not (callable(value) or isinstance(value, str | None)):
        raise TypeError(f"{requirement}, got {type(value).__name__}")


def check_order(module: Any, **others: Any) -> None:
    """Refuse arguments in another order, or of another kind, before anything is done with them."""
    if isinstance(module, type):
        raise TypeError(f"module must be a torch.nn.Module, got the class {module.__name__}: pass an instance of it")
    if not isinstance(module, nn.Module):
        is_swapped = any(isinstance(other, nn.Module) for other in others.values())
        swapped = ": pass the module first, then the inputs" if is_swapped else ""
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}{swapped}")
    if others["behavior"] is module:
        raise TypeError("behavior must be a function of module and inputs, got the module, which is called without it")
    _check_data(others["inputs"], others["targets"])


def _check_data(inputs: Any, targets: Any) -> None:
    if isinstance(inputs, DataLoader | Dataset):
        raise TypeError(
            f"inputs must be a batch, got {type(inputs).__name__}: pass the parts of next(iter(loader)) of a loader"
        )
    if callable(inputs):
        raise TypeError(f"inputs must be data, got {_named(inputs)}: pass the inputs second, and functions by name")
    if callable(targets):
        raise TypeError(f"targets must be data, got {_named(targets)}, which can be called: pass loss_fn=...")
    if isinstance(inputs, Probe) and targets is not None:
        raise TypeError("targets must be None where inputs is a Probe, which has its own: pass Probe(inputs, targets)")


def _named(function: Any) -> str:
    """How a message calls what can be called."""
    return f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__
