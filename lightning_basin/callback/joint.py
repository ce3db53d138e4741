"""One measurement for all processes of a fit: the first one measures, the others wait for its record."""

import math

from torch import nn

from lightning_basin.callback.cost import advise
from lightning_basin.callback.gathering import GatheredModule
from lightning_basin.callback.lightnings import ModelParallelStrategy, StochasticWeightAveraging, Trainer, callbacks_of
from lightning_basin.callback.notices import inform
from lightning_basin.callback.overhead import Overhead, announced
from lightning_basin.callback.probing import ModuleGetter
from lightning_basin.callback.processes import PatientBroadcast
from lightning_basin.callback.progress import Progress, unmeasurable
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord

_NUM_BEFORE_ADVICE = 3  # measurements: the first takes longer than others, and two more show what those cost


class JointMeasurement:
    """Measures in a fit. Every process makes the same calls, and gets the same records."""

    def __init__(self, trainer: Trainer, module: nn.Module, progress: Progress) -> None:
        self._trainer = trainer
        self._module = module
        self._session, self._probing = progress.session, progress.probing
        self._overhead = Overhead()  # Begun anew when training begins.
        self._broadcast: PatientBroadcast | None = None  # While training goes on.
        self._gathered: GatheredModule | None = None
        if isinstance(trainer.strategy, ModelParallelStrategy):  # Nothing is sharded before `configure_model`.
            try:
                self._gathered = GatheredModule(module, is_here=trainer.is_global_zero)
            except (TypeError, ValueError) as error:
                raise unmeasurable(module, error) from error

    def open(self) -> None:
        """Begin to count the time of the fit, and connect the processes."""
        self._overhead = Overhead()
        self._broadcast = PatientBroadcast(self._trainer.strategy.broadcast)

    def close(self) -> None:
        """Close the connections between the processes."""
        if self._broadcast is not None:
            self._broadcast.close()
            self._broadcast = None

    def whole(self) -> ModuleGetter:
        """Return what gives the module with all parameters on rank zero; all processes must ask for it together."""
        return (lambda: self._module) if self._gathered is None else self._gathered.gathered(self._module)

    def record(self, step: int, whole: ModuleGetter | None = None) -> BasinRecord | None:
        """Measure, or see that nothing is to be measured now; all processes get the same record.

        Without ``whole`` the module of the fit is measured as it is now.
        """
        session, probing = self._session, self._probing
        has_probe = probing.probe is not None and not probing.is_refused  # None: resumed, and no batch has come by.
        if session.has_given_up or not has_probe or _renews_batch_statistics(self._trainer):
            return None
        if not self._allows():
            session.skip(step)
            return None
        whole = whole or self.whole()
        record = self._measured(step, whole) if self._trainer.is_global_zero else None
        assert self._broadcast is not None, "opened before"
        record = self._broadcast(record)
        if record is None:
            session.count_failure(in_training=True)
        return record

    def advise(self, cadence: tuple[str, int]) -> None:
        """Say once what measuring costs, where that is much and nothing limits it, and which cadence would help."""
        session, arguments = self._session, self._session.arguments
        is_early = self._overhead.num_measurements < _NUM_BEFORE_ADVICE
        if is_early or session.is_cost_judged or arguments.is_paced or arguments.max_overhead is not None:
            return
        session.is_cost_judged = True
        records = session.results.records
        advice = advise(self._overhead.cost(records[1 - _NUM_BEFORE_ADVICE :]), cadence, arguments)
        if advice is not None:
            inform(advice)

    def _allows(self) -> bool:
        """Whether measuring now would not take too long; rank zero decides for all, by its own clock."""
        limit = self._session.arguments.overhead_limit
        if limit is None:
            return True
        if self._session.arguments.is_paced:
            allows = self._overhead.allows_in_all(limit, _num_epochs_left(self._trainer))
        else:
            allows = self._overhead.allows_next(limit)
        is_allowed: bool = self._trainer.strategy.broadcast(allows, 0)
        return is_allowed

    def _measured(self, step: int, whole: ModuleGetter) -> BasinRecord | None:
        session, probing = self._session, self._probing
        with self._overhead.measuring(), announced(f"Measuring {escaped(session.arguments.prefix)} at step {step}"):
            return session.measure(probing.request(session.results.records, self._trainer), whole, probing.probe, step)


def _num_epochs_left(trainer: Trainer) -> float:
    """The number of epochs to the end of a fit, the present one among them; infinity where nobody knows."""
    num_epochs, step = trainer.current_epoch + 1, trainer.global_step
    by_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - num_epochs
    has_end = trainer.max_steps != -1 and step > 0
    by_steps = (trainer.max_steps - step) * num_epochs // step if has_end else math.inf
    return 1 + min(by_epochs, by_steps)


def _renews_batch_statistics(trainer: Trainer) -> bool:
    """Whether this is the extra epoch, after those of training, in which the module holds averaged weights."""
    averaging = (callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging))
    return any(0 <= callback.swa_end < trainer.current_epoch for callback in averaging)
