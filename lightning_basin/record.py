"""Frozen results of one measurement, and the keys under which they are logged."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import quantiles
from textwrap import shorten
from typing import Any

from lightning_basin.functional import RANK_TOLERANCES
from lightning_basin.naming import escaped

MAX_LAYER_CURVES = 32
"""Above this number of layers a network is drawn by blocks: more curves than this nobody reads."""

ILL_DEFINED_GAP = 3.0
"""A rank whose gap is below three digits depends on the tolerance."""

_MERGED = ("merged_inputs", "train_merged_inputs")

OUTPUT_QUANTITIES = ("duplicated_activations", "duplicated_activations_exact", "train_duplicated_activations")
"""Names of what is measured of the outputs, as of what enters a layer."""

_STATISTICS = ("gradient_rank", "gradient_rank_deficit", "hessian_nullity", "duplicated_activations", "dead_units")


@dataclass(frozen=True)
class MergedInput:
    """An input that a network does not tell from an earlier one, from some layer on.

    Attributes:
        index: Of the input.
        equals: Of the first input with the same activation.
        layer: The first layer, in the order in which they are entered, where both have the same activation; ``None``
            where only the outputs are the same. Inputs that are equal from the start are so at the first layer.
    """

    index: int
    equals: int
    layer: str | None


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was measured of one layer, or of a block of layers. What was not measured is ``None``.

    Attributes:
        num_parameters: Trainable parameters, N.
        num_rows: Outputs on all inputs of the probe, m.
        gradient_rank: Singular values of the behavioral gradients G above ``gradient_rtol`` times the largest.
        gradient_rank_gap: ``log10(sigma_r / sigma_{r+1})``; ``None`` at rank 0.
        gradient_rank_at: The rank at relative tolerances 1e-12, 1e-8, 1e-6, 1e-4 and 1e-2, as far as it is known.
        gradient_effective_rank: ``exp`` of the entropy of the squared singular values; ``None`` without a spectrum.
        gradient_rtol: Relative tolerance that decided ``gradient_rank``.
        gradient_method: ``"svd"``, ``"gram"``, ``"gram+sketch"``, ``"cholesky"`` or ``"sketch"``.
        hessian_nullity: Eigenvalues of the Hessian that the remaining residual leaves indistinguishable from zero;
            ``None`` where the Hessian was not formed and the two ends below do not meet.
        hessian_nullity_lower: It is at least this: a proof.
        hessian_nullity_upper: And at most this: a proof but for a probability of 1e-9.
        hessian_nullity_strict: Eigenvalues that are zero to rounding.
        hessian_negative: Eigenvalues that are negative beyond rounding.
        hessian_largest: Largest magnitude of an eigenvalue of the Hessian.
        residual_curvature: Norm of what the residual adds to the Gauss-Newton part, relative to the largest eigenvalue;
            a bound from above, within a factor of two for the network, where the Hessian was not formed.
        smallest_curvature: Smallest nonzero eigenvalue of the Gauss-Newton part, relative to the largest of the
            Hessian; a bound from below.
        gauss_newton_nullity: N minus the rank of the Gauss-Newton part.
        hessian_resolving_loss: Below about which loss the two ends will meet; 0 where float64 cannot hold such a loss;
            ``None`` where they do meet, or where this is not known.
        hessian_rtol: Tolerance on eigenvalues relative to the largest, beside the residual curvature.
        hessian_method: ``"dense"``, ``"bracket"`` or ``"gauss-newton"``.
        duplicated_activations: Inputs that what enters the layer no longer tells from an earlier one.
        duplicated_activations_exact: The same counted with equality.
        train_duplicated_activations: ``duplicated_activations`` over the whole training set.
        dead_units: Outputs of the layer that are constant over the probe; of the network, their sum.
    """

    num_parameters: int
    num_rows: int
    gradient_rank: int
    gradient_rank_gap: float | None
    gradient_rank_at: Mapping[float, int]
    gradient_effective_rank: float | None
    gradient_rtol: float
    gradient_method: str
    hessian_nullity: int | None = None
    hessian_nullity_lower: int | None = None
    hessian_nullity_upper: int | None = None
    hessian_nullity_strict: int | None = None
    hessian_negative: int | None = None
    hessian_largest: float | None = None
    residual_curvature: float | None = None
    smallest_curvature: float | None = None
    gauss_newton_nullity: int | None = None
    hessian_resolving_loss: float | None = None
    hessian_rtol: float | None = None
    hessian_method: str | None = None
    duplicated_activations: int | None = None
    duplicated_activations_exact: int | None = None
    train_duplicated_activations: int | None = None
    dead_units: int | None = None

    @property
    def gradient_rank_deficit(self) -> int:
        """Directions lost beyond the unavoidable ones: ``min(m, N) - gradient_rank``."""
        return min(self.num_rows, self.num_parameters) - self.gradient_rank

    @property
    def gradient_nullity(self) -> int:
        """``N - gradient_rank``, an upper bound on the dimension of the behavior manifold."""
        return self.num_parameters - self.gradient_rank

    @property
    def saturated(self) -> bool:
        """Whether the rank fills the probe (``rank = m < N``), which is then too small to see the network."""
        return self.gradient_rank == self.num_rows < self.num_parameters

    @property
    def ill_defined(self) -> bool:
        """Whether no clear gap separates the singular values that count from those that do not."""
        return self.gradient_rank_gap is not None and self.gradient_rank_gap < ILL_DEFINED_GAP

    @property
    def hessian_certified(self) -> bool | None:
        """Whether the two ends of the bracket meet; ``None`` where there is none."""
        if self.hessian_nullity_lower is None or self.hessian_nullity_upper is None:
            return None
        return self.hessian_nullity_lower == self.hessian_nullity_upper

    def quantities(self) -> dict[str, float]:
        """Every quantity that was measured, by name, in the order in which it is documented."""
        return {name: value for name, value in self._named().items() if value is not None}

    def _named(self) -> dict[str, float | None]:
        """Every quantity that there is, by name."""
        return {
            "gradient_rank": self.gradient_rank,
            "gradient_rank_deficit": self.gradient_rank_deficit,
            "gradient_nullity": self.gradient_nullity,
            "gradient_rank_gap": self.gradient_rank_gap,
            "gradient_effective_rank": self.gradient_effective_rank,
            "saturated": int(self.saturated),
            "hessian_nullity": self.hessian_nullity,
            "hessian_nullity_lower": self.hessian_nullity_lower,
            "hessian_nullity_upper": self.hessian_nullity_upper,
            "hessian_certified": None if self.hessian_certified is None else int(self.hessian_certified),
            "hessian_nullity_strict": self.hessian_nullity_strict,
            "hessian_negative": self.hessian_negative,
            "hessian_largest": self.hessian_largest,
            "residual_curvature": self.residual_curvature,
            "smallest_curvature": self.smallest_curvature,
            "gauss_newton_nullity": self.gauss_newton_nullity,
            "duplicated_activations": self.duplicated_activations,
            "duplicated_activations_exact": self.duplicated_activations_exact,
            "train_duplicated_activations": self.train_duplicated_activations,
            "dead_units": self.dead_units,
        }


