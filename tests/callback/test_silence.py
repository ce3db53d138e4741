"""What a copy does has no effect on the run."""

import threading
from types import SimpleNamespace

import pytest
import torch

from lightning_basin.callback.silence import collectives_refused, quiet_step
from lightning_basin.network.replica import replicas
from tests.lightning_packages import CSVLogger, Trainer
from tests.training import Regressor


@pytest.fixture
def attached(tmp_path):
    """A module with its trainer, and a silent copy."""
    trainer = Trainer(logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_progress_bar=False)
    module = Regressor()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    trainer.strategy.optimizers, module.trainer = [optimizer], trainer
    (replica,) = replicas(module, training=True)
    quiet_step(replica, trainer, [])
    return module, replica


def test_what_a_copy_sets_in_its_trainer_stays_there(attached):
    module, replica = attached
    replica.trainer.should_stop = replica.trainer.seen = True
    assert isinstance(replica.trainer, Trainer)
    assert not module.trainer.should_stop
    assert not hasattr(module.trainer, "seen")


def test_a_copy_reads_the_state_of_the_run(attached):
    module, replica = attached
    module.trainer.fit_loop.epoch_progress.current.completed = 7
    assert (replica.current_epoch, replica.trainer.max_epochs) == (7, module.trainer.max_epochs)


def test_what_a_copy_logs_arrives_nowhere(attached):
    module, replica = attached
    replica.log("loss", 1.0)
    replica.logger.log_metrics({"loss": 1.0})
    replica.loggers[0].experiment.log_metrics({"loss": 1.0}, step=1)
    assert module.logger.experiment.metrics == []


def test_the_optimizer_of_a_copy_moves_nothing_and_keeps_its_settings(attached):
    module, replica = attached
    before = module.trainer.optimizers[0].param_groups[0]["lr"]
    optimizer = replica.optimizers()
    optimizer.param_groups[0]["lr"] = 5.0
    with optimizer.toggle_model():
        optimizer.zero_grad()
    assert optimizer.step(lambda: "closure") == "closure"
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == before


def test_collectives_are_refused_in_one_thread_and_come_back():
    group, failures = torch.distributed.ProcessGroup, []
    before = dict(vars(group))

    def call():
        try:
            group.allgather()
        except Exception as error:
            failures.append(error)

    with collectives_refused(SimpleNamespace(world_size=2)):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "`allgather` would wait for the others: pass a behavior" in str(failures[0])
    assert isinstance(failures[1], TypeError)  # Torch asks for arguments.
    assert dict(vars(group)) == before
