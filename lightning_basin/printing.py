"""A record as sentences and a table for a terminal."""

from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from lightning_basin.layer_names import tag, tags_of

if TYPE_CHECKING:
    from lightning_basin.record import BasinRecord, LayerRecord, MergedInput


def heading(record: "BasinRecord") -> list[str]:
    """Return the lines above the table: what was found in words, sizes, rank, merged inputs, Hessian."""
    step = "" if record.step is None else f"step {record.step}: "
    loss = "" if record.loss is None else f", loss {record.loss:.3g}"
    gap = "none" if record.gradient_rank_gap is None else f"{record.gradient_rank_gap:.1f} digits"
    flags = "".join(f" [{flag}]" for flag in ("saturated", "ill_defined") if getattr(record, flag))
    method = f"rank by {record.gradient_method}, decided at {record.gradient_rtol:.1e} of the largest singular value"
    ranks = ", ".join(f"{rtol:.0e}: {rank}" for rtol, rank in record.gradient_rank_at.items())
    lines = [
        in_words(record),
        f"{step}{record.num_inputs} inputs, {record.num_rows} outputs, {record.num_parameters} parameters{loss}",
        f"{method}, gap {gap}{flags}",
    ]
    if record.gradient_effective_rank is not None:
        lines.append(f"rank at {ranks}; effective {record.gradient_effective_rank:.1f}")
    if record.gradient_rank_bound is not None:
        lines.append(f"duplicated activations bound the rank by {record.gradient_rank_bound}")
    if record.surviving_fraction is not None:
        lines.append(f"null space: {record.surviving_fraction:.4f} of steps along random null directions survive")
    lines += [*_merged_lines("inputs", record.merged_inputs)]
    if record.train_num_inputs is not None:
        training_set = f"of {record.train_num_inputs:,} training inputs"
        lines += [*_merged_lines(training_set, record.train_merged_inputs)] or [f"none {training_set} merged"]
    return [*lines, *_hessian_lines(record), *_time_lines(record)]


def in_words(record: "BasinRecord") -> str:
    """Say in a sentence what can still change, what was lost, and how many inputs became one."""
    rank = f"{'at least ' if record.projected else ''}{record.gradient_rank:,}"
    possible = record.gradient_rank + record.gradient_rank_deficit
    if record.saturated:
        known = "all that the probe can show"
    elif record.ill_defined:
        known = "it depends on the tolerance"
    else:
        known = f"{record.gradient_rank_deficit:,} lost"
    parts = [f"The outputs respond to {rank} of {possible:,} directions ({known})", _flat(record)]
    if record.duplicated_activations:
        parts.append(f"a layer merges {record.duplicated_activations:,} of {record.num_inputs:,} inputs")
    elif record.duplicated_activations == 0:
        parts.append("no layer merges inputs")
    return "; ".join(parts)


def _flat(record: "BasinRecord") -> str:
    lower, upper, nullity = record.hessian_nullity_lower, record.hessian_nullity_upper, record.hessian_nullity
    if nullity is not None:
        return f"{nullity:,} of {record.num_parameters:,} leave the loss flat"
    if lower is not None and upper is not None:
        return f"{lower:,} to {upper:,} of {record.num_parameters:,} leave the loss flat"
    return f"{record.gradient_nullity:,} of {record.num_parameters:,} change no output"


def _hessian_lines(record: "BasinRecord") -> Iterator[str]:
    if record.hessian_method is None:
        return
    yield f"Hessian by {record.hessian_method}: {_known_nullity(record)}"
    details = {
        "zero to rounding": record.hessian_nullity_strict,
        "negative": record.hessian_negative,
        "Gauss-Newton nullity": record.gauss_newton_nullity,
    }
    counts = [f"{name} {count}" for name, count in details.items() if count is not None]
    if record.residual_curvature is not None:
        counts.append(f"residual curvature {record.residual_curvature:.1e}")
    yield ", ".join(counts)


