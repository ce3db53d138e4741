"""Markdown tables of what was measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import floor, hessians, ours
from benchmarks.networks import Workload
from benchmarks.timing import Candidate

Network = tuple[Workload, Sequence[Candidate]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; all columns but the first one are aligned to the right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def named(candidates: Sequence[Candidate], name: str, type_name: str | None = None) -> Candidate | None:
    """The candidate of a way that has taken a turn, and of a type."""
    fitting = [candidate for candidate in candidates if candidate.name == name and candidate.turns]
    return next((candidate for candidate in fitting if type_name in (None, candidate.type_name)), None)


def gram_seconds(candidate: Candidate | None) -> float | None:
    """Seconds of a Gram matrix from a module: ours with the copy and all its checks."""
    return None if candidate is None else candidate.seconds("gram")


def first_rank(candidate: Candidate) -> int | None:
    """The rank of the network."""
    return candidate.found.get("rank", candidate.found.get("layers", (None,))[0])


def rank_seconds(candidate: Candidate | None) -> float | None:
    """Seconds of the rank of the network; with those of all layers, where it was not measured alone."""
    if candidate is None:
        return None
    return candidate.seconds("rank" if "rank" in candidate.found else "layers")


def title(workload: Workload) -> str:
    """A heading."""
    rows = f"k = {workload.num_inputs}, m = {workload.num_rows}"
    return f"#### {workload.title} (`{workload.name}`): N = {workload.num_parameters:,}, {rows}"


# --- ranks ------------------------------------------------------------------------------------------------------------


def ranks(workload: Workload, candidates: Sequence[Candidate]) -> list[str]:
    """Of one network: times in seconds, and as multiples of ours; memory; integers."""
    header = ["way", "type", "Gram", "×", "rank", "×", "and of layers", "×", "MiB", "rank", "of layers"]
    rows = [_rank_row(candidate, candidates) for candidate in candidates if not _is_aside(candidate)]
    return [title(workload), "", *markdown(header, rows), "", *_asides(candidates)]


def _is_aside(candidate: Candidate) -> bool:
    return candidate.name in (floor.MATRIX_PRODUCTS, ours.PARTS, ours.STEP.name)


def _rank_row(candidate: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    if not candidate.turns:
        return [candidate.name, candidate.type_name, candidate.note or "", *[""] * 8]
    cells = [candidate.name + ("" if not candidate.is_once else " ¹"), candidate.type_name]
    own, kernel = named(candidates, ours.RANKS), named(candidates, ours.KERNEL, candidate.type_name)
    alone = candidate.seconds("rank")
    own_alone = None if own is None else own.seconds("rank")
    for seconds, reference in (
        (gram_seconds(candidate), gram_seconds(kernel)),
        (alone, own_alone if own_alone is not None else rank_seconds(own)),
        (candidate.seconds("layers"), None if own is None else own.seconds("layers")),
    ):
        cells += [_number(seconds), "" if candidate in (own, kernel) else _ratio(seconds, reference)]
    stages = [stage for stage in ("gram", "rank", "layers") if stage in candidate.found]
    cells += [_number(candidate.mebibytes(*stages), "{:.0f}"), _number(first_rank(candidate), "{:d}")]
    layers = candidate.found.get("layers")
    cells.append(candidate.note if layers is None and candidate.note else _layers(layers, own))
    return cells


def _layers(found: tuple[int, ...] | None, own: Candidate | None) -> str:
    if found is None:
        return ""
    expected = None if own is None else own.found.get("layers")
    if len(found) <= 9:
        return " ".join(map(str, found[1:]))
    if expected is None or found == expected:
        return f"sum {sum(found[1:])} over {len(found) - 1}"
    differing = sum(one != other for one, other in zip(found[1:], expected[1:], strict=False))
    return f"sum {sum(found[1:])}, {differing} of {len(found) - 1} differ"


def _asides(candidates: Sequence[Candidate]) -> list[str]:
    lines = []
    own, step = named(candidates, ours.RANKS), named(candidates, ours.STEP.name)
    seconds = None if step is None else step.seconds("step")
    if own is not None and seconds:
        lines.append(
            f"One training step on the probe (float32) takes {_number(seconds)} s: our rank costs "
            f"{_number(_quotient(rank_seconds(own), seconds), '{:.3g}')} of them.\n"
        )
    for type_name in ("float32", "float64"):
        names = (floor.MATRIX_PRODUCTS, ours.PARTS, ours.KERNEL)
        products, parts, kernel = (named(candidates, name, type_name) for name in names)
        if products is None or parts is None or kernel is None:
            continue
        counted = products.found["floor"]
        alone = products.median_found("floor", "seconds")
        gram, factors = parts.seconds("gram"), parts.median_found("products", "seconds")
        lines.append(
            f"Gram matrix in {type_name}: {counted['operations'] / 1e9:.3g} GFLOP of matrix products "
            f"({counted['least_operations'] / 1e9:.3g} where symmetric results are formed once), which alone take "
            f"{_number(alone)} s. Ours takes {_number(factors)} s from factors ({_ratio(factors, alone)}), "
            f"{_number(gram)} s with the derivatives and their check against autograd ({_ratio(gram, alone)}), "
            f"{_number(gram_seconds(kernel))} s with the copy and its checks ({_ratio(gram_seconds(kernel), alone)}).\n"
        )
    return lines


# --- Hessians ---------------------------------------------------------------------------------------------------------


def products(networks: Sequence[Network]) -> list[str]:
    """Products with the Hessian per second on each network."""
    header = ["network", "type", "way", "per second", "of ours", "prepared in", "differs by"]
    rows = []
    for workload, candidates in networks:
        for candidate in sorted(candidates, key=lambda candidate: candidate.type_name):
            own = named(candidates, hessians.OURS, candidate.type_name)
            rate = products_per_second(candidate)
            if rate is None:
                rows.append([workload.name, candidate.type_name, candidate.name, candidate.note or "", "", "", ""])
                continue
            reference = None if own is None else products_per_second(own)
            rows.append(
                [
                    workload.name,
                    candidate.type_name,
                    candidate.name,
                    _number(rate),
                    _ratio(rate, reference),
                    _number(candidate.seconds("prepared")),
                    _difference(candidate, named(candidates, hessians.OURS, "float64")),
                ]
            )
    return markdown(header, rows)


def products_per_second(candidate: Candidate) -> float | None:
    """Once it is prepared."""
    seconds = candidate.seconds("products")
    return None if seconds is None else candidate.found["prepared"]["count"] / seconds


def _difference(candidate: Candidate, reference: Candidate | None) -> str:
    if reference is None or candidate is reference:
        return ""
    return f"{candidate.found['products'].difference(reference.found['products']):.0e}"


def layer_norm(candidates: Sequence[Candidate]) -> list[str]:
    """Errors of whole Hessians beside finite differences."""
    rows = []
    for candidate in candidates:
        found = candidate.found.get("hessian")
        cells = [candidate.note or "", ""] if found is None else [f"{found[key]:.1e}" for key in ("error", "asymmetry")]
        rows.append([candidate.name, *cells])
    return markdown(["way", "relative error", "asymmetry"], rows)


def nullities(networks: Sequence[Network]) -> list[str]:
    """Counts of flat directions, and what they took."""
    tolerances = [f"at {tolerance:.0e}" for tolerance in hessians.TOLERANCES]
    header = ["network", "N", "way", "seconds", "products", "MiB", *tolerances, "error"]
    rows = []
    for workload, candidates in networks:
        for candidate in candidates:
            name, found = candidate.name, candidate.found.get("nullity")
            cells = [workload.name, f"{workload.num_parameters:,}", name + (" ¹" if candidate.is_once else "")]
            if found is None:
                rows.append([*cells, candidate.note or "", *[""] * (3 + len(tolerances))])
                continue
            counts = [str(found["counts"][tolerance]) for tolerance in hessians.TOLERANCES]
            cells += [_number(candidate.seconds("nullity")), str(found["products"])]
            rows.append(
                [*cells, _number(candidate.mebibytes("nullity"), "{:.0f}"), *counts, _errors(found, candidates)]
            )
    return markdown(header, rows)


def _errors(found: dict[str, Any], candidates: Sequence[Candidate]) -> str:
    """By which part of all directions the counts are off: from all eigenvalues, or else from the proof."""
    if "lower" in found and found["lower"] == found["upper"]:
        return f"certified: {found['lower']}"
    truth = named(candidates, hessians.ALL_EIGENVALUES) or named(candidates, hessians.OURS)
    if truth is None:
        return ""
    expected = truth.found["nullity"]["counts"]
    offs = [f"{found['counts'][key] - expected[key]:+d}" for key in hessians.TOLERANCES]
    return ", ".join(offs)


# --- cost over parameters ---------------------------------------------------------------------------------------------


def scaling(networks: Sequence[Network]) -> list[str]:
    """Seconds of a whole measurement over the number of parameters, at the same number of rows."""
    rows = []
    for workload, candidates in networks:
        own, step = named(candidates, ours.RANKS), named(candidates, ours.STEP.name)
        if own is None or step is None:
            continue
        seconds, memory = own.seconds("layers"), own.mebibytes("layers")
        dense = 8 * workload.num_rows * workload.num_parameters / 2**20
        cells = [_number(seconds), _ratio(seconds, step.seconds("step"))]
        rows.append([f"{workload.num_parameters:,}", *cells, _number(memory, "{:.0f}"), f"{dense:,.0f}"])
    header = ["N", "rank of network and layers", "training steps", "MiB", "MiB of the gradients as a matrix"]
    return markdown(header, rows)


def _number(value: float | None, form: str = "{:.3g}") -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 and form != "{:d}" else form.format(value)


def _quotient(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _ratio(value: float | None, reference: float | None) -> str:
    quotient = _quotient(value, reference)
    return "" if quotient is None else f"{_number(quotient, '{:.2g}' if quotient < 10 else '{:.0f}')}×"
