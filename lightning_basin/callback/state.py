"""The state of a monitor in a checkpoint: how its probe is written, and how it is read."""

import hashlib
from collections.abc import Mapping
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.tensors import map_tensors, tensors_of


def probe_state(probe: Probe) -> dict[str, Any] | None:
    """Return a probe in the form that ``torch.load(weights_only=True)`` reads; ``None`` if it holds other objects."""
    state = {"inputs": probe.inputs, "targets": probe.targets}
    if not _is_plain(state):
        return None
    copied: dict[str, Any] = map_tensors(lambda tensor: tensor.cpu().clone().as_subclass(Tensor), state)
    return copied


def fingerprint(probe: Probe) -> str:
    """Return a string that is the same for two probes if, and almost surely only if, they hold the same tensors."""
    digest = hashlib.sha256()
    for tensor in tensors_of((probe.inputs, probe.targets)):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(collection: Any) -> bool:
    if type(collection) is dict:  # By exact types, here and below: a checkpoint cannot hold a subclass.
        return all(type(key) in (str, int) and _is_plain(item) for key, item in collection.items())
    if type(collection) in (tuple, list):
        return all(_is_plain(item) for item in collection)
    return isinstance(collection, Tensor) or type(collection) in (type(None), str, int, float, bool)


_KINDS: Mapping[str, type | UnionType] = {
    "settings": dict,
    "measured_step": int | None,
    "zero_loss_step": int | None,
    "num_zero_losses": int,
    "skipped_steps": list,
    "leave_out_loss": bool,
    "history_path": str | None,
}
"""Entries of a state that may be missing, and what each is."""


def read_state(state: Any, passed_fingerprint: str | None) -> tuple[dict[str, Any] | None, str]:
    """Return as much of a state as can be used, with a `Probe` and a list of `BasinRecord`, and what is wrong with it.

    The curve of one probe does not go on with another: where the probe cannot be read, nothing is used. Where the
    records cannot be read, they begin anew on the same probe. Any other entry that is damaged counts as missing. The
    fingerprint is that of a probe that was passed; there is none where the probe is taken from training.
    """
    try:
        of_probe = read_probe(state, passed_fingerprint)
    except ValueError as error:
        return None, str(error)
    try:
        records = _read_records(state["records"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return of_probe, f"its records cannot be read ({type(error).__name__}: {error})"
    damaged = [name for name, kind in _KINDS.items() if name in state and not isinstance(state[name], kind)]
    usable = {name: value for name, value in state.items() if name not in damaged}
    return {**usable, **of_probe, "records": records}, f"values of another type in {damaged}" if damaged else ""


def _read_records(plain: Any) -> list[BasinRecord]:
    if not isinstance(plain, list):
        raise TypeError(f"no list but a {type(plain).__name__}")
    records = [BasinRecord.from_dict(record) for record in plain]
    for record in records:
        values: list[tuple[str, Any]] = [("step", record.step)]
        for scope in (record, *record.layers.values(), *record.blocks.values()):
            values += scope.quantities().items()
        damaged = [name for name, value in values if not isinstance(value, int | float)]
        if damaged:
            raise TypeError(f"no numbers in {damaged}")
    return records


def read_probe(state: Any, passed_fingerprint: str | None = None) -> dict[str, Any]:
    """Return the ``probe`` of a state, if it holds one, its ``probe_fingerprint`` and its ``step_calls``.

    A probe with the fingerprint of one that was passed need not be read again; one that is not as it was written raises
    a ValueError.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"it is no dict but a {type(state).__name__}")
    plain, expected, calls = state.get("probe"), state.get("probe_fingerprint"), state.get("step_calls")
    is_known = passed_fingerprint is not None and expected == passed_fingerprint
    if plain is None or is_known:
        has_none = (expected is None and state.get("records")) or (passed_fingerprint is None and "probe" not in state)
        if has_none and not is_known:  # Else no probe was full yet, or a checkpoint cannot hold it.
            raise ValueError("there is no probe in it")
        return {"probe": None, "probe_fingerprint": expected, "step_calls": calls}
    try:
        probe = Probe(**plain)
        actual = fingerprint(probe if calls is None else Probe(probe.inputs))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its probe cannot be read ({error})") from error
    if expected is not None and actual != expected:
        raise ValueError("its probe is not the one that was written")
    return {"probe": probe, "probe_fingerprint": actual, "step_calls": calls}
