"""Frozen results of one measurement, and the keys under which they are logged."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import quantiles
from typing import Any

MAX_LAYER_CURVES = 32
"""Above this number of layers a network is drawn by blocks: more curves than this nobody reads."""

ILL_DEFINED_GAP = 3.0
"""A rank whose gap is below three digits depends on the tolerance."""

_STATISTICS = ("gradient_rank", "gradient_rank_deficit", "hessian_nullity", "duplicated_activations", "dead_units")


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was measured of one layer, or of a block of layers. What was not measured is ``None``.

    Attributes:
        num_parameters: Trainable parameters, N.
        num_rows: Outputs on all inputs of the probe, m.
        gradient_rank: Singular values of the behavioral gradients G above ``gradient_rtol`` times the largest.
        gradient_rank_gap: ``log10(sigma_r / sigma_{r+1})``; ``None`` at rank 0.
        gradient_rank_at: The rank at relative tolerances 1e-12, 1e-8, 1e-6, 1e-4 and 1e-2.
        gradient_effective_rank: ``exp`` of the entropy of the squared singular values.
        gradient_rtol: Relative tolerance that decided ``gradient_rank``.
        gradient_method: ``"svd"``, ``"gram"`` or ``"gram+sketch"``.
        hessian_nullity: Eigenvalues of the Hessian that the remaining residual leaves indistinguishable from zero.
        hessian_nullity_strict: Eigenvalues that are zero to rounding.
        hessian_negative: Eigenvalues that are negative beyond rounding.
        residual_curvature: Norm of what the residual adds to the Gauss-Newton part, relative to the largest eigenvalue.
        gauss_newton_nullity: N minus the rank of the Gauss-Newton part.
        duplicated_activations: Inputs that what enters the layer no longer tells from an earlier one.
        duplicated_activations_exact: The same counted with equality.
        dead_units: Outputs of the layer that are constant over the probe; of the network, their sum.
    """

    num_parameters: int
    num_rows: int
    gradient_rank: int
    gradient_rank_gap: float | None
    gradient_rank_at: Mapping[float, int]
    gradient_effective_rank: float
    gradient_rtol: float
    gradient_method: str
    hessian_nullity: int | None = None
    hessian_nullity_strict: int | None = None
    hessian_negative: int | None = None
    residual_curvature: float | None = None
    gauss_newton_nullity: int | None = None
    duplicated_activations: int | None = None
    duplicated_activations_exact: int | None = None
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

    def quantities(self) -> dict[str, float]:
        """Every quantity that was measured, by name, in the order in which it is documented."""
        named: dict[str, float | None] = {
            "gradient_rank": self.gradient_rank,
            "gradient_rank_deficit": self.gradient_rank_deficit,
            "gradient_nullity": self.gradient_nullity,
            "gradient_rank_gap": self.gradient_rank_gap,
            "gradient_effective_rank": self.gradient_effective_rank,
            "saturated": int(self.saturated),
            "hessian_nullity": self.hessian_nullity,
            "hessian_nullity_strict": self.hessian_nullity_strict,
            "hessian_negative": self.hessian_negative,
            "residual_curvature": self.residual_curvature,
            "gauss_newton_nullity": self.gauss_newton_nullity,
            "duplicated_activations": self.duplicated_activations,
            "duplicated_activations_exact": self.duplicated_activations_exact,
            "dead_units": self.dead_units,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class BasinRecord(LayerRecord):
    """What was measured of a network: its own quantities, and those of its layers.

    ``duplicated_activations`` of the network is the largest over the layers after the first.

    Attributes:
        num_inputs: Inputs of the probe, k.
        loss: Of the probe, in evaluation mode and float64.
        surviving_fraction: What is left of steps along random null directions: 1 where these are free.
        gradient_rank_bound: The largest rank that the duplicated activations leave possible.
        output_duplicated_activations: Inputs whose output equals that of an earlier one.
        output_duplicated_activations_exact: The same counted with equality.
        layers: By name in ``named_modules()``; ``""`` is the root.
        blocks: Of networks with more than 32 layers, by range of names.
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
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    blocks: Mapping[str, LayerRecord] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measure_seconds: float = 0.0
    step: int | None = None

    @property
    def log10_loss(self) -> float | None:
        """``log10`` of the loss, at least -40: a linear curve of the loss hides where it reaches zero."""
        return None if self.loss is None or self.loss < 0 else math.log10(max(self.loss, 1e-40))

    def quantities(self) -> dict[str, float]:
        """Every quantity of the network that was measured, by name."""
        named = super().quantities()
        named |= {f"gradient_rank_at_{tolerance:.0e}": rank for tolerance, rank in self.gradient_rank_at.items()}
        own: dict[str, float | None] = {
            "gradient_rank_bound": self.gradient_rank_bound,
            "surviving_fraction": self.surviving_fraction,
            "loss": self.loss,
            "log10_loss": self.log10_loss,
        }
        named |= {name: value for name, value in own.items() if value is not None}
        return named | {"measure_seconds": self.measure_seconds}

    def scalars(self, prefix: str = "basin") -> dict[str, float]:
        """The record as logged: ``<prefix>/<name>``, ``<prefix>_layer_<name>/<layer>``, ``<prefix>_stats/<name>_<p>``.

        Above ``MAX_LAYER_CURVES`` layers, ``<prefix>_block_<name>/<range>`` takes the place of the layers' keys.

        Args:
            prefix: First part of every key.
        """
        named = {f"{prefix}/{name}": float(value) for name, value in self.quantities().items()}
        parts, kind = (self.blocks, "block") if self.blocks else (self.layers, "layer")
        tags = _tags(parts)
        for part, record in parts.items():
            for name, value in record.quantities().items():
                named[f"{prefix}_{kind}_{name}/{tags[part]}"] = float(value)
        outputs = {
            "duplicated_activations": self.output_duplicated_activations,
            "duplicated_activations_exact": self.output_duplicated_activations_exact,
        }
        for name, count in outputs.items():
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
        plain["layers"] = {name: _fields(layer) for name, layer in self.layers.items()}
        plain["blocks"] = {name: _fields(block) for name, block in self.blocks.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "BasinRecord":
        """The record that `to_dict` wrote."""
        parts = {
            part: {name: LayerRecord(**record) for name, record in plain[part].items()} for part in ("layers", "blocks")
        }
        return cls(**{**plain, **parts})

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
            f"rank at {elsewhere}; effective {self.gradient_effective_rank:.1f}",
        ]
        if self.gradient_rank_bound is not None:
            lines.append(f"duplicated activations bound the rank by {self.gradient_rank_bound}")
        if self.surviving_fraction is not None:
            lines.append(f"null space: {self.surviving_fraction:.4f} of steps along random null directions survive")
        if self.residual_curvature is not None:
            lines.append(
                f"Hessian: {self.hessian_nullity_strict} zero to rounding, {self.hessian_negative} negative, "
                f"Gauss-Newton nullity {self.gauss_newton_nullity}, residual curvature {self.residual_curvature:.1e}"
            )
        return "\n".join(lines)


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
    for name, part in [*((tag(name), part) for name, part in parts.items()), ("network", record)]:
        values = (getattr(part, attribute) for attribute in _COLUMNS.values())
        rows.append([name, *("" if value is None else f"{value:,}" for value in values)])
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
    return f"{tag(first)}-{number if joint else tag(last)}"


def tag(layer: str) -> str:
    """A layer's name as it stands in a logged key: ``root`` for the root, no slash."""
    return layer.replace("/", ".") or "root"


def _tags(layers: Iterable[str]) -> dict[str, str]:
    """Tags of layers, told apart by a prime where two names look the same without their slash."""
    tags: dict[str, str] = {}
    for layer in layers:
        tags[layer] = tag(layer)
        while tags[layer] in list(tags.values())[:-1]:
            tags[layer] += "'"
    return tags


def _fields(record: LayerRecord) -> dict[str, Any]:
    plain = {item.name: getattr(record, item.name) for item in fields(record)}
    return plain | {"gradient_rank_at": dict(record.gradient_rank_at)}
