"""A copy of a module in float64 or float32, and a place to evaluate it that leaves no trace.

A measurement never runs the user's module. It runs a deep copy in evaluation mode, so that counters, caches,
buffers, metrics and train flags of the original cannot change, whatever happens in between. The numbers of the
weights are the same: float64 holds every float32, float16 and bfloat16 exactly.
"""

import copy
import inspect
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from lightning_basin.probe import as_dtype, map_tensors, tensors_of

_RAISED: Mapping[torch.dtype, Mapping[torch.dtype, torch.dtype]] = {
    torch.float64: {
        torch.float16: torch.float64,
        torch.bfloat16: torch.float64,
        torch.float32: torch.float64,
        torch.complex64: torch.complex128,
    },
    torch.float32: {torch.float16: torch.float32, torch.bfloat16: torch.float32},
}
_RAISED_CASTS: Mapping[torch.dtype, Mapping[Callable[..., Any], Callable[..., Any]]] = {
    torch.float64: {
        Tensor.float: Tensor.double,
        Tensor.half: Tensor.double,
        Tensor.bfloat16: Tensor.double,
        Tensor.cfloat: Tensor.cdouble,  # type: ignore[attr-defined]  # not in the stubs of torch 2.13
    },
    torch.float32: {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float},
}
_TENSOR_TYPE = re.compile(r"torch\.(?:cuda\.)?(Float|Half|BFloat16)Tensor")
_TENSOR_TYPES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
_MODULE_ATTRIBUTES = vars(nn.Module()).keys()


