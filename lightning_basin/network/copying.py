"""Deep copies of modules, and of whatever these hold, that lead nowhere back to the original."""

import copy
import functools
import logging
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from io import IOBase
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_basin.network.remedies import is_out_of_memory
from lightning_basin.tensors import as_dtype

_IMMUTABLE: frozenset[type] = frozenset(
    [
        *(type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range, property),
        *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, types.CodeType, types.ModuleType),
    ]
)
_SHARED: tuple[type, ...] = (
    *(type, Dataset, DataLoader, Sampler, Optimizer, LRScheduler),
    *(threading.Thread, BaseProcess, Executor, IOBase, logging.Logger),
)
_SHARED_PACKAGES = frozenset(["lightning", "pytorch_lightning", "lightning_fabric"])


class DeepCopier:
    """Copies objects into objects of one precision that share no state with them.

    ``copy.deepcopy`` keeps a way back to the original in closures, methods of built-in objects, caches of functions
    and weak references; in the copies made here, all of these belong to the copies. Tensors lose their graph, and begin
    another one where they had one. An object that cannot be copied (a lock) is shared, but the object that holds it is
    copied. The copy of a generator, or of a pass over a loader, raises when the next item is asked for, as the original
    goes on with the items. A module that refuses to be copied, or returns itself, is copied attribute by attribute.

    Objects that are large or do not belong to the computation are shared: data sets and their loaders, optimizers,
    threads, processes, files, and what Lightning builds a run from (trainer, loops, strategies, loggers, data modules).
    So are functions that can be imported, and objects with a finalizer (``__del__``) and no tensors: the finalizer
    of a copy would release what the original still uses.

    A compiled module or function is replaced by its original. Backward hooks are left out: they change what training
    does with gradients, not what the module computes.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # Alive, so that no other object gets the identity of one of them.
        self.weakly_held: list[Any] = []
        """Copies to which weak references lead; nothing else may keep them alive."""
        self.computed: list[Tensor] = []
        """Leaves of the new graphs, for originals that were computed from parameters."""
        self.failure: str | None = None
        """Why the first object that could not be copied could not be copied."""

    def copy(self, item: Any) -> Any:
        """Copy an object; every call returns the same copy of it."""
        if type(item) in _IMMUTABLE:
            return item
        if id(item) not in self._copies:
            duplicate = self._copy(item)
            if id(item) not in self._copies:  # Else something in it has led to it again.
                self._remember(item, duplicate)
        return self._copies[id(item)]

    def _remember(self, item: Any, duplicate: Any) -> Any:
        self._copies[id(item)] = duplicate
        self._originals.append(item)
        return duplicate

    def _copy(self, item: Any) -> Any:
        copy_kind = _COPY_KIND.get(type(item))
        if copy_kind is not None:
            return copy_kind(self, item)
        if isinstance(item, Tensor):
            return self._copy_tensor(item)
        if isinstance(item, nn.Module):
            return self._copy_module(item)
        if isinstance(item, types.GeneratorType | _BaseDataLoaderIter):
            return _UsedElsewhere(type(item).__name__)
        return item if _is_shared(item) else self._copy_object(item)

    def _copy_tensor(self, item: Tensor) -> Tensor:
        if is_lazy(item):
            return copy.deepcopy(item)
        # A subclass may need attributes for `to` that it has lost; and a mode around the copy would delay each call.
        with torch._C.DisableTorchFunction():
            detached = item.detach()
            value = as_dtype(detached, self._dtype)
            value = value.clone() if value is detached else value  # Another type is a copy already.
            if item.grad_fn is not None:
                with torch.enable_grad():
                    self.computed.append(value.requires_grad_())
                    value = value.clone()  # A module may write into what it keeps.
        if isinstance(item, nn.Parameter):
            return nn.Parameter(value, requires_grad=item.requires_grad)
        if type(value) is not type(item):
            value = value.as_subclass(type(item))
            vars(value).update(self.copy(vars(item)))
        return value

    def _copy_module(self, item: nn.Module) -> nn.Module:
        if isinstance(item, torch._dynamo.OptimizedModule):
            return self.copy(item._orig_mod)  # type: ignore[no-any-return]
        for hooks in (item._backward_hooks, item._backward_pre_hooks):
            self._remember(hooks, OrderedDict())
        compiled_call = vars(item).get("_compiled_call_impl")
        if compiled_call is not None:  # Set by Module.compile(); it would run the original.
            self._remember(compiled_call, None)
        method = getattr(type(item), "__deepcopy__", None)
        if method is None:
            return self._copy_object(item)  # type: ignore[no-any-return]
        num_copies = len(self._copies)
        if method.__module__ != nn.utils.parametrize.__name__:
            # The method calls `copy.deepcopy`, which refuses tensors with a graph, and leaves the precision as it is.
            for tensor in (tensor for module in item.modules() for tensor in tensors_held_by(vars(module))):
                self.copy(tensor)
            duplicate = self._copy_object(item)
            if _is_separate(duplicate, item):
                return duplicate  # type: ignore[no-any-return]
            self._forget(num_copies)
        made: nn.Module = self._remember(item, object.__new__(type(item)))
        for name, attribute in vars(item).items():
            vars(made)[name] = self.copy(attribute)
        return made

    def _copy_object(self, item: Any) -> Any:
        """Copy an object as ``copy.deepcopy`` does it; where this fails, return the object itself."""
        num_copies = len(self._copies)
        methods = [item.__deepcopy__] if hasattr(type(item), "__deepcopy__") else []
        for method in (*methods, lambda _: self._rebuild(item, item.__reduce_ex__(4))):
            try:
                return method(self._copies)
            except Exception as error:  # noqa: PERF203 - whatever an object raises
                if is_out_of_memory(error) or isinstance(error, RecursionError):
                    raise
                self._forget(num_copies)
                failure = f"copying {type(item).__name__} failed with {type(error).__name__}: {error}"
        self.failure = self.failure or failure
        return item

    def _forget(self, num_copies: int) -> None:
        """Forget all copies but so many, the first ones."""
        while len(self._copies) > num_copies:
            self._copies.popitem()

    def _rebuild(self, item: Any, reduced: str | tuple[Any, ...]) -> Any:
        """Make an object anew from copies of what the pickle protocol reduces it to."""
        if isinstance(reduced, str):  # The name of a global object.
            return item
        make, arguments, state, elements, pairs = (*reduced, None, None, None)[:5]
        made = self._remember(item, make(*map(self.copy, arguments)))
        if state is not None:
            state = self.copy(state)
            if hasattr(type(made), "__setstate__"):
                made.__setstate__(state)
            else:
                state, slots = state if isinstance(state, tuple) else (state, None)
                vars(made).update(state or {})
                for name, value in (slots or {}).items():
                    setattr(made, name, value)
        for element in elements or ():
            made.append(self.copy(element))
        for key, value in pairs or ():
            made[self.copy(key)] = self.copy(value)
        return made

    def _copy_function(self, item: types.FunctionType) -> Any:
        if _is_importable(item):
            return item
        if hasattr(item, "_torchdynamo_orig_callable"):
            return self.copy(item._torchdynamo_orig_callable)
        closure = self.copy(item.__closure__)
        if id(item) in self._copies:  # It is in its own closure.
            return self._copies[id(item)]
        made = types.FunctionType(item.__code__, item.__globals__, item.__name__, None, closure)
        self._remember(item, made)
        for name in ("__defaults__", "__kwdefaults__", "__dict__", "__module__", "__qualname__", "__doc__"):
            setattr(made, name, self.copy(getattr(item, name)))
        return made

    def _copy_cell(self, item: types.CellType) -> types.CellType:
        made: types.CellType = self._remember(item, types.CellType())
        try:
            contents = item.cell_contents
        except ValueError:  # Nothing was assigned yet.
            return made
        made.cell_contents = self.copy(contents)
        return made

    def _copy_builtin(self, item: types.BuiltinFunctionType) -> Any:
        owner = self.copy(item.__self__)
        return item if owner is item.__self__ else getattr(owner, item.__name__)

    def _copy_reference(self, item: Any) -> Any:
        is_proxy = not isinstance(item, weakref.ref)
        target = item.__repr__.__self__ if is_proxy else item()  # A proxy hands on whatever it is asked for.
        duplicate = self.copy(target)
        if duplicate is target:
            return item
        self.weakly_held.append(duplicate)
        return weakref.proxy(duplicate) if is_proxy else type(item)(duplicate)

    def _copy_weak_collection(self, item: Any) -> Any:
        made = self._remember(item, type(item)())
        held = self.copy(set(item) if isinstance(item, weakref.WeakSet) else dict(item))
        self.weakly_held.append(held)
        made.update(held)
        return made


_COPY_KIND: Mapping[type, Any] = {
    **dict.fromkeys(
        (dict, OrderedDict), lambda copier, item: copier._rebuild(item, (type(item), (), None, None, item.items()))
    ),
    set: lambda copier, item: set(map(copier.copy, item)),
    list: lambda copier, item: copier._rebuild(item, (list, (), None, item)),
    tuple: lambda copier, item: tuple(map(copier.copy, item)),
    types.FunctionType: DeepCopier._copy_function,
    types.CellType: DeepCopier._copy_cell,
    types.MethodType: lambda copier, item: types.MethodType(copier.copy(item.__func__), copier.copy(item.__self__)),
    types.BuiltinFunctionType: DeepCopier._copy_builtin,
    functools._lru_cache_wrapper: lambda copier, item: functools.lru_cache(**item.cache_parameters())(
        copier.copy(item.__wrapped__)
    ),
    # Without the threads that wait at the original: a copy would wake them.
    threading.Condition: lambda copier, item: threading.Condition(copier.copy(vars(item)["_lock"])),
    **dict.fromkeys(
        (weakref.ref, weakref.WeakMethod, weakref.ProxyType, weakref.CallableProxyType), DeepCopier._copy_reference
    ),
    **dict.fromkeys(
        (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet), DeepCopier._copy_weak_collection
    ),
}
"""How objects of some exact types are copied."""


class _UsedElsewhere(Iterator[Any]):
    """Takes the place of an iterator in a copy, as the original goes on with it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __next__(self) -> Any:
        raise TypeError(
            f"a copy must not take the next item of an iterator that training goes on with, but asks a {self._kind}: "
            f"keep what can be copied, as a list and a position or a random.Random"
        )


