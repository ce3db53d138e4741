"""Callbacks that look for a value, and a fit with them."""

from datetime import timedelta

from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.lightning_packages import EarlyStopping, ModelCheckpoint
from tests.training import Regressor, loader, make_trainer

RANK = "basin/gradient_rank"


class Scheduled(Regressor):
    """Halves its rate of learning where a measured value does not fall."""

    def __init__(self, key=RANK, interval="epoch", *, strict=True, patience=0):
        super().__init__()
        self.patience = patience
        self.config = {"monitor": key, "interval": interval, "strict": strict}

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {"scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=self.patience), **self.config}
        ]


TRAINERS = {
    "validation in the epoch": {"val_check_interval": 0.25},
    "validation after each batch": {"val_check_interval": 1},
    "sanity check": {"num_sanity_val_steps": 2, "val_check_interval": 0.5},
    "rare validation": {"check_val_every_n_epoch": 2},
    "validation by batches of all epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "accumulation": {"accumulate_grad_batches": 4, "val_check_interval": 0.25},
    "no validation": {"limit_val_batches": 0},
    "one batch": {"limit_train_batches": 1},
    "development": {"fast_dev_run": 2},
}


WATCHERS = {
    "stopping": lambda _: EarlyStopping(RANK, patience=99),
    "stopping after validation": lambda _: EarlyStopping(RANK, patience=99, check_on_train_epoch_end=False),
    "checkpoint": lambda root: ModelCheckpoint(root, monitor=RANK, save_top_k=-1),
    "checkpoint at steps": lambda root: ModelCheckpoint(root, monitor=RANK, save_last=True, every_n_train_steps=1),
    "checkpoint by time": lambda root: ModelCheckpoint(root, monitor=RANK, train_time_interval=timedelta(0)),
}


def fit(root, *callbacks, module=None, batches=None, **options):
    options = {"max_epochs": 2, "enable_checkpointing": True} | options
    trainer = make_trainer(root, *callbacks, **options)
    trainer.fit(module or Regressor(), loader(60, 5) if batches is None else batches, loader(10, 5))
    return trainer


COMBINED = [
    *((watcher, options) for watcher in ("stopping after validation", "checkpoint") for options in TRAINERS),
    *((watcher, options) for watcher in WATCHERS for options in ("validation in the epoch", "one batch")),
]
