from pathlib import Path

import pytest

from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.history.page import read_page
from tests.lightning_packages import Callback, CSVLogger, TensorBoardLogger
from tests.training import Regressor, loader, make_trainer, steps

pytestmark = [pytest.mark.fits, pytest.mark.figures]


def fit(root, *callbacks, logger_class=CSVLogger, **options):
    trainer = make_trainer(root, *callbacks, logger=logger_class(root, name="runs"), **options)
    trainer.fit(Regressor(), loader())
    return root / "runs" / "version_0"


@pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])
def test_report_of_all_records_stands_in_the_log_directory(tmp_path, logger_class):
    monitor = BasinMonitor(probe=20)
    folder = fit(tmp_path, monitor, logger_class=logger_class)
    history = read_page(folder / "report.html")
    assert history.steps.tolist() == steps(monitor) == [0, 3, 6]
    assert history.column("gradient_rank").tolist() == [record.gradient_rank for record in monitor.records]
    assert history.name == "runs/version_0"


class Looks(Callback):
    """Looks for the report at the beginning of each batch."""

    def __init__(self):
        self.is_there = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_there.append((Path(trainer.log_dir) / "report.html").is_file())


def test_report_is_there_from_zero_loss_on(tmp_path):
    looks = Looks()
    # The baseline is measured at the first batch, after the callback that looks.
    folder = fit(tmp_path, looks, BasinMonitor(probe=20, zero_loss_threshold=1e3), max_epochs=1)
    assert looks.is_there == [False, True, True]
    assert read_page(folder / "report.html").zero_loss_step == 0


def test_report_says_why_training_was_stopped(tmp_path):
    stopping = RankEarlyStopping(patience=1, after_zero_loss=False)
    folder = fit(tmp_path, BasinMonitor(probe=20), stopping, max_epochs=20)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Training was stopped: {stopping.stopping_reason_message}" in page


def test_report_is_written_of_a_fit_that_was_broken_off(tmp_path):
    class Fails(Regressor):
        def on_train_epoch_end(self):
            raise RuntimeError("the user's own error")

    trainer = make_trainer(tmp_path, BasinMonitor(probe=20), logger=CSVLogger(tmp_path, name="runs"))
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer.fit(Fails(), loader())
    assert (tmp_path / "runs" / "version_0" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "options"), [({"report": False}, {}), ({}, {"logger": False}), ({}, {"fast_dev_run": True})]
)
def test_no_report_is_written_where_none_is_asked_for_or_there_is_no_folder(tmp_path, arguments, options):
    logger = {"logger": CSVLogger(tmp_path, name="runs")}
    make_trainer(tmp_path, BasinMonitor(probe=20, **arguments), **logger | options).fit(Regressor(), loader())
    assert list(tmp_path.rglob("*.html")) == []


def test_two_monitors_have_a_report_each(tmp_path):
    folder = fit(tmp_path, BasinMonitor(probe=20), BasinMonitor(probe=7, prefix="held_out"), max_epochs=1)
    assert read_page(folder / "report.html").num_inputs == 20
    assert read_page(folder / "held_out_report.html").num_inputs == 7


def test_a_report_that_cannot_be_written_ends_no_fit(tmp_path, caplog):
    (tmp_path / "runs" / "version_0" / "report.html").mkdir(parents=True)
    logger = CSVLogger(tmp_path, name="runs", version=0)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, BasinMonitor(probe=20), logger=logger, max_epochs=1).fit(Regressor(), loader())
    assert "BasinMonitor has written no report. IsADirectoryError" in caplog.text
    assert "BasinMonitor(report=False)" in caplog.text
