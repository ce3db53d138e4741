"""What several files of tests of the monitor share."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_basin import measure_basin
from tests.training import (
    Unmeasurable,
    regression_data,
)


def measured_at_start(module, inputs, targets=None, **options):
    """What the baseline must be: the initial weights, measured without a Trainer."""
    return measure_basin(module, inputs, targets, layers="auto", step=0, **options)


def events_of(logger) -> EventAccumulator:
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0, "images": 0, "histograms": 0})
    return events.Reload()


def axis(logger, tag) -> list[int]:
    return [event.step for event in events_of(logger).Scalars(tag)]


PROBES = {
    "20": lambda: 20,
    "auto": lambda: "auto",
    "10": lambda: 10,
    "given": lambda: regression_data(10, seed=9).tensors,
    "another given": lambda: regression_data(10, seed=8).tensors,
    "in another precision": lambda: [tensor.double() for tensor in regression_data(10, seed=9).tensors],
}


class Wide(Unmeasurable):
    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(4, 200)

    def loss_fn(self, outputs, targets):
        return outputs.square().mean()

    def training_step(self, batch, batch_idx):
        self.num_training_steps += 1
        return self.loss_fn(self(batch[0]), batch[1])