def replicas(module: nn.Module, *callables: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Deep copies in float64 or float32 and evaluation mode, sharing nothing that a forward pass could change.

    Tied parameters stay tied, and callables that are modules, or methods of ``module``, follow the copy. An attribute
    that cannot be copied (a lock, an open file) is shared. A compiled module or method is replaced by its original, and
    backward hooks are left out: they change what training does with gradients, not what the module computes.

    Args:
        module: Stays as it is.
        callables: Further callables to copy along, for example a loss module; plain functions and ``None`` stay.
        dtype: Of every floating point tensor of the copies.

    Returns:
        The copy of ``module``, then those of ``callables``.

    Raises:
        ValueError: If a parameter has no shape yet because the module is lazily built.
        TypeError: If a trainable parameter is complex, or a part of the module is scripted.

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
    memo: dict[int, Any] = {}
    for part in modules:
        _remember_tensors(part, memo, dtype)
        _remember_hooks(part, modules, memo)
    for part in reversed(modules):
        if isinstance(part, torch._dynamo.OptimizedModule):
            memo[id(part)] = _deep_copy(part._orig_mod, modules, memo)
    copies = [_deep_copy(module, modules, memo)]
    copies += [_deep_copy(item, modules, memo) if _owner(item) is not None else item for item in callables]
    for replica in map(_owner, copies):
        if replica is None:  # Not by truth: a module may have a length, and that be 0.
            continue
        replica.eval()
        for part in replica.modules():
            _uncompile_methods(part, memo)
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                part.sparse = False  # Sparse gradients save time in training, and do not fit into a matrix.
                part.scale_grad_by_freq = False  # That is a step size for each row, and no derivative.
    return tuple(copies)


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


def _remember_tensors(part: nn.Module, memo: dict[int, Any], dtype: torch.dtype) -> None:
    """Decide what every tensor of a module becomes in its copy, before the copy is made."""
    for name, parameter in part.named_parameters(recurse=False):
        if is_lazy(parameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run one forward pass before measuring")
        if parameter.requires_grad and parameter.is_complex():
            raise TypeError(f"trainable parameters must be real, but {name!r} is complex: split it into two real ones")
        if id(parameter) not in memo:
            value = as_dtype(parameter.detach().clone(), dtype)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for attribute in vars(part).values():
        for tensor in _plain_tensors(attribute):
            # Also saves cached activations, which cannot be deep-copied while they carry a graph.
            memo.setdefault(id(tensor), as_dtype(tensor.detach().clone(), dtype))


def _plain_tensors(attribute: Any) -> Iterator[Tensor]:
    if isinstance(attribute, Tensor):
        if not is_lazy(attribute):
            yield attribute
    elif isinstance(attribute, Mapping):
        for item in attribute.values():
            yield from _plain_tensors(item)
    elif isinstance(attribute, list | tuple | set):
        for item in attribute:
            yield from _plain_tensors(item)


def _remember_hooks(part: nn.Module, modules: list[nn.Module], memo: dict[int, Any]) -> None:
    """Share hooks, except methods of the network itself: what they belong to may hold anything, a trainer too."""
    inside = {id(module) for module in modules}
    for hooks in (part._forward_hooks, part._forward_pre_hooks):
        for hook in hooks.values():
            if not (inspect.ismethod(hook) and id(hook.__self__) in inside):
                memo[id(hook)] = hook
    for backward_hooks in (part._backward_hooks, part._backward_pre_hooks):
        memo[id(backward_hooks)] = OrderedDict()
    compiled_call = vars(part).get("_compiled_call_impl")
    if compiled_call is not None:  # Set by Module.compile(); it would run the original.
        memo[id(compiled_call)] = None


def _uncompile_methods(replica: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy its own methods in place of compiled ones, as in ``self.forward = torch.compile(self.forward)``."""
    for name, attribute in list(vars(replica).items()):
        original = getattr(attribute, "_torchdynamo_orig_callable", None)
        if inspect.ismethod(original):  # It would run the module that was copied.
            vars(replica)[name] = MethodType(original.__func__, memo.get(id(original.__self__), original.__self__))


def _deep_copy(item: Any, modules: list[nn.Module], memo: dict[int, Any]) -> Any:
    try:
        attempt = dict(memo)
        duplicate = copy.deepcopy(item, attempt)
    except Exception:  # Whatever an attribute of the user's raises when it is copied: share it.
        for part in modules:
            for name, attribute in vars(part).items():
                # Never what every module has: a shared dict of hooks would put ours on the original.
                if name not in _MODULE_ATTRIBUTES and id(attribute) not in memo:
                    _share_if_not_copyable(attribute, memo)
        return copy.deepcopy(item, memo)
    memo.update(attempt)
    return duplicate


def _share_if_not_copyable(attribute: Any, memo: dict[int, Any]) -> None:
    try:
        copy.deepcopy(attribute, dict(memo))
    except Exception:
        memo[id(attribute)] = attribute


_MAY_ASK = frozenset([torch.dtype, str, type(torch.FloatTensor)])  # Types of arguments that can ask for a precision.


class _RaisedPrecision(TorchFunctionMode):
    """Turns requests for a precision below that of the evaluation, by dtype or by method, into requests for the latter.

    Attention and normalisation layers often ask for float32 by name (``softmax(..., dtype=torch.float32)``); the
    rounding of that one line would fill the null space.

    Args:
        dtype: Of the evaluation.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._raised_dtypes = _RAISED[dtype]
        self._raised_casts = _RAISED_CASTS[dtype]
        # Autocast leaves float64 alone.
        self._autocast_device_types = ("cpu", "cuda") if dtype == torch.float32 else ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for device_type in self._autocast_device_types:
            if torch.is_autocast_enabled(device_type):  # By the module itself.
                with torch.autocast(device_type, enabled=False):
                    return self.__torch_function__(func, types, args, kwargs)
        func = self._raised_casts.get(func, func)
        # Most calls ask for nothing: thousands of them are in each measurement.
        raised = args if _MAY_ASK.isdisjoint(map(type, args)) else tuple(map(self._raised, args))
        named = {name: self._raised(argument) for name, argument in kwargs.items()} if kwargs else {}
        try:
            return func(*raised, **named)
        except RuntimeError:
            # A constant of the module that the copy did not reach, of lower precision: the same numbers in that of the
            # evaluation.
            tensors = tensors_of((raised, named))
            if not any(tensor.dtype in self._raised_dtypes and not tensor.requires_grad for tensor in tensors):
                raise
            return func(*map_tensors(self._raised_constant, raised), **map_tensors(self._raised_constant, named))

    def _raised_constant(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.requires_grad else as_dtype(tensor, self._dtype)

    def _raised(self, argument: Any) -> Any:
        if isinstance(argument, torch.dtype):
            return self._raised_dtypes.get(argument, argument)
        if isinstance(argument, str | type(torch.FloatTensor)):  # As in tensor.type("torch.FloatTensor").
            name = argument if isinstance(argument, str) else f"{argument.__module__}.{argument.__name__}"
            found = _TENSOR_TYPE.fullmatch(name)
            return argument if found is None else self._raised_dtypes.get(_TENSOR_TYPES[found[1]], argument)
        return argument


class _NoCheckpoint:
    """Takes the place of a reentrant checkpoint: everything is kept."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:  # noqa: FBT001  # as in torch
        return function(*args)


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
    kernel (others have no second derivative), no cuDNN and no reentrant checkpoints, ``dtype`` as default dtype and in
    place of every lower precision, which holds inside of matrix products too.
    Afterwards: the random states of Python, NumPy, torch and ``device`` are as before.

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
        # all of their graph from `torch.autograd.grad`.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(setattr, checkpoint, "CheckpointFunction", checkpoint.CheckpointFunction)
        checkpoint.CheckpointFunction = _NoCheckpoint  # type: ignore[misc,assignment]
        stack.callback(torch.backends.mha.set_fastpath_enabled, attention_fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.set_default_dtype, default_dtype)
        torch.set_default_dtype(dtype)
        if dtype == torch.float32:
            stack.enter_context(_plain_float32())
        stack.enter_context(_RaisedPrecision(dtype))
        yield
