"""What the arguments of a `BasinMonitor` are, and what they must be."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from lightning_basin.callback.lightnings import MisconfigurationException
from lightning_basin.layer_names import tag
from lightning_basin.probe import Probe
from lightning_basin.settings import HESSIAN_MODES, HessianMode, LayerSelection, Precision, check_precision


class Arguments:
    """The arguments of a `BasinMonitor`, which says what each means.

    The parts of a monitor hold the monitor as their arguments, and read an argument when they need it: one that is
    assigned in the middle of a fit counts from then on.
    """

    loss_fn: Callable[..., Any] | Literal["behavioral"] | None
    behavior: Callable[..., Any] | Literal["outputs", "probabilities"] | None
    batch_fn: Callable[..., Any] | None
    every_n_epochs: int
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
    dtype: Precision
    verify_null_space: int | Literal["zero_loss"] | None
    seed: int
    max_overhead: float | None
    max_failures: int | None
    history: Literal["csv", "jsonl"] | None
    on_other_probe: Literal["raise", "replace"]
    prefix: str


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse values that mean nothing, before anything is measured.

    Args:
        arguments: By name.

    Raises:
        MisconfigurationException: For the first argument that is not as it must be; it says how that is.
    """
    for name, holds, what in _RULES:
        value = arguments[name]
        if not holds(value):
            shown = repr(value)
            shown = shown if len(shown) <= _LONGEST_SHOWN and "\n" not in shown else type(value).__name__
            raise MisconfigurationException(f"`BasinMonitor({name}={shown})` must {what}")
    if arguments["history"] is not None:
        check_file_name(arguments["prefix"], arguments["history"])
    try:
        check_precision(arguments["dtype"], arguments["hessian"], arguments["rtol"])
    except ValueError as error:
        raise MisconfigurationException(f"`BasinMonitor(dtype={arguments['dtype']!r})`: {error}") from error


def check_file_name(prefix: str, ending: str) -> None:
    """Refuse a prefix after which no file can be named, on any of the usual systems.

    Args:
        prefix: Of a monitor.
        ending: Of the file, ``"csv"`` or ``"jsonl"``.

    Raises:
        MisconfigurationException: If the name would be too long, none, that of a device, or lead to another folder.
    """
    longest = f".{tag(prefix)}-9999.{ending}"  # While it is written, where earlier runs have left others.
    if "/" in prefix or "\\" in prefix or "\0" in prefix or _DEVICE.fullmatch(prefix.partition(".")[0].strip()):
        why = "a prefix without slashes that is no name of a device"
    elif not prefix or len(longest.encode()) > _LONGEST_NAME:
        why = f"a prefix of 1 to {_LONGEST_NAME - len(longest) + len(tag(prefix))} letters"
    else:
        return
    raise MisconfigurationException(
        f"`BasinMonitor(prefix=..., history={ending!r})` writes <prefix>.{ending} and needs {why}, got {prefix[:60]!r}"
    )


def probe_or_size(probe: Any) -> tuple[Probe | None, int]:
    """Return a probe that was passed, or the number of inputs to take from training batches; the other is empty.

    Args:
        probe: The argument ``probe`` of `BasinMonitor`.

    Raises:
        MisconfigurationException: If it is neither a number of inputs, nor a `Probe`, nor a pair that makes one.
    """
    if isinstance(probe, int) and not isinstance(probe, bool):
        if probe < 1:
            raise MisconfigurationException(f"`BasinMonitor(probe={probe})` must be at least 1")
        return None, probe
    if isinstance(probe, Probe):
        return probe, 0
    if not isinstance(probe, tuple | list):
        raise MisconfigurationException(
            f"`BasinMonitor(probe=...)` must be a number of inputs, a Probe or a pair of inputs and targets, "
            f"got {type(probe).__name__}"
        )
    try:
        return Probe(*probe), 0
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"`BasinMonitor(probe=...)`: {error}") from error


_LONGEST_SHOWN = 60
_LONGEST_NAME = 255  # Bytes, of a file on the usual file systems.
_DEVICE = re.compile("con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)


def as_builtin(value: Any) -> Any:
    """A number of NumPy as one of Python, which a checkpoint may hold; anything else as it is.

    Example:
        >>> as_builtin(np.int64(3))
        3
    """
    return value.item() if isinstance(value, np.generic) else value


def _at_least_one(value: Any) -> bool:
    return not isinstance(value, int) or value >= 1


def _share(value: float | None) -> bool:
    return value is None or 0.0 < value < 1.0


def _no_word_but(*words: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, str) or value in words


def _function_or(*words: str | None) -> Callable[[Any], bool]:
    """A class can be called too, and is not meant."""

    def holds(value: Any) -> bool:
        is_function = callable(value) and not isinstance(value, type)
        return value in words if isinstance(value, str | None) else is_function

    return holds


_COUNTS = (
    *("every_n_epochs", "every_n_train_steps", "every_n_epochs_after_zero_loss", "every_n_spectra"),
    *("zero_loss_patience", "max_outputs", "memory_budget", "verify_null_space", "max_failures"),
)
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *((name, _at_least_one, "be at least 1") for name in _COUNTS),
    ("verify_null_space", _no_word_but("zero_loss"), "be a number or 'zero_loss'"),
    ("max_outputs", _no_word_but("auto"), "be a number or 'auto'"),
    ("rtol", _share, "be inside (0, 1)"),
    ("max_overhead", _share, "be inside (0, 1)"),
    ("duplicate_rtol", lambda value: 0.0 <= value < 1.0, "be inside [0, 1)"),
    ("zero_loss_threshold", lambda value: value >= 0.0, "be >= 0"),
    ("duplicates_over", _no_word_but("train"), "be 'train', a data set or batches"),
    ("hessian", lambda value: value is False or value in HESSIAN_MODES, f"be in {HESSIAN_MODES} or False"),
    ("loss_fn", _function_or("behavioral", None), "be callable or 'behavioral', and no class"),
    (
        "behavior",
        _function_or("outputs", "probabilities", None),
        "be callable, 'outputs' or 'probabilities', and no class",
    ),
    ("batch_fn", _function_or(None), "be callable, and no class"),
    ("on_other_probe", lambda value: value in ("raise", "replace"), "be 'raise' or 'replace'"),
    ("prefix", lambda value: isinstance(value, str), "be a string"),
    ("history", lambda value: value in ("csv", "jsonl", None), "be 'csv', 'jsonl' or None"),
)
