"""What was set out to be reached, beside what this run measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import floor, hessians, ours, peers
from benchmarks.networks import WORKLOADS, Workload
from benchmarks.tables import (
    Network,
    first_rank,
    gram_seconds,
    markdown,
    named,
    products_per_second,
    rank_seconds,
)
from benchmarks.timing import Candidate

_MLPS = ("mlp", "mlp-large")
_WRONG = 1e-3  # relative error of products with the Hessian: by so much and more they are not rounded, but wrong
_FEEDFORWARD = ("mlp", "mlp-large", "cnn")
_SQUARED = ("vmap(jacrev)", "vmap(jacrev) in groups", "nngeometry", "ViViT", "BackPACK", "curvlinops", "laplace")


@dataclass
class Results:
    """Everything that a run has measured."""

    ranks: list[Network] = field(default_factory=list)
    scaling: list[Network] = field(default_factory=list)
    products: list[Network] = field(default_factory=list)
    layer_norm: list[Network] = field(default_factory=list)
    nullities: list[Network] = field(default_factory=list)


@dataclass(frozen=True)
class Goal:
    """A bound that every figure should meet.

    Attributes:
        text: What is asked for.
        figures: What was measured, by network.
        is_met: Whether a figure meets the bound; ``None`` where it only is to be shown.
        form: Of a figure.
    """

    text: str
    figures: Mapping[str, float]
    is_met: Callable[[float], bool] | None
    form: str = "{:.3g}×"

    def row(self) -> list[str]:
        """Of the table."""
        measured = ", ".join(f"{name} {self.form.format(figure)}" for name, figure in self.figures.items())
        if not self.figures:
            return [self.text, "", "not measured"]
        if self.is_met is None:
            return [self.text, measured, ""]
        missed = [name for name, figure in self.figures.items() if not self.is_met(figure)]
        return [self.text, measured, f"**not reached**: {', '.join(missed)}" if missed else "reached"]


def table(results: Results) -> list[str]:
    """All goals, one row each."""
    ranked = {workload.name: candidates for workload, candidates in results.ranks}
    found = [
        *_gram_goals(ranked),
        *_rank_goals(ranked),
        *_cost_goals(ranked, results.scaling),
        *_hessian_goals(results),
    ]
    return markdown(["goal", "measured", "verdict"], [goal.row() for goal in found])


def _at_least(bound: float) -> Callable[[float], bool]:
    return lambda figure: figure >= bound


def _at_most(bound: float) -> Callable[[float], bool]:
    return lambda figure: figure <= bound


Ranked = Mapping[str, Sequence[Candidate]]


def _larger(ranked: Ranked) -> list[str]:
    """Networks where there is more to do than calls of Python."""
    return [name for name in ranked if not name.startswith("seed")]


def _gram_goals(ranked: Ranked) -> list[Goal]:
    def against(names: Sequence[str], networks: Sequence[str], type_name: str | None = None) -> dict[str, float]:
        """Of the fastest one; of two types of numbers the smaller ratio."""
        found: dict[str, float] = {}
        for kind in ("float32", "float64") if type_name is None else (type_name,):
            ratios = _ratios(ranked, networks, names, gram_seconds, own_way=ours.KERNEL, type_name=kind)
            found |= {network: min(ratio, found.get(network, ratio)) for network, ratio in ratios.items()}
        return found

    all_networks = _larger(ranked)
    dense = [
        Goal(f"Gram ≥ {bound}× faster than the fastest way that forms the gradients", against(peers.DENSE, [name]), met)
        for name, bound in (("mlp", 50), ("mlp-large", 300), ("cnn", 10))
        for met in [_at_least(bound)]
    ]
    return [
        Goal("Gram ≥ 5× faster than nngeometry's", against(["nngeometry"], all_networks), _at_least(5)),
        Goal("Gram ≥ 2× faster than ViViT's, float32, MLPs", against(["ViViT"], _MLPS, "float32"), _at_least(2)),
        Goal("Gram ≥ 4× faster than ViViT's, float64, MLPs", against(["ViViT"], _MLPS, "float64"), _at_least(4)),
        Goal("Gram ≥ 2× faster than ViViT's, both types, CNN", against(["ViViT"], ["cnn"]), _at_least(2)),
        *dense,
    ]


def _rank_goals(ranked: Ranked) -> list[Goal]:
    def against(names: Sequence[str], networks: Sequence[str], *, must_be_right: bool = False) -> dict[str, float]:
        return _ratios(ranked, networks, names, rank_seconds, must_be_right=must_be_right)

    all_networks, wrong = _larger(ranked), _wrong_integers(ranked)
    right = against(_SQUARED, all_networks, must_be_right=True)
    return [
        Goal("rank ≥ 10× faster than by forming the gradients", against(peers.DENSE, _FEEDFORWARD), _at_least(10)),
        Goal("rank ≥ 2× faster than vmap(jacrev)", against(peers.DENSE, ["transformer", "resnet"]), _at_least(2)),
        Goal("exact rank ≥ 2× faster than the fastest squared one", against(_SQUARED, all_networks), _at_least(2)),
        Goal("the same beside squared ones with the right integer", right, _at_least(2)),
        Goal("the integers of float64 svdvals, network and layers", wrong, _at_most(0), "{:.0f} wrong"),
    ]


def _cost_goals(ranked: Ranked, scaling: Sequence[Network]) -> list[Goal]:
    memory, multiples, with_copy = {}, {}, {}
    for name in _larger(ranked):
        candidates = ranked[name]
        own = named(candidates, ours.RANKS)
        share = None if own is None else _memory_share(WORKLOADS[name], candidates, own)
        if share is not None:
            memory[name] = share
        for type_name in ("float32", "float64"):
            products = named(candidates, floor.MATRIX_PRODUCTS, type_name)
            alone = None if products is None else products.median_found("floor", "seconds")
            parts, whole = (named(candidates, way, type_name) for way in (ours.PARTS, ours.KERNEL))
            gram = None if parts is None else parts.seconds("gram")
            if alone and gram:
                multiples[f"{name} {type_name}"] = gram / alone
                with_copy[f"{name} {type_name}"] = (gram_seconds(whole) or math.nan) / alone
    steps = {}
    own, step = (named(ranked.get("seed", ()), name) for name in (ours.RANKS, ours.STEP.name))
    if own is not None and step is not None:
        steps["seed"] = (rank_seconds(own) or math.nan) / (step.seconds("step") or math.nan)
    return [
        Goal("rank in a tenth of the memory of the dense route to it", memory, _at_most(0.1), "{:.3g}"),
        Goal("Gram within 2× of its own matrix products", multiples, _at_most(2)),
        Goal("the same with the copy and all checks", with_copy, _at_most(2)),
        Goal("at seed scale a rank within one training step", steps, _at_most(1), "{:.3g} steps"),
        Goal("cost at most linear in N up to 1e7: exponent", _exponent(scaling), _at_most(1.05), "{:.2f}"),
    ]


def _hessian_goals(results: Results) -> list[Goal]:
    speeds = {
        f"{workload.name} {type_name}": speed
        for workload, candidates in results.products
        for type_name in ("float32", "float64")
        for speed in _product_speed(candidates, type_name)
    }
    errors = {
        candidate.name: candidate.found["hessian"]["error"]
        for _, candidates in results.layer_norm
        for candidate in candidates
        if candidate.name == hessians.OURS and candidate.turns
    }
    counts, seconds = {}, {}
    for workload, candidates in results.nullities:
        own = named(candidates, hessians.OURS)
        if own is not None:
            found = own.found["nullity"]
            counts[workload.name] = found["products"] if found["lower"] == found["upper"] else math.inf
            seconds[workload.name] = own.seconds("nullity") or math.nan
    all_values = [named(candidates, hessians.ALL_EIGENVALUES) for _, candidates in results.nullities]
    reference = next((found.seconds("nullity") for found in all_values if found is not None), None)
    beside = {name: value / reference for name, value in seconds.items()} if reference else {}
    return [
        Goal("Hessian products as fast as the fastest right peer's (0.95× is a tie)", speeds, _at_least(0.95)),
        Goal("Hessian through LayerNorm: error beside finite differences", errors, _at_most(1e-8), "{:.0e}"),
        Goal("certified nullity within 100 Hessian products", counts, _at_most(100), "{:.0f}"),
        Goal("its time beside all eigenvalues at N = 3,078", beside, None),
    ]


def _product_speed(candidates: Sequence[Candidate], type_name: str) -> list[float]:
    """Our fastest way, in this type or the finer one, beside the fastest peer's that is right to three digits."""
    own, peer, truth = 0.0, 0.0, named(candidates, hessians.OURS, "float64")
    for candidate in candidates:
        rate = products_per_second(candidate)
        if rate is None:
            continue
        if candidate.name.startswith(hessians.OURS):
            own = max(own, rate if candidate.type_name in (type_name, "float64") else 0.0)
        elif truth is None or candidate.found["products"].difference(truth.found["products"]) < _WRONG:
            peer = max(peer, rate if candidate.type_name == type_name else 0.0)
    return [own / peer] if own and peer else []


