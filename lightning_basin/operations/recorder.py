"""Record which operations use which parameter while a network runs.

A parameter reaches the outputs only through the operations that take it, whatever the module is called that holds it:
a linear layer, attention and a recurrent cell all multiply a matrix with their input. So the gradients of an input
follow from the input of each operation and from the derivatives of the network's outputs by its output, without one
gradient with respect to a parameter.

Operations that are not known here are not recorded. Whether the recorded uses are all of them is for the caller to
check.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin.operations import elementwise, lookups, products
from lightning_basin.operations.uses import (
    Call,
    Elements,
    ElementwiseUse,
    Handler,
    OperationOutput,
    Operations,
    Source,
    Use,
    aten,
)
from lightning_basin.tensors import tensors_of

_HANDLERS: Mapping[Any, Handler] = {**products.HANDLERS, **lookups.HANDLERS, **elementwise.HANDLERS}


@contextmanager
def record_operations(
    parameters: Mapping[str, Tensor], constants: Sequence[Tensor], *, num_inputs: int
) -> Iterator[Operations]:
    """Record the operations that use parameters while the body runs.

    ``constants`` are tensors that depend on no input, such as buffers. A tensor that is made or repeated to the length
    ``num_inputs`` has a part for each input.
    """
    recorder = _Recorder(parameters, constants, num_inputs)
    with recorder:
        yield recorder.operations
    recorder.settle()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves its base untyped
    """Sees every operation below autograd."""

    def __init__(self, parameters: Mapping[str, Tensor], constants: Sequence[Tensor], num_inputs: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = Operations()
        self._num_inputs = num_inputs
        self._sources = {id(tensor): Source(name, tensor) for name, tensor in parameters.items()}
        # Tensors that depend on no input. Kept alive, or another tensor could get the same id.
        self._fixed = {id(tensor): tensor for tensor in (*parameters.values(), *constants)}
        # Copies of parameters for each input: views of what is fixed, yet not fixed themselves.
        self._parts: dict[int, Tensor] = {}
        self._unsettled: list[tuple[OperationOutput, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.settle()
        kwargs = kwargs or {}
        arguments = tensors_of((args, kwargs))
        self.operations.sequence.append(described_operation(func, arguments))
        is_fixed = all(map(self._is_fixed, arguments))
        output = OperationOutput()
        # Before the operation runs: it may overwrite its arguments.
        uses: Sequence[Use] = []
        if is_fixed:
            uses = self._copies(func, args, output)
        elif func in _HANDLERS:
            uses = _HANDLERS[func](Call(output, self.operations.uses, self.find_source), *args, **kwargs)
        if not is_fixed and func._schema.is_mutable:
            self._forget_written(func, args, kwargs)
        results = func(*args, **kwargs)
        tensors = tensors_of(results)
        if uses and not tensors[0].is_complex():  # Derivatives by complex numbers follow other rules.
            self.operations.uses += uses
            self._unsettled.append((output, tensors[0]))
        is_copied = is_fixed and (bool(uses) or self._are_repeated_indices(func, args))
        if is_copied or any(id(tensor) in self._parts for tensor in arguments):
            shared = set(map(_memory, arguments))
            self._parts |= {id(tensor): tensor for tensor in tensors if _memory(tensor) in shared}
        elif is_fixed and not self._has_part_for_each_input(arguments, tensors):
            self._fixed |= {id(tensor): tensor for tensor in tensors}
        if not (is_fixed or _is_view(func)) and any(tensor.requires_grad for tensor in arguments):
            self.operations.num_elements += sum(tensor.numel() for tensor in tensors)
        return results

    def settle(self) -> None:
        """Note where in the graph the last outputs are: they are in it only after an operation has returned."""
        for output, tensor in self._unsettled:
            output.shape = tensor.shape
            # A view of a parameter, taken without a graph, requires gradients and has none.
            if tensor.grad_fn is not None:
                output.edge = get_gradient_edge(tensor)
        self._unsettled.clear()

    def find_source(self, tensor: Any) -> tuple[Source, Elements] | None:
        """Return the source that a tensor is (a view of), and its elements there, or ``None``."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or id(tensor) in self._parts:
            return None
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if id(base) not in self._fixed or base.dtype != tensor.dtype:
            return None
        source = self._sources.setdefault(id(base), Source(None, base))
        sizes, offset = tuple(tensor.shape), int(tensor.storage_offset()) - int(base.storage_offset())
        return source, Elements(sizes, sizes, tensor.stride(), offset)

    def _is_fixed(self, tensor: Tensor) -> bool:
        if id(tensor) in self._parts:
            return False
        return id(tensor) in self._fixed or (tensor._is_view() and id(tensor._base) in self._fixed)

    def _forget_written(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forget the tensors, and their views, into which an operation writes what depends on an input."""
        written: set[int] = set()
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written |= {_memory(tensor) for tensor in tensors_of(value) if self._is_fixed(tensor)}
        if written:
            self._fixed = {key: tensor for key, tensor in self._fixed.items() if _memory(tensor) not in written}

    def _copies(self, func: Any, args: tuple[Any, ...], output: OperationOutput) -> list[Use]:
        """The use of a parameter that is copied for each input; none for other operations."""
        if func not in (aten.expand.default, aten.repeat.default) or self._num_inputs == 1:
            return []
        tensor, sizes = args[0], args[1]
        old = (1,) * (len(sizes) - tensor.ndim) + tuple(tensor.shape)
        copies = [
            size if func is aten.repeat.default or (length == 1 and size > 0) else 1
            for size, length in zip(sizes, old, strict=True)
        ]
        found = self.find_source(tensor)
        if found is None or not any(count % self._num_inputs == 0 for count in copies if count > 1):
            return []
        source, elements = found
        interleaved = tuple(length for pair in zip(copies, old, strict=True) for length in pair)
        ones = tuple(length for size in old for length in (1, size))
        return [
            ElementwiseUse(source, elements.seen_as(*ones), output, lambda derivative: derivative.reshape(interleaved))
        ]

    def _are_repeated_indices(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether integers are repeated for each input, as the places of tokens that look up their embeddings are."""
        if func not in (aten.expand.default, aten.repeat.default) or self._num_inputs == 1 or not args[1]:
            return False
        tensor, sizes = args
        is_repeated = sizes[0] == self._num_inputs and (tensor.ndim < len(sizes) or tensor.shape[0] == 1)
        return is_repeated and not tensor.is_floating_point()

    def _has_part_for_each_input(self, arguments: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
        """Whether a new tensor was made in the number of the inputs, as the first state of a recurrent network is."""
        return not arguments and any(
            tensor.is_floating_point() and self._num_inputs in tensor.shape for tensor in results
        )


def _is_view(func: Any) -> bool:
    """Whether the result of an operation has the memory of its argument, which is a view of it or was changed."""
    return func is aten._unsafe_view.default or any(result.alias_info is not None for result in func._schema.returns)


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views; a sparse tensor has no storage, and no views."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


class OperationSequence(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves its base untyped
    """Notes each operation below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Hashable] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations.append(described_operation(func, tensors_of((args, kwargs))))
        return func(*args, **(kwargs or {}))


def described_operation(func: Any, tensors: Any) -> Hashable:
    """Describe an operation by the shapes and types of the tensors that it takes, and which of them have gradients."""
    return (func.name(), *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors))
