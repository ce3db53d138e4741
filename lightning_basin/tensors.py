"""Tensors in nested collections."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def is_sequence_of(length: int, item: Any) -> bool:
    """Whether something is a tuple or list of a length."""
    return isinstance(item, tuple | list) and len(item) == length


def check_containers(collection: Any) -> None:
    """Refuse containers that cannot be made again from other tensors, and tensors without axes, wherever they stand.

    Raises:
        TypeError: If there is such a container.
        ValueError: If there is such a tensor.
    """
    if isinstance(collection, Tensor) and (dense := dense_form(collection)) is not None:
        raise ValueError(
            f"all tensors of a probe must be dense, got {dense.kind}: pass tensor.{dense.method}, by batch_fn in a "
            f"run, and a behavior that makes of it what the module takes"
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
                    f"be made of other tensors: pass batch_fn=lambda batch: {written_as_pair(collection)}"
                ) from error
    else:
        items = list(collection) if isinstance(collection, tuple | list) else []
    for item in items:
        if tensors_of(item):
            check_containers(item)


class DenseForm(NamedTuple):
    """How a tensor that has no plain axes is made one that has.

    Attributes:
        kind: What it is.
        method: Makes it dense.
    """

    kind: str
    method: str


def dense_form(tensor: Tensor) -> DenseForm | None:
    """How a tensor is made dense; ``None`` for one that is.

    Example:
        >>> dense_form(torch.eye(2).to_sparse()).method
        'to_dense()'
    """
    if tensor.is_nested:
        return DenseForm("a nested tensor", "to_padded_tensor(0.0)")
    return None if tensor.layout == torch.strided else DenseForm(str(tensor.layout), "to_dense()")


def written_as_pair(batch: Any, name: str = "batch") -> str:
    """A pair of a batch as it is written in Python: of the parts that have the most common size.

    Args:
        batch: Anything.
        name: How the batch itself is written.

    Example:
        >>> written_as_pair({"size": torch.tensor(8), "image": torch.zeros(8, 2), "label": torch.zeros(8)})
        "(batch['image'], batch['label'])"
    """
    if is_sequence_of(2, batch):
        return name
    parts: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        parts = {name: batch}
    elif isinstance(batch, Mapping):
        parts = {f"{name}[{key!r}]": part for key, part in batch.items()}
    elif isinstance(batch, tuple | list):
        if len(batch) > 2 and all(is_sequence_of(2, item) for item in batch):  # noqa: PLR2004
            return f"torch.utils.data.default_collate({name})"
        parts = {f"{name}[{index}]": part for index, part in enumerate(batch)}
    elif is_dataclass(batch):
        parts = {f"{name}.{item.name}": getattr(batch, item.name) for item in fields(batch)}
    sizes = {part: tensors[0].shape[:1] for part, held in parts.items() if (tensors := tensors_of(held))}
    counted = Counter(size for size in sizes.values() if size)
    found = [part for part, size in sizes.items() if size == counted.most_common(1)[0][0]] if counted else [*sizes]
    found = (found or ["inputs", "targets"])[:2]
    return f"({', '.join([*found, *('None' for _ in range(2 - len(found)))])})"


def described(batch: Any) -> str:
    """Name the type of something, with its keys or its length.

    Example:
        >>> described({"x": 1})
        "dict with keys ['x']"
    """
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
