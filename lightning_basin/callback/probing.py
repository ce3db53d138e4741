"""The probe of a run: how it is taken from training batches, and known again on resuming."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_basin.callback.arguments import Arguments, ProbeSize
from lightning_basin.callback.lightnings import MisconfigurationException, Trainer
from lightning_basin.callback.loggers import batches_that_stepped
from lightning_basin.callback.notices import Notices, memory_hint, warn
from lightning_basin.callback.preflight import check_request, read_first_step
from lightning_basin.callback.request import Findings, Request
from lightning_basin.callback.state import fingerprint
from lightning_basin.callback.step_run import trained_parameters
from lightning_basin.callback.training_set import check_one_loader
from lightning_basin.limits import MOST_PROBE_INPUTS
from lightning_basin.network.replica import device_of, replicas
from lightning_basin.probe import Probe, ProbeCollector
from lightning_basin.record import BasinRecord
from lightning_basin.tensors import tensors_of

ModuleGetter = Callable[[], nn.Module]
"""A function that returns a module with all of its parameters, on the first process."""

InitialWeights = tuple[nn.Module, int, int]
"""A copy of the module, the number of optimizer steps at which it was made, and their place on the x axis."""

_PAIR_HINT = (
    ". The behavior got the inputs of the batch, which is a pair of inputs and targets. HINT: where it takes the whole "
    "batch, pass BasinMonitor(batch_fn=lambda batch: (batch, None))"
)


class Probing:
    """Takes the probe from the first training batches, and finds out how outputs and loss are read from them.

    Attributes:
        arguments: The monitor's arguments.
        size: The number of inputs to take, at most where it depends on the outputs; 0 where a probe was passed.
        probe: The inputs that are measured; ``None`` until there are enough.
        findings: What the first batch showed of the module.
        initial: The weights of the baseline, where training begins before there are enough inputs.
        is_checked: Whether a first batch with inputs has come by.
        is_refused: Whether the probe is not the one with which the run has begun, and is not measured.
    """

    def __init__(self, arguments: Arguments, notices: Notices, probe: Probe | None, size: ProbeSize) -> None:
        self.arguments = arguments
        self.probe = probe
        self._asked_size = size
        self._notices = notices
        self._is_passed = probe is not None
        self.reset()

    def reset(self) -> None:
        """Forget another run."""
        self.findings = Findings()
        self.initial: InitialWeights | None = None
        self.is_checked = False
        self.is_refused = False
        self._is_size_open = self._asked_size == "auto"
        self.size: int = MOST_PROBE_INPUTS if self._asked_size == "auto" else self._asked_size
        self._expected: str | None = None  # The fingerprint of a probe that has to be taken again on resuming.
        self.drop_batches()
        if not self._is_passed:
            self.probe = None

    def drop_batches(self) -> None:
        """Forget the batches from which a probe was being taken."""
        whole_batches = callable(self.arguments.behavior)
        self._collector = ProbeCollector(self.size, batch_fn=self.request([]).batch_fn, whole_batches=whole_batches)

    def request(self, records: Sequence[BasinRecord], trainer: Trainer | None = None) -> Request:
        """Return what the next measurement is asked for, after some records; no trainer means outside of a fit."""
        return Request(self.arguments, self.findings, records, self._notices, trainer)

    def start(self, module: nn.Module, probe: Probe | None, step_calls: Sequence[int] | None) -> None:
        """Check a module outside of a fit, and refuse one that cannot be measured, as `Progress.start` says."""
        if self.probe is None:
            self.probe = probe
            self.findings.step_calls = None if step_calls is None else tuple(step_calls)
        if self.probe is None:
            raise ValueError("there is no probe; pass BasinMonitor(probe=(inputs, targets))")
        check_request(self.request([]), module, self.probe, num_inputs=self.probe.size)

    def take(self, batch: Any, request: Request, whole: ModuleGetter | None, *, keeps_weights: bool) -> str | None:
        """Collect inputs until there are enough; at the first batch, check what can be measured.

        Args:
            batch: A training batch.
            request: What the measurements will be asked for, in the fit that begins.
            whole: A function that returns the module with all of its parameters, at the first batch; else ``None``.
            keeps_weights: Whether to keep the weights as they are now for the baseline, if there are too few inputs.

        Returns:
            What cannot be measured, as the rest of a sentence; ``None`` where everything can, and for a batch without
            inputs, which is passed over: the first batch is then the next one.
        """
        trainer = request.trainer
        assert trainer is not None, "batches come by in a fit only"
        if self.probe is None and _is_empty(batch):
            self.is_checked = whole is None
            return None
        try:
            module = None if whole is None else whole()
            if module is not None:
                self._read_step(request, module, batch)
            if self.probe is None:
                self._collect(batch, trainer)
            if module is not None:
                self._check(request, module)
                if keeps_weights and self.probe is None and not self._collector.is_complete:
                    (initial,) = replicas(module)
                    self.initial = (initial, trainer.global_step, batches_that_stepped(trainer))
        except (TypeError, ValueError) as error:
            if whole is not None:
                return f"{error}{self._hint(batch, str(error))}"
            self.probe = self._collector.probe
            assert self.probe is not None, "a first batch was taken"
            self._notices.warn(f"The probe has {self.probe.size} inputs, not {self.size}: {error}")
        except Exception as error:  # Not the configuration. The measurements will say whether they succeed.
            name = type(trainer.lightning_module).__name__
            warn(f"BasinMonitor could not check {name}. {type(error).__name__}: {error}{memory_hint(error)}")
        if self.probe is None and self._collector.is_complete:
            self.probe = self._collector.probe
        return None

    def _read_step(self, request: Request, module: nn.Module, batch: Any) -> None:
        """See what the training step trains; read outputs, targets and loss from it unless arguments say them."""
        settings = request.settings().on_device(device_of(module, torch.float32))
        self.findings.trained = trained_parameters(module, batch, request.trainer, settings.torch_dtype)
        is_told = self.arguments.behavior not in (None, "outputs") or self.arguments.batch_fn is not None
        if not is_told and self.probe is None and not self._is_passed and read_first_step(request, module, batch):
            self.drop_batches()

    def _collect(self, batch: Any, trainer: Trainer) -> None:
        if self.request([]).batch_fn is None and not callable(self.arguments.behavior):
            check_one_loader(trainer, batch)
        self._collector.add(batch)

    def _check(self, request: Request, module: nn.Module) -> None:
        probe = self.probe or self._collector.probe
        assert probe is not None, "a first batch was taken"
        settings, limit = request.settings(), float("inf")
        if self.probe is None and request.trainer is not None:  # Fewer, where an epoch has no more.
            limit = probe.size * request.trainer.num_training_batches

        def num_inputs(num_outputs: int) -> int:
            if self._is_size_open:
                self.size = settings.probe_size(num_outputs)
            return int(min(self.size or probe.size, limit))

        check_request(request, module, probe, num_inputs=num_inputs)
        if self._is_size_open:
            self._collector.limit(self.size)

    def _hint(self, batch: Any, problem: str) -> str:
        """Return the rest of what to say where the first batch cannot be measured for a problem."""
        is_pair = callable(self.arguments.behavior) and self.arguments.batch_fn is None and not self._is_passed
        if is_pair and isinstance(batch, tuple | list) and len(batch) == 2:  # noqa: PLR2004
            return _PAIR_HINT
        unread = self.findings.unread
        return f". It cannot be read from training_step: {unread}" if unread not in ("", problem) else ""

    def end_collection(self) -> None:
        """Make the probe of the inputs of an epoch, which has no more."""
        if self.probe is None and self._collector.probe is not None:
            self.probe = self._collector.probe
            self._notices.inform(
                f"The probe has {self.probe.size} inputs, not {self.size}: an epoch has no more. HINT: for more, pass "
                f"BasinMonitor(probe=(inputs, targets))"
            )

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the probe of the run; ``None`` where there is no probe yet."""
        return self._expected or (None if self.probe is None else self._fingerprint(self.probe))

    def passed_fingerprint(self) -> str | None:
        """Return the fingerprint of a probe that was passed; ``None`` where it is taken from training batches."""
        return fingerprint(self.probe) if self._is_passed and self.probe is not None else None

    def _fingerprint(self, probe: Probe) -> str:
        # Targets that a training step makes may be made again.
        return fingerprint(probe if self.findings.step_calls is None else Probe(probe.inputs))

    def refuse_another(self) -> None:
        """Measure nothing on a probe that had to be taken again on resuming, and is another one."""
        if self.probe is None or self._expected is None:
            return
        self.is_refused = self._fingerprint(self.probe) != self._expected
        if self.is_refused:
            self._notices.warn(
                "BasinMonitor does not go on measuring: the probe had to be taken anew, and is not that of the run so "
                "far. HINT: pass BasinMonitor(on_other_probe='replace')"
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the probe of the run so far, or refuse a monitor whose probe is another one."""
        self.findings.step_calls = None if state["step_calls"] is None else tuple(state["step_calls"])
        before, size = state["probe_fingerprint"], state.get("probe_size", self.size)
        if before is None:  # No probe was full yet.
            return
        passed, replaces = self.passed_fingerprint(), self.arguments.on_other_probe == "replace"
        if self._asked_size == "auto" and size:  # As many as the run so far, however they were asked for.
            self.size, self._is_size_open = size, False
        is_other = self.size != size if passed is None else passed != before
        if is_other and not replaces:
            raise MisconfigurationException(
                f"`BasinMonitor(probe=...)` must be the probe of the run so far, {_describe(size)}, got "
                f"{_describe(self.size)}. HINT: pass the same, or BasinMonitor(on_other_probe='replace')"
            )
        if self._is_passed:
            return
        self.drop_batches()
        self.probe = None if is_other else state["probe"]
        if self.probe is None and not replaces:
            self._expected = before

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"findings": copy.copy(self.findings), "initial": None}


def _is_empty(batch: Any) -> bool:
    tensors = tensors_of(batch)
    return bool(tensors) and all(tensor.shape[:1] == (0,) for tensor in tensors)


def _describe(probe_size: int) -> str:
    return f"probe={probe_size}" if probe_size else "a given batch"
