"""Callbacks and schedulers that monitor a measured value: what they look for, and what they do until there is one."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.lightnings import MisconfigurationException, Trainer, callbacks_of
from lightning_basin.keys import Key, did_you_mean, mistaken_for, possible_keys
from lightning_basin.naming import escaped, printable
from lightning_basin.network.layers import find_layers
from lightning_basin.record import NETWORK_QUANTITIES

_OF_HESSIAN = ("hessian_", "residual_curvature", "smallest_curvature", "gauss_newton_nullity")
"""The first characters of the names of all that is measured of a Hessian."""


@dataclass(frozen=True)
class Watcher:
    """A callback, or Lightning's configuration of a scheduler, that looks for a value by its key; messages name it."""

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


def find_watchers(trainer: Trainer) -> list[Watcher]:
    """Return every callback and scheduler of a run that monitors a value, of whatever kind."""
    named: list[tuple[Any, Any]] = [(callback, callback) for callback in callbacks_of(trainer)]
    named += [(config, config.scheduler) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    return [
        Watcher(owner, key, f"{type(called).__name__}(monitor={printable(key)!r})")
        for owner, called in named
        if isinstance(key := getattr(owner, "monitor", None), str)
    ]


def check_watchers(
    watchers: Iterable[Watcher], arguments: Arguments, module: nn.Module, prefixes: Sequence[str]
) -> Iterator[str]:
    """Refuse what looks for a value that no measurement can have, and yield a warning for what goes on all the same."""
    keys = keys_of(arguments, module)
    later = _later_keys(arguments, module, keys)
    for watcher in watchers:
        key = Key.of(watcher.key, arguments.prefix)
        is_of_another = any(Key.of(watcher.key, other) for other in prefixes if other != arguments.prefix)
        if key is None:
            if not is_of_another:
                yield from _check_foreign(watcher, keys, prefixes)
        elif watcher.key not in keys and watcher.key not in later and not is_of_another:
            raise MisconfigurationException(
                f"{watcher.name} looks for a value that BasinMonitor(prefix={arguments.prefix!r}) never logs"
                f"{did_you_mean(watcher.key, keys) or '. HINT: `BasinRecord.scalars` shows the keys'}"
            )
        elif (argument := left_out(arguments).get(key.quantity)) is not None:
            problem = f"{watcher.name} looks for a value that `BasinMonitor({argument})` does not measure"
            if watcher.is_strict:
                raise MisconfigurationException(f"{problem}. HINT: change this argument, or the key")
            yield problem
        elif watcher.is_strict and _is_late(key.quantity, arguments):
            lenient = "" if watcher.is_saving else ". HINT: pass strict=False"
            yield (
                f"{watcher.name} looks for a value that is not there before the loss has reached zero, and is passed "
                f"over until then{lenient}"
            )


def keys_of(arguments: Arguments, module: nn.Module) -> list[str]:
    """Return every key that a measurement of a module can have, as far as one can tell before."""
    try:
        layers = [_compiled_away(layer.name) for layer in find_layers(module)]
    except ValueError:  # Nothing is trained: the first batch is where this is refused.
        layers = []
    return possible_keys(arguments.prefix, layers, arguments.layers)


def _later_keys(arguments: Arguments, module: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return the keys of modules that are no layers now, and may become some where they are trained later."""
    has_blocks = any(key.startswith(f"{escaped(arguments.prefix)}_block_") for key in keys)
    if has_blocks or not isinstance(arguments.layers, str):
        return set()
    return set(possible_keys(arguments.prefix, [_compiled_away(name) for name, _ in module.named_modules()], "all"))


def _compiled_away(name: str) -> str:
    """Return a module's name as in a copy, which is not compiled."""
    return ".".join(level for level in name.split(".") if level != "_orig_mod")


def _is_late(quantity: str, arguments: Arguments) -> bool:
    is_verified = quantity == "surviving_fraction" and arguments.verify_null_space == "zero_loss"
    return quantity == "zero_loss_step" or is_verified


def _check_foreign(watcher: Watcher, keys: Collection[str], prefixes: Sequence[str]) -> Iterator[str]:
    """Refuse a key that begins like none of any monitor's, where it looks like one of them."""
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
    """Lets watchers pass over their checks until there is a value, where they would end the run without it.

    A strict ``EarlyStopping`` is lenient until then, a scheduler does not step, and a ``ModelCheckpoint`` ranks no
    weights. No value is made up: a provisional one could stop a run.
    """

    def __init__(self, watchers: Iterable[Watcher], arguments: Arguments, present: Collection[str]) -> None:
        self._arguments = arguments
        self._waiting: list[tuple[Watcher, dict[str, Any]]] = []
        for watcher in watchers:
            if watcher.key not in present:
                lenient = _lenient(watcher)
                self._waiting.append((watcher, {name: getattr(watcher.owner, name) for name in lenient}))
                _set(watcher.owner, lenient)

    def unmet(self, keys: Collection[str]) -> Iterator[str]:
        """Say who waits on after a measurement that should have brought the value."""
        for watcher, _ in self._waiting:
            key = Key.of(watcher.key, self._arguments.prefix)
            assert key is not None, "one of this monitor's"
            if not _is_late(key.quantity, self._arguments) and key.quantity not in left_out(self._arguments):
                saving = ", and saves no ranked weights until then" if watcher.is_saving else ""
                yield (
                    f"{watcher.name} is passed over until there is a value for it, as the first measurement brought "
                    f"none{saving}{did_you_mean(watcher.key, keys) if key.scope else ''}"
                )

    def end(self, present: Collection[str] | None = None) -> None:
        """Let every watcher whose key has a value now check as it did before; ``None`` lets all."""
        ends = [entry for entry in self._waiting if present is None or entry[0].key in present]
        self._waiting = [entry for entry in self._waiting if entry not in ends]
        for watcher, before in ends:
            _set(watcher.owner, before)


def _lenient(watcher: Watcher) -> dict[str, Any]:
    """Return the attributes of a watcher that ends no run for a missing value, and says nothing of it."""
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


def left_out(arguments: Arguments) -> dict[str, str]:
    """Return the quantities that no measurement has with some arguments, each with the argument that leaves it out."""
    training_set = [name for name in NETWORK_QUANTITIES if name.startswith("train_")]
    hessian = [name for name in NETWORK_QUANTITIES if name.startswith(_OF_HESSIAN)]
    missing: dict[str, str] = {}
    for name, is_left_out, quantities in (
        ("hessian", arguments.hessian is False, hessian),
        ("dtype", arguments.dtype == "float32", hessian),
        ("verify_null_space", arguments.verify_null_space is None, ["surviving_fraction"]),
        ("duplicates_over", arguments.duplicates_over is None, training_set),
    ):
        if is_left_out:
            missing |= dict.fromkeys(quantities, f"{name}={getattr(arguments, name)!r}")
    return missing