def _is_shared(item: Any) -> bool:
    if isinstance(item, _SHARED):
        return True
    kinds = {kind.__name__ for kind in type(item).__mro__ if kind.__module__.partition(".")[0] in _SHARED_PACKAGES}
    if kinds - {"HyperparametersMixin"}:
        return "Callback" not in kinds and not isinstance(item, dict)  # A hook may be a method of a callback.
    return hasattr(type(item), "__del__") and not any(tensors_held_by(getattr(item, "__dict__", None)))


def _is_importable(function: types.FunctionType) -> bool:
    """Whether a function can be imported by its name, as a function inside of another one cannot."""
    item: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        item = getattr(item, name, None)
    return item is function


def _is_separate(duplicate: Any, item: nn.Module) -> bool:
    if not isinstance(duplicate, nn.Module):
        return False
    return {id(member) for member in members_of(duplicate)}.isdisjoint(id(member) for member in members_of(item))


def members_of(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """Yield the modules, parameters and buffers of a module, the module itself among them."""
    yield from module.modules()
    yield from module.parameters()
    yield from module.buffers()


def tensors_held_by(attribute: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, but none of a module or another object in them."""
    if isinstance(attribute, Tensor):
        if not is_lazy(attribute):
            yield attribute
    elif type(attribute) in _IMMUTABLE:
        return
    elif isinstance(attribute, dict | Mapping):  # A dict is recognized faster.
        for item in attribute.values():
            yield from tensors_held_by(item)
    elif isinstance(attribute, list | tuple | set):
        for item in attribute:
            yield from tensors_held_by(item)
