"""One hundred handwritten digits and one question: is it a 3? Watch a network forget everything else.

Run it with ``make demo``. It prints what was measured, and leaves a report and the curves for TensorBoard in ``logs/``.

The network is fitted by SGD until the loss is about zero. Then noise is added to the labels, which drives SGD along the
set of perfect fits to sparser ones (Blanc et al., 2020). At last the noise is taken away, and the loss goes to zero.
"""

import argparse
import logging
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, BasinRecord
from lightning_basin.figures import plot_history, plot_merges
from lightning_basin.history.sources import read_history

NUM_IMAGES = 100
FIT, NOISE, CALM = 1000, 7000, 2000  # optimizer steps


class IsItAThree(L.LightningModule):
    """Three layers; SGD at first, with noise in the labels later, and Adam at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 8), nn.Linear(8, 4), nn.Linear(4, 1)
        self.loss_fn = nn.MSELoss()
        self.automatic_optimization = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(images)))))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, targets = batch
        if FIT <= self.global_step < FIT + NOISE:
            targets = targets + 0.5 * torch.randn_like(targets)
        loss = self.loss_fn(self(images), targets)
        sgd, adam = self.optimizers()
        optimizer = sgd if self.global_step < FIT + NOISE else adam
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if optimizer is adam:
            self.lr_schedulers().step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, CALM)
        return [torch.optim.SGD(self.parameters(), 0.2), adam], [schedule]


def story(records: list[BasinRecord]) -> str:
    lines = [f"{'step':>6} {'loss':>8} {'rank':>5} {'bound':>6} {'N - rank':>9} {'Hessian nullity':>16}  duplicates"]
    for record in records:
        nullity = f"{record.hessian_nullity_lower}"
        if not record.hessian_certified:
            nullity += f" to {record.hessian_nullity_upper}"
        layers = {name: layer.duplicated_activations for name, layer in record.layers.items()}
        merged = ", ".join(f"{name}: {count}" for name, count in layers.items() if count)
        lines.append(
            f"{record.step:6} {record.loss:8.0e} {record.gradient_rank:5} {record.gradient_rank_bound:6} "
            f"{record.gradient_nullity:9} {nullity:>16}  {merged}"
        )
    return "\n".join(lines)


def picture(folder: str, moments: tuple[int, ...]) -> Figure:
    """The rank over the steps, and below it the merge trees of some of them."""
    history = read_history(folder)
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle("Asked only “is it a 3?”, a network forgets every other digit", x=0.01, ha="left", size=16)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    plot_history(history, above.subplots())
    for step, ax in zip(moments, below.subplots(1, len(moments)), strict=True):
        plot_merges(history, ax, step=step, labels=load_digits().target[:NUM_IMAGES].tolist())
        rank = history.column("gradient_rank")[history.index_at(step)]
        ax.set_title(f"step {step:,}: rank {rank:.0f}", loc="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2, help="seeds differ: 3 and 5 stay at ranks above 70")
    parser.add_argument("--max-steps", type=int, default=FIT + NOISE + CALM)
    parser.add_argument("--log-dir", default="logs")
    parser.add_argument("--picture", help="where to save a picture with three merge trees")
    options = parser.parse_args()
    torch.set_num_threads(1)  # The matrices are tiny: threads would wait for each other.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # That the rank is that of the probe is how it begins where 100 images are fitted exactly.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|probe is too small).*")

    L.seed_everything(options.seed, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data[:NUM_IMAGES] / 16)
    is_three = torch.tensor(digits.target[:NUM_IMAGES] == 3).double()[:, None]
    monitor = BasinMonitor(probe=(images, is_three), every_n_epochs=200, zero_loss_threshold=1e-3)
    logger = TensorBoardLogger(options.log_dir, name="threes")
    trainer = L.Trainer(
        max_epochs=options.max_steps,  # One batch an epoch.
        callbacks=[monitor],
        logger=logger,
        precision="64-true",
        accelerator="cpu",
        log_every_n_steps=100,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    print(f"Asking {NUM_IMAGES} digits whether they are a 3, for {options.max_steps:,} steps; about a minute ...")
    started = time.perf_counter()
    trainer.fit(IsItAThree(), DataLoader(TensorDataset(images, is_three), batch_size=NUM_IMAGES))
    seconds = time.perf_counter() - started

    print(f"\n{story(monitor.records[::5])}\n")
    measuring = sum(record.measure_seconds for record in monitor.records)
    print(f"{len(monitor.records)} measurements took {measuring:.0f} of {seconds:.0f} seconds.")
    if options.picture:
        picture(logger.log_dir, (FIT, FIT + 4800, options.max_steps)).savefig(options.picture, dpi=90)


if __name__ == "__main__":
    main()
