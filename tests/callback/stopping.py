"""Fits that a callback ends, and what each of them looks at."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, RankEarlyStopping
from tests.lightning_packages import LightningModule
from tests.training import Scripted, make_trainer, scripted_loader, seeded

rank_stopping = partial(RankEarlyStopping, after_zero_loss=False)


def stop_on(root, stopping, ranks=(6,), losses=(1.0,), *, stopping_first=False, num_batches=1, **options):
    """Train on scripted ranks; the monitor's arguments are in `options["monitor"]`, the others are the Trainer's."""
    monitor = BasinMonitor(probe=8, hessian=False, **options.pop("monitor", {}))
    callbacks = [stopping, monitor] if stopping_first else [monitor, stopping]
    trainer = make_trainer(root, *callbacks, **{"max_epochs": 20} | options)
    trainer.fit(Scripted(ranks, losses), scripted_loader(num_batches), scripted_loader(1))
    return trainer, monitor


def stopping_epoch(root, stopping, ranks, **options):
    trainer, monitor = stop_on(root, stopping, ranks, num_batches=2, **options)
    return trainer.current_epoch, monitor


# Ranks after epochs 1, 2, ...: 6, 5, 5, 5, 5. A patience of two is over at the end of epoch 4.
FALLING_ONCE = (6, 6, 6, 5, 5)


class WithoutLoss(LightningModule):
    """A linear map whose training step keeps its loss to itself."""

    def __init__(self, outputs=1, inputs=8):
        super().__init__()
        with seeded():
            self.map = nn.Linear(inputs, outputs, bias=False)

    def forward(self, inputs):
        return self.map(inputs)

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).sum() + self.map.weight.square().sum()  # No function of the outputs alone.

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches_of(inputs, outputs=1):
    return DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), outputs)), len(inputs))


RARE = {"every_n_train_steps": 1, "verify_null_space": 4}
"""Whether null directions survive is known at every fourth measurement."""
