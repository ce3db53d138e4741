"""The state of a monitor in a checkpoint, read with care: it may be damaged, or of another version."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_basin.callback.state import fingerprint
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord, LayerRecord

_FORM: dict[str, Any] = {
    "probe_size": int,
    "settings": Mapping[str, object],
    "measured_step": int | None,
    "zero_loss_step": int | None,
    "num_zero_losses": int,
    "skipped_steps": list[int],
    "leave_out_loss": bool,
    "history_path": str | None,
}
"""Of every part but the probe and the records, its type."""

_READ_APART = ("probe", "probe_fingerprint", "step_calls", "records")


def read_state(state: Any, settings: Sequence[str], own: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """What of a state can be used, in the form in which a monitor writes it but for the probe and the records.

    The curve of one probe is not gone on with on another: where the probe cannot be read, nothing is used. Where the
    records cannot, the probe is, and they begin anew.

    Args:
        state: Whatever a checkpoint holds.
        settings: Names of the settings that this version writes.
        own: The fingerprint of a probe that the monitor was given; ``None`` where it takes one from training.

    Returns:
        The parts that could be read, by name, with a `Probe` and a list of `BasinRecord`; a part that is missing could
        not. ``None`` where nothing is to be used. And what is wrong, one clause each.
    """
    read: dict[str, Any] | None = None
    try:
        read = read_probe(state, own)
        records, unknown = _read_records(state.get("records"))
    except ValueError as error:
        return read, [str(error)]
    good = {name for name, form in _FORM.items() if name in state and _is_a(state[name], form)}
    read |= {name: state[name] for name in good} | {"records": records}
    stated = read.get("settings", {})
    read["settings"] = {name: stated[name] for name in settings if _is_builtin(stated.get(name, _NOTHING))}
    wrong = {
        "parts that are missing or damaged": (_FORM.keys() - good) | ({*_READ_APART} - state.keys()),
        "unknown parts": state.keys() - _FORM.keys() - {*_READ_APART},
        "unknown fields of its records": unknown,
        "unknown or damaged settings": stated.keys() - read["settings"].keys(),
    }
    return read, [f"{what}: {', '.join(sorted(map(repr, names)))}" for what, names in wrong.items() if names]


_NOTHING = object()


def _is_builtin(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def read_probe(state: Any, own: str | None = None) -> dict[str, Any]:
    """The ``probe``, if a state holds one, the ``probe_fingerprint`` by which it is known, and its ``step_calls``.

    Args:
        state: Whatever a checkpoint holds.
        own: The fingerprint of a probe that the monitor was given, which need not be read again.

    Raises:
        ValueError: If it is not what was written.
    """
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"no parts in it but {_kind(state)}")
    plain, expected = state.get("probe"), state.get("probe_fingerprint")
    if not isinstance(expected, str | None):
        raise ValueError(f"what its probe is known by is {_kind(expected)}")
    calls = state.get("step_calls")
    if not _is_a(calls, list[int] | None):
        raise ValueError(f"the losses from which its outputs were read are {_kind(calls)}")
    if own is not None and expected == own:
        return {"probe": None, "probe_fingerprint": own, "step_calls": calls}
    if plain is None:  # None was full yet, or none that a checkpoint can hold.
        if (expected is None and state.get("records")) or (own is None and "probe" not in state):
            raise ValueError("no probe in it")
        return {"probe": None, "probe_fingerprint": expected, "step_calls": calls}
    try:
        probe = Probe(**plain)
        found = fingerprint(probe if calls is None else Probe(probe.inputs))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its probe cannot be read ({error})") from error
    if expected is not None and found != expected:
        raise ValueError("its probe is not the one that was written")
    return {"probe": probe, "probe_fingerprint": found, "step_calls": calls}


def _read_records(plain: Any) -> tuple[list[BasinRecord], set[str]]:
    """All records, and the names of fields that this version does not know.

    Raises:
        ValueError: If one cannot be read.
    """
    if not isinstance(plain, list):
        raise ValueError(f"its records are no list but {_kind(plain)}")
    records: list[BasinRecord] = []
    unknown: set[str] = set()
    for index, item in enumerate(plain):
        try:
            known = _known(item, BasinRecord, unknown)
            for part in ("layers", "blocks"):
                known[part] = {name: _known(layer, LayerRecord, unknown) for name, layer in known[part].items()}
            record = BasinRecord.from_dict(known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"record {index} of {len(plain)} cannot be read ({error})") from error
        if not _is_a(record, BasinRecord):
            raise ValueError(f"record {index} of {len(plain)} holds values of another type")
        records.append(record)
    return records, unknown


def _known(plain: Mapping[str, Any], form: type[LayerRecord], unknown: set[str]) -> dict[str, Any]:
    """The fields that a record has; the names of others are added to those unknown."""
    names = {field.name for field in fields(form)}
    unknown |= plain.keys() - names
    return {name: value for name, value in plain.items() if name in names}


def _is_a(value: Any, form: Any) -> bool:
    """Whether a value, and all in it, is of a type as annotations write it; whole numbers are counts or steps."""
    kind, arguments = get_origin(form), get_args(form)
    if kind in (Union, UnionType):
        return any(_is_a(value, one) for one in arguments)
    if kind in (tuple, list):
        return isinstance(value, kind) and all(_is_a(item, arguments[0]) for item in value)
    if kind is not None:
        key, item = arguments
        return isinstance(value, Mapping) and all(_is_a(a, key) and _is_a(b, item) for a, b in value.items())
    if form in (int, float):
        return type(value) is int and value >= 0 if form is int else type(value) in (int, float)
    if is_dataclass(value):
        hints = _hints(form)
        return type(value) is form and all(_is_a(getattr(value, name), hints[name]) for name in hints)
    return isinstance(value, NoneType if form is None else form)


@cache
def _hints(form: type) -> dict[str, Any]:
    return get_type_hints(form)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
