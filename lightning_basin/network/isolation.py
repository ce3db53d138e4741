"""A place to evaluate a copy that leaves no trace."""

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
    """Refuse that a module, or a part of it, is run by this thread: a copy of it is.

    Args:
        module: Found by what runs inside in a place to which the copy was not followed, a global variable say.
    """
    names = {id(part): name for name, part in module.named_modules()}
    thread = threading.get_ident()

    def refuse(part: nn.Module, _: Any) -> None:
        if id(part) in names and threading.get_ident() == thread:
            name = escaped(names[id(part)])
            raise ValueError(
                f"a copy of the module is measured, but {f'its part {name!r}' if name else 'the module'} itself is "
                f"run, found in a global variable or through the trainer: use the module that is passed in"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class _NoCheckpoint:
    """Takes the place of a reentrant checkpoint: everything is kept."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:  # noqa: FBT001  # as in torch
        return function(*args)


def _no_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    """Takes the place of what runs around the function of any other checkpoint: everything is kept."""
    yield


@contextmanager
def _plain_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside of products of float32, which Lightning advises to allow, and no foreign kernels.

    Those of oneDNN hide the products of recurrent layers, as those of cuDNN do, and have precisions of their own. The
    convolutions of NNPACK are off by twenty times the rounding of a sum.
    """
    backends: Any = torch.backends  # Whose parts are not in the stubs of torch 2.13.
    with ExitStack() as stack:
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        stack.callback(setattr, backends.mkldnn, "enabled", backends.mkldnn.enabled)
        backends.mkldnn.enabled = False
        for place in (backends, backends.cuda.matmul):  # The second follows the first where it is not set itself.
            before = place.fp32_precision
            if before not in ("none", "ieee"):
                stack.callback(setattr, place, "fp32_precision", before)
                place.fp32_precision = "ieee"
        yield


@contextmanager
def isolated_evaluation(device: torch.device, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Evaluate in float64 or float32 with gradients, and put every global state back, also when the body raises.

    Inside: gradients on, inference mode, autocast, anomaly detection and compilation off, the mathematical attention
    kernel (others have no second derivative), no cuDNN, no checkpoints and no cached parametrizations, ``dtype`` inside
    of matrix products too.
    What runs code of the user enters `RaisedPrecision` for it.
    Afterwards: the random states of Python, NumPy, torch and ``device`` are as before. These belong to the process, so
    that what another thread draws from them meanwhile is drawn again.

    Args:
        device: Where the evaluation runs.
        dtype: In which.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    default_dtype = torch.get_default_dtype()
    attention_fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(random.setstate, python_state)
        stack.callback(np.random.set_state, numpy_state)
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for device_type in {"cpu", device.type}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # The recurrent kernels of cuDNN hide their products and have no second derivative; reentrant checkpoints hide
        # all of their graph from `torch.autograd.grad`, others run again in a backward pass, where no mode is.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(setattr, checkpoint, "CheckpointFunction", checkpoint.CheckpointFunction)
        checkpoint.CheckpointFunction = _NoCheckpoint  # type: ignore[misc,assignment]
        generator = checkpoint._checkpoint_without_reentrant_generator
        stack.callback(setattr, checkpoint, "_checkpoint_without_reentrant_generator", generator)
        checkpoint._checkpoint_without_reentrant_generator = _no_checkpoint
        # It is found by the module that was parametrized first, of which this is a copy.
        for name, empty in (("_cache_enabled", 0), ("_cache", {})):
            stack.callback(setattr, parametrize, name, getattr(parametrize, name))
            setattr(parametrize, name, empty)
        stack.callback(torch.backends.mha.set_fastpath_enabled, attention_fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.set_default_dtype, default_dtype)  # A module may set it.
        if dtype == torch.float32:
            stack.enter_context(_plain_float32())
        yield
