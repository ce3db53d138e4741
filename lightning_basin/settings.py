"""What may be asked of a measurement, and checks of it."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_basin.functional.rank import check_rtol
from lightning_basin.network.network import LossFunction, ModuleBehavior, call_module
from lightning_basin.probe import Probe

HESSIAN_MODES = ("auto", "dense", "bracket", "gauss-newton")

HessianMode = Literal["auto", "dense", "bracket", "gauss-newton", False]


@dataclass(frozen=True)
class Probabilities:
    """Probabilities as the behavior whose gradients count: the softmax over the second axis of a module's outputs.

    The loss still takes the outputs themselves.

    Attributes:
        outputs: From the module and the inputs to the outputs, shape ``(k, classes, ...)``.
    """

    outputs: ModuleBehavior = call_module


Behavior = ModuleBehavior | Probabilities | Literal["outputs", "probabilities"]

LayerSelection = Literal["auto", "all"] | Sequence[str]

Precision = Literal["float64", "float32"]
"""What a network is run and differentiated in; everything behind it is computed in float64."""

DTYPES = {"float64": torch.float64, "float32": torch.float32}
"""Floating point types by the names that measurements take."""


def planned_hessian(
    loss_fn: LossFunction | Literal["behavioral"] | None, hessian: HessianMode, dtype: Precision
) -> HessianMode:
    return hessian if loss_fn is not None and dtype == "float64" else False


def check_order(module: Any, **others: Any) -> None:
    """Refuse arguments in another order, or of another kind, before anything is done with them.

    Args:
        module: The first argument of `measure_basin`.
        others: The next four by name.

    Raises:
        TypeError: If they are; it says what to pass.
    """
    modules = {name: part for name, part in others.items() if isinstance(part, nn.Module)}
    if isinstance(module, type):
        raise TypeError(f"module must be a torch.nn.Module, got the class {module.__name__}: pass an instance of it")
    if not isinstance(module, nn.Module):
        swapped = ": pass the module first, then the inputs" if modules else ""
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}{swapped}")
    if not any(True for _ in module.parameters()):
        for name, part in modules.items():
            if any(True for _ in part.parameters()):
                raise TypeError(
                    f"module must have parameters, but {type(module).__name__} has none, and {name}, "
                    f"{type(part).__name__}, has some: pass the one in place of the other"
                )
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
        raise TypeError("targets must be those of the Probe that is passed as inputs: pass Probe(inputs, targets)")


def _named(function: Any) -> str:
    """How a message calls what can be called."""
    return f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__


def check_settings(
    probe: Probe,
    loss_fn: LossFunction | Literal["behavioral"] | None,
    behavior: Behavior | None,
    hessian: HessianMode,
    rtol: float | None,
    duplicate_rtol: float,
    max_outputs: int | Literal["auto"] | None,
    layers: LayerSelection,
    memory_budget: int | None,
    dtype: Precision,
) -> None:
    if hessian is not False and hessian not in HESSIAN_MODES:
        raise ValueError(f"hessian must be one of {HESSIAN_MODES} or False, got {hessian!r}")
    if isinstance(loss_fn, str) and loss_fn != "behavioral":
        raise ValueError(f"loss_fn must be a function of outputs and targets or 'behavioral', got {loss_fn!r}")
    if not (callable(loss_fn) or isinstance(loss_fn, str | None)) or isinstance(loss_fn, type):
        kind = f"{_named(loss_fn)}: pass an instance of it" if isinstance(loss_fn, type) else type(loss_fn).__name__
        raise TypeError(f"loss_fn must be a function of outputs and targets or 'behavioral', got {kind}")
    if not (callable(behavior) or isinstance(behavior, str | Probabilities | None)):
        raise TypeError(
            f"behavior must be a function of module and inputs, 'outputs' or 'probabilities', got "
            f"{type(behavior).__name__}"
        )
    if isinstance(behavior, str) and behavior not in ("outputs", "probabilities"):
        raise ValueError(
            f"behavior must be a function of module and inputs, 'outputs' or 'probabilities', got {behavior!r}"
        )
    check_rtol(rtol)
    check_precision(dtype, hessian, rtol)
    _check_types(duplicate_rtol, max_outputs, layers, memory_budget)
    if not 0.0 <= duplicate_rtol < 1.0:
        raise ValueError(f"duplicate_rtol must be inside [0, 1), got {duplicate_rtol}")
    if isinstance(max_outputs, str) and max_outputs != "auto":
        raise ValueError(f"max_outputs must be a number, 'auto' or None, got {max_outputs!r}")
    if isinstance(max_outputs, int) and max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1, got {max_outputs}")
    if callable(loss_fn) and probe.targets is None:
        is_pair = isinstance(probe.inputs, tuple | list) and len(probe.inputs) == 2  # noqa: PLR2004
        raise ValueError(
            f"a loss_fn needs targets to compare the outputs with, got none: pass targets, or no loss_fn"
            f"{'; inputs is a pair: if it is one of inputs and targets, pass these apart' if is_pair else ''}"
        )


def check_precision(dtype: Precision, hessian: HessianMode, rtol: float | None) -> None:
    """Refuse what cannot be told in a floating point type.

    Raises:
        ValueError: If ``dtype`` is not one that networks are evaluated in, or too coarse for what is asked.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
    if dtype == "float64":
        return
    if hessian not in ("auto", False):
        raise ValueError(
            f"hessian must be 'auto' or False with dtype='float32', whose second derivatives do not resolve a null "
            f"space, got {hessian!r}"
        )
    epsilon = torch.finfo(torch.float32).eps
    if rtol is not None and rtol < epsilon:
        raise ValueError(
            f"rtol must be at least {epsilon:.1e} with dtype='float32', whose rounding that is, got {rtol}"
        )


def _check_types(duplicate_rtol: Any, max_outputs: Any, layers: Any, memory_budget: Any) -> None:
    if not is_number(duplicate_rtol, float):
        raise TypeError(f"duplicate_rtol must be a number, got {duplicate_rtol!r}")
    if not isinstance(max_outputs, str | None) and not is_number(max_outputs, int):
        raise TypeError(f"max_outputs must be an integer, 'auto' or None, got {max_outputs!r}")
    if not isinstance(layers, Sequence) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be 'auto', 'all' or a list of names of layers, got {layers!r}")
    check_memory_budget(memory_budget)


def check_memory_budget(memory_budget: Any) -> None:
    """Refuse what is no number of bytes.

    Raises:
        TypeError: If that is so.
        ValueError: If it is a number that counts nothing.
    """
    if memory_budget is None:
        return
    if not is_number(memory_budget, float):
        raise TypeError(f"memory_budget must be a number of bytes or None, got {memory_budget!r}")
    if not math.isfinite(memory_budget):
        raise ValueError(
            f"memory_budget must be a finite number of bytes, got {memory_budget}: pass 2**60 for no limit"
        )


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is an integer, or any real number where ``kind`` is ``float``; truth is no number."""
    return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
