"""The probe: the fixed inputs, with targets, on which a network is measured.

(In interpretability a probe is a linear classifier on features. Here it is a batch.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_basin.tensors import (
    as_dtype,
    check_containers,
    copied,
    described,
    float64_device,
    is_sequence_of,
    map_tensors,
    tensors_of,
    written_as_pair,
)


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch of k inputs, copied when it is made and never written to.

    Attributes:
        inputs: The arguments of the module: a tensor, or a (nested) tuple, list or dict with tensors in it. Every
            tensor is dense, with the k inputs along its first axis. A list or tuple of k other things (strings, say)
            has one for each input; anything else is the same for all inputs.
        targets: The targets in the same form, or ``None``.

    Raises:
        TypeError: If there is no tensor among the inputs.
        ValueError: If the probe is empty, or its tensors differ in the length of their first axis.

    Example:
        >>> Probe(torch.zeros(8, 2), torch.zeros(8)).size
        8
    """

    inputs: Any
    targets: Any = None

    def __post_init__(self) -> None:
        check_containers((self.inputs, self.targets))
        tensors = tensors_of(self.inputs)
        if not tensors:
            raise TypeError(
                f"the inputs of a probe must be a tensor or a tuple, list or dict with tensors in it, "
                f"got {type(self.inputs).__name__}{_as_tensor_hint(self.inputs)}"
            )
        lengths = {tensor.shape[0] if tensor.ndim else None for tensor in tensors + tensors_of(self.targets)}
        if len(lengths) > 1 or None in lengths:
            shapes = [tuple(tensor.shape) for tensor in tensors + tensors_of(self.targets)]
            raise ValueError(
                f"all tensors of a probe must have the inputs along their first axis, in the same number, "
                f"got shapes {shapes}: where inputs have no such axis (graphs, sets), pass indices of a data set as "
                f"inputs, and a behavior that makes a batch of them"
            )
        if lengths == {0}:
            raise ValueError("a probe must hold at least one input, got an empty batch")
        for name in ("inputs", "targets"):
            object.__setattr__(self, name, map_tensors(copied, getattr(self, name)))

    @classmethod
    def from_batches(cls, batches: Sequence[tuple[Any, Any]], size: int) -> "Probe":
        """Join the first ``size`` inputs of some batches of the same structure.

        Args:
            batches: Pairs of inputs and targets.
            size: The number of inputs to take; where the batches hold fewer inputs, all of them are taken.

        Raises:
            TypeError: If there is no tensor among the inputs.
            ValueError: If ``size`` is not positive, or tensors of different batches do not fit together.

        Example:
            >>> batch = (torch.zeros(3, 2), torch.zeros(3))
            >>> Probe.from_batches([batch, batch], size=4).size
            4
        """
        if size < 1:
            raise ValueError(f"probe must hold at least 1 input, got {size}")
        if not batches:
            raise ValueError("a probe needs at least one batch to take its inputs from, got none")
        marked = [_with_columns(batch) for batch in batches]
        if len({len(_leaves(batch)) for batch in marked}) > 1:  # A list that has the length of one batch by chance.
            marked = list(batches)
        try:
            joined = iter([_joined(leaves, size) for leaves in zip(*map(_leaves, marked), strict=True)])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"batches must have tensors of the same structure and shapes to be joined: {error}"
            ) from error
        inputs, targets = _map_leaves(lambda _: next(joined), marked[0])
        return cls(inputs, targets)

    @property
    def size(self) -> int:
        """The number of inputs, k."""
        return int(tensors_of(self.inputs)[0].shape[0])

    def select(self, indices: Sequence[int] | Tensor) -> "Probe":
        """Return the probe of some of the inputs."""
        chosen = torch.as_tensor(indices)

        def select(leaf: "Tensor | _Column") -> Any:
            if isinstance(leaf, Tensor):
                return leaf[chosen.to(leaf.device)]
            return type(leaf.items)([leaf.items[index] for index in chosen.tolist()])

        return Probe(*_map_leaves(select, _with_columns((self.inputs, self.targets))))

    @property
    def has_columns(self) -> bool:
        """Whether there is a list or tuple of other things than tensors, with one for each input."""
        marked = _with_columns((self.inputs, self.targets))
        return any(isinstance(leaf, _Column) for leaf in _leaves(marked))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Probe":
        """Return the probe on another device, as `torch.nn.Module.to` does: floating point tensors take ``dtype``.

        In float64, the probe stays on the CPU where the device has no float64.
        """
        if dtype == torch.float64:
            device = float64_device(torch.device(device))

        def move(tensor: Tensor) -> Tensor:  # Converted first: the device may not have the type from which it is.
            return (tensor if dtype is None else as_dtype(tensor, dtype)).to(device)

        return Probe(*map_tensors(move, (self.inputs, self.targets)))


