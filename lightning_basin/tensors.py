"""Tensors in nested collections."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def is_sequence_of(length: int, item: Any) -> bool:
    """Whether an item is a tuple or list of this length."""
    return isinstance(item, tuple | list) and len(item) == length


def check_containers(collection: Any) -> None:
    """Refuse tensors without plain axes, and containers that cannot be built again from other tensors."""
    if isinstance(collection, Tensor) and (dense := dense_form(collection)) is not None:
        raise ValueError(
            f"all tensors of a probe must be dense, got {dense[0]}: pass tensor.{dense[1]}, by batch_fn in a "
            f"run, and a behavior that turns it into what the module takes"
        )
    if isinstance(collection, PackedSequence):
        raise TypeError(
            "a batch must hold padded sequences, with the inputs along the first axis, got a PackedSequence: pass "
            "batch_fn=lambda batch: (pad_packed_sequence(batch[0], batch_first=True), batch[1]), or such inputs, "
            "and a behavior that packs the padded sequences and their lengths again"
        )
    if isinstance(collection, Mapping):
        items = list(collection.values())
        if tensors_of(items):
            try:
                map_tensors(Tensor.detach, collection)
            except Exception as error:
                raise TypeError(
                    f"a batch must hold tensors in dicts, tuples and lists, got {described(collection)}, which cannot "
                    f"be built from other tensors: pass batch_fn=lambda batch: {written_as_pair(collection)}"
                ) from error
    else:
        items = list(collection) if isinstance(collection, tuple | list) else []
    for item in items:
        if tensors_of(item):
            check_containers(item)


def dense_form(tensor: Tensor) -> tuple[str, str] | None:
    """Return the kind of a tensor that is not dense, and the call that makes it dense; ``None`` for a dense tensor."""
    if tensor.is_nested:
        return "a nested tensor", "to_padded_tensor(0.0)"
    return None if tensor.layout == torch.strided else (str(tensor.layout), "to_dense()")


def written_as_pair(batch: Any, name: str = "batch") -> str:
    """Write a pair of inputs and targets in Python, of the first two items of a batch with the most common size."""
    if is_sequence_of(2, batch):
        return name
    items: dict[str, Any] = {}  # by the code that reads an item from the batch
    if isinstance(batch, Tensor):
        items = {name: batch}
    elif isinstance(batch, Mapping):
        items = {f"{name}[{key!r}]": item for key, item in batch.items()}
    elif isinstance(batch, tuple | list):
        if len(batch) > 2 and all(is_sequence_of(2, item) for item in batch):  # noqa: PLR2004
            return f"torch.utils.data.default_collate({name})"
        items = {f"{name}[{index}]": item for index, item in enumerate(batch)}
    elif is_dataclass(batch):
        items = {f"{name}.{field.name}": getattr(batch, field.name) for field in fields(batch)}
    sizes = {code: tensors[0].shape[:1] for code, item in items.items() if (tensors := tensors_of(item))}
    counts = Counter(size for size in sizes.values() if size)
    codes = [code for code, size in sizes.items() if size == counts.most_common(1)[0][0]] if counts else [*sizes]
    inputs, targets = [*(codes or ["inputs", "targets"]), "None"][:2]
    return f"({inputs}, {targets})"


def described(batch: Any) -> str:
    """Name the type of a batch, with its keys or its length."""
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with keys {[*batch.keys()]}"
    return f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__


_WITHOUT_TENSORS = frozenset([type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.layout])
"""The types of most arguments of operations: each argument is searched several times."""


def tensors_of(collection: Any) -> list[Tensor]:
    """Return every tensor in a nested collection, in the order of `map_tensors`."""
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
    """Return the same collection with every tensor replaced; containers are new, everything else is shared."""
    return apply_to_collection(collection, Tensor, function)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor of a network to a floating point type, unless it holds integers or booleans.

    For float64, a tensor of a device without it comes to the CPU. Float64 holds every element of a lower precision.
    """
    if dtype == torch.float64:
        tensor = tensor.to(float64_device(tensor.device))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def as_result(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Convert what a network has computed to the type in which it is compared, added up and decomposed.

    A tensor of a device without float64 comes to the CPU. A network in float32 stays on its device: each tensor that
    leaves it passes here.
    """
    # In two steps: torch converts on the device that a tensor comes from.
    return tensor.to(float64_device(tensor.device)).to(dtype)


def float64_device(device: torch.device) -> torch.device:
    """Return the device on which to compute with a device's tensors: the CPU where the device has no float64.

    Example:
        >>> float64_device(torch.device("mps"))
        device(type='cpu')
    """
    return torch.device("cpu") if device.type == "mps" else device


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor without its graph."""
    return tensor.detach().clone()
