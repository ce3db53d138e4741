import csv
import time
from datetime import timedelta

import pytest

from lightning_basin import BasinMonitor
from tests.lightning_packages import (
    CSVLogger,
    PassThroughProfiler,
)
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    steps,
)

pytestmark = pytest.mark.fits


class Ticking(PassThroughProfiler):
    """A clock that runs only while the profiler is told that something is done: three seconds a measurement."""

    def __init__(self, seconds_a_batch=1.0) -> None:
        super().__init__()
        self.now = 0.0
        self.seconds_a_batch = seconds_a_batch

    def start(self, action_name):
        if action_name == "[BasinMonitor]basin.measure":
            self.now += 3.0
        if action_name == "run_training_batch":
            self.now += self.seconds_a_batch

    def __call__(self):
        return self.now


def ticking_trainer(root, monkeypatch, monitor, seconds_a_batch=1.0, **options):
    clock = Ticking(seconds_a_batch)
    monkeypatch.setattr(time, "monotonic", clock)
    return make_trainer(root, monitor, profiler=clock, **{"max_epochs": 12} | options)


def ticking_run(root, monkeypatch, monitor, seconds_a_batch=1.0, module=None, **options):
    trainer = ticking_trainer(root, monkeypatch, monitor, seconds_a_batch, **options)
    trainer.fit(module or Regressor(), loader())


def test_measurements_take_at_most_their_share_of_the_time(tmp_path, monkeypatch, caplog):
    monitor, logger = BasinMonitor(probe=20, every_n_train_steps=1, max_overhead=0.25), CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        ticking_run(tmp_path, monkeypatch, monitor, logger=logger)
    # Three seconds a measurement and one a step: the k-th fits after n steps if 3 k <= (3 k + n) / 4, so if n >= 9 k.
    assert steps(monitor) == [0, 18, 27, 36]
    assert monitor.skipped_steps == [step for step in range(1, 37) if step not in (18, 27, 36)]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        column = [row["basin/skipped_measurements"] for row in csv.DictReader(file)]
    assert [float(value) for value in column if value] == [0, 17, 25, 33]
    said = [message for message in caplog.messages if "max_overhead" in message]
    assert said == [
        "BasinMonitor(max_overhead=0.25) skips measurements",
        "BasinMonitor(max_overhead=0.25) skipped 33 of 37 measurements, which skipped_steps lists",
    ]


def test_a_run_with_time_to_spare_skips_nothing(tmp_path, monkeypatch):
    monitor = BasinMonitor(probe=20, every_n_epochs=4, max_overhead=0.5)
    ticking_run(tmp_path, monkeypatch, monitor)
    # The second measurement ends at 3 + 12 + 3 seconds, of which 6 were spent.
    assert (steps(monitor), monitor.skipped_steps) == ([0, 12, 24, 36], [])


