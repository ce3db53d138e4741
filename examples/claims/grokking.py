"""Does the rank move where a transformer begins to generalize? Modular addition, long after the training pairs fit.

A transformer with one block adds numbers modulo 23, and sees three quarters of the pairs. With weight decay it may fit
these first and be right on the others later: it groks (Power et al., 2022). It has no normalization, and its GELU
commutes with no rescaling. So these changes of its weights leave all outputs as they are, whatever the weights:

- an invertible matrix between queries and keys, and one between values and outputs, in each of two heads: 4 * 4 * 4;
- an invertible matrix on the stream, which all parts read and write: 16 * 16;
- a vector that is added to all embeddings and taken from both positions: 16.

Predicted was: the rank is N minus their number, 1824 - 336 = 1488, from beginning to end, also where the network begins
to generalize; the effective rank, in which large singular values count more, falls there. Without weight decay it falls
less.

The rank at initialization was 1480. This showed a change that had been missed: a vector that no query sees, 16 - 2 * 4
dimensions, is added to both positions, and the biases of the block take it back, for all that values add to the stream
is a constant, too.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from examples.claims.page import publish, table
from examples.claims.statistics import mean, spearman
from lightning_basin import measure_basin
from lightning_basin.figures.style import NULLITY, RANK, axes_or_new
from lightning_basin.functional import behavioral_gradients, default_rtol, numerical_rank, singular_values

SEEN = 0.75  # The share of the pairs that are trained on.
OUTPUTS_PER_PARAMETER = 1.5  # Of the probe: more outputs than parameters, so that they do not limit the rank.
DECAYS = {"weight decay 1": 1.0, "no weight decay": 0.0}
COLORS = dict(zip(DECAYS, (RANK, NULLITY), strict=True))


class Sizes(NamedTuple):
    """The modulus, the width of the stream, the size of each of two heads, and the number of hidden units."""

    prime: int = 23
    stream: int = 16
    head: int = 4
    hidden: int = 16

    @property
    def num_symmetries(self) -> int:
        """The number of directions of the weights in which the outputs never change, while prime > stream."""
        unqueried = max(0, self.stream - 2 * self.head)
        return 4 * self.head**2 + self.stream**2 + self.stream + unqueried


FULL = Sizes()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One network at one step.

    Attributes:
        step: The number of steps taken.
        seen: The share of the training pairs that it adds correctly.
        unseen: The share of the other pairs.
        rank: The rank of the gradients.
        effective_rank: The effective rank.
        rank_at_1e_2: The rank at the tolerance 1e-2.
    """

    step: int
    seen: float
    unseen: float
    rank: int
    effective_rank: float
    rank_at_1e_2: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        num_parameters: The number of parameters, N.
        num_outputs: The number of outputs on the probe.
        predicted: The rank from algebra.
        rank_on_all_pairs: The rank of the first network on all pairs, before training.
        curves: The moments of each network, by the name of the weight decay.
    """

    num_parameters: int
    num_outputs: int
    predicted: int
    rank_on_all_pairs: int
    curves: dict[str, list[list[Moment]]]

    def changes(self, decay: str) -> list[float]:
        """Compute by which factor the effective rank of each network has changed since it fitted its pairs."""
        factors = []
        for curve in self.curves[decay]:
            fitted = next((moment for moment in curve if moment.seen > 0.99), curve[-1])
            factors.append(curve[-1].effective_rank / fitted.effective_rank)
        return factors


class Transformer(nn.Module):
    """One block without normalization. It reads the logits of the sum at the second number."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.stream
        self.embedding = nn.Embedding(sizes.prime, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.positions = nn.Parameter(torch.randn(2, width) * width**-0.5)
        self.queries, self.keys, self.values = (nn.Linear(width, 2 * sizes.head, bias=False) for _ in range(3))
        self.mixing = nn.Linear(2 * sizes.head, width, bias=False)
        self.block = nn.Sequential(nn.Linear(width, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, width))
        self.logits = nn.Linear(width, sizes.prime, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Compute the logits of the sums, shape ``(k, prime)``, from pairs of numbers ``(k, 2)``."""
        stream = self.embedding(pairs) + self.positions
        heads = (len(pairs), 2, 2, self.sizes.head)
        queries, keys, values = (
            layer(stream).reshape(heads).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        )
        attention = (queries @ keys.mT * self.sizes.head**-0.5).softmax(dim=-1)
        stream = stream + self.mixing((attention @ values).transpose(1, 2).flatten(2))
        last = stream[:, -1]
        logits: Tensor = self.logits(last + self.block(last))
        return logits


def train_together(
    networks: Sequence[nn.Module],
    pairs: Tensor,
    sums: Tensor,
    *,
    decay: float,
    moments: Sequence[int],
) -> Iterator[int]:
    """Train networks by full-batch AdamW, which acts on each number alone: they do not see each other.

    Args:
        networks: The networks, of one architecture, which are changed.
        pairs: The pairs of numbers, shape ``(k, 2)``.
        sums: Their sums.
        decay: The weight decay.
        moments: The numbers of steps after which the networks are needed, the last at the end.

    Yields:
        Each of these numbers, when the networks have taken as many steps.
    """
    parameters, _ = stack_module_state(list(networks))
    skeleton = deepcopy(networks[0])

    def loss(values: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(skeleton, values, (pairs,)), sums)

    optimizer = torch.optim.AdamW(parameters.values(), 0.005, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    for step in range(moments[-1] + 1):
        if step in moments:
            for index, network in enumerate(networks):
                network.load_state_dict({name: values[index].detach() for name, values in parameters.items()})
            yield step
        optimizer.zero_grad()
        torch.autograd.backward(vmap(loss)(parameters).sum())
        optimizer.step()


def rank_on_all_pairs(network: nn.Module, pairs: Tensor) -> int:
    """Measure the rank on more outputs than a probe may have: of the triangular factor of all gradients."""
    network = deepcopy(network).double()
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    triangle = torch.empty(0, sum(parameter.numel() for parameter in parameters.values()), dtype=torch.float64)
    for chunk in torch.split(pairs, 128):
        rows = behavioral_gradients(
            lambda values, x: functional_call(network, dict(values), tuple(x)), parameters, [chunk]
        )
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    num_outputs = len(network(pairs).flatten())
    return numerical_rank(singular_values(triangle), rtol=default_rtol(num_outputs, triangle.shape[1]))


def _right(network: nn.Module, pairs: Tensor, sums: Tensor) -> float:
    with torch.no_grad():
        return float((network(pairs).argmax(dim=1) == sums).double().mean())


def run(
    seeds: Sequence[int] = range(6), sizes: Sizes = FULL, moments: Sequence[int] = (0, 250, 500, 1000, 1500)
) -> Result:
    """Train transformers with and without weight decay, and measure them.

    Args:
        seeds: The seed of each network.
        sizes: The sizes of the networks.
        moments: The numbers of steps at which they are measured, the last at the end.
    """
    numbers = torch.arange(sizes.prime)
    pairs = torch.cartesian_prod(numbers, numbers)
    sums = pairs.sum(dim=1) % sizes.prime
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    seen, unseen = order.tensor_split([round(SEEN * len(pairs))])
    curves: dict[str, list[list[Moment]]] = {}
    torch.manual_seed(seeds[0])
    first = Transformer(sizes)
    num_parameters = sum(parameter.numel() for parameter in first.parameters())
    probe = pairs[order[: round(OUTPUTS_PER_PARAMETER * num_parameters / sizes.prime)]]
    for name, decay in DECAYS.items():
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append(Transformer(sizes))
        curves[name] = [[] for _ in networks]
        for step in train_together(networks, pairs[seen], sums[seen], decay=decay, moments=moments):
            for network, curve in zip(networks, curves[name], strict=True):
                record = measure_basin(network, probe, layers=[], hessian=False)
                assert record.gradient_effective_rank is not None
                curve.append(
                    Moment(
                        step=step,
                        seen=_right(network, pairs[seen], sums[seen]),
                        unseen=_right(network, pairs[unseen], sums[unseen]),
                        rank=record.gradient_rank,
                        effective_rank=record.gradient_effective_rank,
                        rank_at_1e_2=record.gradient_rank_at[1e-2],
                    )
                )
    return Result(
        num_parameters=num_parameters,
        num_outputs=len(probe) * sizes.prime,
        predicted=num_parameters - sizes.num_symmetries,
        rank_on_all_pairs=rank_on_all_pairs(first, pairs),
        curves=curves,
    )


def check(result: Result) -> None:
    """Check that ranks stay within 2 % below the prediction; at the 5 % level, that effective ranks fall in training.

    Raises:
        AssertionError: If one of them fails.
    """
    assert result.rank_on_all_pairs == result.predicted
    for curves in result.curves.values():
        ranks = {moment.rank for moment in chain(*curves)}
        assert min(ranks) > 0.98 * result.predicted, ranks
        assert max(ranks) <= result.predicted, ranks
        falls = [curve[-1].effective_rank / curve[0].effective_rank for curve in curves]
        assert mean(falls).upper < 1.0, falls


def describe(result: Result) -> str:
    """Write the means over the networks in Markdown."""
    header = ["training", "step", "right on trained pairs", "on other pairs", "ranks", "effective rank", "rank at 1e-2"]
    rows = []
    for name, curves in result.curves.items():
        for moments in zip(*curves, strict=True):
            ranks = sorted({moment.rank for moment in moments})
            rows.append(
                [
                    name,
                    moments[0].step,
                    mean([moment.seen for moment in moments]),
                    mean([moment.unseen for moment in moments]),
                    " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                    f"{mean([moment.effective_rank for moment in moments]):.0f}",
                    f"{mean([float(moment.rank_at_1e_2) for moment in moments]):.0f}",
                ]
            )
    ends = [curve[-1] for curves in result.curves.values() for curve in curves]
    related = spearman([end.effective_rank for end in ends], [end.unseen for end in ends])
    changes = ", ".join(f"{name} {mean(result.changes(name))}" for name in result.curves)
    return (
        f"{table(header, rows)}\n\n"
        f"{len(ends) // 2} networks each; N = {result.num_parameters}, {result.num_outputs} outputs on the probe. "
        f"Rank from algebra: {result.predicted}; of the first network on all pairs: {result.rank_on_all_pairs}. Factor "
        f"of the effective rank from the first moment at which the training pairs fit to the end: {changes}. Rank "
        f"correlation of effective rank and share of other pairs at the end: {related}."
    )


def draw(result: Result) -> Figure:
    """Draw the share of other pairs, and the effective rank, of each network."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = (axes_or_new(ax) for ax in figure.subplots(1, 2))
    for name, curves in result.curves.items():
        for curve in curves:
            steps = [moment.step for moment in curve]
            left.plot(steps, [moment.unseen for moment in curve], color=COLORS[name], alpha=0.6)
            right.plot(steps, [moment.effective_rank for moment in curve], color=COLORS[name], alpha=0.6)
    for place, name in enumerate(result.curves):
        left.annotate(name, (0.45, 0.42 - 0.08 * place), xycoords="axes fraction", color=COLORS[name])
    left.set(xlabel="optimizer steps", ylabel="right on other pairs", ylim=(-0.02, 1.02))
    right.set(xlabel="optimizer steps", ylabel="effective rank", ylim=(0, None))
    right.set_title(f"The integer rank stays near {result.predicted}", loc="left", fontsize="medium")
    return figure


if __name__ == "__main__":
    publish("examples.claims.grokking", run=run, check=check, describe=describe, draw=draw)
