"""Copies of a module whose modules are in training mode, and that compute without randomness all the same."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_basin.network.calls import ModuleBehavior, call_module
from lightning_basin.network.network import Network
from lightning_basin.network.replica import replicas

_DROPOUTS = frozenset(
    f"{kind}dropout{suffix}"
    for kind in ("", "alpha_", "feature_", "feature_alpha_")
    for suffix in ("", "_", "1d", "2d", "3d")
)


class _WithoutRandomness(TorchFunctionMode):
    """Inside this mode dropout does nothing, and batch normalization uses its running statistics."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _DROPOUTS and args:
            return args[0]
        if name == "batch_norm" and func is nn.functional.batch_norm and args[1] is not None:
            kwargs["training"] = False
        if name == "scaled_dot_product_attention" and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def in_training_mode(
    module: nn.Module,
    loss_fn: Any,
    behavior: ModuleBehavior | None,
    *,
    dtype: torch.dtype,
    modes: Collection[str] | None = None,
) -> tuple[Network, Any]:
    """Copy a module and the loss into training mode, but for what makes outputs random.

    Without names of modules in that mode, all are in it that are not torch's own.
    """
    replica, loss_fn, behavior = replicas(module, loss_fn, behavior, dtype=dtype, training=True)
    for name, submodule in replica.named_modules():
        submodule.training = (submodule.training and not is_of_torch(submodule)) if modes is None else name in modes
    call = call_module if behavior is None else behavior

    def outputs(module: nn.Module, inputs: Any) -> Tensor:
        with _WithoutRandomness():
            return call(module, inputs)

    return Network(replica, outputs, dtype=dtype), loss_fn


def is_of_torch(module: nn.Module) -> bool:
    """Return whether the modes of a module differ in dropout and batch statistics alone."""
    return type(module).__module__.startswith("torch.nn.")


def names_in_training(network: Network) -> tuple[str, ...]:
    """Return the names of the modules of a network that are in training mode."""
    return tuple(name for name, module in network.module.named_modules() if module.training)
