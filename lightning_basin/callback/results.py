"""The results of a monitor, also where a package has copied the monitor and fits with the copy."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_basin.history.columns import History, history_of
from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord


@dataclass
class Results:
    """The results of one fit: records, oldest first, and the steps at which a measurement was due, but not allowed."""

    records: list[BasinRecord] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    zero_loss_step: int | None = None
    probe: Probe | None = None

    def clear(self) -> None:
        """Forget everything, in the lists that there are: whoever holds them sees the next fit."""
        self.records.clear()
        self.skipped_steps.clear()
        self.zero_loss_step = self.probe = None

    def history(self) -> History:
        """Return the records, of which there is at least one, as columns, with the labels of the inputs."""
        history = history_of(self.records, zero_loss_step=self.zero_loss_step)
        return replace(history, labels=labels_of(self.probe))

    def __copy__(self) -> "Results":
        return Results(list(self.records), list(self.skipped_steps), self.zero_loss_step, self.probe)


class Latest:
    """The results of the fit that began last, of all those with a monitor and its copies.

    A copy of it is itself. Pickled it is empty: nobody can look into another process.
    """

    def __init__(self) -> None:
        self.results: Results | None = None

    def __copy__(self) -> "Latest":
        return self

    def __deepcopy__(self, _: object) -> "Latest":
        return self

    def __reduce__(self) -> tuple[type["Latest"], tuple[()]]:
        return Latest, ()


MAX_LABELS = 12
"""The largest number of different targets that are labels of inputs: more cannot be told apart by colour."""


def labels_of(probe: Probe | None) -> Sequence[float | str] | None:
    """Return the target of each input as a label, where targets are few numbers; ``None`` elsewhere."""
    targets = None if probe is None else probe.targets
    if not isinstance(targets, Tensor) or targets.numel() != targets.shape[0] or targets.is_complex():
        return None
    values = targets.detach().flatten().tolist()
    if len(set(values)) > MAX_LABELS:
        return None
    return [int(value) if float(value).is_integer() else value for value in values]
