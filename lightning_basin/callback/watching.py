"""Callbacks and schedulers that monitor a measured value: what they look for, and what they do until there is one."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_basin.callback.keys import Key, did_you_mean, left_out, mistaken_for, possible_keys
from lightning_basin.callback.lightnings import Callback, MisconfigurationException, Trainer
from lightning_basin.naming import escaped, printable
from lightning_basin.network.layers import find_layers


@dataclass(frozen=True)
class Watcher:
    """A callback or a scheduler that looks for a value by its key.

    Attributes:
        owner: The callback, or Lightning's configuration of the scheduler.
        key: For which it looks.
        name: How a message calls it.
    """

    owner: Any
    key: str
    name: str

    @property
    def is_strict(self) -> bool:
        """Whether it ends the run where the value is missing."""
        return bool(getattr(self.owner, "strict", self.is_saving))

    @property
    def is_saving(self) -> bool:
        """Whether it is a ``ModelCheckpoint``, of whichever package."""
        return hasattr(self.owner, "save_top_k")


def watchers(trainer: Trainer) -> Iterator[Watcher]:
    """Every callback and scheduler of a run that monitors a value, of whatever kind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
    named: list[tuple[Any, Any]] = [(callback, callback) for callback in callbacks]
    named += [(config, config.scheduler) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    for owner, called in named:
        key = getattr(owner, "monitor", None)
        if isinstance(key, str):
            yield Watcher(owner, key, f"{type(called).__name__}(monitor={printable(key)!r})")


def check_watchers(
    trainer: Trainer, settings: Mapping[str, Any], module: nn.Module, prefixes: Sequence[str]
) -> Iterator[str]:
    """Refuse what looks for a value that no measurement of a monitor can have.

    Args:
        trainer: At the start of training, when every callback and scheduler is set up.
        settings: Arguments of the monitor by name.
        module: The one that it measures.
        prefixes: Of all monitors of the run, this one's among them.

    Returns:
        A warning for each that goes on all the same.

    Raises:
        MisconfigurationException: For a key that is mistyped, or a value that the settings leave out and that the run
            would be ended for.
    """
    found = list(watchers(trainer))
    if not found:
        return
    prefix = settings["prefix"]
    keys = keys_of(settings, module)
    later = _later_keys(settings, module, keys)
    for watcher in found:
        key = Key.of(watcher.key, prefix)
        is_of_another = any(Key.of(watcher.key, other) for other in prefixes if other != prefix)
        if key is None:
            yield from _check_foreign(watcher, keys, prefixes)
        elif watcher.key not in keys and watcher.key not in later and not is_of_another:
            raise MisconfigurationException(
                f"{watcher.name} looks for a value that BasinMonitor(prefix={prefix!r}) never logs"
                f"{did_you_mean(watcher.key, keys) or '. HINT: see BasinRecord.scalars for its keys'}"
            )
        elif (setting := left_out(settings).get(key.quantity)) is not None:
            problem = f"{watcher.name} looks for a value that `BasinMonitor({setting})` does not measure"
            if watcher.is_strict:
                raise MisconfigurationException(f"{problem}. HINT: change this argument, or the key")
            yield problem
        elif watcher.is_strict and _is_late(key.quantity, settings):
            lenient = "" if watcher.is_saving else ". HINT: pass strict=False"
            yield (
                f"{watcher.name} looks for a value that is not there before the loss has reached zero, and is passed "
                f"over until then{lenient}"
            )


def _later_keys(settings: Mapping[str, Any], module: nn.Module, keys: Sequence[str]) -> set[str]:
    """Keys of modules that are no layers now, and may become some where their parameters are trained later."""
    groups = {found.group for key in keys if (found := Key.of(key, settings["prefix"])) is not None}
    if "block" in groups or not isinstance(settings["layers"], str):
        return set()
    names = [_compiled_away(name) for name, _ in module.named_modules()]
    return set(possible_keys(settings["prefix"], names, "all"))


def keys_of(settings: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Every key that a measurement of a module can have, as far as one can tell before.

    Args:
        settings: Arguments of the monitor by name.
        module: The one that it measures.
    """
    return possible_keys(settings["prefix"], _layers(module), settings["layers"])


def _layers(module: nn.Module) -> list[str]:
    try:
        return [_compiled_away(layer.name) for layer in find_layers(module)]
    except ValueError:  # Nothing is trained: the first batch is where this is refused.
        return []


def _compiled_away(name: str) -> str:
    """A module's name as in a copy, which is not compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_late(quantity: str, settings: Mapping[str, Any]) -> bool:
    is_verified = quantity == "surviving_fraction" and settings["verify_null_space"] == "zero_loss"
    return quantity == "zero_loss_step" or is_verified


def _check_foreign(watcher: Watcher, keys: Collection[str], prefixes: Sequence[str]) -> Iterator[str]:
    """Refuse a key that begins like none of this monitor's, and that is meant to."""
    if any(Key.of(watcher.key, prefix) for prefix in prefixes):
        return
    meant = mistaken_for(watcher.key, keys, prefixes)
    if meant is not None:
        raise MisconfigurationException(
            f"{watcher.name} looks for a value that no BasinMonitor logs: their prefixes are {list(prefixes)}. Did you "
            f"mean {meant!r}?"
        )
    # A quantity without a prefix may be a value of the user's own; a loss is, most likely.
    prefixed = f"{escaped(prefixes[0])}/{watcher.key}"
    if prefixed in keys and not watcher.key.endswith("loss"):
        yield f"{watcher.name} looks for a value that BasinMonitor does not log. Did you mean {prefixed!r}?"


class Lenience:
    """Lets watchers pass over their checks until there is a value, where they would end the run for want of it.

    A strict ``EarlyStopping`` is lenient until then, a scheduler does not step, and a ``ModelCheckpoint`` ranks no
    weights. No value is made up: a provisional one could stop a run.

    Args:
        trainer: At the start of training.
        settings: Arguments of the monitor by name.
        present: The keys that have a value already.
    """

    def __init__(self, trainer: Trainer, settings: Mapping[str, Any], present: Collection[str]) -> None:
        self._settings = settings
        waiting = [one for one in watchers(trainer) if self._key(one) and one.key not in present]
        self._kept: list[tuple[Watcher, dict[str, Any]]] = []
        for watcher in waiting:
            lenient = _lenient(watcher)
            self._kept.append((watcher, {name: getattr(watcher.owner, name) for name in lenient}))
            _set(watcher.owner, lenient)

    def unmet(self, keys: Collection[str]) -> Iterator[str]:
        """Say who found no value after a measurement that should have brought it.

        Args:
            keys: Those that have one.
        """
        for watcher, _ in self._kept:
            key = self._key(watcher)
            assert key is not None, "one of this monitor's"
            if not _is_late(key.quantity, self._settings) and key.quantity not in left_out(self._settings):
                saving = ", and saves no ranked weights until then" if watcher.is_saving else ""
                yield (
                    f"{watcher.name} is passed over until there is a value for it, as the first measurement brought "
                    f"none{saving}{did_you_mean(watcher.key, keys) if key.part else ''}"
                )

    def end(self, present: Collection[str] | None = None) -> None:
        """Let those whose key has a value now check as they did before; ``None`` lets all."""
        ends = [one for one in self._kept if present is None or one[0].key in present]
        self._kept = [one for one in self._kept if one not in ends]
        for watcher, before in ends:
            _set(watcher.owner, before)

    def _key(self, watcher: Watcher) -> Key | None:
        return Key.of(watcher.key, self._settings["prefix"])


def _lenient(watcher: Watcher) -> dict[str, Any]:
    """What has to be set for a watcher that ends no run for a missing value, and says nothing of it."""
    if watcher.is_saving:
        return {"save_top_k": 0}
    if not watcher.is_strict:
        return {}
    # A scheduler that is only lenient warns at each of its steps, and a verbose early stopping at each check.
    quiet = {"frequency": sys.maxsize} if hasattr(watcher.owner, "frequency") else {"strict": False, "verbose": False}
    return {name: value for name, value in quiet.items() if hasattr(watcher.owner, name)}


def _set(owner: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)
