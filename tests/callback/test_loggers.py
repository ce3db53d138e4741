"""Loggers of lightning, each with what it keeps on this machine."""

import csv
import json
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_basin import BasinMonitor
from lightning_basin.callback.loggers import log_scalars
from lightning_basin.callback.media import image_writer, page_writer
from lightning_basin.history.details import details_of
from tests.lightning_packages import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger, loggers
from tests.training import Regressor, loader, make_trainer, repeated_loader, steps

pytestmark = pytest.mark.fits


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


class Experiment(defaultdict):
    """Stands for that of the package litlogger, which needs an account: one series of values for each key."""

    class Series(list):
        def append(self, value, step):
            super().append((step, value))

    def __init__(self, **_):
        super().__init__(self.Series)

    def print_url(self):
        pass


def test_litlogger_gets_values_at_their_step_and_neither_figures_nor_report(tmp_path, monkeypatch):
    if not hasattr(loggers, "LitLogger"):
        pytest.skip("this version of lightning has no LitLogger")
    monkeypatch.setitem(sys.modules, "litlogger", SimpleNamespace(Experiment=Experiment))
    logger = loggers.LitLogger(tmp_path, name="run")
    assert log_scalars([logger], {"basin/gradient_rank": 6.0}, step=3) == []
    assert log_scalars([logger], {"basin/gradient_rank": 5.0}, step=7) == []
    assert logger.experiment["basin/gradient_rank"] == [(3, 6.0), (7, 5.0)]
    assert (image_writer(logger), page_writer(logger)) == (None, None)


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


@pytest.mark.filterwarnings("error:MLFlow only allows")
def test_mlflow_gets_a_name_for_each_value_also_where_it_refuses_what_tells_them_apart(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # Else mlflow 3 wants a database.
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    assert log_scalars([logger], {"a(": 1.0, "a%": 2.0, "a_": 3.0, "ä": 4.0, "ö": 5.0}, step=7) == []
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == {"a_": 3.0, "a__": 1.0, "a___": 2.0, "_": 4.0, "__": 5.0}


def test_tensorboard_gets_the_values_in_groups_and_other_loggers_under_their_keys(tmp_path):
    tensorboard, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    values = {"a.b/gradient_rank": 6.0, "a.b/loss": 0.5, "a.b_layer_dead_units/fc": 1.0}
    assert log_scalars([tensorboard, table], values, step=3, prefix="a.b") == []
    tensorboard.finalize("success")
    assert EventAccumulator(tensorboard.log_dir).Reload().Tags()["scalars"] == ["a.b/gradient_rank", "a.b_more/loss"]
    assert table.experiment.metrics == [values | {"step": 3}]


def kept_by_tensorboard(logger, key):
    return [(event.step, event.value) for event in EventAccumulator(logger.log_dir).Reload().Scalars(key)]


def kept_by_csv(logger, key):
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row[key]]


def kept_by_mlflow(logger, key):
    return [(metric.step, metric.value) for metric in logger.experiment.get_metric_history(logger.run_id, key)]


def kept_by_wandb(logger, key):
    logger.experiment.finish()
    (path,) = Path(logger.save_dir).glob("wandb/offline-run-*/run-*.wandb")
    kept = []
    for record in wandb_records(path):
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if key in row:
            kept.append((row["trainer/global_step"], row[key]))
    return kept


