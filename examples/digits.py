"""Train a small network on handwritten digits to zero loss and beyond, and watch its basin flatten.

Run it with ``python examples/digits.py``. The network is wide and loses nothing: its rank stays where it is, and only
the head and the null space move. It prints what was measured at the start, when the loss had reached zero, and at the
end, and leaves the curves for TensorBoard in ``logs/``.
"""

import argparse
import logging
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, BasinRecord

NUM_IMAGES = 60


class DigitClassifier(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows that it is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss_fn = nn.MSELoss()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, targets = batch
        loss = self.loss_fn(self(images), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def training_set() -> TensorDataset:
    digits = load_digits()
    images = torch.tensor(digits.data[:NUM_IMAGES] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[:NUM_IMAGES])
    return TensorDataset(images, nn.functional.one_hot(labels, 10).float())


def what_to_look_at(first: BasinRecord, last: BasinRecord) -> str:
    head = "network.4"
    curves = {
        "basin/gradient_rank": "all that 60 images with 10 outputs can show: no output is tied to another",
        f"basin_layer_gradient_rank/{head}": "the head, of 600: it loses what hidden units no longer tell apart",
        "basin/gradient_nullity": "directions that leave every output as it is",
        "basin/hessian_nullity_upper": "flat directions of the loss at most; falls with the residual",
        "basin/residual_curvature": "how far the two still are from being the same thing",
    }
    lines = ["What to look at, and its way from the start to the end (TensorBoard has some of it in basin_more/):"]
    for key, meaning in curves.items():
        before, after = (
            record.layers[head].gradient_rank if head in key else record.quantities()[key.removeprefix("basin/")]
            for record in (first, last)
        )
        lines.append(f"  {key:38}{before:>8.4g} -> {after:<9.4g} {meaning}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=3000)
    parser.add_argument("--every-n-epochs", type=int, default=300)
    parser.add_argument("--log-dir", default="logs")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # That the rank is that of the probe is how it must be where 60 images are fitted exactly.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|probe is too small).*")

    L.seed_everything(0, verbose=False)
    dataset = training_set()
    monitor = BasinMonitor(probe=NUM_IMAGES, every_n_epochs=options.every_n_epochs, zero_loss_threshold=1e-5)
    loggers = [TensorBoardLogger(options.log_dir, name="digits"), CSVLogger(options.log_dir, name="digits_csv")]
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[monitor],
        logger=loggers,
        log_every_n_steps=3,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    print(
        f"Training 64-64-64-10 on {NUM_IMAGES} digits for {options.max_epochs} epochs; about a minute ...", flush=True
    )
    started = time.perf_counter()
    # Three batches of 20: the probe of 60 is then the whole training set, taken from the first three steps.
    trainer.fit(DigitClassifier(), DataLoader(dataset, batch_size=20, shuffle=True))
    seconds = time.perf_counter() - started

    at_zero = next((record for record in monitor.records if record.step == monitor.zero_loss_step), None)
    print(f"\n=== at the start ===\n{monitor.records[0]}")
    print(f"\n=== at zero loss ===\n{at_zero or 'not reached'}")
    print(f"\n=== at the end ===\n{monitor.records[-1]}")
    print(f"\n{what_to_look_at(monitor.records[0], monitor.records[-1])}")
    measuring = sum(record.measure_seconds for record in monitor.records)
    print(f"{len(monitor.records)} measurements took {measuring:.0f} of {seconds:.0f} seconds. The curves:")
    print(f"  tensorboard --logdir {options.log_dir}/digits")
    print("  http://localhost:6006/?smoothing=0&tagFilter=^basin/#timeseries")


if __name__ == "__main__":
    main()
