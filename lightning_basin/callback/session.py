"""The measurements of a run, one after the other, and what follows from them; no Lightning is needed for it."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_basin.callback.arguments import PACED_SHARE, Arguments
from lightning_basin.callback.notices import Notices, inform, memory_hint, warn
from lightning_basin.callback.request import Request
from lightning_basin.callback.results import Results
from lightning_basin.history.details import DETAILS, details_of
from lightning_basin.keys import Key
from lightning_basin.measure import measure
from lightning_basin.naming import escaped
from lightning_basin.null_space import verify_null_space
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord
from lightning_basin.settings import Probabilities
from lightning_basin.structure import StructureCache

NEAR_ZERO = 100.0
"""The loss below which zero loss is near, in units of ``zero_loss_threshold``."""


class Session:
    """Measures at a step, keeps the records, and counts zero losses and failures in a row.

    Attributes:
        num_zero_losses: The number of measurements in a row, up to the newest, in which the loss was zero.
        num_failures: The number of measurements in a row that have failed.
        history_path: The path of the table of the run, which a resumed run goes on with.
        turning_step: The step of the newest record of three: the first one, the first with a loss near zero, and the
            first at zero loss; ``None`` before the first.
        is_cost_judged: Whether it was seen what measuring costs the run.
    """

    def __init__(self, arguments: Arguments, notices: Notices) -> None:
        self.arguments = arguments
        self.results = Results()
        self.num_zero_losses = 0
        self.num_failures = 0
        self.history_path: str | None = None
        self.turning_step: int | None = None
        self.is_cost_judged = False
        self.notices = notices
        self._cache = StructureCache()

    def reset(self) -> None:
        """Forget another run; failures are counted on, as they may have the same cause."""
        self.results.clear()
        self.num_zero_losses = 0
        self.history_path = self.turning_step = None
        self.is_cost_judged = False

    @property
    def sparse_since(self) -> int | None:
        """The step from which on measurements become rarer; ``None`` where each that is due is to be taken.

        A loss that is zero is looked at each time, until it has been zero for as long as ``zero_loss_patience`` says.
        """
        is_confirming = self.num_zero_losses > 0 and self.results.zero_loss_step is None
        return self.turning_step if self.arguments.max_overhead == "auto" and not is_confirming else None

    @property
    def has_given_up(self) -> bool:
        """Whether there were as many failures in a row as are allowed."""
        return self.arguments.max_failures is not None and self.num_failures >= self.arguments.max_failures

    def count_failure(self, *, in_training: bool) -> None:
        """Count a measurement that has failed, and say where it was the last; a fit (``in_training``) goes on."""
        self.num_failures += 1
        if self.has_given_up:
            warn(
                f"BasinMonitor stops measuring after {self.num_failures} failures in a row"
                f"{_goes_on(in_training=in_training)}. HINT: BasinMonitor(max_failures=None) keeps trying"
            )

    def skip(self, step: int) -> None:
        """Take note of a measurement that the limit on overhead does not allow."""
        self.results.skipped_steps.append(step)
        self.notices.inform(_word_of_skipping(self.arguments))

    def inform_of_skipped(self) -> None:
        """Say how many measurements were skipped in all."""
        num_skipped = len(self.results.skipped_steps)
        if self.arguments.overhead_limit is not None and num_skipped:
            inform(
                f"{_limited_monitor(self.arguments)} skipped {num_skipped} of "
                f"{len(self.results.records) + num_skipped} measurements, which skipped_steps lists"
            )

    def keep(self, record: BasinRecord, probe: Probe | None) -> None:
        """Add the newest record, and the probe on which it was measured."""
        self.num_failures = 0
        if self._is_turning_point(record):
            self.turning_step = record.step
        if self.reaches_zero_loss(record):
            self.results.zero_loss_step = record.step
        self.num_zero_losses = self._num_zero_losses_with(record)
        records = self.results.records
        if records:  # Names of the inputs of a whole training set are kept of the newest record only.
            records[-1] = replace(records[-1], train_merged_inputs=())
        records.append(record)
        self.results.probe = probe

    def reaches_zero_loss(self, record: BasinRecord) -> bool:
        """Whether a record, if it is the next one, is the first at which the loss counts as zero."""
        is_first = self.results.zero_loss_step is None
        return is_first and self._num_zero_losses_with(record) >= self.arguments.zero_loss_patience

    def _num_zero_losses_with(self, record: BasinRecord) -> int:
        """Return the number of measurements in a row without a loss, where a record is the next one."""
        # By magnitude: a loss that goes below zero has no minimum there, and its sign is no sign of a perfect fit.
        return self.num_zero_losses + 1 if self._is_small(record, 1.0) else 0

    def _is_turning_point(self, record: BasinRecord) -> bool:
        """Whether a record, if it is the next one, is the first of all, near zero loss or at zero loss."""
        records = self.results.records
        is_first_near = self._is_small(record, NEAR_ZERO) and not any(
            self._is_small(earlier, NEAR_ZERO) for earlier in records
        )
        return not records or is_first_near or self.reaches_zero_loss(record)

    def _is_small(self, record: BasinRecord, factor: float) -> bool:
        """Whether the magnitude of the loss is at most so many times that of a zero loss."""
        return record.loss is not None and abs(record.loss) <= factor * self.arguments.zero_loss_threshold

    def owns_key(self, key: str) -> bool:
        """Whether a metric's key begins as the keys of this monitor do."""
        return Key.of(key, self.arguments.prefix) is not None

    def log_values(self, record: BasinRecord) -> dict[str, float]:
        """Return the values of a record of this run by key; the step of zero loss is in one record only."""
        is_first_zero = record.step is not None and record.step == self.results.zero_loss_step
        return record.scalars(self.arguments.prefix) | (self._zero_loss_value if is_first_zero else {})

    def callback_values(self, record: BasinRecord) -> dict[str, float]:
        """Return what callbacks see: the step of zero loss stays, as a strict ``EarlyStopping`` would miss it."""
        return self.log_values(record) | self._zero_loss_value

    def table_row(self, record: BasinRecord) -> dict[str, Any]:
        """Return the values of a record as a row of a table, which begins with the step and ends with details."""
        step = {} if record.step is None else {"step": record.step}
        return {**step, **self.log_values(record), f"{escaped(self.arguments.prefix)}/{DETAILS}": details_of(record)}

    @property
    def _zero_loss_value(self) -> dict[str, float]:
        step = self.results.zero_loss_step
        return {} if step is None else {f"{escaped(self.arguments.prefix)}/zero_loss_step": float(step)}

    def measure(
        self, request: Request, whole: Callable[[], nn.Module], probe: Probe | None, step: int
    ) -> BasinRecord | None:
        """Measure the module that ``whole`` returns, and add nothing yet; ``None``, after a warning, if that failed."""
        try:
            with request.profiled("measure"):
                module = whole()
                assert probe is not None, "there is one from the start on"
                measured_probe, settings = request.specify(module, probe)
                training_set = request.training_set()
                record = measure(
                    module, measured_probe, settings, duplicates_over=training_set, step=step, cache=self._cache
                )
        except Exception as error:  # A measurement must never end a training run.
            warn(
                f"BasinMonitor could not measure at step {step}{_goes_on(in_training=request.trainer is not None)}. "
                f"{type(error).__name__}: {error}{memory_hint(error)}"
            )
            return None
        return self._verify(request, module, probe, record) if self._is_verified(record) else record

    def _is_verified(self, record: BasinRecord) -> bool:
        """Whether the null space is to be verified for a record, if it is the next one."""
        every_n = self.arguments.verify_null_space
        if every_n == "zero_loss":
            return self.reaches_zero_loss(record)
        return every_n is not None and len(self.results.records) % every_n == 0

    def _verify(self, request: Request, module: nn.Module, probe: Probe, record: BasinRecord) -> BasinRecord:
        """Return the record with its surviving fraction, if this can be measured."""
        started = time.perf_counter()
        behavior = request.behavior
        if isinstance(behavior, Probabilities):
            behavior = partial(_probabilities, behavior.outputs)
        assert not isinstance(behavior, str)
        try:
            with request.profiled("verify_null_space"):
                check = verify_null_space(
                    module, probe, behavior=behavior, rtol=self.arguments.rtol, seed=self.arguments.seed
                )
        except Exception as error:  # The rest of the record is as it would be without.
            self.notices.warn(f"The null space could not be verified. {type(error).__name__}: {error}")
            return record
        if not check.converged:
            self.notices.inform(
                "The null space could not be verified at every step: no way back to the same outputs was found"
            )
            return record
        elapsed = time.perf_counter() - started
        return replace(
            record,
            surviving_fraction=check.surviving_fraction,
            measure_seconds=record.measure_seconds + elapsed,
            seconds={**record.seconds, "verify_null_space": elapsed},
        )

    def __getstate__(self) -> dict[str, Any]:
        # Two copies never fill one list; and what the cache holds is found again.
        return vars(self) | {"results": copy.copy(self.results), "_cache": StructureCache()}


def _goes_on(*, in_training: bool) -> str:
    return ", training goes on" if in_training else ""


def _probabilities(outputs: Callable[[nn.Module, Any], Tensor], module: nn.Module, inputs: Any) -> Tensor:
    return outputs(module, inputs).softmax(1)


def _limited_monitor(arguments: Arguments) -> str:
    return "BasinMonitor" if arguments.is_paced else f"BasinMonitor(max_overhead={arguments.overhead_limit:g})"


def _word_of_skipping(arguments: Arguments) -> str:
    if not arguments.is_paced:
        return f"{_limited_monitor(arguments)} skips measurements"
    lighter = "" if arguments.hessian is False else ", BasinMonitor(hessian=False) takes less time"
    return (
        f"BasinMonitor measures at some epochs only, as all would take more than {PACED_SHARE:.0%} of the wall time. "
        f"HINT: BasinMonitor(every_n_epochs=1) measures at each{lighter}"
    )