def wandb_records(path):
    """All records of a run; its own process may write the last ones after `finish` has returned."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    patience = time.monotonic() + 60
    while True:
        try:
            records = list(map(wandb_internal_pb2.Record.FromString, log_records(path.read_bytes())))
        except (DecodeError, struct.error):  # Half of a record.
            records = []
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < patience, "wandb has not finished its file"
        time.sleep(0.1)


def log_records(content):
    """The records of a file in the log format of LevelDB, with a head of seven bytes, as wandb 0.31 writes it."""
    position, record = 7, b""
    while position < len(content):
        if 2**15 - position % 2**15 < 7:  # The rest of a block that holds no head is padding.
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            yield record
            record = b""


def make_mlflow(root):
    return MLFlowLogger(tracking_uri=f"file:{root / 'mlruns'}")


LOGGERS = {
    "tensorboard": (TensorBoardLogger, kept_by_tensorboard),
    "csv": (CSVLogger, kept_by_csv),
    "wandb": (lambda root: WandbLogger(save_dir=root, offline=True), kept_by_wandb),
    "mlflow": (make_mlflow, kept_by_mlflow),
}


@pytest.mark.parametrize(
    "names",
    [["tensorboard"], ["csv"], ["wandb"], ["mlflow"], ["csv", "tensorboard"], ["mlflow", "wandb", "csv"]],
    ids=" and ".join,
)
@pytest.mark.filterwarnings("ignore:.*log_every_n_steps")
def test_every_logger_keeps_every_measurement_once_at_its_step(tmp_path, monkeypatch, names):
    for name in set(names) - {"tensorboard", "csv"}:
        pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # Else mlflow 3 wants a database.
    monitor, loggers = BasinMonitor(probe=20), [LOGGERS[name][0](tmp_path) for name in names]
    make_trainer(tmp_path, monitor, logger=loggers, max_epochs=3).fit(Regressor(), loader())
    keys = set().union(*(record.scalars() for record in monitor.records)) - {"basin/measure_seconds"}
    for name, logger in zip(names, loggers, strict=True):
        logger.finalize("success")
        for key in (
            "basin/gradient_rank",
            "basin_layer_hessian_nullity_lower/readout",
            "basin_stats/gradient_rank_deficit_p90",
        ):
            assert key in keys
            # The baseline stands at the first step, each epoch at its last.
            values = torch.tensor([record.scalars()[key] for record in monitor.records], dtype=torch.float32).tolist()
            kept = [
                (step, torch.tensor(value, dtype=torch.float32).item()) for step, value in LOGGERS[name][1](logger, key)
            ]
            assert kept == list(zip([0, 2, 5, 8], values, strict=True))


@pytest.mark.parametrize("logger", [False, True], ids=["none", "Lightning's choice"])
def test_run_with_the_loggers_of_lightning_or_none(tmp_path, logger):
    monitor = BasinMonitor(probe=20)
    trainer = make_trainer(tmp_path, monitor, logger=logger)
    trainer.fit(Regressor(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert trainer.callback_metrics["basin/gradient_rank"] == monitor.records[-1].gradient_rank
    assert bool(list(tmp_path.rglob("events*"))) == logger


class Renamed(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"größe (a)": self.hidden, "readout": self.readout})
        del self.hidden, self.readout

    def forward(self, inputs):
        return self.net["readout"](self.net["größe (a)"](inputs).tanh())


def test_names_are_changed_only_where_a_logger_refuses_them(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = [CSVLogger(tmp_path), make_mlflow(tmp_path)]
    make_trainer(tmp_path, BasinMonitor(probe=20), logger=loggers, max_epochs=1).fit(Renamed(), loader())
    key = "basin_layer_gradient_rank/net.größe (a)"
    assert [step for step, _ in kept_by_csv(loggers[0], key)] == [0, 2]
    kept = loggers[1].experiment.get_run(loggers[1].run_id).data.metrics
    assert "basin_layer_gradient_rank/net.gr__e _a_" in kept


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return [{key: json.loads(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("history", ["csv", "jsonl"])
def test_history_holds_one_row_a_measurement_in_the_log_directory(tmp_path, history):
    monitor, logger = BasinMonitor(probe=20, history=history), CSVLogger(tmp_path)
    make_trainer(tmp_path, monitor, logger=logger).fit(Regressor(), loader())
    expected = [
        {"step": record.step, **record.scalars(), "basin/details": details_of(record)} for record in monitor.records
    ]
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
