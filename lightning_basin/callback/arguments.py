"""What the arguments of a `BasinMonitor` are, and what they must be."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lightning_basin.callback.lightnings import MisconfigurationException
from lightning_basin.checks import is_flag, is_number
from lightning_basin.layer_names import tag
from lightning_basin.probe import Probe
from lightning_basin.settings import DType, HessianMode, LayerSelection, Settings

PACED_SHARE = 0.1
"""The share of the wall time that measuring takes in a long run without a cadence."""


Rule = tuple[str, Callable[[Any], bool], str]
"""The name of an argument, whether a value of it is valid, and what it must do otherwise."""

FLAG = "be True or False"
"""What an argument must do that is true or false."""


class Arguments:
    """The arguments of a `BasinMonitor`, whose docstring says what each means.

    What a monitor consists of holds the monitor as its arguments, and reads an argument when it needs one: a value
    that is assigned in the middle of a fit counts from then on.
    """

    loss_fn: Callable[..., Any] | Literal["behavioral"] | None
    behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None
    batch_fn: Callable[..., Any] | None
    every_n_epochs: int | None
    every_n_train_steps: int | None
    every_n_epochs_after_zero_loss: int | None
    every_n_spectra: int
    layers: LayerSelection
    hessian: HessianMode
    zero_loss_threshold: float
    zero_loss_patience: int
    rtol: float | None
    duplicate_rtol: float
    duplicates_over: Any
    max_outputs: int | Literal["auto"] | None
    memory_budget: int | None
    dtype: DType
    verify_null_space: int | Literal["zero_loss"] | None
    seed: int
    max_overhead: float | Literal["auto"] | None
    max_failures: int | None
    history: Literal["csv", "jsonl"] | None
    report: bool
    figures: bool
    on_other_probe: Literal["raise", "replace"]
    prefix: str

    @property
    def is_paced(self) -> bool:
        """Whether no cadence was passed, so that measurements of long runs keep to `PACED_SHARE`."""
        cadences = (self.every_n_epochs, self.every_n_train_steps, self.every_n_epochs_after_zero_loss)
        return self.max_overhead is None and all(cadence is None for cadence in cadences)

    @property
    def overhead_limit(self) -> float | None:
        """The share of the wall time that measuring may take; ``None`` where no clock decides."""
        if self.is_paced:
            return PACED_SHARE
        return None if isinstance(self.max_overhead, str) else self.max_overhead


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse values that mean nothing, before anything is measured."""
    check_rules("BasinMonitor", _RULES, arguments)
    try:
        Settings(**{name: arguments[name] for name in _SHARED})
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"`BasinMonitor(...)`: {error}") from error
    if arguments["history"] is not None:
        _check_file_name(arguments["prefix"], arguments["history"])


def check_rules(callback: str, rules: Sequence[Rule], arguments: Mapping[str, Any]) -> None:
    """Refuse the first argument that breaks a rule."""
    for name, is_valid, requirement in rules:
        value = arguments[name]
        if not is_valid(value):
            shown = repr(value)
            shown = shown if len(shown) <= _LONGEST_SHOWN and "\n" not in shown else type(value).__name__
            raise MisconfigurationException(f"`{callback}({name}={shown})` must {requirement}")


def _check_file_name(prefix: str, ending: str) -> None:
    """Refuse a prefix after which no file can be named, on any of the usual systems."""
    longest = f".{tag(prefix)}-9999.{ending}"  # While it is written, where earlier runs have left others.
    if "/" in prefix or "\\" in prefix or "\0" in prefix or _DEVICE.fullmatch(prefix.partition(".")[0].strip()):
        requirement = "a prefix without slashes that is no name of a device"
    elif not prefix or len(longest.encode()) > _LONGEST_NAME:
        requirement = f"a prefix of 1 to {_LONGEST_NAME - len(longest) + len(tag(prefix))} letters"
    else:
        return
    raise MisconfigurationException(
        f"`BasinMonitor(prefix=..., history={ending!r})` writes <prefix>.{ending} and needs {requirement}, got "
        f"{prefix[:60]!r}"
    )


