"""Information loss leads to a flat basin: the theory in one plot, with every number predicted beforehand.

A network with a bottleneck, 16-1-16-1, sees 64 pairs of categories (8 x 8, one-hot) and learns a label that depends on
the first category only. To fit it, the first layer must merge the 8 inputs of each first category into one
activation, and then

* 64 distinct activations behind the first layer become 8,
* the rank of the behavioral gradients becomes 15: 8 (one for each merged activation, behind the merge)
  + 1 x 7 (rank of the gradients at the first layer x rank of the differences between the merged inputs),
* the bound that the merged activations leave is the same 15, so that they explain all of the rank that was lost
  (counting the 17 parameters before the merge would give 17 + 8 = 25), and
* the Hessian has 66 - 15 = 51 zero eigenvalues.

(Hebbar, "Information loss leads to flat basins", 2022; the count is bound B4 of the documentation's theory.)
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import BasinMonitor, BasinRecord

NUM_CATEGORIES = 8
PREDICTED = {"distinct activations": 8, "gradient rank": 15, "Hessian nullity": 51, "rank bound": 15}


class Bottleneck(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 1), nn.Tanh(), nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        self.loss_fn = nn.MSELoss()

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.network(pairs)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        pairs, labels = batch
        return self.loss_fn(self(pairs), labels)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        # A rate that falls: at a constant one Adam keeps kicking the merged activations apart.
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.999)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def category_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """All 64 pairs, and a label for each first category."""
    codes = torch.eye(NUM_CATEGORIES, dtype=torch.float64)
    first = codes.repeat_interleave(NUM_CATEGORIES, dim=0)
    second = codes.repeat(NUM_CATEGORIES, 1)
    labels = torch.randn(NUM_CATEGORIES, 1, dtype=torch.float64)
    return torch.cat([first, second], dim=1), first @ labels


def measured(record: BasinRecord) -> dict[str, int | None]:
    return {
        "distinct activations": record.num_inputs - (record.duplicated_activations or 0),
        "gradient rank": record.gradient_rank,
        "Hessian nullity": record.hessian_nullity,
        "rank bound": record.gradient_rank_bound,
    }


def figure(records: list[BasinRecord]) -> Figure:
    """Distinct activations, rank, bound and nullity over the optimizer steps."""
    drawing = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes = drawing.add_subplot()
    steps = [record.step for record in records]
    styles = {"distinct activations": "C0-", "gradient rank": "C3-", "Hessian nullity": "C2-", "rank bound": "C3--"}
    for name, style in styles.items():
        axes.plot(steps, [measured(record)[name] for record in records], style, label=name, drawstyle="steps-post")
        axes.axhline(PREDICTED[name], color=style[:2], linewidth=0.6, linestyle=":")
        axes.annotate(f" {PREDICTED[name]}", (steps[-1], PREDICTED[name]), va="center")
    axes.set(xlabel="optimizer steps", ylabel="count", title="Information loss leads to a flat basin (dots: predicted)")
    axes.legend(loc="center right")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("logs/merged_categories.png"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")

    L.seed_everything(options.seed, verbose=False)
    pairs, labels = category_pairs()
    monitor = BasinMonitor(probe=(pairs, labels), every_n_epochs=50)
    trainer = L.Trainer(
        max_epochs=options.max_epochs,
        callbacks=[monitor],
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Bottleneck(), DataLoader(TensorDataset(pairs, labels), batch_size=len(pairs)))

    start, end = monitor.records[0], monitor.records[-1]
    print(f"=== at the start ===\n{start}\n\n=== at the end ===\n{end}\n")
    print(f"{'':24}{'start':>8}{'end':>8}{'predicted':>12}")
    for name, prediction in PREDICTED.items():
        print(f"{name:24}{measured(start)[name]:>8}{measured(end)[name]:>8}{prediction:>12}")
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure(monitor.records).savefig(options.figure)
    print(f"\nfigure: {options.figure}")
    if measured(end) != PREDICTED:
        raise SystemExit("The measurement is not what the theory predicts.")
    print("As predicted.")


if __name__ == "__main__":
    main()
