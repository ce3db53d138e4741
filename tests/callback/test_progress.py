import threading
import time

import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, Probe
from lightning_basin.callback.progress import Progress
from tests.lightning_packages import MisconfigurationException, SimpleProfiler
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


@pytest.mark.parametrize(
    ("step", "is_loaded", "is_same_module", "goes_on"),
    [
        pytest.param(0, False, True, False, id="from the start"),
        pytest.param(7, True, False, True, id="from a checkpoint"),
        pytest.param(7, False, True, True, id="trained further"),
        pytest.param(7, False, False, False, id="another module"),
    ],
)
def test_what_was_measured_goes_on_with_the_same_run_only(step, is_loaded, is_same_module, goes_on):
    progress, (first, second) = Progress(BasinMonitor(), None, 3), [nn.Linear(2, 1) for _ in range(2)]
    progress.begin(first, 0)
    progress.schedule.measured_step, progress.is_loaded = 5, is_loaded
    progress.session.num_failures = 1
    progress.begin(first if is_same_module else second, step)
    assert (progress.schedule.measured_step == 5) == goes_on
    assert (progress.session.num_failures, progress.is_loaded) == (0, False)


def test_a_run_of_checkpoints_needs_a_probe():
    progress = Progress(BasinMonitor(), None, 3)
    with pytest.raises(MisconfigurationException, match="cannot measure Linear: there is no probe; pass"):
        progress.start(nn.Linear(2, 1), None, None)
    progress.start(nn.Linear(2, 1), Probe(torch.eye(2)), None)
    assert progress.observe(nn.Linear(2, 1), 4).step == 4
    assert progress.shown.records[0].gradient_rank == 2
