"""Watch the losses that a training step calls."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_basin.tensors import tensors_of

_LOSSES = frozenset(
    [
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "cross_entropy"),
        *("ctc_loss", "gaussian_nll_loss", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss"),
        *("margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "nll_loss"),
        *("multilabel_soft_margin_loss", "poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss"),
        *("triplet_margin_loss", "triplet_margin_with_distance_loss"),
    ]
)
"""Losses of `torch.nn.functional`, which the modules of torch call too."""


class LastCall(BaseException):
    """Ends a step once all outputs are known; no handler of a user takes it for an error."""


@dataclass(eq=False)
class LossCall:
    """A loss that a step has called.

    Attributes:
        function: A function or a module without parameters.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        value: What it returned.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor

    @property
    def name(self) -> str:
        """Name of the function, or of the class of the module."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def outputs(self) -> list[Tensor]:
        """The arguments that have a gradient."""
        return [tensor for tensor in tensors_of((self.args, self.kwargs)) if tensor.requires_grad]


class LossWatch(TorchFunctionMode):
    """Notes the outermost losses that are called inside, and ends the body after one of them.

    Args:
        last: The position of the call that ends the body; ``None`` for none.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._last = last
        self._entered: list[int] = []  # For every module that runs: how many calls there were before.
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        is_loss = getattr(func, "__module__", "") == "torch.nn.functional" and func.__name__ in _LOSSES
        if is_loss and isinstance(value, Tensor) and value.requires_grad:
            self.calls.append(LossCall(func, args, kwargs or {}, value))
            self._end_unless_inside_a_module()
        return value

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Watch modules too: one without parameters that makes a number of outputs is a loss."""
        before = register_module_forward_pre_hook(lambda *_: self._enter())
        after = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self) -> None:
        if threading.get_ident() == self._thread:
            self._entered.append(len(self.calls))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if threading.get_ident() != self._thread or not self._entered:
            return
        num_before = self._entered.pop()
        is_number = isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad
        if is_number and not any(parameter.requires_grad for parameter in module.parameters()):
            call = LossCall(module, args, kwargs, value)
            if call.outputs:
                self.calls[num_before:] = [call]
        self._end_unless_inside_a_module()

    def _end_unless_inside_a_module(self) -> None:
        # A module that is a loss takes the place of those that it calls.
        if self._last is not None and len(self.calls) > self._last and not self._entered:
            raise LastCall


@dataclass(frozen=True)
class Place:
    """Where an output or a target stands among the arguments of a loss.

    Attributes:
        is_output: Whether it is an output.
        index: Its position among the outputs, or among the targets.
        shape: Its shape, for all inputs.
    """

    is_output: bool
    index: int
    shape: torch.Size