def _known_nullity(record: "BasinRecord") -> str:
    """One sentence on the nullity: its value or bracket, and the reason."""
    smallest, residual = record.smallest_curvature, record.residual_curvature
    sizes = ""
    if smallest is not None and residual is not None:
        sizes = f"smallest curvature {smallest:.1e} {{}} 2·residual curvature {2 * residual:.1e}"
    if record.hessian_certified:
        reason = f": {sizes.format('>')}" if sizes else ""
        return f"nullity {record.hessian_nullity}, certified{reason}"
    if record.hessian_certified is None:
        return "nothing is proved of the nullity" + (
            "" if record.hessian_nullity is None else f", counted {record.hessian_nullity}"
        )
    counted = "" if record.hessian_nullity is None else f"nullity {record.hessian_nullity}, certified "
    between = f"{counted}between {record.hessian_nullity_lower} and {record.hessian_nullity_upper}"
    if record.hessian_resolving_loss is not None:
        below = f"below about {record.hessian_resolving_loss:.0e}" if record.hessian_resolving_loss else "exactly zero"
        return f"{between}: resolve by training until the loss is {below}"
    if smallest is not None and residual is not None and smallest > 2 * residual and record.hessian_rtol is not None:
        return f"{between}: smallest curvature {smallest:.1e} against the tolerance {record.hessian_rtol:.1e}"
    return f"{between}: {sizes.format('against')}" if sizes else between


def _time_lines(record: "BasinRecord") -> Iterator[str]:
    """At most one line: how long the measurement took, and which share of it each stage, the longest first."""
    if not record.seconds or not record.measure_seconds:  # Of an earlier version.
        return
    longest = sorted(record.seconds.items(), key=lambda item: -item[1])
    stages = ", ".join(f"{stage} {seconds / record.measure_seconds:.0%}" for stage, seconds in longest)
    yield f"took {record.measure_seconds:.2f} s: {stages}"


_COLUMNS = {
    "parameters": "num_parameters",
    "rank": "gradient_rank",
    "deficit": "gradient_rank_deficit",
    "nullity": "gradient_nullity",
    "Hessian nullity": "hessian_nullity",
    "duplicates": "duplicated_activations",
    "dead units": "dead_units",
}


def table(record: "BasinRecord") -> str:
    """Return a table with one row for each layer or block, the outputs and the network."""
    rows = [["layer", *_COLUMNS]]
    records = record.blocks or record.layers
    tags = tags_of(records)
    for name, row_record in [*((tags[scope], records[scope]) for scope in records), ("network", record)]:
        rows.append([name, *(_cell(row_record, attribute) for attribute in _COLUMNS.values())])
    if record.output_duplicated_activations is not None:
        cells = {"layer": "output", "duplicates": f"{record.output_duplicated_activations:,}"}
        rows.insert(-1, [cells.get(column, "") for column in rows[0]])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells below each other, the first cell to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _merged_lines(inputs: str, merged: Sequence["MergedInput"]) -> Iterator[str]:
    """At most one line: how many inputs merged, and the first of them at each layer."""
    if not merged:
        return
    by_layer: dict[str | None, list[MergedInput]] = {}
    for item in merged:
        by_layer.setdefault(item.layer, []).append(item)
    places = []
    for layer, items in by_layer.items():
        pairs = [*(f"{item.index}={item.equals}" for item in items[:3]), *(["..."] if items[3:] else [])]
        places.append(f"{len(items)} at {'output' if layer is None else tag(layer)} ({', '.join(pairs)})")
    yield shorten(f"{len(merged):,} {inputs} merged, first {'; '.join(places)}", 100, placeholder=" ...")


def _cell(record: "LayerRecord", attribute: str) -> str:
    value = getattr(record, attribute)
    if attribute == "hessian_nullity" and value is None and record.hessian_nullity_upper is not None:
        return f"{record.hessian_nullity_lower:,} to {record.hessian_nullity_upper:,}"
    return "" if value is None else f"{value:,}"
