"""The training set of a run, read anew beside its loader."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_basin.callback.lightnings import MisconfigurationException, Trainer
from lightning_basin.probe import Probe
from lightning_basin.tensors import written_as_pair
from lightning_basin.training_set import TrainingSet, as_probes


def check_one_loader(trainer: Trainer, batch: Any) -> None:
    """Refuse batches that hold a batch of each of some loaders: a pair of them is no pair of inputs and targets."""
    loaders, place = trainer.train_dataloader, "batch"
    count = len(loaders) if isinstance(loaders, list | tuple | dict) else 0
    while isinstance(loaders, list | tuple | dict) and loaders:
        key = next(iter(loaders)) if isinstance(loaders, dict) else 0
        loaders, batch, place = loaders[key], batch[key], f"{place}[{key!r}]"
    if count:
        raise TypeError(
            f"a training batch must be a pair of inputs and targets, but holds a batch of each of {count} loaders: "
            f"pass batch_fn=lambda batch: {written_as_pair(batch, place)} for those of the first"
        )


def whole_training_set(
    duplicates_over: Any, trainer: Trainer | None, *, batch_fn: Callable[..., Any] | None, whole_batches: bool
) -> Iterable[Probe] | None:
    """Return the training set over which duplicates are counted; a loader's data set is read anew, in order."""
    data, prepare = duplicates_over, None
    if data is None:
        return None
    if isinstance(data, str):
        if trainer is None:
            raise MisconfigurationException(
                "`BasinMonitor(duplicates_over='train')` needs a run. HINT: pass the data set itself"
            )
        data, prepare = trainer.train_dataloader, partial(_as_in_training, trainer)
    try:
        if prepare is None and not isinstance(data, DataLoader | Dataset):
            return as_probes(data)
        return TrainingSet(data, prepare=prepare, batch_fn=batch_fn, whole_batches=whole_batches)
    except TypeError as error:
        raise MisconfigurationException(
            f"`BasinMonitor(duplicates_over=...)` cannot count over the training set: {error}. HINT: pass such a "
            f"data set, or a list of batches, as `duplicates_over`"
        ) from error


def _as_in_training(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as the training step gets it: what lightning 2.6 does between the loader and the step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
