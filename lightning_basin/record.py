"""Frozen results of one measurement, and the keys under which they are logged."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from statistics import quantiles
from typing import Any

from lightning_basin.functional import RANK_TOLERANCES
from lightning_basin.layer_names import tags_of
from lightning_basin.naming import escaped
from lightning_basin.report import heading, table

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
        return "\n".join([*heading(self), table(self), *(f"note: {note}" for note in self.notes)])


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