def _as_tensor_hint(inputs: Any) -> str:
    is_numbers = isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], list | tuple | float | int)
    return ": pass torch.as_tensor(inputs)" if is_numbers or hasattr(inputs, "__array__") else ""


@dataclass(frozen=True, eq=False)
class _Column:
    """A list or tuple with one item for each input."""

    items: Any


def _with_columns(batch: Any) -> Any:
    """The same nested collection, in which every list or tuple with one item for each input is a `_Column`."""
    tensors = tensors_of(batch)
    size = tensors[0].shape[0] if tensors and tensors[0].ndim else None

    def mark(sequence: Any) -> Any:
        if len(sequence) == size and type(sequence) in (list, tuple) and not tensors_of(sequence):
            return _Column(sequence)
        items = [marked(item) for item in sequence]
        return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)

    def marked(collection: Any) -> Any:
        return apply_to_collection(collection, (list, tuple), mark)

    return tuple(map(marked, batch))


def _leaves(marked: Any) -> list[Any]:
    """The tensors and columns of a collection, in the order of `_map_leaves`."""
    leaves: list[Any] = []
    _map_leaves(leaves.append, marked)
    return leaves


def _map_leaves(function: Callable[[Any], Any], marked: Any) -> Any:
    return apply_to_collection(marked, (Tensor, _Column), function)


def _joined(leaves: Sequence[Any], size: int) -> Any:
    if isinstance(leaves[0], Tensor):
        return torch.cat(list(leaves))[:size]
    kind = type(leaves[0].items)
    return kind(item for leaf in leaves for item in leaf.items)[:size]


class ProbeCollector:
    """Takes a probe of some size from training batches as they come by, each split by `split_batch`.

    Attributes:
        probe: The inputs taken so far; ``None`` before the first batch.

    Example:
        >>> import torch
        >>> collector = ProbeCollector(size=5)
        >>> collector.add((torch.zeros(3, 2), torch.zeros(3)))
        >>> collector.is_complete, collector.probe.size
        (False, 3)
    """

    def __init__(self, size: int, *, batch_fn: Callable[[Any], Any] | None = None, whole_batches: bool = False) -> None:
        self.probe: Probe | None = None
        self._size = size
        self._batch_fn = batch_fn
        self._whole_batches = whole_batches
        self._batches: list[tuple[Any, Any]] = []

    @property
    def is_complete(self) -> bool:
        """Whether all inputs have been taken."""
        return self.probe is not None and self.probe.size == self._size

    def limit(self, size: int) -> None:
        """Take another number of inputs, also of those that have been taken."""
        self._size = size
        if self._batches:
            self.probe = Probe.from_batches(self._batches, size)

    def add(self, batch: Any) -> None:
        """Take the inputs and targets of a batch, as copies: a training step may write to the batch.

        Raises:
            TypeError: If the batch does not say which tensors are inputs and which are targets.
            ValueError: If the batch does not fit to the batches before, which are kept.
        """
        pair = split_batch(batch, self._batch_fn, whole_batches=self._whole_batches)
        check_containers(pair)
        pair = map_tensors(copied, pair)
        self.probe = Probe.from_batches([*self._batches, pair], self._size)
        self._batches.append(pair)


def split_batch(
    batch: Any, batch_fn: Callable[[Any], Any] | None = None, *, whole_batches: bool = False
) -> tuple[Any, Any]:
    """Split a training batch into inputs and targets.

    Args:
        batch: The batch. Without ``batch_fn``, a pair is taken as it is, and a tensor, or a sequence of one, as inputs
            without targets.
        batch_fn: The function from the batch to a pair; ``None`` for none.
        whole_batches: Whether any other batch is taken as inputs without targets, instead of being refused.

    Raises:
        TypeError: If the batch does not say which tensors are inputs and which are targets.
    """
    if batch_fn is not None:
        try:
            pair = batch_fn(batch)
        except Exception as error:
            raise TypeError(
                f"batch_fn must take a training batch, {described(batch)}, but failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if not is_sequence_of(2, pair):
            raise TypeError(f"batch_fn must return a pair of inputs and targets, got {described(pair)}")
        return pair[0], pair[1]
    if is_sequence_of(2, batch):
        return batch[0], batch[1]
    if is_sequence_of(1, batch):
        return batch[0], None
    if isinstance(batch, Tensor) or whole_batches:
        return batch, None
    raise TypeError(
        f"a training batch must be a pair of inputs and targets, got {described(batch)}: pass "
        f"batch_fn=lambda batch: {written_as_pair(batch)}, or probe=(inputs, targets)"
    )
