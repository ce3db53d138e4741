"""The report of a fit in its log directory, written when the loss has reached zero and at the end."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_basin.callback.lightnings import Logger, Trainer, callbacks_of
from lightning_basin.callback.media import page_writer
from lightning_basin.callback.session import Session
from lightning_basin.history.page import page_name
from lightning_basin.naming import escaped
from lightning_basin.pages.report import report


class ReportFile:
    """Writes the report of one fit, and hands it to the loggers that take pages.

    A fit without a logger gets none, as it may be one of thousands.
    """

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer = trainer
        self._session = session
        self.path: Path | None = None
        self._num_written = 0

    def begin(self) -> None:
        """Find the folder of the run."""
        trainer = self._trainer
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector of lightning 2.6
        if self._session.arguments.report and trainer.loggers and trainer.is_global_zero and not fast_dev_run:
            self._num_written = len(self._session.results.records)
            try:
                folder = _folder_of(trainer.loggers, trainer.default_root_dir)
            except Exception as error:  # Whatever a logger raises that is asked for its folder.
                _inform_of(error, self._session)
            else:
                self.path = folder if folder is None else folder / page_name(self._session.arguments.prefix)

    def write(self, log_step: int) -> None:
        """Write the page anew, if there are records that it does not have."""
        num_records = len(self._session.results.records)
        if self.path is not None and num_records != self._num_written:
            self._num_written = num_records
            if write_page(self.path, self._session, stopped=self._why_stopped()):
                for logger in self._trainer.loggers:
                    self._hand_to(logger, self.path, log_step)

    def _hand_to(self, logger: Logger, path: Path, log_step: int) -> None:
        try:
            if write := page_writer(logger):
                write(f"{escaped(self._session.arguments.prefix)}/report", path, log_step)
        except Exception as error:  # Whatever a logger raises: a server that does not answer.
            self._session.notices.inform(
                f"{type(logger).__name__} has no report of BasinMonitor. {type(error).__name__}: {error}"
            )

    def _why_stopped(self) -> str | None:
        """The message of the callback that has stopped the fit."""
        messages = [getattr(callback, "stopping_reason_message", None) for callback in callbacks_of(self._trainer)]
        return next((message for message in messages if message), None)


def _folder_of(loggers: Sequence[Logger], default_root_dir: str) -> Path | None:
    """Return the folder of a run; ``None`` where it is not on a local disk.

    A logger without a folder of the run gets the one in which Lightning puts the checkpoints, so that runs differ.
    """
    folders: list[str] = [folder for logger in loggers if (folder := getattr(logger, "log_dir", None))]
    root = next(iter(folders), None) or loggers[0].save_dir or default_root_dir
    if "://" in str(root):
        return None
    if folders:
        return Path(root)
    name, version = loggers[0].name, loggers[0].version
    return Path(root) / (name or "") / (version if isinstance(version, str) else f"version_{version}")


def write_page(path: Path, session: Session, *, stopped: str | None = None) -> bool:
    """Write the report of a session, and return whether this has worked; a failure costs a message."""
    folder = path.resolve().parent
    try:
        report(replace(session.results.history(), name=f"{folder.parent.name}/{folder.name}", stopped=stopped), path)
    except Exception as error:  # A full disk, or a package of figures that is not there.
        _inform_of(error, session)
        return False
    return True


def _inform_of(error: Exception, session: Session) -> None:
    session.notices.inform(
        f"BasinMonitor has written no report. {type(error).__name__}: {error}. HINT: BasinMonitor(report=False) "
        f"asks for none"
    )
