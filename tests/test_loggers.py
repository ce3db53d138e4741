"""Loggers of lightning, each with what it keeps on this machine."""

import csv
import json

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_basin import BasinMonitor
from lightning_basin.loggers import log_scalars
from tests.training import Regressor, loader, make_trainer, repeated_loader, steps

pytestmark = pytest.mark.usefixtures("one_thread")


class Full(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise OSError("no space left")


def test_a_logger_that_fails_does_not_keep_the_others_from_logging(tmp_path):
    first, last = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    assert log_scalars([first, Full(tmp_path), last], {"basin/gradient_rank": 6.0}, step=3) == [
        "Full could not log. OSError: no space left"
    ]
    first.finalize("success")
    (event,) = EventAccumulator(first.log_dir).Reload().Scalars("basin/gradient_rank")
    assert (event.step, event.value) == (3, 6.0)
    assert last.experiment.metrics == [{"basin/gradient_rank": 6.0, "step": 3}]


def test_without_a_logger_nothing_is_logged():
    assert log_scalars([], {"basin/gradient_rank": 6.0}, step=3) == []


@pytest.mark.filterwarnings("error:MLFlow only allows")
def test_mlflow_gets_names_that_it_takes_and_more_values_than_it_takes_at_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # Else mlflow 3 wants a database.
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    scalars = {f"basin_layer_gradient_rank/net.{index}" + "'" * (index == 0): float(index) for index in range(1500)}
    assert log_scalars([logger], scalars, step=7) == []
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == {key.replace("'", "_"): value for key, value in scalars.items()}


def test_wandb_keeps_every_key_at_its_step_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    for step in (0, 5):
        assert log_scalars([logger], {"basin/gradient_rank": 6.0 - step}, step=step) == []
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert (summary["basin/gradient_rank"], summary["trainer/global_step"]) == (1.0, 5)


# ------------------------------------------------------------------------------------------------------- history


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("history", ["csv", "jsonl"])
def test_history_holds_one_row_a_measurement_in_the_log_directory(tmp_path, history):
    monitor, logger = BasinMonitor(probe=20, history=history), CSVLogger(tmp_path)
    make_trainer(tmp_path, monitor, logger=logger).fit(Regressor(), loader())
    expected = [{"step": record.step} | record.scalars() for record in monitor.records]
    assert rows_of(tmp_path / "lightning_logs" / "version_0" / f"basin.{history}") == expected


@pytest.mark.parametrize("history", ["csv", "jsonl"])
def test_history_of_a_resumed_run_is_complete(tmp_path, history):
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20), max_epochs=2)
    trainer.fit(Regressor(), repeated_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monitor = BasinMonitor(probe=20, history=history)
    resumed = make_trainer(tmp_path, monitor, max_epochs=4)
    resumed.fit(Regressor(), repeated_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [row["step"] for row in rows_of(tmp_path / f"basin.{history}")] == steps(monitor) == [0, 4, 8, 12, 16]


def test_history_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "basin.jsonl").mkdir()
    monitor = BasinMonitor(probe=20, history="jsonl")
    with pytest.warns(UserWarning, match=r"basin.jsonl could not be written. IsADirectoryError"):
        make_trainer(tmp_path, monitor).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3, 6]


def test_no_history_is_written_in_a_fast_dev_run(tmp_path):
    make_trainer(tmp_path, BasinMonitor(probe=20, history="csv"), fast_dev_run=True).fit(Regressor(), loader())
    assert not list(tmp_path.rglob("basin.csv"))