@dataclass(frozen=True, kw_only=True)
class BasinRecord(LayerRecord):
    """What was measured of a network: its own quantities, and those of its layers.

    ``duplicated_activations`` of the network is the largest over the layers after the first.

    Attributes:
        num_inputs: Inputs of the probe, k.
        loss: Of the probe, in evaluation mode.
        surviving_fraction: What is left of steps along random null directions: 1 where these are free.
        gradient_rank_bound: The largest rank that the duplicated activations leave possible.
        output_duplicated_activations: Inputs whose output equals that of an earlier one.
        output_duplicated_activations_exact: The same counted with equality.
        merged_inputs: Inputs of the probe that share their activation with an earlier one, by index.
        train_num_inputs: Inputs of the training set, where duplicates were counted over it.
        train_output_duplicated_activations: Of these, inputs whose output equals that of an earlier one.
        train_merged_inputs: ``merged_inputs`` of the training set.
        layers: By name in ``named_modules()``; ``""`` is the root.
        blocks: Of networks with more than 32 layers, by range of names.
        projected: Whether ranks are lower bounds, those of random combinations of outputs (``max_outputs``).
        notes: What a reader should know about how the numbers were obtained.
        measure_seconds: Wall time.
        step: Optimizer steps taken, ``None`` outside of training.
    """

    num_inputs: int
    loss: float | None = None
    surviving_fraction: float | None = None
    gradient_rank_bound: int | None = None
    output_duplicated_activations: int | None = None
    output_duplicated_activations_exact: int | None = None
    merged_inputs: tuple[MergedInput, ...] = ()
    train_num_inputs: int | None = None
    train_output_duplicated_activations: int | None = None
    train_merged_inputs: tuple[MergedInput, ...] = ()
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    blocks: Mapping[str, LayerRecord] = field(default_factory=dict)
    projected: bool = False
    notes: tuple[str, ...] = ()
    measure_seconds: float = 0.0
    step: int | None = None

    @property
    def log10_loss(self) -> float | None:
        """``log10`` of the loss, at least -40: a linear curve of the loss hides where it reaches zero."""
        return None if self.loss is None or self.loss < 0 else math.log10(max(self.loss, 1e-40))

    def _named(self) -> dict[str, float | None]:
        named = super()._named()
        named |= {f"gradient_rank_at_{tolerance:.0e}": rank for tolerance, rank in self.gradient_rank_at.items()}
        return named | {
            "gradient_rank_bound": self.gradient_rank_bound,
            "surviving_fraction": self.surviving_fraction,
            "loss": self.loss,
            "log10_loss": self.log10_loss,
            "train_num_inputs": self.train_num_inputs,
            "measure_seconds": self.measure_seconds,
        }

    def scalars(self, prefix: str = "basin") -> dict[str, float]:
        """The record as logged: ``<prefix>/<name>``, ``<prefix>_layer_<name>/<layer>``, ``<prefix>_stats/<name>_<p>``.

        Above ``MAX_LAYER_CURVES`` layers, ``<prefix>_block_<name>/<range>`` takes the place of the layers' keys.

        Args:
            prefix: First part of every key. Control characters and markup in it and in names of layers are
                percent-encoded.
        """
        prefix = escaped(prefix)
        named = {f"{prefix}/{name}": float(value) for name, value in self.quantities().items()}
        parts, kind = (self.blocks, "block") if self.blocks else (self.layers, "layer")
        tags = tags_of(parts)
        for part, record in parts.items():
            for name, value in record.quantities().items():
                named[f"{prefix}_{kind}_{name}/{tags[part]}"] = float(value)
        counts = (
            self.output_duplicated_activations,
            self.output_duplicated_activations_exact,
            self.train_output_duplicated_activations,
        )
        for name, count in zip(OUTPUT_QUANTITIES, counts, strict=True):
            if count is not None and "output" not in tags.values():
                named[f"{prefix}_{kind}_{name}/output"] = float(count)
        return named | {f"{prefix}_stats/{name}": value for name, value in self._statistics()}

    def _statistics(self) -> Iterator[tuple[str, float]]:
        for name in _STATISTICS:
            values = [layer.quantities()[name] for layer in self.layers.values() if name in layer.quantities()]
            if len(values) > 1:
                deciles = quantiles(values, n=10, method="inclusive")
                yield f"{name}_p10", deciles[0]
                yield f"{name}_median", deciles[4]
                yield f"{name}_p90", deciles[8]

    def to_dict(self) -> dict[str, Any]:
        """All fields as builtins, layers as nested dicts; `from_dict` reads it back."""
        plain = _fields(self)
        for name in _MERGED:
            plain[name] = [(merged.index, merged.equals, merged.layer) for merged in plain[name]]
        plain["layers"] = {name: _fields(layer) for name, layer in self.layers.items()}
        plain["blocks"] = {name: _fields(block) for name, block in self.blocks.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "BasinRecord":
        """The record that `to_dict` wrote."""
        parts = {
            part: {name: LayerRecord(**record) for name, record in plain[part].items()} for part in ("layers", "blocks")
        }
        merged = {name: tuple(MergedInput(*item) for item in plain.get(name, ())) for name in _MERGED}
        return cls(**{**plain, **parts, **merged})

    def __str__(self) -> str:
        """A table that can be read in a terminal of 100 columns."""
        return "\n".join([self._heading(), _table(self), *(f"note: {note}" for note in self.notes)])

    def _heading(self) -> str:
        step = "" if self.step is None else f"step {self.step}: "
        loss = "" if self.loss is None else f", loss {self.loss:.3g}"
        gap = "none" if self.gradient_rank_gap is None else f"{self.gradient_rank_gap:.1f} digits"
        flags = "".join(f" [{flag}]" for flag in ("saturated", "ill_defined") if getattr(self, flag))
        decided = f"rank by {self.gradient_method}, decided at {self.gradient_rtol:.1e} of the largest singular value"
        elsewhere = ", ".join(f"{rtol:.0e}: {rank}" for rtol, rank in self.gradient_rank_at.items())
        lines = [
            f"{step}{self.num_inputs} inputs, {self.num_rows} outputs, {self.num_parameters} parameters{loss}",
            f"{decided}, gap {gap}{flags}",
        ]
        if self.gradient_effective_rank is not None:
            lines.append(f"rank at {elsewhere}; effective {self.gradient_effective_rank:.1f}")
        if self.gradient_rank_bound is not None:
            lines.append(f"duplicated activations bound the rank by {self.gradient_rank_bound}")
        if self.surviving_fraction is not None:
            lines.append(f"null space: {self.surviving_fraction:.4f} of steps along random null directions survive")
        lines += [*_merged_lines("inputs", self.merged_inputs)]
        if self.train_num_inputs is not None:
            training_set = f"of {self.train_num_inputs:,} training inputs"
            lines += [*_merged_lines(training_set, self.train_merged_inputs)] or [f"none {training_set} merged"]
        lines.extend(_hessian_lines(self))
        return "\n".join(lines)


def _hessian_lines(record: BasinRecord) -> Iterator[str]:
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


def _known_nullity(record: BasinRecord) -> str:
    """In one sentence what is known of the nullity."""
    smallest, residual = record.smallest_curvature, record.residual_curvature
    sizes = ""
    if smallest is not None and residual is not None:
        sizes = f"smallest curvature {smallest:.1e} {{}} 2·residual curvature {2 * residual:.1e}"
    if record.hessian_certified:
        because = f": {sizes.format('>')}" if sizes else ""
        return f"nullity {record.hessian_nullity}, certified{because}"
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


_COLUMNS = {
    "parameters": "num_parameters",
    "rank": "gradient_rank",
    "deficit": "gradient_rank_deficit",
    "nullity": "gradient_nullity",
    "Hessian nullity": "hessian_nullity",
    "duplicates": "duplicated_activations",
    "dead units": "dead_units",
}


def _table(record: BasinRecord) -> str:
    rows = [["layer", *_COLUMNS]]
    parts = record.blocks or record.layers
    tags = tags_of(parts)
    for name, part in [*((tags[name], part) for name, part in parts.items()), ("network", record)]:
        rows.append([name, *(_cell(part, attribute) for attribute in _COLUMNS.values())])
    if record.output_duplicated_activations is not None:
        cells = {"layer": "output", "duplicates": f"{record.output_duplicated_activations:,}"}
        rows.insert(-1, [cells.get(column, "") for column in rows[0]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _merged_lines(what: str, merged: Sequence[MergedInput]) -> Iterator[str]:
    """At most one line: how many inputs merged, and the first of them at each layer."""
    if not merged:
        return
    at: dict[str | None, list[MergedInput]] = {}
    for item in merged:
        at.setdefault(item.layer, []).append(item)
    parts = [
        f"{len(items)} at {'output' if layer is None else tag(layer)} ({', '.join(map(_pair, items[:3]))}"
        + (", ...)" if len(items) > 3 else ")")  # noqa: PLR2004 - some examples
        for layer, items in at.items()
    ]
    yield shorten(f"{len(merged):,} {what} merged, first {'; '.join(parts)}", 100, placeholder=" ...")


def _pair(merged: MergedInput) -> str:
    return f"{merged.index}={merged.equals}"


def _cell(record: LayerRecord, attribute: str) -> str:
    value = getattr(record, attribute)
    if attribute == "hessian_nullity" and value is None and record.hessian_nullity_upper is not None:
        return f"{record.hessian_nullity_lower:,} to {record.hessian_nullity_upper:,}"
    return "" if value is None else f"{value:,}"


def layer_blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Group the layers of a deep network into at most ``MAX_LAYER_CURVES`` blocks; none for fewer layers.

    A block is what shares a name up to its first number; where that leaves too many, neighbours are joined.

    Args:
        names: Of the layers, in order.

    Example:
        >>> names = [f"layers.{i}.{part}" for i in range(17) for part in ("norm", "linear")]
        >>> list(layer_blocks(names).items())[1]
        ('layers.1', ['layers.1.norm', 'layers.1.linear'])
    """
    if len(names) <= MAX_LAYER_CURVES:
        return {}
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        blocks.setdefault(".".join(parts[: numbers[0] + 1] if numbers else parts), []).append(name)
    if len(blocks) <= MAX_LAYER_CURVES:
        return blocks
    keys = list(blocks)
    size = -(-len(keys) // MAX_LAYER_CURVES)
    joined = {}
    for start in range(0, len(keys), size):
        range_of = keys[start : start + size]
        name = range_of[0] if len(range_of) == 1 else _range_name(range_of[0], range_of[-1])
        joined[name] = [layer for key in range_of for layer in blocks[key]]
    return joined


def _range_name(first: str, last: str) -> str:
    """``layers.0-1`` from ``layers.0`` and ``layers.1``; both names where they have no common part."""
    stem, _, number = last.rpartition(".")
    joint = first.rpartition(".")[0] == stem and number.isdigit()
    return f"{_without_slash(first)}-{number if joint else _without_slash(last)}"


def tag(layer: str) -> str:
    """A layer's name as it stands in a logged key: ``root`` for the root, no slash, and what is special escaped.

    Example:
        >>> tag(""), tag("fc1"), tag("a/[b]")
        ('root', 'fc1', 'a.%5Bb%5D')
    """
    return escaped(_without_slash(layer))


def _without_slash(layer: str) -> str:
    return layer.replace("/", ".") or "root"


def tags_of(layers: Iterable[str]) -> dict[str, str]:
    """Tags of layers, told apart by a prime where two names look the same without their slash."""
    tags: dict[str, str] = {}
    for layer in layers:
        tags[layer] = tag(layer)
        while tags[layer] in list(tags.values())[:-1]:
            tags[layer] += "'"
    return tags


def rank_in_doubt(quantity: str, parts: Sequence[LayerRecord], *, projected: bool) -> str | None:
    """Why a rank, or what is computed from it, says more of the measurement than of the network.

    Args:
        quantity: Its name; of statistics over layers, with the quantile behind it.
        parts: The network, the layer, or the layers that the statistics are over.
        projected: Whether ranks are lower bounds.

    Returns:
        What such a rank is, with what helps; ``None`` for a rank that is the network's own, or no rank at all.
    """
    if quantity.startswith(("gradient_rank_gap", "gradient_rank_bound")) or not quantity.startswith(_RANKS):
        return None
    if projected:
        return "lower bounds, those of random combinations of outputs. HINT: pass a smaller BasinMonitor(probe=...)"
    if any(_looks_saturated(part, quantity) for part in parts):
        return "saturated, those of the probe and not of the network. HINT: pass a larger BasinMonitor(probe=...)"
    if quantity.startswith(_AT_OWN_TOLERANCE):
        return None
    if any(part.ill_defined for part in parts):
        return f"ill-defined, as no gap of {ILL_DEFINED_GAP:g} digits separates what counts from what does not"
    return None


_RANKS = ("gradient_rank", "gradient_nullity", "gradient_effective_rank")
_AT_OWN_TOLERANCE = ("gradient_rank_at_", "gradient_effective_rank")


def _looks_saturated(part: LayerRecord, quantity: str) -> bool:
    if not quantity.startswith("gradient_rank_at_"):
        return part.saturated
    return part.quantities().get(quantity) == part.num_rows < part.num_parameters


def _names(of: type[LayerRecord], **fields: Any) -> tuple[str, ...]:
    sizes: dict[str, Any] = {"num_parameters": 0, "num_rows": 0, "gradient_rank": 0, "gradient_rank_gap": None}
    ranks: dict[str, Any] = {
        "gradient_rank_at": dict.fromkeys(RANK_TOLERANCES, 0),
        "gradient_effective_rank": None,
        "gradient_rtol": 0.0,
        "gradient_method": "",
    }
    return tuple(of(**sizes, **ranks, **fields)._named())


LAYER_QUANTITIES = _names(LayerRecord)
"""Names of all quantities of a layer, in the order in which they are documented."""

NETWORK_QUANTITIES = _names(BasinRecord, num_inputs=0)
"""The same of the network; ``zero_loss_step`` is one of a run."""

STATISTICS = tuple(f"{name}_{quantile}" for name in _STATISTICS for quantile in ("p10", "median", "p90"))
"""Names of quantiles over the layers."""


def _fields(record: LayerRecord) -> dict[str, Any]:
    plain = {item.name: getattr(record, item.name) for item in fields(record)}
    return plain | {"gradient_rank_at": dict(record.gradient_rank_at)}
