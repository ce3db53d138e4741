"""What enters and leaves each layer in one forward pass."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _DisableFuncTorch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim

from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.operations.uses import Operations
from lightning_basin.tensors import dense_form, tensors_of

NO_OUTPUTS = torch.empty(0)
"""The outputs of a trace before the forward pass has ended."""


@dataclass(eq=False)
class Trace:
    """What one forward pass showed.

    Attributes:
        entering: The input activations of each layer, of all its calls, in the order of first entry.
        leaving: The (first) tensor that left each call of a layer.
        num_first: The number of layers that were entered before any had been left: the first layer, and the layers
            around it.
        operations: The operations that use trainable parameters.
    """

    outputs: Tensor
    entering: dict[str, list[Tensor]] = field(default_factory=dict)
    leaving: dict[str, list[Tensor]] = field(default_factory=dict)
    num_first: int = 0
    operations: Operations = field(default_factory=Operations)

    def detached(self) -> "Trace":
        """Return the trace without the graph, and so without its operations."""
        entering, leaving = (
            {name: [tensor.detach() for tensor in tensors] for name, tensors in by_layer.items()}
            for by_layer in (self.entering, self.leaving)
        )
        operations = Operations(num_elements=self.operations.num_elements, sequence=self.operations.sequence)
        return Trace(self.outputs.detach(), entering, leaving, self.num_first, operations)


@contextmanager
def recording(module: nn.Module, layers: Sequence[Layer], trace: Trace) -> Iterator[None]:
    """Record what enters and leaves the layers of a module, by hooks that are removed afterwards."""
    handles = []
    clones = _Clones()

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not trace.leaving:
                trace.num_first += name not in trace.entering
            entering = tensors_of((args, kwargs))
            if any(tensor.is_nested for tensor in entering):
                raise TypeError(f"layer {escaped(name)!r} must be called with dense tensors, got a nested one")
            trace.entering.setdefault(name, []).extend(map(clones.of, entering))

        return hook

    def leave(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            first = tensors_of(output)[:1]
            if first and (dense := dense_form(first[0])) is not None:
                raise TypeError(f"layer {escaped(name)!r} must return dense tensors, got {dense[0]}")
            first = [as_plain(tensor) for tensor in first]
            trace.leaving.setdefault(name, []).extend(map(without_transforms, first))
            # A clone of a subclass would lack the attributes of the instance.
            return clones.passed_on(output) if type(output) is Tensor else output

        return hook

    try:
        for layer in layers:
            submodule = module.get_submodule(layer.name)
            handles.append(submodule.register_forward_pre_hook(enter(layer.name), with_kwargs=True))
            handles.append(submodule.register_forward_hook(leave(layer.name), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_run_by(module: nn.Module, layers: Sequence[Layer], function: Callable[[], Any]) -> list[str]:
    """Return the names of the layers that a function calls."""
    trace = Trace(outputs=NO_OUTPUTS)
    with recording(module, layers, trace):
        function()
    return list(trace.entering)


def as_plain(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass as one of torch, without calling a method that the subclass overrides."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def without_transforms(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor inside of `torch.func` transforms, which is of no use after these have ended.

    Its first axes are those over which `torch.func.vmap` maps, the axis of the outermost `vmap` first.
    """
    if not is_functorch_wrapped_tensor(tensor):
        return tensor
    while is_functorch_wrapped_tensor(tensor):
        axis = maybe_get_bdim(tensor)  # Negative where the transform is a derivative.
        tensor = get_unwrapped(tensor)
        tensor = tensor if axis < 0 else tensor.movedim(axis, 0)
    with _DisableFuncTorch():
        return tensor.clone()


class _Clones:
    """Clones of the tensors that enter and leave layers: what is done in place later cannot change them."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def passed_on(self, left: Tensor) -> Tensor:
        """Return a clone, with which the network goes on in place of what left a layer."""
        clone = left.clone()
        self._left[id(clone)] = weakref.ref(clone), left
        return clone

    def of(self, entering: Tensor) -> Tensor:
        """Return a clone; or what left the layer before, if it is unchanged, which saves much of all memory."""
        if is_functorch_wrapped_tensor(entering):
            return without_transforms(entering)
        entering = as_plain(entering)
        twin, left = self._left.get(id(entering), (None, entering))
        is_same = twin is not None and twin() is entering
        return left if is_same and torch.equal(left, entering) else entering.to_dense().clone()
