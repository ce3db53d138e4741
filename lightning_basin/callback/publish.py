"""Where the values of a record go in a fit: to loggers, callbacks, and a table on disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from lightning_basin.callback.advice import misunderstandings
from lightning_basin.callback.arguments import Arguments
from lightning_basin.callback.history import HistoryFile, unused
from lightning_basin.callback.keys import Key
from lightning_basin.callback.lightnings import Trainer
from lightning_basin.callback.loggers import log_scalars, set_callback_metrics
from lightning_basin.callback.notices import Notices
from lightning_basin.callback.session import Session
from lightning_basin.callback.watching import Lenience, check_watchers, watchers
from lightning_basin.layer_names import tag
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord


def owns_key(key: str, prefix: str) -> bool:
    """Whether a metric's key is one of a monitor with this prefix."""
    return Key.of(key, prefix) is not None


def log_values(record: BasinRecord, prefix: str, zero_loss_step: int | None) -> dict[str, float]:
    """Return the values of a record by key; the step of zero loss is in one record only.

    Args:
        record: The record of a run.
        prefix: The first part of every key.
        zero_loss_step: The number of optimizer steps at which the loss had reached zero; ``None`` before.
    """
    is_first_zero = record.step is not None and record.step == zero_loss_step
    return record.scalars(prefix) | (_zero_loss_value(prefix, zero_loss_step) if is_first_zero else {})


def callback_values(record: BasinRecord, prefix: str, zero_loss_step: int | None) -> dict[str, float]:
    """Return what callbacks find: the step of zero loss stays, so that a strict ``EarlyStopping`` does not miss it.

    Args:
        record: The newest record of a run.
        prefix: The first part of every key.
        zero_loss_step: The number of optimizer steps at which the loss had reached zero; ``None`` before.
    """
    return log_values(record, prefix, zero_loss_step) | _zero_loss_value(prefix, zero_loss_step)


def table_row(record: BasinRecord, prefix: str, zero_loss_step: int | None) -> dict[str, float]:
    """Return the values of a record as a row of a table, which begins with the step.

    Args:
        record: The record of a run.
        prefix: The first part of every key.
        zero_loss_step: The number of optimizer steps at which the loss had reached zero; ``None`` before.
    """
    return ({} if record.step is None else {"step": record.step}) | log_values(record, prefix, zero_loss_step)


def _zero_loss_value(prefix: str, zero_loss_step: int | None) -> dict[str, float]:
    return {} if zero_loss_step is None else {f"{escaped(prefix)}/zero_loss_step": float(zero_loss_step)}


