"""Contexts in which a copy is evaluated without a trace in the process or in the original."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.utils import checkpoint

from lightning_basin.naming import escaped


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Refuse that this thread runs a module or one of its submodules, while a copy is measured.

    A copy may find its original in places that are not copied, as in a global variable.
    """
    names = {id(submodule): name for name, submodule in module.named_modules()}
    thread = threading.get_ident()

    def refuse(called: nn.Module, _: Any) -> None:
        if id(called) in names and threading.get_ident() == thread:
            name = escaped(names[id(called)])
            raise ValueError(
                f"a copy of the module is measured, but {f'the submodule {name!r}' if name else 'the module'} itself "
                f"is run, found in a global variable or through the trainer: use the module that is passed in"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class _NoCheckpoint:
    """Takes the place of a reentrant checkpoint: all activations are kept."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:  # noqa: FBT001  # as in torch
        return function(*args)


def _no_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    """Take the place of the generator around any other checkpoint: all activations are kept."""
    yield


def _exchange(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and put it back when a stack is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@contextmanager
def _plain_float32() -> Iterator[None]:
    """Multiply float32 in float32: without TF32 or bfloat16, which Lightning advises to allow, and foreign kernels.

    The kernels of oneDNN hide the products of recurrent layers, as cuDNN does, and round in other precisions. The
    convolutions of NNPACK are off by twenty times the rounding of a sum.
    """
    backends: Any = torch.backends  # Its attributes are not in the stubs of torch 2.13.
    with ExitStack() as stack:
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        _exchange(stack, backends.mkldnn, "enabled", False)  # noqa: FBT003 - the value of the flag
        for owner in (backends, backends.cuda.matmul):  # The second follows the first, unless it was set itself.
            if owner.fp32_precision not in ("none", "ieee"):
                _exchange(stack, owner, "fp32_precision", "ieee")
        yield


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    """Put the random state of torch, on the CPU and on a device, back."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if device.type == "mps":
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


@contextmanager
def isolated_evaluation(device: torch.device, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Evaluate in float64 or float32 with gradients, and put every global state back, also when the body raises.

    Inside, gradients are on; inference mode, autocast, anomaly detection, compilation, cuDNN, checkpoints and cached
    parametrizations are off; attention runs by its formula, as other kernels have no second derivative; and matrix
    products are computed in ``dtype``. Code of the user needs `RaisedPrecision` around it, too.
    Afterwards, the random states of Python, NumPy, torch and ``device`` are as before. These belong to the process:
    numbers that another thread draws from them meanwhile are drawn again.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    default_dtype = torch.get_default_dtype()
    attention_fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_kept_random_state(device))
        stack.callback(random.setstate, python_state)
        stack.callback(np.random.set_state, numpy_state)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for device_type in {"cpu", device.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # The recurrent kernels of cuDNN hide their products and have no second derivative. Reentrant checkpoints hide
        # their graph from `torch.autograd.grad`; others run again in a backward pass, outside of all modes.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        _exchange(stack, checkpoint, "CheckpointFunction", _NoCheckpoint)
        _exchange(stack, checkpoint, "_checkpoint_without_reentrant_generator", _no_checkpoint)
        # The cache finds a value by the id of the original module, also for its copy.
        _exchange(stack, parametrize, "_cache_enabled", 0)
        _exchange(stack, parametrize, "_cache", {})
        stack.callback(torch.backends.mha.set_fastpath_enabled, attention_fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.set_default_dtype, default_dtype)  # A module may set it.
        if dtype == torch.float32:
            stack.enter_context(_plain_float32())
        yield
