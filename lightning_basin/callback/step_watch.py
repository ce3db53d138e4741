"""Watch which losses and modules a training step calls."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_basin.tensors import map_tensors, tensors_of

_BACKWARD = frozenset([Tensor.backward, torch.autograd.backward])


class LastCall(BaseException):
    """Ends a step once all outputs are known; no handler of a user takes it for an error."""


@dataclass(eq=False)
class Call:
    """A loss that a step has called, or one tensor of what a module with parameters has returned to it.

    ``value`` is the value of a loss with these arguments, or the tensor.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor
    is_loss: bool = True

    @property
    def name(self) -> str:
        """The name of the function, or of the class of the module."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors with a gradient: arguments of a loss, or what a module returned."""
        candidates = (self.args, self.kwargs) if self.is_loss else self.value
        return [tensor for tensor in tensors_of(candidates) if tensor.requires_grad]


class StepWatch(TorchFunctionMode):
    """Notes the outermost losses and modules with parameters that are called inside.

    Args:
        last: The position of the loss that ends the body; ``None`` for none.
        given: The tensors that take the place of what modules return, by position among all calls.
    """

    def __init__(self, last: int | None = None, given: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.objectives: list[Tensor] = []
        self._last = last
        self._given = given or {}
        self._entered: list[int] = []  # The number of calls before each module that runs.
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BACKWARD:  # Manual optimization past `manual_backward`.
            self.objectives += tensors_of(args[:1])
            return None
        value = func(*args, **(kwargs or {}))
        if _is_loss(func) and isinstance(value, Tensor):
            self.calls.append(Call(func, args, kwargs or {}, value))
            self._end_unless_inside_a_module()
        return value

    @contextmanager
    def modules(self, root: nn.Module) -> Iterator[None]:
        """Watch modules too: one without parameters that makes a number is a loss, others make outputs.

        The ``forward`` of the root, which has the step, counts as a call too: a step often calls it directly.
        """
        before = register_module_forward_pre_hook(lambda *_: self._enter())
        after = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
        forward, assigned = root.forward, vars(root).get("forward")

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._enter()
            value = None
            try:
                value = forward(*args, **kwargs)
            finally:
                replaced = self._leave(root, args, kwargs, value)
            return value if replaced is None else replaced

        vars(root)["forward"] = watched
        try:
            yield
        finally:
            before.remove()
            after.remove()
            # torch 2.13 forgets to remove what says that a hook takes keywords: a run would gather it.
            vars(torch_modules).get("_global_forward_hooks_with_kwargs", {}).pop(after.id, None)
            del vars(root)["forward"]
            if assigned is not None:
                vars(root)["forward"] = assigned

    def _enter(self) -> None:
        if threading.get_ident() == self._thread:
            self._entered.append(len(self.calls))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        if threading.get_ident() != self._thread or not self._entered:
            return None
        num_before, replaced = self._entered.pop(), None
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if not is_trained and isinstance(value, Tensor) and value.ndim == 0:
            # A module that is a loss takes the place of those that it calls.
            self.calls[num_before:] = [Call(module, args, kwargs, value)]
        elif is_trained and not self._entered:
            start = len(self.calls)
            self.calls += [Call(module, (), {}, tensor, is_loss=False) for tensor in tensors_of(value)]
            if not self._given.keys().isdisjoint(range(start, len(self.calls))):
                positions = iter(range(start, len(self.calls)))
                replaced = map_tensors(lambda tensor: self._given.get(next(positions), tensor), value)
        self._end_unless_inside_a_module()
        return replaced

    def _end_unless_inside_a_module(self) -> None:
        # Not behind a module with parameters: others may still look at what leaves it.
        if self._last is None or len(self.calls) <= self._last or self._entered:
            return
        if self.calls[self._last].is_loss:
            raise LastCall


def _is_loss(function: Callable[..., Any]) -> bool:
    """Whether a function is a loss of `torch.nn.functional`, which the modules of torch call too."""
    name = getattr(function, "__name__", "")
    is_named_so = name.endswith("_loss") or name.startswith(("cross_entropy", "binary_cross_entropy", "kl_div"))
    return is_named_so and getattr(function, "__module__", "") == "torch.nn.functional"


@dataclass(frozen=True)
class Place:
    """The place of an output or a target in a loss's arguments: its index among outputs or targets, and its shape."""

    is_output: bool
    index: int
    shape: torch.Size