ProbeSize = int | Literal["auto"]
"""The number of inputs to take from training batches; ``"auto"`` finds it from the number of outputs."""


def probe_or_size(probe: Any) -> tuple[Probe | None, ProbeSize]:
    """Return a probe that was passed and 0, or ``None`` and the number of inputs to take from training batches.

    Raises:
        MisconfigurationException: If it is neither a number of inputs, nor ``"auto"``, a `Probe` or a pair.
    """
    if isinstance(probe, str) and probe == "auto":
        return None, "auto"
    if isinstance(probe, int) and not isinstance(probe, bool):
        if probe < 1:
            raise MisconfigurationException(f"`BasinMonitor(probe={probe})` must be at least 1")
        return None, probe
    if isinstance(probe, Probe):
        return probe, 0
    if not isinstance(probe, tuple | list):
        raise MisconfigurationException(
            f"`BasinMonitor(probe=...)` must be a number of inputs, 'auto', a Probe or a pair of inputs and targets, "
            f"got {repr(probe) if isinstance(probe, str) else type(probe).__name__}"
        )
    try:
        return Probe(*probe), 0
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"`BasinMonitor(probe=...)`: {error}") from error


_LONGEST_SHOWN = 60
"""The number of characters of a value that an error shows."""

_LONGEST_NAME = 255  # bytes of a file's name on the usual file systems
_DEVICE = re.compile("con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)


def as_builtin(value: Any) -> Any:
    """Return a number of NumPy as one of Python, which a checkpoint may hold; anything else as it is.

    Example:
        >>> as_builtin(np.int64(3))
        3
    """
    return value.item() if isinstance(value, np.generic) else value


def is_count(value: Any) -> bool:
    """Whether a value is an integer, and at least 1."""
    return is_number(value, int) and value >= 1


def _is_count_or_none(value: Any) -> bool:
    return value is None or is_count(value)


def _is_function_or_none(value: Any) -> bool:
    """A class can be called too, and is not meant."""
    return value is None or (callable(value) and not isinstance(value, type))


def _no_word_but(word: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, str) or value == word


_SHARED = (
    *("loss_fn", "behavior", "layers", "hessian", "rtol", "duplicate_rtol", "max_outputs", "memory_budget"),
    *("dtype", "seed"),
)
"""The arguments that `Settings` checks, for `measure_basin` too."""

_OPTIONAL_COUNTS = ("every_n_epochs", "every_n_train_steps", "every_n_epochs_after_zero_loss", "max_failures")
_RULES: tuple[Rule, ...] = (
    *((name, _is_count_or_none, "be an integer, at least 1, or None") for name in _OPTIONAL_COUNTS),
    *((name, is_count, "be an integer, at least 1") for name in ("every_n_spectra", "zero_loss_patience")),
    ("memory_budget", lambda value: not is_number(value, float) or value >= 1, "be at least 1"),
    (
        "verify_null_space",
        lambda value: value == "zero_loss" if isinstance(value, str) else _is_count_or_none(value),
        "be an integer, at least 1, 'zero_loss' or None",
    ),
    (
        "max_overhead",
        lambda value: value in ("auto", None) or (is_number(value, float) and 0.0 < value < 1.0),
        "be inside (0, 1) or 'auto'",
    ),
    ("zero_loss_threshold", lambda value: is_number(value, float) and value >= 0.0, "be a number, >= 0"),
    *((name, is_flag, FLAG) for name in ("report", "figures")),
    ("duplicates_over", _no_word_but("train"), "be 'train', a data set or batches"),
    ("batch_fn", _is_function_or_none, "be callable, and no class"),
    ("on_other_probe", lambda value: value in ("raise", "replace"), "be 'raise' or 'replace'"),
    ("prefix", lambda value: isinstance(value, str), "be a string"),
    ("history", lambda value: value in ("csv", "jsonl", None), "be 'csv', 'jsonl' or None"),
)