def _ratios(
    ranked: Ranked,
    networks: Sequence[str],
    names: Sequence[str],
    seconds: Callable[[Candidate | None], float | None],
    *,
    own_way: str = ours.RANKS,
    type_name: str | None = None,
    must_be_right: bool = False,
) -> dict[str, float]:
    """Of the fastest of some ways to ours, by network; on demand of those only that find our integer."""
    found = {}
    for network in networks:
        candidates = ranked.get(network, ())
        own = named(candidates, own_way, type_name)
        times = [
            seconds(candidate)
            for candidate in candidates
            if own is not None
            and candidate.name in names
            and candidate.turns
            and type_name in (None, candidate.type_name)
            and (not must_be_right or first_rank(candidate) == first_rank(own))
        ]
        fastest, reference = min((time for time in times if time is not None), default=None), seconds(own)
        if reference and fastest:
            found[network] = fastest / reference
    return found


def _wrong_integers(ranked: Ranked) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, candidates in ranked.items():
        own, truth = named(candidates, ours.RANKS), named(candidates, peers.SINGULAR_VALUES)
        if own is None or truth is None:
            continue
        expected = truth.found.get("layers", (first_rank(truth),))
        measured = own.found["layers"][: len(expected)]
        found[name] = sum(one != other for one, other in zip(measured, expected, strict=True))
    return found


def _memory_share(workload: Workload, candidates: Sequence[Candidate], own: Candidate) -> float | None:
    """Of the dense route to the same integer; where that was not run, of the float64 matrix that it would hold."""
    exact = named(candidates, peers.SINGULAR_VALUES)
    reference = 8 * workload.num_rows * workload.num_parameters / 2**20
    if exact is not None:
        reference = exact.mebibytes("rank") or reference
    memory = own.mebibytes("rank" if "rank" in own.found else "layers")
    return None if memory is None else memory / reference


def _exponent(scaling: Sequence[Network]) -> dict[str, float]:
    """Of the power law between the two largest networks."""
    points = []
    for workload, candidates in scaling:
        own = named(candidates, ours.RANKS)
        if own is not None:
            points.append((workload.num_parameters, own.seconds("layers") or math.nan))
    if len(points) < 2:
        return {}
    (fewer, shorter), (more, longer) = sorted(points)[-2:]
    return {f"{more:,}": math.log(longer / shorter) / math.log(more / fewer)}
