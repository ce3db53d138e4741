"""Deep copies that lead nowhere back to the original, of modules and whatever these hold."""

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
_CALLABLES = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_MISSING = object()


class _NotToBeUsed(Iterator[Any]):
    """Stands in for an iterator that the original goes on with."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __next__(self) -> Any:
        raise TypeError(
            f"a copy must not take the next item of an iterator that training goes on with, but asks a {self._kind}: "
            f"keep what can be copied, as a list and a position or a random.Random"
        )


class DeepCopier:
    """Copies objects, in one precision, into others that share nothing with them that a call could change.

    Where ``copy.deepcopy`` keeps a way back to the original, this follows it: closures get cells of their own, methods
    of built-in objects, caches of functions and weak references belong to the copies. Tensors lose their graph, and
    begin one of their own where they had one. What cannot be copied (a lock) is shared, by itself, and not together
    with the object that holds it. A generator and a pass over a loader, which end by being used, give nothing to a
    copy: asking it for the next item raises. A module that refuses to be copied, or returns itself, is copied
    attribute by attribute.

    Shared, and not looked into, are what is large or does not belong to the computation: data sets and their loaders,
    optimizers, threads, processes, files, and what Lightning builds a run from (trainer, loops, strategies, loggers,
    data modules). So are objects with a finalizer (``__del__``) and no tensors, as that of a copy would release what
    the original still uses, and functions that are found under their name in their module.

    A compiled module or function is replaced by its original, and backward hooks are left out: they change what
    training does with gradients, not what the module computes.

    Args:
        dtype: Of every floating point tensor of the copies.

    Example:
        >>> calls = []
        >>> note = DeepCopier().copy(calls.append)
        >>> note(1), calls
        (None, [])
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # Alive, so that no other object gets the identity of one of them.
        self.weakly_held: list[Any] = []
        """Copies that weak references lead to: nothing else may keep them alive."""
        self.computed: list[Tensor] = []
        """Leaves of the graphs of those copies whose originals were computed from parameters before."""
        self.failure: str | None = None
        """Why the first object that could not be copied could not be."""

    def copy(self, item: Any) -> Any:
        """The copy of an object, the same one at every call."""
        if type(item) in _IMMUTABLE:
            return item
        if type(item) in (weakref.ProxyType, weakref.CallableProxyType):
            return self._proxy(item)
        known = self._memo.get(id(item), _MISSING)
        return self._remember(item, self._copied(item)) if known is _MISSING else known

    def _remember(self, item: Any, duplicate: Any) -> Any:
        self._memo[id(item)] = duplicate
        self._originals.append(item)
        return duplicate

    def _copied(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._tensor(item)
        if isinstance(item, nn.Module):
            return self._module(item)
        special = _SPECIAL.get(type(item))
        if special is not None:
            return special(self, item)
        if isinstance(item, types.GeneratorType | _BaseDataLoaderIter):
            return _NotToBeUsed(type(item).__name__)
        if _is_shared(item):
            return item
        if isinstance(item, weakref.ref):
            return self._reference(item)
        return self._object(item)

    def _tensor(self, item: Tensor) -> Tensor:
        if is_lazy(item):
            return copy.deepcopy(item)
        with torch._C.DisableTorchFunctionSubclass():  # A subclass may need attributes for `to` that it has lost.
            detached = item.detach()
            value = as_dtype(detached, self._dtype)
            value = detached.clone() if value is detached else value
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

    def _module(self, item: nn.Module) -> nn.Module:
        if isinstance(item, torch._dynamo.OptimizedModule):
            return self.copy(item._orig_mod)  # type: ignore[no-any-return]
        for hooks in (item._backward_hooks, item._backward_pre_hooks):
            self._remember(hooks, OrderedDict())
        compiled_call = vars(item).get("_compiled_call_impl")
        if compiled_call is not None:  # Set by Module.compile(); it would run the original.
            self._remember(compiled_call, None)
        own = getattr(type(item), "__deepcopy__", None)
        if own is not None:  # It calls `copy.deepcopy`, which leaves graphs, and numbers as they are.
            for tensor in (tensor for part in item.modules() for tensor in tensors_held_by(vars(part))):
                self.copy(tensor)
        size = len(self._memo)
        if getattr(own, "__module__", None) != nn.utils.parametrize.__name__:
            duplicate = self._object(item)
            if own is None or _is_separate(duplicate, item):
                return duplicate  # type: ignore[no-any-return]
            self._forget(size)
        made = self._remember(item, object.__new__(type(item)))
        for name, attribute in vars(item).items():
            vars(made)[name] = self.copy(attribute)
        return made  # type: ignore[no-any-return]

    def _object(self, item: Any) -> Any:
        """As ``copy.deepcopy`` does it; the object itself where that fails."""
        size = len(self._memo)
        if hasattr(type(item), "__deepcopy__"):
            try:
                return item.__deepcopy__(self._memo)
            except Exception as error:  # Whatever an object raises: it may still have a state to copy.
                if _is_of_the_machine(error):
                    raise
                self._forget(size)
        try:
            return self._reconstructed(item)
        except Exception as error:  # There is no way to copy it.
            if _is_of_the_machine(error):
                raise
            self._forget(size)
            if self.failure is None:
                self.failure = f"copying {type(item).__name__} failed with {type(error).__name__}: {error}"
            return item

    def _forget(self, size: int) -> None:
        """What was copied since there were so many copies."""
        while len(self._memo) > size:
            self._memo.popitem()

    def _reconstructed(self, item: Any) -> Any:
        reduced = item.__reduce_ex__(4)
        if isinstance(reduced, str):  # The name of a global object.
            return item
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
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
        for element in items or ():
            made.append(self.copy(element))
        for key, value in pairs or ():
            made[self.copy(key)] = self.copy(value)
        return made

    def _dict(self, item: dict[Any, Any]) -> dict[Any, Any]:
        made: dict[Any, Any] = self._remember(item, type(item)())
        for key, value in item.items():
            made[self.copy(key)] = self.copy(value)
        return made

    def _list(self, item: list[Any]) -> list[Any]:
        if _IMMUTABLE.issuperset(map(type, item)):  # Words of a data set, say, by the million.
            return item.copy()
        made: list[Any] = self._remember(item, [])
        made.extend(map(self.copy, item))
        return made

    def _tuple(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        made = tuple(map(self.copy, item))
        return item if all(new is old for new, old in zip(made, item, strict=True)) else made

    def _set(self, item: set[Any]) -> set[Any]:
        return set(map(self.copy, item))

    def _function(self, item: types.FunctionType) -> Any:
        if _is_global(item):
            return item
        if hasattr(item, "_torchdynamo_orig_callable"):
            return self.copy(item._torchdynamo_orig_callable)
        cells, held = item.__closure__ or (), (item.__defaults__, item.__kwdefaults__)
        if not cells and held == (None, None):
            return item
        # In this order, as a function may be in a cell of its own.
        closure = tuple(self._remember(cell, self._memo.get(id(cell), types.CellType())) for cell in cells)
        made = types.FunctionType(item.__code__, item.__globals__, item.__name__, None, closure)
        self._remember(item, made)
        made.__defaults__, made.__kwdefaults__ = self.copy(held[0]), self.copy(held[1])
        for old, new in zip(cells, closure, strict=True):
            if _content(new) is _MISSING and _content(old) is not _MISSING:
                new.cell_contents = self.copy(old.cell_contents)
        is_stateless = all(
            _content(new) is _content(old) and isinstance(_content(old), _CALLABLES)
            for old, new in zip(cells, closure, strict=True)
        )
        if is_stateless and made.__defaults__ is held[0] and held[1] is None:
            return self._remember(item, item)
        for name in ("__module__", "__qualname__", "__doc__"):
            setattr(made, name, getattr(item, name))
        vars(made).update(self.copy(vars(item)))
        return made

    def _method(self, item: types.MethodType) -> types.MethodType:
        function, owner = self.copy(item.__func__), self.copy(item.__self__)
        is_same = function is item.__func__ and owner is item.__self__
        return item if is_same else types.MethodType(function, owner)

    def _builtin_method(self, item: types.BuiltinFunctionType) -> Any:
        owner = self.copy(item.__self__)
        return item if owner is item.__self__ else getattr(owner, item.__name__)

    def _cached_function(self, item: Any) -> Any:
        wrapped = self.copy(item.__wrapped__)
        return item if wrapped is item.__wrapped__ else functools.lru_cache(**item.cache_parameters())(wrapped)

    def _condition(self, item: threading.Condition) -> threading.Condition:
        # Without the threads that wait at the original: a copy would wake them.
        return threading.Condition(self.copy(vars(item)["_lock"]))

    def _reference(self, item: Any) -> Any:
        target = item()
        duplicate = self.copy(target)
        if duplicate is target:
            return item
        if isinstance(item, weakref.WeakMethod):
            self.weakly_held.append(duplicate.__self__)
            return weakref.WeakMethod(duplicate)
        self.weakly_held.append(duplicate)
        return weakref.ref(duplicate)

    def _proxy(self, item: Any) -> Any:
        target = item.__repr__.__self__  # What a proxy leads to, as everything that is asked of it.
        duplicate = self.copy(target)
        if duplicate is target:
            return item
        self.weakly_held.append(duplicate)
        return weakref.proxy(duplicate)

    def _weak_mapping(self, item: Any) -> Any:
        made = self._remember(item, type(item)())
        for key, value in item.items():
            new_key, new_value = self.copy(key), self.copy(value)
            self.weakly_held.append(new_key if isinstance(item, weakref.WeakKeyDictionary) else new_value)
            made[new_key] = new_value
        return made

    def _weak_set(self, item: weakref.WeakSet[Any]) -> weakref.WeakSet[Any]:
        elements = [self.copy(element) for element in item]
        self.weakly_held.extend(elements)
        return weakref.WeakSet(elements)


_SPECIAL: Mapping[type, Any] = {
    dict: DeepCopier._dict,
    OrderedDict: DeepCopier._dict,
    list: DeepCopier._list,
    tuple: DeepCopier._tuple,
    set: DeepCopier._set,
    types.FunctionType: DeepCopier._function,
    types.MethodType: DeepCopier._method,
    types.BuiltinFunctionType: DeepCopier._builtin_method,
    functools._lru_cache_wrapper: DeepCopier._cached_function,
    threading.Condition: DeepCopier._condition,
    weakref.WeakKeyDictionary: DeepCopier._weak_mapping,
    weakref.WeakValueDictionary: DeepCopier._weak_mapping,
    weakref.WeakSet: DeepCopier._weak_set,
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out; on the CPU, torch has no type of its own for that (torch 2.13).

    Example:
        >>> is_out_of_memory(MemoryError())
        True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


_NO_MEMORY = ("can't allocate memory", "not enough memory")


def _is_of_the_machine(error: Exception) -> bool:
    return is_out_of_memory(error) or isinstance(error, RecursionError)


def _is_shared(item: Any) -> bool:
    if isinstance(item, _SHARED):
        return True
    kinds = {kind.__name__ for kind in type(item).__mro__ if kind.__module__.partition(".")[0] in _SHARED_PACKAGES}
    if kinds - {"HyperparametersMixin"}:
        return "Callback" not in kinds and not isinstance(item, dict)  # A callback may own a hook.
    return hasattr(type(item), "__del__") and not any(tensors_held_by(getattr(item, "__dict__", None)))


def tensors_held_by(attribute: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, and in none of the modules or other objects among them."""
    if isinstance(attribute, Tensor):
        if not is_lazy(attribute):
            yield attribute
    elif type(attribute) in _IMMUTABLE:
        return
    elif isinstance(attribute, dict | Mapping):  # The first of them is told at once.
        for item in attribute.values():
            yield from tensors_held_by(item)
    elif isinstance(attribute, list | tuple | set):
        for item in attribute:
            yield from tensors_held_by(item)


def _is_separate(duplicate: Any, item: nn.Module) -> bool:
    if not isinstance(duplicate, nn.Module):
        return False
    return {id(part) for part in parts_of(duplicate)}.isdisjoint(id(part) for part in parts_of(item))


def parts_of(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """Modules, parameters and buffers."""
    yield from module.modules()
    yield from module.parameters()
    yield from module.buffers()


def _is_global(function: types.FunctionType) -> bool:
    """Whether a function is found under its name, as those defined inside of another one are not."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Nothing was assigned yet.
        return _MISSING
