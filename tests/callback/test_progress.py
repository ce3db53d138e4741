import threading
import time

import pytest

from lightning_basin import BasinMonitor
from tests.lightning_packages import (
    SimpleProfiler,
)
from tests.training import (
    Regressor,
    loader,
    make_trainer,
    steps,
)

pytestmark = pytest.mark.fits

SAID = {}


def test_a_long_measurement_is_announced_while_it_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_basin.callback.overhead.LONG_SECONDS", 0.01)
    begun = "Measuring basin at step 0 is taking more than 0.01 s"
    monkeypatch.setitem(SAID, "messages", caplog)

    def behavior(module, inputs):
        deadline = time.monotonic() + 60
        while len(inputs) == 15 and begun not in SAID["messages"].messages and time.monotonic() < deadline:
            time.sleep(0.001)  # The check before training has seen the first batch of 10 only.
        return module(inputs)

    with caplog.at_level("INFO"):
        make_trainer(tmp_path, BasinMonitor(probe=15, behavior=behavior), max_epochs=1).fit(Regressor(), loader(30, 10))
    (ended,) = [message for message in caplog.messages if message.startswith("Measuring basin at step 0 took ")]
    assert caplog.messages.index(begun) < caplog.messages.index(ended)
    assert threading.active_count() == len(threading.enumerate())
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_short_measurement_is_not_announced(tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, BasinMonitor(probe=20)).fit(Regressor(), loader())
    assert not [message for message in caplog.messages if "at step" in message]


def test_profiler_shows_what_measuring_takes(tmp_path):
    profiler = SimpleProfiler()
    make_trainer(tmp_path, BasinMonitor(probe=20, verify_null_space=2), profiler=profiler).fit(Regressor(), loader())
    durations = profiler.recorded_durations
    assert len(durations["[BasinMonitor]basin.measure"]) == 3
    assert len(durations["[BasinMonitor]basin.verify_null_space"]) == 2


@pytest.mark.parametrize("profiler", ["simple", "advanced", pytest.param("pytorch", marks=pytest.mark.slow)])
def test_every_profiler_of_lightning_lets_measurements_pass(tmp_path, profiler):
    monitor = BasinMonitor(probe=20, verify_null_space=1)
    make_trainer(tmp_path, monitor, profiler=profiler).fit(Regressor(), loader())
    assert steps(monitor) == [0, 3, 6]
    assert all(record.surviving_fraction is not None for record in monitor.records)
