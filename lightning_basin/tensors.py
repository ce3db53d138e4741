"""Tensors in nested collections."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def check_containers(collection: Any) -> None:
    """Refuse containers that cannot be made again from other tensors, wherever they stand.

    Raises:
        TypeError: If there is one.
    """
    if isinstance(collection, PackedSequence):
        raise TypeError(
            "a batch must hold padded sequences, with the inputs along the first axis, got a PackedSequence: pass "
            "batch_fn=lambda batch: (pad_packed_sequence(batch[0], batch_first=True), batch[1]), and a behavior that "
            "packs the padded sequences and their lengths again"
        )
    if isinstance(collection, Mapping):
        items = list(collection.values())
        if tensors_of(items):
            try:
                map_tensors(Tensor.detach, collection)
            except Exception as error:
                raise TypeError(
                    f"a batch must hold tensors in dicts, tuples and lists, got {described(collection)}, which cannot "
                    f"be made of other tensors: pass batch_fn=lambda batch: ({', '.join(two_parts(collection))})"
                ) from error
    else:
        items = list(collection) if isinstance(collection, tuple | list) else []
    for item in items:
        if not isinstance(item, Tensor) and tensors_of(item):
            check_containers(item)


def two_parts(batch: Any) -> list[str]:
    """Two parts of a batch that hold tensors, as they are written in Python: most often inputs and targets."""
    found = ["inputs", "targets"]
    if isinstance(batch, Mapping):
        found = [f"batch[{key!r}]" for key, part in batch.items() if tensors_of(part)]
    elif isinstance(batch, tuple | list):
        found = [f"batch[{index}]" for index, part in enumerate(batch) if tensors_of(part)]
    elif is_dataclass(batch):
        found = [f"batch.{item.name}" for item in fields(batch) if tensors_of(getattr(batch, item.name))]
    return [*found[:2], *("None" for _ in range(2 - len(found)))]


def described(batch: Any) -> str:
    """Name the type of a batch, and its keys or length."""
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with keys {[*batch.keys()]}"
    return f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__


_WITHOUT_TENSORS = frozenset([type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.layout])
"""What arguments of operations mostly are: each is looked through several times."""


def tensors_of(collection: Any) -> list[Tensor]:
    """Every tensor in a nested collection, in the order in which `map_tensors` meets them."""
    if isinstance(collection, Tensor):
        return [collection]
    kind = type(collection)
    if kind in _WITHOUT_TENSORS:
        return []
    if kind in (tuple, list):
        items: Iterable[Any] = collection
    elif is_dataclass(collection) and not isinstance(collection, type):
        items = [getattr(collection, item.name) for item in fields(collection)]
    elif isinstance(collection, Mapping):
        items = collection.values()
    elif isinstance(collection, Sequence) and not isinstance(collection, str | bytes):
        items = collection
    else:
        return []
    return [tensor for item in items for tensor in tensors_of(item)]


def map_tensors(function: Callable[[Tensor], Any], collection: Any) -> Any:
    """The same collection with every tensor replaced; containers are new, everything else is shared."""
    return apply_to_collection(collection, Tensor, function)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a floating point type; those of integers and booleans stay. From devices without float64, on the CPU.

    Float64 holds every number of a lower precision; float32 rounds those of float64.
    """
    tensor = tensor.to(float64_device(tensor.device))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def float64_device(device: torch.device) -> torch.device:
    """Where to compute what lies on a device: there, or on the CPU if it has no float64.

    Example:
        >>> float64_device(torch.device("mps"))
        device(type='cpu')
    """
    return torch.device("cpu") if device.type == "mps" else device


def copied(tensor: Tensor) -> Tensor:
    """Return a copy without a graph."""
    return tensor.detach().clone()
