"""A sweep: many runs in parallel processes, in one table, and what stopping on a rank saves.

Networks 16-w-16-1 learn three quarters of the categorical pairs of `information_loss`, and are tested on the others. A
network that merges the inputs of a category must be right on the pairs it has not seen. So the claim is: the lower the
rank at the end, the lower the test error. Where `RankEarlyStopping` stops a run, this is noted, and the run goes on: so
each counts twice, as it was when it stopped, and in full length.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.claims.ensembles import multilayer_perceptron
from examples.claims.information_loss import category_pairs
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean, spearman
from lightning_basin import BasinMonitor, RankEarlyStopping
from lightning_basin.figures.style import INFORMATION, NULLITY, RANK, axes_or_new

EVERY = 50  # Optimizer steps between two measurements.


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        width: The width of the first layer.
        seed: The seed of weights and of the choice of pairs.
        stops: Whether it stops when the rank has settled.
        steps: The number of optimizer steps.
        loss: The loss on the training pairs at the end.
        rank: The rank of the gradients on the training pairs, 48 at most.
        nullity: N minus the rank.
        duplicates: The number of duplicated activations.
        test_error: The mean squared error on the other pairs; labels have variance one.
    """

    width: int
    seed: int
    stops: bool
    steps: int
    loss: float | None
    rank: int
    nullity: int
    duplicates: int
    test_error: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """All runs of the sweep."""

    runs: list[Run]

    def of(self, *, stops: bool, width: int | None = None) -> list[Run]:
        """Select the runs that stop, or those in full length; of one width, or of all."""
        return [run for run in self.runs if run.stops == stops and width in (None, run.width)]

    @property
    def widths(self) -> list[int]:
        """The widths."""
        return sorted({run.width for run in self.runs})

    def correlation(self, quantity: str) -> Interval:
        """Correlate a quantity with the test error, over the runs in full length."""
        runs = self.of(stops=False)
        return spearman([getattr(run, quantity) for run in runs], [run.test_error for run in runs])

    def saved(self, width: int) -> Interval:
        """The share of the steps that stopping saves, at a width."""
        pairs = zip(self.of(stops=True, width=width), self.of(stops=False, width=width), strict=True)
        return mean([1 - short.steps / full.steps for short, full in pairs])


class Perceptron(L.LightningModule):
    """A network 16-w-16-1, trained by Adam with a rate that falls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = multilayer_perceptron((16, width, 16, 1))
        self.loss_fn = nn.MSELoss()

    def forward(self, pairs: Tensor) -> Tensor:
        """Compute the outputs, shape ``(k, 1)``."""
        outputs: Tensor = self.network(pairs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        pairs, labels = batch
        loss: Tensor = self.loss_fn(self(pairs), labels)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Choose Adam."""
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Notes(L.Callback):
    """Calls a function where another callback stops the training for the first time, and lets it go on."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note: Callable[[], None] | None = note

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the stop back. Callbacks are called in their order, so that this is the last one."""
        if trainer.should_stop and self.note is not None:
            self.note()
            self.note = None
        trainer.should_stop = False


