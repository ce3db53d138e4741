"""Is information loss related to circuit complexity, or is dimension? The second open question.

Every boolean function of three inputs is, up to exchange and negation of inputs and of the output, one of 14. The size
of its smallest circuit of two-input gates and the length of its shortest formula of AND, OR and NOT are found by
enumeration. Networks 3-6-4-1 with ReLU learn each from many seeds. With inputs and labels -1 and 1, all functions of a
class are the same task for a network.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product

import torch
from matplotlib.figure import Figure
from torch import nn

from examples.claims.ensembles import make_ensemble, multilayer_perceptron, squared_errors, train
from examples.claims.page import publish, table
from examples.claims.statistics import Interval, mean, spearman
from lightning_basin.figures.style import INFORMATION, RANK, axes_or_new
from lightning_basin.functional import duplicated_activations

NUM_INPUTS = 3
SOLVED = 1e-4  # Mean squared error, of labels -1 and 1.

_ROWS = list(product((0, 1), repeat=NUM_INPUTS))
_ALL = (1 << len(_ROWS)) - 1
"""The function that is always true: bit i of a function is its value at row i of its truth table."""

_VARIABLES = [sum(row[i] << place for place, row in enumerate(_ROWS)) for i in range(NUM_INPUTS)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One class of boolean functions, and the networks that computed one function of it.

    Attributes:
        function: The truth table of the function, as bits.
        circuit: The smallest number of two-input gates.
        formula: The smallest number of inputs that a formula of AND, OR and NOT reads.
        num_solved: The number of networks that fit.
        num_networks: The number of networks.
        rank: The mean rank of the gradients of those that fit; at most 8.
        merged: The mean number of duplicated activations behind the last hidden layer, of 8.
    """

    function: int
    circuit: int
    formula: int
    num_solved: int
    num_networks: int
    rank: Interval
    merged: Interval


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        tasks: All classes that are not constant.
        of_networks: The rank correlation of the rank and the number of merged inputs, over all networks that fit.
    """

    tasks: list[Task]
    of_networks: Interval

    def correlation(self, first: str, second: str) -> Interval:
        """Correlate two attributes of the classes, over all classes; of an estimate its value."""
        return spearman(*([_value(getattr(task, name)) for task in self.tasks] for name in (first, second)))


def _value(attribute: float | Interval) -> float:
    return attribute.value if isinstance(attribute, Interval) else attribute


def circuit_sizes(most: int = 4) -> dict[int, int]:
    """Find the smallest number of two-input gates of every function, NOT being free.

    All sets of functions that a number of gates can compute are enumerated. A function and its negation count as one.
    """
    sizes = dict.fromkeys((0, *map(_up_to_negation, _VARIABLES)), 0)
    sets = {frozenset(map(_up_to_negation, _VARIABLES))}
    for size in range(1, most + 1):
        larger = set()
        for signals in sets:
            for gate in _gates(signals):
                sizes.setdefault(gate, size)
                larger.add(signals | {gate})
        sets = larger
    return {function: sizes[_up_to_negation(function)] for function in range(_ALL + 1)}


def _up_to_negation(function: int) -> int:
    return min(function, function ^ _ALL)


def _gates(signals: Iterable[int]) -> set[int]:
    """Apply all ten two-input gates to all pairs of signals; a gate and its negation count as one."""
    gates = set()
    for first, second in combinations(signals, 2):
        ways = (first & second, first & ~second, ~first & second, ~first & ~second, first ^ second)
        gates |= {_up_to_negation(way & _ALL) for way in ways}
    return gates - set(signals)


def formula_sizes() -> dict[int, int]:
    """Find the smallest number of inputs that a formula of AND, OR and NOT reads, for every function."""
    by_size: dict[int, set[int]] = {1: {way for one in _VARIABLES for way in (one, one ^ _ALL)}}
    sizes = dict.fromkeys((0, _ALL), 0) | dict.fromkeys(by_size[1], 1)
    size = 1
    while len(sizes) <= _ALL:
        size += 1
        pairs = ((f, g) for part in range(1, size // 2 + 1) for f in by_size[part] for g in by_size[size - part])
        by_size[size] = {way for f, g in pairs for way in (f & g, f | g)} - set(sizes)
        sizes |= dict.fromkeys(by_size[size], size)
    return sizes


def classes() -> list[int]:
    """Select one function of each class under exchange and negation of inputs, and negation of the output."""
    moves = [
        [_ROWS.index(tuple(row[i] ^ flip for i, flip in zip(order, flips, strict=True))) for row in _ROWS]
        for order in permutations(range(NUM_INPUTS))
        for flips in product((0, 1), repeat=NUM_INPUTS)
    ]

    def smallest(function: int) -> int:
        moved = [sum((function >> source & 1) << place for place, source in enumerate(move)) for move in moves]
        return min(map(_up_to_negation, moved))

    return sorted({smallest(function) for function in range(_ALL + 1)})


def run(seeds: Sequence[int] = range(1000, 1100), steps: int = 3000, widths: Sequence[int] = (6, 4)) -> Result:
    """Train networks of each class, all at once.

    Args:
        seeds: The seeds of each class.
        steps: The number of steps of Adam.
        widths: The widths of the hidden layers.
    """
    functions = [function for function in classes() if function not in (0, _ALL)]
    inputs = torch.tensor(_ROWS, dtype=torch.float64) * 2 - 1
    labels = torch.tensor([[[function >> i & 1] for i in range(len(_ROWS))] for function in functions]) * 2.0 - 1
    ensemble = make_ensemble(
        partial(multilayer_perceptron, (NUM_INPUTS, *widths, 1), nn.ReLU), [*seeds] * len(functions)
    )
    targets = labels.double().repeat_interleave(len(seeds), dim=0)
    train(ensemble, inputs, targets, steps=steps, decay=0.999)
    fits = (squared_errors(ensemble, inputs, targets) < SOLVED).view(len(functions), len(seeds))
    hidden = ensemble.activations(inputs)[-2].detach()
    circuits, formulas = circuit_sizes(), formula_sizes()
    tasks, all_ranks, all_merged = [], [], []
    for place, function in enumerate(functions):
        members = (place * len(seeds) + fits[place].nonzero().flatten()).tolist()
        ranks = [float(rank) for rank in ensemble.gradient_ranks(inputs, members)]
        merged = [float(duplicated_activations(hidden[index])) for index in members]
        all_ranks += ranks
        all_merged += merged
        tasks.append(
            Task(
                function=function,
                circuit=circuits[function],
                formula=formulas[function],
                num_solved=len(members),
                num_networks=len(seeds),
                rank=mean(ranks),
                merged=mean(merged),
            )
        )
    return Result(tasks=tasks, of_networks=spearman(all_ranks, all_merged))


def check(result: Result) -> None:
    """Check, at the 5 % level, what is related: rank to merges, and success to complexity.

    Raises:
        AssertionError: If one of them fails.
    """
    assert result.of_networks.upper < 0.0, result.of_networks
    assert result.correlation("formula", "num_solved").upper < 0.0


def describe(result: Result) -> str:
    """Write the classes and the correlations in Markdown."""
    tasks = sorted(result.tasks, key=lambda task: (task.circuit, task.formula))
    rows = [
        [
            f"{task.function:08b}"[::-1],
            task.circuit,
            task.formula,
            f"{task.num_solved} of {task.num_networks}",
            task.rank,
            task.merged,
        ]
        for task in tasks
    ]
    names = {"rank": "rank of the gradients", "merged": "merged inputs", "num_solved": "networks that fit"}
    correlations = [
        [
            name,
            *(result.correlation(other, quantity) for other in ("circuit", "formula", "merged") if other != quantity),
        ]
        for quantity, name in names.items()
    ]
    for row in correlations:
        row.extend([""] * (4 - len(row)))
    header = ["truth table", "gates", "formula", "solved", "mean rank, of 8", "mean merged inputs, of 8"]
    return (
        f"{table(header, rows)}\n\nRank correlations over the {len(tasks)} classes:\n\n"
        f"{table(['', 'with gates', 'with formula', 'with merged inputs'], correlations)}\n\n"
        f"Rank and merged inputs over all networks that fit: {result.of_networks}."
    )


def draw(result: Result) -> Figure:
    """Draw mean rank and merged inputs over the length of the formula."""
    ax = axes_or_new(None)
    for quantity, name, color in (("rank", "rank", RANK), ("merged", "merged inputs", INFORMATION)):
        lengths = [task.formula for task in result.tasks]
        values: list[Interval] = [getattr(task, quantity) for task in result.tasks]
        errors = [[value.value - value.lower for value in values], [value.upper - value.value for value in values]]
        ax.errorbar(lengths, [value.value for value in values], errors, fmt="o", color=color, markersize=5)
        last = max(range(len(lengths)), key=lambda index: lengths[index])
        ax.annotate(name, (lengths[last], values[last].value), (8, -3), textcoords="offset points", color=color)
    ax.set(xlabel="length of the shortest formula", ylim=(0, 8.4))
    ax.set_title("Complexity says little about rank and merges", loc="left", fontsize="medium")
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


if __name__ == "__main__":
    publish("examples.claims.circuits", run=run, check=check, describe=describe, draw=draw)
