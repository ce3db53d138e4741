"""Runs whose checkpoints are measured afterwards."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_basin import BasinMonitor
from tests.lightning_packages import ModelCheckpoint, TensorBoardLogger
from tests.training import loader, make_trainer


def run(root, module, *callbacks, batches=None, monitor=None, saving=None, **options):
    """Train with a monitor that measures every step or epoch, and save a checkpoint of each."""
    monitor = BasinMonitor(probe=20) if monitor is None else monitor
    checkpoint = ModelCheckpoint(root / "saved", filename="{step}", save_top_k=-1, **(saving or {}))
    logger = TensorBoardLogger(root, name="", version="live")
    options = {"max_epochs": 3, "enable_checkpointing": True, "logger": logger} | options
    make_trainer(root, monitor, checkpoint, *callbacks, **options).fit(module, batches or loader())
    logger.finalize("success")
    return monitor


def curves(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag.startswith("basin") and not tag.endswith("measure_seconds")
    }
