"""The operations of a forward pass in their order, by which two passes are known to compute the same function."""

from collections.abc import Hashable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin.tensors import tensors_of


class OperationSequence(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves its base untyped
    """Notes each operation below autograd.

    Example:
        >>> import torch
        >>> sequences = []
        >>> for number in (1.0, 2.0):
        ...     with OperationSequence() as sequence:
        ...         _ = torch.full((2,), number).exp()
        ...     sequences.append(sequence.operations)
        >>> sequences[0] == sequences[1], len(sequences[0])
        (True, 2)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Hashable] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations.append(described_operation(func, tensors_of((args, kwargs))))
        return func(*args, **(kwargs or {}))


def described_operation(func: Any, tensors: Any) -> Hashable:
    """Describe an operation by the shapes and types of the tensors that it takes, and by which of them have gradients.

    Args:
        func: The operation.
        tensors: The tensors that it takes.
    """
    return (func.name(), *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors))
