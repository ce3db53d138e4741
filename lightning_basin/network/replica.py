"""A copy of a module in float64 or float32 and evaluation mode.

A measurement never runs the user's module. It runs a deep copy in evaluation mode, so that counters, caches,
buffers, metrics and train flags of the original cannot change, whatever happens in between. The numbers of the
weights are the same: float64 holds every float32, float16 and bfloat16 exactly.
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
        ValueError: If a parameter or buffer has no shape yet because the module is lazily built.
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
        _check_tensors(part)
    copier = DeepCopier(dtype)
    originals = {id(part) for owner in owners for part in members_of(owner)}
    with RaisedPrecision(dtype):  # Objects may copy themselves, and modules act in `eval`, by code of their own.
        copies = [copier.copy(item) for item in (module, *callables)]
        for replica in map(_owner, copies):
            if replica is not None:  # Not by truth: a module may have a length, and that be 0.
                _prepare(replica, originals, training=training, failure=copier.failure)
    vars(copies[0])["_computed"], vars(copies[0])["_copy_failure"] = copier.computed, copier.failure
    inside = {id(part) for part in copies[0].modules()}
    outside = [item for item in copier.weakly_held if id(item) not in inside]
    if outside:  # Nothing else holds these.
        vars(copies[0])["_weakly_held"] = outside
    return tuple(copies)


def _prepare(replica: nn.Module, originals: Collection[int], *, training: bool, failure: str | None) -> None:
    """Make sure that a copy shares nothing with its original, and put it into its mode."""
    for part in members_of(replica):
        if id(part) in originals:
            shared = f"tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            cause = "" if failure is None else f": {failure}"
            raise TypeError(f"{type(replica).__name__} must be copied, but a copy of it shares its {shared}{cause}")
    if not training:
        _evaluate(replica)
    elif not replica.training:
        replica.train()
    for module in replica.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # Sparse gradients save time in training, and do not fit into a matrix.
            module.scale_grad_by_freq = False  # That is a step size for each row, and no derivative.


def _evaluate(replica: nn.Module) -> None:
    """Put a copy into evaluation mode and let the same parameters be trained as before: some modules freeze or add."""
    named = partial(replica.named_parameters, remove_duplicate=False)
    trained = {name for name, parameter in named() if parameter.requires_grad}
    replica.eval()
    for name, parameter in named():
        parameter.requires_grad_(name in trained)


def check_computed(module: nn.Module, replica: nn.Module, result: Tensor) -> None:
    """Refuse a result that depends on parameters through tensors which the module has computed from them before.

    Args:
        module: Of the user.
        replica: The copy that has been run, whose tensors of this kind lead to no parameter.
        result: Attached to its graph.

    Raises:
        ValueError: If it does; it names the attributes.
    """
    computed: list[Tensor] = vars(replica)["_computed"]
    if not computed or not result.requires_grad:
        return
    used = torch.autograd.grad(result.sum(), computed, retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in used):
        names = [
            f"{name}.{attribute}" if name else attribute
            for name, part in module.named_modules()
            for attribute, held in (vars(part) | part._buffers).items()
            if attribute != "_buffers" and any(tensor.grad_fn is not None for tensor in tensors_held_by(held))
        ]
        raise ValueError(
            f"what a module computes from its parameters must be computed at each call, but it keeps and uses tensors "
            f"from before, as {[*map(escaped, names)]}: compute them in forward"
        )


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


def _check_tensors(part: nn.Module) -> None:
    for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(f"{kind} {escaped(name)!r} has no shape yet: run one forward pass before measuring")
    for name, parameter in part.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.is_complex():
            raise TypeError(
                f"trainable parameters must be real, but {escaped(name)!r} is complex: split it into two real ones"
            )


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module is measured."""
    return float64_device(next((parameter.device for parameter in module.parameters()), torch.device("cpu")))