def prepare_process() -> None:
    """Let a process use one core and say nothing: what many runs say at the same time nobody can read."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _make_trainer(max_epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train_one(width: int, seed: int, max_steps: int) -> tuple[Run, Run]:
    """Make one run, and tell how it was when the rank had settled, and at the end."""
    pairs, labels = category_pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:48], order[48:]
    torch.manual_seed(seed)
    module = Perceptron(width)
    runs: dict[bool, Run] = {}

    def note(*, stops: bool) -> None:
        record = monitor.records[-1]
        with torch.no_grad():
            error = float((module.double()(pairs[unseen]) - labels[unseen]).square().mean())
        runs[stops] = Run(
            width=width,
            seed=seed,
            stops=stops,
            steps=trainer.global_step,
            loss=record.loss,
            rank=record.gradient_rank,
            nullity=record.gradient_nullity,
            duplicates=record.duplicated_activations or 0,
            test_error=error,
        )

    monitor = BasinMonitor(
        probe=(pairs[seen], labels[seen]),
        every_n_epochs=1,
        hessian=False,
        zero_loss_threshold=1e-4,
        report=False,
        figures=False,
    )
    stopping = RankEarlyStopping(patience=3)
    trainer = _make_trainer(max_steps // EVERY, [monitor, stopping, Notes(partial(note, stops=True))])
    # One batch a step, and a measurement an epoch.
    steps = [tensor.expand(EVERY, *tensor.shape) for tensor in (pairs[seen], labels[seen])]
    trainer.fit(module, DataLoader(TensorDataset(*steps), batch_size=None))
    note(stops=False)
    full = runs[False]
    return runs.get(True, replace(full, stops=True)), full


def run(
    seeds: Sequence[int] = range(5), widths: Sequence[int] = (1, 2, 4), max_steps: int = 1000, num_processes: int = 2
) -> Result:
    """Make all runs, several at a time.

    Args:
        seeds: The seeds.
        widths: The widths of the first layer.
        max_steps: The number of steps of a run in full length.
        num_processes: The number of processes.
    """
    with ProcessPoolExecutor(num_processes, get_context("spawn"), prepare_process) as pool:
        jobs = [pool.submit(train_one, width, seed, max_steps) for width, seed in product(widths, seeds)]
        pairs = [job.result() for job in jobs]
    return Result(runs=[run for kind in zip(*pairs, strict=True) for run in kind])


def check(result: Result) -> None:
    """Check, at the 5 % level, that lower ranks go with lower test errors; and stopping saves steps in narrow runs.

    Raises:
        AssertionError: If one of them fails.
    """
    assert result.correlation("rank").lower > 0.0, result.correlation("rank")
    pairs = zip(*(result.of(stops=stops, width=min(result.widths)) for stops in (True, False)), strict=True)
    assert all(short.steps < full.steps for short, full in pairs)


def describe(result: Result) -> str:
    """Write the means of each width, and the correlations, in Markdown."""
    rows = []
    for width in result.widths:
        full, short = result.of(stops=False, width=width), result.of(stops=True, width=width)
        rows.append(
            [
                f"16-{width}-16-1",
                *(
                    f"{mean([float(getattr(run, name)) for run in full]).value:.1f}"
                    for name in ("rank", "nullity", "duplicates")
                ),
                *(f"{max(run.test_error for run in runs):.0e}" for runs in (full, short)),
                result.saved(width),
            ]
        )
    header = ["network", "rank, of 48", "nullity", "duplicates", "largest test error", "with stopping", "steps saved"]
    correlations = ", ".join(f"{name} {result.correlation(name)}" for name in ("rank", "nullity", "duplicates"))
    return (
        f"{table(header, rows)}\n\n"
        f"Means over {len(result.of(stops=False, width=result.widths[0]))} runs of each. Rank correlation with the "
        f"test error, over all {len(result.of(stops=False))} runs: {correlations}."
    )


def draw(result: Result) -> Figure:
    """Draw the test error of each run over its rank, and over its duplicates."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    runs = result.of(stops=False)
    shades = {width: 0.3 + 0.7 * place / len(result.widths) for place, width in enumerate(reversed(result.widths))}
    quantities = (("rank", RANK), ("nullity", NULLITY), ("duplicates", INFORMATION))
    for ax, (quantity, color) in zip(map(axes_or_new, figure.subplots(1, 3, sharey=True)), quantities, strict=True):
        for run in runs:
            height = max(run.test_error, 1e-32)
            ax.plot(getattr(run, quantity), height, "o", color=color, alpha=shades[run.width], markersize=5)
        ax.set(xlabel=quantity, yscale="log")
    figure.axes[0].set_ylabel("test error")
    figure.suptitle("Each run: darker is narrower", x=0.01, ha="left", size="medium")
    return figure


if __name__ == "__main__":
    publish("examples.claims.sweep", run=run, check=check, describe=describe, draw=draw)
