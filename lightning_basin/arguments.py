"""What the arguments of a `BasinMonitor` must be."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightning_basin.curvature import HESSIAN_MODES
from lightning_basin.lightnings import MisconfigurationException
from lightning_basin.measurement import check_precision


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
            raise MisconfigurationException(f"`BasinMonitor({name}={value!r})` must {what}")
    if arguments["history"] is not None and not _names_a_file(arguments["prefix"]):
        raise MisconfigurationException(
            f"`BasinMonitor(prefix={arguments['prefix']!r})` must be the name of a file where history= writes a table: "
            f"at most 200 bytes, and none of {_NOT_IN_FILES}"
        )
    try:
        check_precision(arguments["dtype"], arguments["hessian"], arguments["rtol"])
    except ValueError as error:
        raise MisconfigurationException(f"`BasinMonitor(dtype={arguments['dtype']!r})`: {error}") from error


def as_builtin(value: Any) -> Any:
    """A number of NumPy as one of Python, which a checkpoint may hold; anything else as it is.

    Example:
        >>> as_builtin(np.int64(3))
        3
    """
    return value.item() if isinstance(value, np.generic) else value


_NOT_IN_FILES = '\\:*?"<>|'


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _names_a_file(prefix: str) -> bool:
    is_short = len(prefix.encode()) <= 200  # noqa: PLR2004 - of the 255 bytes that file systems take
    return is_short and prefix.strip(". ") != "" and not any(character in prefix for character in _NOT_IN_FILES)


def _at_least_one(value: Any) -> bool:
    return not isinstance(value, int) or value >= 1


def _share(value: float | None) -> bool:
    return value is None or 0.0 < value < 1.0


def _no_word_but(*words: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, str) or value in words


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
    ("loss_fn", _no_word_but("behavioral"), "be callable or 'behavioral'"),
    ("behavior", _no_word_but("outputs", "probabilities"), "be callable, 'outputs' or 'probabilities'"),
    ("on_other_probe", lambda value: value in ("raise", "replace"), "be 'raise' or 'replace'"),
    ("prefix", _is_name, "be a word of printable characters"),
    ("history", lambda value: value in ("csv", "jsonl", None), "be 'csv', 'jsonl' or None"),
)