class Publisher:
    """Hands the records of one fit to whoever looks for them.

    Args:
        trainer: The trainer at the start of training.
        arguments: The monitor's arguments.
        session: The records of the run.
        notices: Says each message once.
    """

    def __init__(self, trainer: Trainer, arguments: Arguments, session: Session, notices: Notices) -> None:
        self._trainer = trainer
        self._arguments = arguments
        self._session = session
        self._notices = notices
        self._history_file: HistoryFile | None = None
        self._lenience: Lenience | None = None  # Of those who look for a value that there is not yet.

    def begin(self, module: nn.Module, prefixes: Sequence[str]) -> None:
        """Set up all that is published to, with the records of a run that is resumed.

        Args:
            module: The module that is trained.
            prefixes: The prefixes of all monitors of the trainer.

        Raises:
            MisconfigurationException: If a callback monitors a value that no measurement can have.
        """
        # Resumed: checkpoints do not hold callback_metrics, but a strict EarlyStopping asks for it.
        values = self._newest_values()
        set_callback_metrics(self._trainer, values, self._owns)
        self._start_history()
        problems = [
            *misunderstandings(self._trainer, self._owns, self._arguments),
            *check_watchers(self._trainer, vars(self._arguments), module, prefixes),
        ]
        for problem in problems:
            self._notices.warn(problem)
        self._lenience = Lenience(self._trainer, vars(self._arguments), values)

    def show(self, record: BasinRecord | None) -> None:
        """Put values where callbacks find them, and let those check from now on who waited for one.

        Args:
            record: The newest record; ``None`` where a measurement was due and brought none.
        """
        values: Mapping[str, float] = {}
        if record is not None:
            values = callback_values(record, self._arguments.prefix, self._session.results.zero_loss_step)
            set_callback_metrics(self._trainer, values, self._owns)
        if self._lenience is not None:
            self._lenience.end(values)
            for problem in self._lenience.unmet(values):
                self._notices.warn(problem)

    def log(self, record: BasinRecord, log_step: int) -> None:
        """Hand a record to all loggers and to the table, and say what it has to say.

        Args:
            record: The newest record.
            log_step: The place on the x axis of Lightning's own curves.
        """
        skipped: dict[str, float] = {}
        if self._arguments.max_overhead is not None:
            num_skipped = len(self._session.results.skipped_steps)
            skipped = {f"{escaped(self._arguments.prefix)}/skipped_measurements": num_skipped}
        for problem in log_scalars(self._trainer.loggers, self._log_values(record) | skipped, step=log_step):
            self._notices.warn(problem)
        self._write_history(lambda file: file.append(self._row(record)))
        for note in record.notes:
            self._notices.inform(note)
        if record.saturated:
            self._notices.warn(
                f"The probe is too small to see the network: the rank of the behavioral gradients is that of the "
                f"probe, {record.num_rows}. HINT: pass a larger BasinMonitor(probe=...)"
            )

    def end(self) -> None:
        """Let all callbacks check as they did before the fit."""
        if self._lenience is not None:
            self._lenience.end()
            self._lenience = None

    def _owns(self, key: str) -> bool:
        return owns_key(key, self._arguments.prefix)

    def _log_values(self, record: BasinRecord) -> dict[str, float]:
        return log_values(record, self._arguments.prefix, self._session.results.zero_loss_step)

    def _row(self, record: BasinRecord) -> dict[str, float]:
        return table_row(record, self._arguments.prefix, self._session.results.zero_loss_step)

    def _newest_values(self) -> dict[str, float]:
        """Return what callbacks find after the newest measurement: what is monitored stays from earlier ones."""
        results = self._session.results
        if not results.records:
            return {}
        values = callback_values(results.records[-1], self._arguments.prefix, results.zero_loss_step)
        missing = {watcher.key for watcher in watchers(self._trainer) if self._owns(watcher.key)} - values.keys()
        for record in results.records if missing else ():
            values |= {key: value for key, value in self._log_values(record).items() if key in missing}
        return values

    def _start_history(self) -> None:
        """Begin the table with the records of the run that is resumed."""
        trainer, ending = self._trainer, self._arguments.history
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        if ending is None or fast_dev_run:
            return
        folder = trainer.log_dir or trainer.default_root_dir  # Asked for on all processes: it is a broadcast.
        if "://" in folder:
            self._notices.warn(
                f"`BasinMonitor(history={ending!r})` writes to a local disk, and is left out in {folder}. HINT: "
                f"pass a local default_root_dir, or a logger"
            )
        elif trainer.is_global_zero:
            self._history_file = HistoryFile(Path(folder) / f"{tag(self._arguments.prefix)}.{ending}")
            self._write_history(self._begin_history)

    def _begin_history(self, file: HistoryFile) -> None:
        known = None if self._session.history_path is None else Path(self._session.history_path)
        # One that an earlier run has left is not written over.
        is_own = known is not None and known.parent == file.path.parent and known.suffix == file.path.suffix
        file.path = known if known is not None and is_own else unused(file.path)
        self._session.history_path = str(file.path)
        file.write(map(self._row, self._session.results.records))

    def _write_history(self, write: Callable[[HistoryFile], None]) -> None:
        if self._history_file is not None:
            try:
                write(self._history_file)
            except OSError as error:  # A full disk, say.
                self._notices.warn(f"{self._history_file.path} could not be written. {type(error).__name__}: {error}")
