"""Inputs and targets of training batches, and a probe collected from them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_basin.probe import Probe
from lightning_basin.tensors import check_containers, copied, described, is_sequence_of, map_tensors, written_as_pair


class ProbeCollector:
    """Takes a probe from training batches as they come by.

    Args:
        size: Inputs wanted.
        batch_fn: From a batch to a pair of inputs and targets. ``None`` takes a pair as it is, and a tensor, or a
            sequence of one, as inputs without targets.
        whole_batches: Take any other batch as inputs without targets, instead of refusing it.

    Example:
        >>> import torch
        >>> collector = ProbeCollector(size=5)
        >>> collector.add((torch.zeros(3, 2), torch.zeros(3)))
        >>> collector.complete, collector.probe().size
        (False, 3)
    """

    def __init__(self, size: int, *, batch_fn: Callable[[Any], Any] | None = None, whole_batches: bool = False) -> None:
        self._size = size
        self._batch_fn = batch_fn
        self._whole_batches = whole_batches
        self._batches: list[tuple[Any, Any]] = []

    @property
    def num_inputs(self) -> int:
        """Inputs taken so far, at most as many as were wanted."""
        return self.probe().size if self._batches else 0

    @property
    def complete(self) -> bool:
        """Whether there are as many inputs as were wanted."""
        return self.num_inputs == self._size

    def add(self, batch: Any) -> None:
        """Copy what a batch holds: a training step may write to it.

        Raises:
            TypeError: If inputs and targets cannot be told apart.
            ValueError: If the batch does not fit to the ones before, which are kept.
        """
        pair = split_batch(batch, self._batch_fn, whole_batches=self._whole_batches)
        check_containers(pair)
        pair = map_tensors(copied, pair)
        Probe.from_batches([*self._batches, pair], self._size)
        self._batches.append(pair)

    def probe(self) -> Probe:
        """The probe of what has been taken so far.

        Raises:
            ValueError: If nothing has.
        """
        return Probe.from_batches(self._batches, self._size)


def split_batch(
    batch: Any, batch_fn: Callable[[Any], Any] | None = None, *, whole_batches: bool = False
) -> tuple[Any, Any]:
    """Inputs and targets of a training batch.

    Args:
        batch: A pair as it is; a tensor, or a sequence of one, as inputs without targets.
        batch_fn: From any other batch to a pair.
        whole_batches: Take any other batch as inputs without targets, instead of refusing it.

    Raises:
        TypeError: If inputs and targets cannot be told apart.
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
