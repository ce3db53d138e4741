"""Markdown tables of what was measured, by us and by others."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.ours import NAME
from benchmarks.timing import Candidate, difference

Describe = Callable[[Any, Any], str]
"""From the result of a way and ours to the text of a cell."""


def table(candidates: Sequence[Candidate], stages: Sequence[str], describe: Describe) -> str:
    """A row for each candidate: seconds until each stage, how often ours fits into them, peak memory, last result.

    Args:
        candidates: The ways that were run; the first of ours that has a stage is what others are compared with.
        stages: The stages that have columns.
        describe: Makes the text of the last column.
    """
    header = ["way", "type", *(name for stage in stages for name in (stage, "×")), "MiB", "result"]
    rows = [header, ["---", *["--:"] * (len(header) - 1)]]
    for candidate in candidates:
        row = [candidate.name, candidate.type_name]
        for stage in stages:
            ours = _ours(candidates, stage, candidate.type_name)
            row += [_number(candidate.seconds(stage)), _ratio(candidate, ours, stage)]
        row += [_number(candidate.mebibytes()), _result(candidates, candidate, stages, describe)]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _ours(candidates: Sequence[Candidate], stage: str, type_name: str) -> Candidate | None:
    """Our first way that has a stage, in the same type where there is one."""
    ours = [other for other in candidates if other.name.startswith(NAME) and other.seconds(stage) is not None]
    return min(ours, key=lambda other: other.type_name != type_name, default=None)


def _ratio(candidate: Candidate, ours: Candidate | None, stage: str) -> str:
    seconds, reference = candidate.seconds(stage), None if ours is None else ours.seconds(stage)
    return "" if candidate is ours or not seconds or not reference else f"{_number(seconds / reference)}×"


def _result(candidates: Sequence[Candidate], candidate: Candidate, stages: Sequence[str], describe: Describe) -> str:
    reached = [stage for stage in stages if candidate.result(stage) is not None]
    if not reached or candidate.note is not None:
        return candidate.note or ""
    ours = _ours(candidates, reached[-1], "float64")
    return describe(
        candidate.result(reached[-1]), candidate.result(reached[-1]) if ours is None else ours.result(reached[-1])
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text(result: Any, ours: Any) -> str:
    """The result as it is."""
    return str(result)


def ranks(result: Any, ours: Any) -> str:
    """The rank of the network, and those of its layers: their sum where they are many, and how many are not as ours."""
    if not isinstance(result, tuple):
        return "" if isinstance(result, list) else f"{result}"  # A list is the fingerprint of a Gram matrix.
    rank, *layers = result
    wrong = sum(one != other for one, other in zip(layers, ours[1:], strict=False))
    told = " ".join(map(str, layers)) if len(layers) <= 8 else f"sum {sum(layers)} over {len(layers)} layers"
    return f"{rank}; {told}" + (f", {wrong} unlike ours" if wrong else "")


def distance(result: list[float], ours: list[float]) -> str:
    """How far products are from ours in float64."""
    return f"{difference(result, ours):.0e} from ours"
