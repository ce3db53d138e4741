"""What a measurement looks at: the outputs, the loss and the training set of a module, inside a fit or outside."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_basin.layers import call_module
from lightning_basin.measurement import Behavior, Probabilities
from lightning_basin.probe import Probe
from lightning_basin.training_set import TrainingSet, as_probes

LOSS_ATTRIBUTES = ("loss_fn", "criterion")
"""Names under which a module's loss is looked for."""


def found_loss(module: nn.Module) -> Callable[..., Any] | None:
    """The loss that a module keeps under one of the usual names.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.criterion = nn.MSELoss()
        >>> found_loss(module)
        MSELoss()
    """
    found = (getattr(module, name, None) for name in LOSS_ATTRIBUTES)
    return next((attribute for attribute in found if callable(attribute)), None)


def quiet_behavior(
    behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None, trainer: Trainer | None
) -> Behavior:
    """The behavior, on a copy that still finds its trainer but logs nothing.

    Args:
        behavior: As `BasinMonitor` takes it.
        trainer: ``None`` outside of a fit.
    """
    call = behavior if callable(behavior) else call_module

    def outputs(module: nn.Module, inputs: Any) -> Any:
        if isinstance(module, LightningModule):
            if trainer is not None:
                module.trainer = trainer
            vars(module).update(log=_ignore, log_dict=_ignore)
            if trainer is not None and trainer.world_size > 1:
                vars(module).update(all_gather=_refuse_to_gather)
        return call(module, inputs)

    return Probabilities(outputs) if behavior == "probabilities" else outputs


def whole_training_set(
    duplicates_over: Any, trainer: Trainer | None, *, batch_fn: Callable[..., Any] | None, whole_batches: bool
) -> Iterable[Probe] | None:
    """Over which duplicates are counted, as a loader's data set is read anew by a plain sequential pass.

    Args:
        duplicates_over: As `BasinMonitor` takes it.
        trainer: ``None`` outside of a fit.
        batch_fn: As `BasinMonitor` takes it.
        whole_batches: Without a ``batch_fn``, take a batch as inputs.

    Raises:
        MisconfigurationException: If it cannot be read in that way.
    """
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
    """A batch as the training step gets it: what lightning 2.6 does between the loader and the step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _ignore(*_: Any, **__: Any) -> None:
    """Takes the place of a method that would log."""


def _refuse_to_gather(*_: Any, **__: Any) -> None:
    """Takes the place of a method that would wait for the other processes, which run other inputs, or none."""
    raise RuntimeError(
        "each process measures apart, and `all_gather` would wait for the others: pass a behavior without it"
    )
