"""How far a run has come: what a monitor carries into checkpoints and out of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from torch import nn

from lightning_basin.callback.arguments import Arguments, ProbeSize
from lightning_basin.callback.lightnings import MisconfigurationException
from lightning_basin.callback.notices import Notices
from lightning_basin.callback.probing import Probing
from lightning_basin.callback.results import Latest, Results
from lightning_basin.callback.schedule import Schedule
from lightning_basin.callback.session import Session
from lightning_basin.callback.state import probe_state, read_state
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord

_COMPARED_ON_RESUME = ("rtol", "duplicate_rtol", "max_outputs", "dtype", "seed")
"""The arguments that change the numbers themselves, and not only which of them there are."""


class Progress:
    """What outlives a fit of a monitor: its probe, its records, and when it has measured.

    Attributes:
        is_loadable: Whether a state that comes from a checkpoint is one to go on with.
        is_loaded: Whether a checkpoint was loaded for the fit that begins.
    """

    def __init__(self, arguments: Arguments, probe: Probe | None, size: ProbeSize) -> None:
        self._arguments = arguments
        self.notices = Notices()
        self.schedule = Schedule(arguments)
        self.session = Session(arguments, self.notices)
        self.probing = Probing(arguments, self.notices, probe, size)
        self._latest = Latest()  # The same for all copies.
        self._has_begun = False
        self.is_loadable = True
        self.is_loaded = False
        self._fitted: Callable[[], nn.Module | None] = _no_module  # The module that was trained last.

    @property
    def shown(self) -> Results:
        """The results of the run; those of a copy where packages have copied the monitor, and fit with the copy."""
        latest = self._latest.results
        return self.session.results if self._has_begun or latest is None else latest

    def begin(self, module: nn.Module, step: int) -> None:
        """Begin a fit: go on with what was measured, or forget it.

        It goes on only where the same module is trained further, or a checkpoint held the records.
        """
        self._has_begun, self._latest.results = True, self.session.results
        self.session.num_failures = 0
        is_resumed, self.is_loaded = self.is_loaded, False
        is_same_module, self._fitted = self._fitted() is module, ref(module)
        self.schedule.begin(step, is_resumed=is_resumed)
        if step == 0 or not (is_resumed or is_same_module):
            self.reset()

    def reset(self) -> None:
        """Forget another run, so that a monitor can be used for two fits."""
        self.session.reset()
        self.schedule.measured_step = None
        self.probing.reset()

    def start(self, module: nn.Module, probe: Probe | None, step_calls: Sequence[int] | None) -> None:
        """Begin to measure outside of a fit: forget what was measured, and refuse a module that cannot be."""
        self._has_begun = True
        self.reset()
        self.session.num_failures = 0
        try:
            self.probing.start(module, probe, step_calls)
        except (TypeError, ValueError) as error:
            raise unmeasurable(module, error) from error

    def observe(self, module: nn.Module, step: int) -> BasinRecord | None:
        """Measure outside of a fit, as at a step of one; return ``None``, after a warning, where measuring failed."""
        session, probe = self.session, self.probing.probe
        if session.has_given_up:
            return None
        record = session.measure(self.probing.request(session.results.records), lambda: module, probe, step)
        if record is None:
            session.count_failure(in_training=False)
        else:
            session.keep(record, probe)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return what stands in a checkpoint: tensors and builtins, to be read by ``torch.load(weights_only=True)``."""
        probing, results = self.probing, self.session.results
        probe = None if probing.probe is None else probe_state(probing.probe)
        if probing.probe is not None and probe is None:
            self.notices.warn(
                "The probe holds objects that a checkpoint cannot hold: a resumed run must be able to take it again. "
                "HINT: pass BasinMonitor(batch_fn=...) that returns tensors, or tuples and dicts of tensors"
            )
        step_calls = probing.findings.step_calls
        return {
            "probe": probe,
            "probe_size": probing.size,
            "probe_fingerprint": probing.fingerprint(),
            "settings": {name: getattr(self._arguments, name) for name in _COMPARED_ON_RESUME},
            "records": [record.to_dict() for record in results.records],
            "measured_step": self.schedule.measured_step,
            "zero_loss_step": results.zero_loss_step,
            "num_zero_losses": self.session.num_zero_losses,
            "skipped_steps": list(results.skipped_steps),
            "leave_out_loss": probing.findings.leaves_out_loss,
            "history_path": self.session.history_path,
            "step_calls": None if step_calls is None else list(step_calls),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the run of a checkpoint, as far as its state can be read."""
        if not self.is_loadable:
            return
        state, problem = read_state(state_dict, self.probing.passed_fingerprint())
        self.reset()
        if problem:
            same = ", on the same probe" if state is not None and state["probe"] is not None else ""
            goes_on = "goes on with the rest" if state is not None and "records" in state else f"measures anew{same}"
            self.notices.warn(
                f"BasinMonitor {goes_on}: its state in the checkpoint is damaged, or of another version: {problem}"
            )
        if state is None:
            return
        self.probing.load(state)
        self.is_loaded = True
        settings = state.get("settings", {})
        for name in _COMPARED_ON_RESUME:
            now = getattr(self._arguments, name)
            before = settings.get(name, now)
            # "auto" keeps the type of the records, float64 where they do not say it.
            if before != now and (name, before, now) != ("dtype", "float64", "auto"):
                self.notices.warn(
                    f"The run so far was measured with {name}={before!r}, it goes on with {now!r}: its curves may jump "
                    f"here"
                )
        self._load_records(state)

    def _load_records(self, state: Mapping[str, Any]) -> None:
        """Go on with the records; what is missing beside them follows from them."""
        records: list[BasinRecord] = state.get("records", [])
        for record in records:
            self.session.keep(record, self.probing.probe)
        results = self.session.results
        self.schedule.measured_step = state.get("measured_step", records[-1].step if records else None)
        results.zero_loss_step = state.get("zero_loss_step", results.zero_loss_step)
        self.session.num_zero_losses = state.get("num_zero_losses", self.session.num_zero_losses)
        results.skipped_steps[:] = state.get("skipped_steps", ())
        without_loss = bool(records) and all(record.loss is None for record in records)
        self.probing.findings.leaves_out_loss = state.get("leave_out_loss", without_loss)
        self.session.history_path = state.get("history_path")

    def belong_to(self, arguments: Arguments) -> None:
        """Read the arguments of another monitor, a copy, from now on."""
        self._arguments = arguments
        for member in (self.schedule, self.session, self.probing):
            member.arguments = arguments

    def __getstate__(self) -> dict[str, Any]:
        members = ("schedule", "session", "probing")
        # A weak reference has no state.
        return vars(self) | {name: copy.copy(getattr(self, name)) for name in members} | {"_fitted": _no_module}


def unmeasurable(module: nn.Module, problem: object) -> MisconfigurationException:
    """Return the error for a module that cannot be measured."""
    return MisconfigurationException(f"BasinMonitor cannot measure {type(module).__name__}: {problem}")


def _no_module() -> None:
    """A reference to no module."""
