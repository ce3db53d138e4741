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
"""The type of every entry of a state but those that are read apart."""

_READ_APART = ("probe", "probe_fingerprint", "step_calls", "records")


def read_state(
    state: Any, settings: Sequence[str], passed_fingerprint: str | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return as much of a state as can be used, with a `Probe` and a list of `BasinRecord`, and what is wrong with it.

    The curve of one probe does not go on with another: where the probe cannot be read, nothing is used. Where the
    records cannot be read, they begin anew on the same probe.

    Args:
        state: Whatever a checkpoint holds.
        settings: The names of the settings that this version writes.
        passed_fingerprint: The fingerprint of a probe that was passed; ``None`` where it is taken from training.

    Returns:
        The entries that could be read, ``None`` where nothing is to be used; and one clause for each problem.
    """
    usable: dict[str, Any] | None = None
    try:
        usable = read_probe(state, passed_fingerprint)
        records, unknown_fields = _read_records(state.get("records"))
    except ValueError as error:
        return usable, [str(error)]
    names = {name for name, form in _FORM.items() if name in state and _is_a(state[name], form)}
    usable |= {name: state[name] for name in names} | {"records": records}
    stated = usable.get("settings", {})
    usable["settings"] = {name: stated[name] for name in settings if name in stated and _is_builtin(stated[name])}
    problems = {
        "parts that are missing or damaged": (_FORM.keys() - names) | ({*_READ_APART} - state.keys()),
        "unknown parts": state.keys() - _FORM.keys() - {*_READ_APART},
        "unknown fields of its records": unknown_fields,
        "unknown or damaged settings": stated.keys() - usable["settings"].keys(),
    }
    return usable, [f"{what}: {', '.join(sorted(map(repr, who)))}" for what, who in problems.items() if who]


def _is_builtin(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def read_probe(state: Any, passed_fingerprint: str | None = None) -> dict[str, Any]:
    """Return the ``probe`` of a state, if it holds one, its ``probe_fingerprint`` and its ``step_calls``.

    Args:
        state: Whatever a checkpoint holds.
        passed_fingerprint: The fingerprint of a probe that was passed, which need not be read again.

    Raises:
        ValueError: If the probe is not as it was written.
    """
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"no parts in it but {_kind(state)}")
    plain, expected, calls = state.get("probe"), state.get("probe_fingerprint"), state.get("step_calls")
    if not isinstance(expected, str | None):
        raise ValueError(f"a fingerprint of its probe that is {_kind(expected)}")
    if not _is_a(calls, list[int] | None):
        raise ValueError(f"positions of the losses in its training step that are {_kind(calls)}")
    if passed_fingerprint is not None and expected == passed_fingerprint:
        return {"probe": None, "probe_fingerprint": expected, "step_calls": calls}
    if plain is None:  # No probe was full yet, or a checkpoint cannot hold it.
        if (expected is None and state.get("records")) or (passed_fingerprint is None and "probe" not in state):
            raise ValueError("no probe in it")
        return {"probe": None, "probe_fingerprint": expected, "step_calls": calls}
    try:
        probe = Probe(**plain)
        actual = fingerprint(probe if calls is None else Probe(probe.inputs))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its probe cannot be read ({error})") from error
    if expected is not None and actual != expected:
        raise ValueError("its probe is not the one that was written")
    return {"probe": probe, "probe_fingerprint": actual, "step_calls": calls}


def _read_records(plain: Any) -> tuple[list[BasinRecord], set[str]]:
    """Return all records, and the names of fields that this version does not know.

    Raises:
        ValueError: If a record cannot be read.
    """
    if not isinstance(plain, list):
        raise ValueError(f"its records are no list but {_kind(plain)}")
    records: list[BasinRecord] = []
    unknown: set[str] = set()
    for index, item in enumerate(plain):
        try:
            known = _known(item, BasinRecord, unknown)
            for scopes in ("layers", "blocks"):
                known[scopes] = {name: _known(scope, LayerRecord, unknown) for name, scope in known[scopes].items()}
            record = BasinRecord.from_dict(known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"record {index} of {len(plain)} cannot be read ({error})") from error
        if not _is_a(record, BasinRecord):
            raise ValueError(f"record {index} of {len(plain)} holds values of another type")
        records.append(record)
    return records, unknown


def _known(plain: Mapping[str, Any], form: type[LayerRecord], unknown: set[str]) -> dict[str, Any]:
    """Return the fields that a record has; add the names of the others to the unknown ones."""
    names = {field.name for field in fields(form)}
    unknown |= plain.keys() - names
    return {name: value for name, value in plain.items() if name in names}


def _is_a(value: Any, form: Any) -> bool:
    """Whether a value, and all in it, is of a type as annotations write it; no whole number but a key is negative."""
    kind, arguments = get_origin(form), get_args(form)
    if kind in (Union, UnionType):
        return any(_is_a(value, one) for one in arguments)
    if kind in (tuple, list):
        return isinstance(value, kind) and all(_is_a(item, arguments[0]) for item in value)
    if kind is not None:
        key, item = arguments
        return isinstance(value, Mapping) and all(type(a) is key and _is_a(b, item) for a, b in value.items())
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
