"""The results of a monitor, also where a package has copied the monitor and fits with the copy."""

from dataclasses import dataclass, field

from lightning_basin.probe import Probe
from lightning_basin.record import BasinRecord


@dataclass
class Results:
    """The results of one fit.

    Attributes:
        records: The records, oldest first.
        skipped_steps: The steps at which a measurement was due that was not allowed.
        zero_loss_step: The number of optimizer steps taken when the loss had reached zero.
        probe: The inputs that were measured.
    """

    records: list[BasinRecord] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    zero_loss_step: int | None = None
    probe: Probe | None = None

    def clear(self) -> None:
        """Forget everything, in the lists that there are: whoever holds them sees the next fit."""
        self.records.clear()
        self.skipped_steps.clear()
        self.zero_loss_step = self.probe = None

    def __copy__(self) -> "Results":
        return Results(list(self.records), list(self.skipped_steps), self.zero_loss_step, self.probe)


class Latest:
    """The results of the fit that began last, of all those with a monitor and its copies.

    A copy of it is itself. Pickled it is empty: nobody can look into another process.

    Example:
        >>> import copy
        >>> latest = Latest()
        >>> copy.deepcopy([latest])[0] is latest
        True
    """

    def __init__(self) -> None:
        self.results: Results | None = None

    def __copy__(self) -> "Latest":
        return self

    def __deepcopy__(self, _: object) -> "Latest":
        return self

    def __reduce__(self) -> tuple[type["Latest"], tuple[()]]:
        return Latest, ()
