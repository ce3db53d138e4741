"""All inputs of a training set, in order, as probes, without a run's loader, which must not be disturbed."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_basin.probe import Probe, split_batch

_BATCH_SIZE = 256  # size of a batch where the data set comes without a loader


class TrainingSet:
    """The inputs of a map-style data set, one after the other, the same at each iteration.

    The data set is read in this process, in the order of its indices, under seeded random states: an augmentation that
    draws from the generators of Python, NumPy or torch draws the same numbers at each iteration, and the run does not
    notice it. A data set that changes when it is read (a counter, a private generator) does change.

    Of a loader only the data set, ``collate_fn`` and the size of a batch are used: no order, no workers. ``prepare`` is
    applied to each collated batch; `split_batch` takes ``batch_fn`` and ``whole_batches``.
    """

    def __init__(
        self,
        data: Any,
        *,
        prepare: Callable[[Any], Any] | None = None,
        batch_fn: Callable[[Any], Any] | None = None,
        whole_batches: bool = False,
    ) -> None:
        loader = (
            data if isinstance(data, DataLoader) else DataLoader(data, _BATCH_SIZE) if _is_map_style(data) else None
        )
        if loader is None or not _is_map_style(loader.dataset):
            kind = type(data if loader is None else loader.dataset).__name__
            raise TypeError(
                f"a training set that is read twice must be a map-style data set, with a length and indices, or a "
                f"DataLoader of one, got {kind}"
            )
        self._dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        # Without automatic batching each item of the data set is a batch.
        self._batch_size = None if loader.batch_sampler is None else loader.batch_size or _BATCH_SIZE
        self._prepare = prepare
        self._batch_fn = batch_fn
        self._whole_batches = whole_batches

    def __iter__(self) -> Iterator[Probe]:
        size = self._batch_size
        for start in range(0, len(self._dataset), size or 1):
            with _seeded_random_states(start):
                if size is None:
                    batch = self._collate(self._dataset[start])
                else:
                    stop = min(start + size, len(self._dataset))
                    batch = self._collate([self._dataset[index] for index in range(start, stop)])
                batch = batch if self._prepare is None else self._prepare(batch)
                inputs, targets = split_batch(batch, self._batch_fn, whole_batches=self._whole_batches)
            yield Probe(inputs, targets)


def _is_map_style(data: Any) -> bool:
    """Whether the data are a data set that can be read at any index."""
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__")


def as_probes(data: Any) -> Iterable[Probe]:
    """Turn a training set, or an iterable of batches, into probes that can be iterated over more than once."""
    if isinstance(data, DataLoader | Dataset):
        return TrainingSet(data)
    if isinstance(data, TrainingSet):
        return data
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise TypeError(
            f"duplicates_over must be a map-style data set, a DataLoader of one, or batches that can be iterated over "
            f"more than once, got {type(data).__name__}: pass a list of batches"
        )
    return _Batches(data)


class _Batches:
    """Batches as probes, made anew at each iteration."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Probe]:
        for batch in self._batches:
            yield batch if isinstance(batch, Probe) else Probe(*split_batch(batch))


@contextmanager
def _seeded_random_states(seed: int) -> Iterator[None]:
    """Seed all generators, and restore the run's states afterwards, also when the body raises."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if is_used else []
    with torch.random.fork_rng(devices):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.set_state(Generator().manual_seed(seed).get_state())
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