@pytest.mark.parametrize(
    ("seconds_a_batch", "options", "expected"),
    [
        # Sixty epochs of three seconds: a ninth of the training time, 20 s, is measured. Three seconds have been, and
        # 17 s hold 11 measurements of the expected 1.5 s. After the first of these, at the sixth epoch, they hold 4 of
        # three seconds in 54 epochs, then 3 in 40, 2 in 26, and 1 in 13.
        pytest.param(1.0, {}, [0, 18, 60, 102, 141, 180], id="run of minutes"),
        pytest.param(1.0, {"max_epochs": -1, "max_steps": 180}, [0, 18, 60, 102, 141, 180], id="so many steps"),
        # Ten epochs of three seconds leave 3.3 s, and five are free: 2 s more, which hold no measurement after one of
        # 1.5 s. There are three all the same: one in 10/3 of ten epochs, then in 3 of 6, and in 3.
        pytest.param(1.0, {"max_epochs": 10}, [0, 12, 21, 30], id="short run"),
        pytest.param(300.0, {"max_epochs": 12}, [*range(0, 37, 3)], id="long run"),
        # Nobody knows how long it lasts. The second fits into the free 5 s. The k-th has to end within a tenth:
        # 3 k <= (3 k + 15 e) / 10 after e epochs of 15 seconds, so that e >= 1.8 k.
        pytest.param(
            5.0,
            {"max_epochs": -1, "max_time": timedelta(seconds=597)},
            [0, 3, *(3 * -(-18 * k // 10) for k in range(3, 21))],
            id="no end",
        ),
    ],
)
def test_without_a_cadence_epochs_are_measured_as_time_allows(
    tmp_path, monkeypatch, caplog, seconds_a_batch, options, expected
):
    monitor = BasinMonitor(probe=20)
    with caplog.at_level("INFO"):
        ticking_run(tmp_path, monkeypatch, monitor, seconds_a_batch, **{"max_epochs": 60} | options)
    assert steps(monitor) == expected
    said = [message for message in caplog.messages if "at some epochs only" in message]
    assert len(said) == (1 if monitor.skipped_steps else 0)
    assert sorted(monitor.skipped_steps + expected) == [*range(0, expected[-1] + 1, 3)]


@pytest.mark.parametrize(
    "arguments", [{"every_n_epochs": 1}, {"every_n_epochs_after_zero_loss": 1}], ids=lambda arguments: str(*arguments)
)
def test_a_cadence_that_is_passed_is_kept(tmp_path, monkeypatch, arguments):
    monitor = BasinMonitor(probe=20, **arguments)
    ticking_run(tmp_path, monkeypatch, monitor)
    assert (steps(monitor), monitor.skipped_steps) == ([*range(0, 37, 3)], [])


@pytest.mark.parametrize(
    ("arguments", "seconds_a_batch", "expected"),
    [
        # Three seconds beside the three of an epoch; each twelfth measurement takes 3 of 39.
        pytest.param(
            {"every_n_epochs": 1},
            1.0,
            ["Measuring takes 50% of the wall time", "every_n_epochs=12) brings it to 8%"],
            id="much",
        ),
        pytest.param({"every_n_epochs": 1}, 9.0, [], id="a tenth"),
        pytest.param({"max_overhead": 0.9}, 1.0, [], id="limited"),
        pytest.param({"max_overhead": "auto"}, 1.0, [], id="ever more rarely"),
    ],
)
def test_what_measuring_costs_is_said_once(tmp_path, monkeypatch, caplog, arguments, seconds_a_batch, expected):
    with caplog.at_level("INFO"):
        ticking_run(tmp_path, monkeypatch, BasinMonitor(probe=20, **arguments), seconds_a_batch)
    said = [message for message in caplog.messages if "of the wall time" in message]
    assert len(said) == (1 if expected else 0)
    assert all(part in said[0] for part in expected)


class FailsAtSix(Regressor):
    """Cannot be measured after six optimizer steps."""

    def forward(self, inputs):
        if not self.training and self._trainer is not None and self.trainer.global_step == 6:
            raise RuntimeError("evaluation is out of order")
        return super().forward(inputs)


def test_what_measuring_costs_is_said_after_the_fourth_measurement_where_the_third_has_failed(
    tmp_path, monkeypatch, caplog
):
    monitor = BasinMonitor(probe=20, every_n_epochs=1)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="could not measure at step 6"):
        ticking_run(tmp_path, monkeypatch, monitor, module=FailsAtSix())
    assert steps(monitor)[:3] == [0, 3, 9]
    assert len([message for message in caplog.messages if "takes 50% of the wall time" in message]) == 1


def test_what_measuring_costs_is_said_once_in_two_fits_of_a_run_and_again_in_another_run(tmp_path, monkeypatch, caplog):
    module, trainer = Regressor(), ticking_trainer(tmp_path, monkeypatch, BasinMonitor(probe=20, every_n_epochs=1))
    num_said = []
    for fitted in (module, module, Regressor()):
        with caplog.at_level("INFO"):
            trainer.fit(fitted, loader())
        num_said.append(len([message for message in caplog.messages if "of the wall time" in message]))
        trainer.fit_loop.max_epochs += 12
    assert num_said == [1, 1, 2]


def test_skipped_steps_survive_resuming(tmp_path):
    trainer = make_trainer(tmp_path, BasinMonitor(probe=20, max_overhead=1e-6), max_epochs=2)
    trainer.fit(Regressor(), loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monitor = BasinMonitor(probe=20)
    make_trainer(tmp_path, monitor, max_epochs=3).fit(Regressor(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert (steps(monitor), monitor.skipped_steps) == ([0, 9], [3, 6])
