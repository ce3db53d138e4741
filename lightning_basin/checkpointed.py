"""The state of a monitor in a checkpoint, checked as it is read: a file may be damaged, or of another version."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.state import fingerprint

_NONE = type(None)


@dataclass(frozen=True, kw_only=True)
class MonitorState:
    """What a monitor goes on with when a run is resumed.

    Attributes:
        probe: The inputs of the run so far; ``None`` where a checkpoint could not hold them, or none were full yet.
        probe_size: How many inputs were asked for; 0 for a probe that was passed.
        probe_fingerprint: By what these inputs are known again.
        settings: Values of the arguments that change the numbers, by name.
        records: Every record so far, oldest first.
        measured_step: Optimizer steps at the last measurement.
        zero_loss_step: Optimizer steps when the loss had reached zero.
        num_zero_losses: Measurements in a row without a loss.
        skipped_steps: Steps at which ``max_overhead`` allowed no measurement.
        leave_out_loss: Whether the loss that was found does not fit.
        history_path: The table on disk.
        step_calls: Positions of the losses that are read from ``training_step``; ``None`` where it is not read.
    """

    probe: Probe | None
    probe_size: int
    probe_fingerprint: str | None
    settings: dict[str, Any]
    records: list[BasinRecord]
    measured_step: int | None
    zero_loss_step: int | None
    num_zero_losses: int
    skipped_steps: list[int]
    leave_out_loss: bool
    history_path: str | None
    step_calls: list[int] | None

    @classmethod
    def read(cls, state: Any, setting_names: Collection[str]) -> "MonitorState":
        """Read what `BasinMonitor.state_dict` wrote.

        Args:
            state: The content of a checkpoint.
            setting_names: Names of the arguments that must stand in it.

        Raises:
            ValueError: If it is not of this form.
        """
        try:
            found = cls(**{**state, "probe": _read_probe(state), "records": [*map(_read_record, state["records"])]})
        except Exception as error:  # Whatever is wrong with a damaged file.
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for name, kinds in _KINDS.items():
            if type(value := getattr(found, name)) not in kinds:
                raise ValueError(f"{name} must not be {value!r}")
        if found.settings.keys() != set(setting_names):
            raise ValueError(f"settings must be {sorted(setting_names)}, got {sorted(map(str, found.settings))}")
        if not all(type(number) is int for number in (*found.skipped_steps, *(found.step_calls or ()))):
            raise ValueError("skipped_steps and step_calls must hold numbers")
        return found


_KINDS = {
    "probe_size": (int,),
    "probe_fingerprint": (str, _NONE),
    "settings": (dict,),
    "measured_step": (int, _NONE),
    "zero_loss_step": (int, _NONE),
    "num_zero_losses": (int,),
    "skipped_steps": (list,),
    "leave_out_loss": (bool,),
    "history_path": (str, _NONE),
    "step_calls": (list, _NONE),
}


def _read_probe(state: Mapping[str, Any]) -> Probe | None:
    if state["probe"] is None:
        return None
    probe = Probe(**state["probe"])
    if fingerprint(probe if state["step_calls"] is None else Probe(probe.inputs)) != state["probe_fingerprint"]:
        raise ValueError("the probe is not the one that was measured")
    return probe


def _read_record(plain: Mapping[str, Any]) -> BasinRecord:
    record = BasinRecord.from_dict(plain)
    assert str(record)  # A table of it, and its curves, need every number in its place.
    assert all(isinstance(value, float) for value in record.scalars().values())
    return record
