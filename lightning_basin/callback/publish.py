"""Where the values of a record go in a fit: to loggers, callbacks, and a table on disk."""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from torch import nn

from lightning_basin.callback.advice import RankedSaves, advise_patience
from lightning_basin.callback.dashboard import Dashboard
from lightning_basin.callback.history import HistoryFile, find_unused
from lightning_basin.callback.lightnings import Trainer
from lightning_basin.callback.loggers import log_scalars, set_callback_metrics
from lightning_basin.callback.news import closing_words, news
from lightning_basin.callback.notices import show
from lightning_basin.callback.report_file import ReportFile
from lightning_basin.callback.session import Session
from lightning_basin.callback.watching import Lenience, check_watchers, find_watchers
from lightning_basin.layer_names import tag
from lightning_basin.naming import escaped
from lightning_basin.record import BasinRecord


class Publisher:
    """Hands the records of one fit to whoever looks for them."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer = trainer
        self._session = session
        self._arguments, self._notices = session.arguments, session.notices
        self._history_file: HistoryFile | None = None
        self._report = ReportFile(trainer, session)
        self._dashboard = Dashboard(trainer, session)
        self._log_step = 0
        self._num_before = 0  # Records of the run before this fit.
        self._lenience: Lenience | None = None  # While training goes on.
        self._ranked_saves = RankedSaves(())

    def begin(self, module: nn.Module, prefixes: Sequence[str]) -> None:
        """Set up all that is published to, with the records of a run that is resumed."""
        # Resumed: checkpoints do not hold callback_metrics, but a strict EarlyStopping asks for it.
        watchers = find_watchers(self._trainer)
        ours = [watcher for watcher in watchers if self._session.owns_key(watcher.key)]
        values = self._newest_values({watcher.key for watcher in ours})
        set_callback_metrics(self._trainer, values, self._session.owns_key)
        self._start_history()
        self._num_before = len(self._session.results.records)
        self._report.begin()
        self._dashboard.begin()
        problems = [
            *check_watchers(watchers, self._arguments, module, prefixes),
            *advise_patience(self._trainer, ours, self._arguments),
        ]
        for problem in problems:
            self._notices.warn(problem)
        self._lenience = Lenience(ours, self._arguments, values)
        self._ranked_saves = RankedSaves(ours)

    def show(self, record: BasinRecord | None) -> None:
        """Put values where callbacks look for them, and let those check from now on who waited for one.

        ``None`` means that a measurement was due and brought none.
        """
        values: Mapping[str, float] = {}
        if record is not None:
            values = self._session.callback_values(record)
            set_callback_metrics(self._trainer, values, self._session.owns_key)
        if self._lenience is not None:
            self._lenience.end(values)
            for problem in self._lenience.unmet(values):
                self._notices.warn(problem)

    def watch_saving(self) -> None:
        """Warn where a checkpoint that is being written is ranked by the value of other weights."""
        records = self._session.results.records
        measured_step = records[-1].step if records else None
        for problem in self._ranked_saves.misjudged(self._trainer.global_step, measured_step, self._arguments):
            self._notices.warn(problem)

    def log(self, record: BasinRecord, log_step: int) -> None:
        """Hand a record to all loggers and to the table, and say what it has to say."""
        self._log_step = log_step
        skipped: dict[str, float] = {}
        if self._arguments.overhead_limit is not None and not self._arguments.is_paced:
            num_skipped = len(self._session.results.skipped_steps)
            skipped = {f"{escaped(self._arguments.prefix)}/skipped_measurements": num_skipped}
        values, prefix = self._session.log_values(record) | skipped, self._arguments.prefix
        for problem in log_scalars(self._trainer.loggers, values, step=log_step, prefix=prefix):
            self._notices.warn(problem)
        self._write_history(lambda file: file.append(self._session.table_row(record)))
        results = self._session.results
        for sentence in news(record, results.records[:-1], results.zero_loss_step):
            self._notices.inform(sentence)
        for note in record.notes:
            self._notices.inform(note)
        self._dashboard.add(record, log_step)
        if record.step is not None and record.step == self._session.results.zero_loss_step:
            self._report.write(log_step)
        if record.saturated:
            self._notices.warn(
                f"The probe is too small to see the network: the rank of the behavioral gradients is that of the "
                f"probe, {record.num_rows}. HINT: pass a larger BasinMonitor(probe=...)"
            )

    def end(self) -> None:
        """Let all callbacks check as they did before the fit; write and say what it has shown."""
        if len(self._session.results.records) > self._num_before:
            self._num_before = len(self._session.results.records)
            self._dashboard.end()
            self._report.write(self._log_step)
            if self._trainer.is_global_zero:
                show(closing_words(self._trainer, self._session, self._report))
        if self._lenience is not None:
            self._lenience.end()
            self._lenience = None

    def _newest_values(self, monitored: Set[str]) -> dict[str, float]:
        """Return what callbacks see after the newest measurement: what is monitored stays from earlier ones."""
        records = self._session.results.records
        values = self._session.callback_values(records[-1]) if records else {}
        missing = monitored - values.keys()
        for record in records if missing else ():
            values |= {key: value for key, value in self._session.log_values(record).items() if key in missing}
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
        continues = known is not None and known.parent == file.path.parent and known.suffix == file.path.suffix
        file.path = known if known is not None and continues else find_unused(file.path)
        self._session.history_path = str(file.path)
        file.write(map(self._session.table_row, self._session.results.records))

    def _write_history(self, write: Callable[[HistoryFile], None]) -> None:
        if self._history_file is not None:
            try:
                write(self._history_file)
            except OSError as error:  # A full disk, say.
                self._notices.warn(f"{self._history_file.path} could not be written. {type(error).__name__}: {error}")
