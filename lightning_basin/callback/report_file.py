"""The report of a fit in its log directory, written when the loss has reached zero and at the end."""

from pathlib import Path

from lightning_basin.callback.lightnings import Trainer, callbacks_of
from lightning_basin.callback.probe_labels import labels_of
from lightning_basin.callback.session import Session
from lightning_basin.history.page import page_name
from lightning_basin.pages.report import report


class ReportFile:
    """Writes the report of one fit.

    A report needs a logger with a folder of the run: one without gets none, as a fit may be one of thousands.

    Args:
        trainer: The trainer.
        session: The records of the run, with the monitor's arguments and notices.

    Attributes:
        path: The path of the page; ``None`` where there will be none.
    """

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer = trainer
        self._session = session
        self.path: Path | None = None
        self._num_written = 0

    def begin(self) -> None:
        """Find the folder of the run; every process asks for it."""
        folders = [folder for logger in self._trainer.loggers if (folder := getattr(logger, "log_dir", None))]
        fast_dev_run: bool = self._trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        is_wanted = self._session.arguments.report and folders and not fast_dev_run and "://" not in str(folders[0])
        if is_wanted and self._trainer.is_global_zero:
            self.path = Path(folders[0]) / page_name(self._session.arguments.prefix)
            self._num_written = len(self._session.results.records)

    def write(self) -> None:
        """Write the page anew, if there are records that it does not have."""
        num_records = len(self._session.results.records)
        if self.path is not None and num_records != self._num_written:
            self._num_written = num_records
            write_page(self.path, self._session, stopped=self._why_stopped())

    def _why_stopped(self) -> str | None:
        """The message of the callback that has stopped the fit."""
        messages = [getattr(callback, "stopping_reason_message", None) for callback in callbacks_of(self._trainer)]
        return next((message for message in messages if message), None)


def write_page(path: Path, session: Session, *, stopped: str | None = None) -> None:
    """Write the report of a session; a failure costs a message.

    Args:
        path: The path of the page.
        session: The records of the run, of which there is at least one.
        stopped: Why training was stopped; ``None`` where it ended by itself.
    """
    results, folder = session.results, path.resolve().parent
    try:
        report(
            results.records,
            path,
            name=f"{folder.parent.name}/{folder.name}",
            zero_loss_step=results.zero_loss_step,
            labels=labels_of(results.probe),
            stopped=stopped,
        )
    except Exception as error:  # A full disk, or a package of figures that is not there.
        session.notices.inform(
            f"BasinMonitor has written no report. {type(error).__name__}: {error}. HINT: BasinMonitor(report=False) "
            f"asks for none"
        )
