"""A copy of a module in float64 or float32, and a place to evaluate it that leaves no trace.

A measurement never runs the user's module. It runs a deep copy in evaluation mode, so that counters, caches,
buffers, metrics and train flags of the original cannot change, whatever happens in between. The numbers of the
weights are the same: float64 holds every float32, float16 and bfloat16 exactly.
"""

import inspect
import random
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from lightning_basin.copying import DeepCopier, parts_of
from lightning_basin.naming import escaped
from lightning_basin.precision import RaisedPrecision


def replicas(
    module: nn.Module, *callables: Any, dtype: torch.dtype = torch.float64, training: bool = False
) -> tuple[Any, ...]:
    """Deep copies in float64 or float32 and evaluation mode, sharing nothing that a forward pass could change.

    Tied parameters stay tied, and what ``module`` and the callables hold of each other is the copy's; see `DeepCopier`.

    Args:
        module: Stays as it is.
        callables: Further callables to copy along, for example a loss module; plain functions and ``None`` stay.
        dtype: Of every floating point tensor of the copies.
        training: Whether the copies are in the mode of training instead: that of ``module`` where this trains, of all
            of its parts where it does not.

    Returns:
        The copy of ``module``, then those of ``callables``.

    Raises:
        ValueError: If a parameter has no shape yet because the module is lazily built.
        TypeError: If a trainable parameter is complex, or a part of the module is scripted or cannot be copied.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> replica, = replicas(layer)
        >>> replica.weight.dtype, layer.weight.dtype, replica.training, layer.training
        (torch.float64, torch.float32, False, True)
    """
    owners = [module, *(owner for owner in map(_owner, callables) if owner is not None)]
    modules = [part for owner in owners for part in owner.modules()]
    for part in modules:
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{type(module).__name__} holds a scripted module, which cannot be looked into: pass the one "
                f"it was scripted from"
            )
    for part in modules:
        _check_parameters(part)
    copier = DeepCopier(dtype)
    originals = {id(part) for owner in owners for part in parts_of(owner)}
    with RaisedPrecision(dtype):  # Objects may copy themselves, and modules act in `eval`, by code of their own.
        copies = [copier.copy(item) for item in (module, *callables)]
        for replica in map(_owner, copies):
            if replica is not None:  # Not by truth: a module may have a length, and that be 0.
                _prepare(replica, originals, training=training, failure=copier.failure)
    inside = {id(part) for part in copies[0].modules()}
    outside = [item for item in copier.weakly_held if id(item) not in inside]
    if outside:  # Nothing else holds these.
        vars(copies[0])["_weakly_held"] = outside
    return tuple(copies)


def _prepare(replica: nn.Module, originals: Collection[int], *, training: bool, failure: str | None) -> None:
    """Make sure that a copy shares nothing with its original, and put it into its mode."""
    for part in parts_of(replica):
        if id(part) in originals:
            shared = f"tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            cause = "" if failure is None else f": {failure}"
            raise TypeError(f"{type(replica).__name__} must be copied, but a copy of it shares its {shared}{cause}")
    if not training:
        replica.eval()
    elif not replica.training:
        replica.train()
    for module in replica.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # Sparse gradients save time in training, and do not fit into a matrix.
            module.scale_grad_by_freq = False  # That is a step size for each row, and no derivative.


def settle_embeddings(module: nn.Module, run: Callable[[], Any]) -> None:
    """Let embeddings with ``max_norm``, which shorten each row when they look it up, do so once and never again.

    Args:
        module: A copy, which is changed.
        run: Runs it on all inputs.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    if any(part.max_norm is not None for part in parts):
        with torch.no_grad():
            run()
        for part in parts:
            part.max_norm = None


def _owner(item: Any) -> nn.Module | None:
    """The module whose state a callable works on."""
    if isinstance(item, partial):
        return _owner(item.func)
    item = item.__self__ if inspect.ismethod(item) else item
    return item if isinstance(item, nn.Module) else None


def _check_parameters(part: nn.Module) -> None:
    for name, parameter in part.named_parameters(recurse=False):
        if is_lazy(parameter):
            raise ValueError(f"parameter {escaped(name)!r} has no shape yet: run one forward pass before measuring")
        if parameter.requires_grad and parameter.is_complex():
            raise TypeError(
                f"trainable parameters must be real, but {escaped(name)!r} is complex: split it into two real ones"
            )


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
    kernel (others have no second derivative), no cuDNN and no checkpoints, ``dtype`` inside of matrix products too.
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
        stack.callback(torch.backends.mha.set_fastpath_enabled, attention_fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.set_default_dtype, default_dtype)  # A module may set it.
        if dtype == torch.float32:
            stack.enter_context(_plain_float32())
        yield
