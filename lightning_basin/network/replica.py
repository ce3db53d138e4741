"""Copies of a module in float64 or float32 and evaluation mode.

A measurement never runs the user's module. It runs a deep copy, so that counters, caches, buffers, metrics and train
flags of the original cannot change. The weights are the same numbers: float64 holds every float32, float16 and
bfloat16 exactly.
"""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_basin.naming import escaped
from lightning_basin.network.copying import DeepCopier, members_of, tensors_held_by
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.tensors import float64_device


def replicas(
    module: nn.Module, *callables: Any, dtype: torch.dtype = torch.float64, training: bool = False
) -> tuple[Any, ...]:
    """Copy a module into float64 or float32 and evaluation mode; the copy shares no state with it (see `DeepCopier`).

    Tied parameters stay tied. Where the module and the callables hold each other, their copies do, too. ``training``
    asks for training mode instead: the train flags of ``module`` if its own flag is set, else all flags.
    """
    owners = [module, *(owner for owner in map(_owner, callables) if owner is not None)]
    submodules = [submodule for owner in owners for submodule in owner.modules()]
    if any(isinstance(submodule, torch.jit.ScriptModule) for submodule in submodules):
        raise TypeError(
            f"{type(module).__name__} holds a scripted module, which cannot be looked into: pass the module from which "
            f"it was scripted"
        )
    for submodule in submodules:
        _check_tensors(submodule)
    copier = DeepCopier(dtype)
    originals = {id(member) for owner in owners for member in members_of(owner)}
    with RaisedPrecision(dtype):  # Objects may copy themselves, and modules act in `eval`, by code of their own.
        copies = [copier.copy(item) for item in (module, *callables)]
        for replica in map(_owner, copies):
            if replica is not None:  # Not by its truth value: a module may have a length, and the length be 0.
                _prepare(replica, originals, training=training, failure=copier.failure)
    vars(copies[0]).update(
        _computed=copier.computed, _copy_failure=copier.failure, _alive_with_the_copy=copier.weakly_held
    )
    return tuple(copies)


def _prepare(replica: nn.Module, originals: Collection[int], *, training: bool, failure: str | None) -> None:
    """Make sure that a copy shares nothing with its original, and put it into its mode."""
    for member in members_of(replica):
        if id(member) in originals:
            shared = f"tensor of shape {tuple(member.shape)}" if isinstance(member, Tensor) else type(member).__name__
            cause = "" if failure is None else f": {failure}"
            raise TypeError(f"{type(replica).__name__} must be copied, but a copy of it shares its {shared}{cause}")
    if not training:
        _evaluate(replica)
    elif not replica.training:
        replica.train()
    for module in replica.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # Sparse gradients do not fit into a matrix.
            module.scale_grad_by_freq = False  # It multiplies derivatives by a step size for each row.


def _evaluate(replica: nn.Module) -> None:
    """Put a copy into evaluation mode, in which some modules freeze parameters; the same ones stay trainable."""
    named = partial(replica.named_parameters, remove_duplicate=False)
    trained = {name for name, parameter in named() if parameter.requires_grad}
    replica.eval()
    for name, parameter in named():
        parameter.requires_grad_(name in trained)


def perturb(module: nn.Module, size: float, names: Collection[str] | None = None) -> None:
    """Move parameters, also one that is zero, and each element otherwise: a softmax notices no common change."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.numel() and (names is None or name in names):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=size * (float(parameter.abs().max()) or 1.0))


def check_computed(module: nn.Module, replica: nn.Module, result: Tensor) -> None:
    """Refuse a result that depends on tensors which the module computed from its parameters before the call.

    Copies of these tensors lead to no parameter.
    """
    computed: list[Tensor] = vars(replica)["_computed"]
    if not computed or not result.requires_grad:
        return
    used = torch.autograd.grad(result.sum(), computed, retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in used):
        names = [
            f"{name}.{attribute}" if name else attribute
            for name, submodule in module.named_modules()
            for attribute, held in (vars(submodule) | submodule._buffers).items()
            if attribute != "_buffers" and any(tensor.grad_fn is not None for tensor in tensors_held_by(held))
        ]
        raise ValueError(
            f"what a module computes from its parameters must be computed at each call, but it keeps and uses tensors "
            f"from before, as {[*map(escaped, names)]}: compute them in forward"
        )


def settle_embeddings(module: nn.Module, run: Callable[[], Any]) -> None:
    """Let embeddings with ``max_norm``, which shorten a row when they look it up, do this once and never again."""
    embeddings = [module for module in module.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    if any(embedding.max_norm is not None for embedding in embeddings):
        with torch.no_grad():
            run()
        for embedding in embeddings:
            embedding.max_norm = None


def _owner(item: Any) -> nn.Module | None:
    """Return the module whose state a callable uses; ``None`` for another callable."""
    if isinstance(item, partial):
        return _owner(item.func)
    item = item.__self__ if inspect.ismethod(item) else item
    return item if isinstance(item, nn.Module) else None


def _check_tensors(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(f"{kind} {escaped(name)!r} has no shape yet: run one forward pass before measuring")
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.is_complex():
            raise TypeError(
                f"trainable parameters must be real, but {escaped(name)!r} is complex: split it into two real ones"
            )


def device_of(module: nn.Module, dtype: torch.dtype = torch.float64) -> torch.device:
    """Return the device on which a module is measured: the CPU for float64 where the module's device has none."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return float64_device(device) if dtype == torch.float64 else device
