"""Frozen results of one measurement, and the keys under which they are logged."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import quantiles
from typing import Any

from lightning_basin.functional import RANK_TOLERANCES
from lightning_basin.layer_names import tags_of
from lightning_basin.naming import escaped
from lightning_basin.printing import heading, table

ILL_DEFINED_GAP = 3.0
"""Digits of the gap: a rank with a smaller gap depends on the tolerance."""

_RANKS_AT = {f"gradient_rank_at_{tolerance:.0e}": tolerance for tolerance in RANK_TOLERANCES}

BLOCK_QUANTITIES = (
    "gradient_rank",
    "gradient_rank_deficit",
    "gradient_nullity",
    "gradient_rank_gap",
    "gradient_effective_rank",
    "log_det_gram",
    "saturated",
    "hessian_nullity",
    "hessian_nullity_lower",
    "hessian_nullity_upper",
    "hessian_certified",
    "hessian_nullity_strict",
    "hessian_negative",
    "hessian_largest",
    "residual_curvature",
    "smallest_curvature",
    "gauss_newton_nullity",
    "duplicated_activations",
    "duplicated_activations_exact",
    "train_duplicated_activations",
    "dead_units",
)
"""Names of the quantities that are logged of a block: attributes of `LayerRecord`, in the order of keys."""

LAYER_QUANTITIES = (*BLOCK_QUANTITIES, "activation_rank", "activation_rank_gap")
"""Names of the quantities that are logged of a layer, whose input activations are one matrix."""

NETWORK_QUANTITIES = (
    *BLOCK_QUANTITIES,
    *_RANKS_AT,
    "gradient_rank_bound",
    "projected",
    "surviving_fraction",
    "loss",
    "log10_loss",
    "train_num_inputs",
    "measure_seconds",
)
"""Names of the quantities that are logged of a network; a run has ``zero_loss_step`` beside them."""

OUTPUT_QUANTITIES = ("duplicated_activations", "duplicated_activations_exact", "train_duplicated_activations")
"""Names of the quantities that are logged of the outputs, as if they entered a further layer."""

_STATISTICS = ("gradient_rank", "gradient_rank_deficit", "hessian_nullity", "duplicated_activations", "dead_units")

STATISTICS = tuple(f"{name}_{quantile}" for name in _STATISTICS for quantile in ("p10", "median", "p90"))
"""Names of the quantiles over the layers."""

_MERGED = ("merged_inputs", "train_merged_inputs")


@dataclass(frozen=True)
class MergedInput:
    """An input that some layer cannot distinguish from an earlier input.

    Attributes:
        index: The input's index in the probe or the training set.
        equals: The index of the first input with the same activation.
        layer: The first layer, in the order of entry, at which both inputs have the same activation; ``None`` where
            only their outputs are the same. Inputs that are equal from the start merge at the first layer.
    """

    index: int
    equals: int
    layer: str | None


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """The quantities of one layer, or of a block of layers. A quantity that was not measured is ``None``.

    Attributes:
        num_parameters: The number of trainable parameters, N.
        num_rows: The number of outputs on all inputs of the probe, m.
        gradient_rank: The number of singular values of the behavioral gradients G above ``gradient_rtol`` times the
            largest.
        gradient_rank_gap: ``log10(sigma_r / sigma_{r+1})``, in digits; ``None`` at rank 0.
        gradient_rank_at: The rank at relative tolerances 1e-12, 1e-8, 1e-6, 1e-4 and 1e-2, where it is known.
        gradient_effective_rank: ``exp`` of the entropy of the squared singular values; ``None`` without a spectrum.
        gradient_rtol: The relative tolerance that decided ``gradient_rank``.
        gradient_method: ``"svd"``, ``"gram"``, ``"gram+sketch"``, ``"cholesky"`` or ``"sketch"``.
        log_det_gram: The natural logarithm of the product of the squared singular values that ``gradient_rank`` counts;
            ``None`` without a spectrum, and at rank 0.
        gradient_largest: The largest singular value; ``None`` without a spectrum.
        gradient_spectrum: The number of singular values in ``[10**(b / 4), 10**((b + 1) / 4))`` by the integer b, but
            for those that are rounding; ``None`` without a spectrum.
        hessian_nullity: The number of eigenvalues of the Hessian that the residual leaves indistinguishable from zero;
            ``None`` where the Hessian was not formed and the two ends of the bracket do not meet.
        hessian_nullity_lower: The lower end of the bracket of ``hessian_nullity``; it is certain.
        hessian_nullity_upper: The upper end of the bracket; it fails with a probability of 1e-9.
        hessian_nullity_strict: The number of eigenvalues that are zero to rounding.
        hessian_negative: The number of eigenvalues that are negative beyond rounding.
        hessian_largest: The largest magnitude of an eigenvalue of the Hessian.
        residual_curvature: The norm of the residual part of the Hessian, relative to the largest eigenvalue. Where the
            Hessian was not formed: a bound from above, for the network within a factor of two, or of ten where a better
            one would not change the bracket.
        smallest_curvature: A bound from below on the smallest nonzero eigenvalue of the Gauss-Newton part, relative to
            the largest eigenvalue of the Hessian.
        gauss_newton_nullity: N minus the rank of the Gauss-Newton part.
        hessian_resolving_loss: The loss below which the ends of the bracket will meet, roughly; 0 where float64 cannot
            hold such a loss; ``None`` where the ends meet, or where the loss is not known.
        hessian_rtol: The tolerance on eigenvalues relative to the largest, beside the residual curvature.
        hessian_method: ``"dense"``, ``"bracket"`` or ``"gauss-newton"``.
        duplicated_activations: The number of inputs that the layer cannot distinguish from an earlier one.
        duplicated_activations_exact: The same number, with equality in place of a tolerance.
        train_duplicated_activations: ``duplicated_activations`` over the whole training set.
        dead_units: The number of the layer's outputs that are constant over the probe; for the network, their sum.
        activation_rank: The rank of the layer's input activations, a matrix with one row per input; ``None`` for blocks
            and the network.
        activation_rank_gap: The gap of ``activation_rank``, in digits like ``gradient_rank_gap``.
    """

    num_parameters: int
    num_rows: int
    gradient_rank: int
    gradient_rank_gap: float | None
    gradient_rank_at: Mapping[float, int]
    gradient_effective_rank: float | None
    gradient_rtol: float
    gradient_method: str
    log_det_gram: float | None = None
    gradient_largest: float | None = None
    gradient_spectrum: Mapping[int, int] | None = None
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
    activation_rank: int | None = None
    activation_rank_gap: float | None = None

    @property
    def gradient_rank_deficit(self) -> int:
        """The directions lost beyond the unavoidable ones: ``min(m, N) - gradient_rank``."""
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
        """Whether the rank's gap is below ``ILL_DEFINED_GAP`` digits."""
        return self.gradient_rank_gap is not None and self.gradient_rank_gap < ILL_DEFINED_GAP

    @property
    def hessian_certified(self) -> bool | None:
        """Whether the two ends of the bracket meet; ``None`` where there is no bracket."""
        if self.hessian_nullity_lower is None or self.hessian_nullity_upper is None:
            return None
        return self.hessian_nullity_lower == self.hessian_nullity_upper

    def quantities(self) -> dict[str, float]:
        """Return every quantity that was measured, by name, in the order of the logged keys."""
        return _measured(self, LAYER_QUANTITIES)


@dataclass(frozen=True, kw_only=True)
class BasinRecord(LayerRecord):
    """The quantities of a network, and of its layers.

    ``duplicated_activations`` of the network is the largest over the layers after the first.

    Attributes:
        num_inputs: The number of inputs of the probe, k.
        loss: The loss on the probe, in evaluation mode.
        surviving_fraction: The fraction of steps along random null directions that survives: 1 where the directions
            are free.
        gradient_rank_bound: The largest rank that the duplicated activations leave possible.
        output_duplicated_activations: The number of inputs whose output equals that of an earlier one.
        output_duplicated_activations_exact: The same number, with equality in place of a tolerance.
        merged_inputs: The inputs of the probe that share their activation with an earlier one, by index.
        train_num_inputs: The number of inputs of the training set, where duplicates were counted over it.
        train_output_duplicated_activations: ``output_duplicated_activations`` over the training set.
        train_merged_inputs: ``merged_inputs`` of the training set.
        layers: The layers' records by name in ``named_modules()``; ``""`` is the root.
        blocks: The blocks' records by range of names, in networks with more than 32 layers.
        projected: Whether ranks are lower bounds, because only random combinations of outputs were measured
            (``max_outputs``).
        dtype: The floating point type in which the network was run, ``"float64"`` or ``"float32"``; ``None`` in records
            of versions that did not say it.
        notes: Sentences on how the numbers were obtained.
        measure_seconds: The wall time of the measurement, in seconds.
        seconds: The wall time of each stage, in seconds. ``"copy"`` is the copy of the module; ``"trace"`` its runs and
            their checks, and what is in no other stage; ``"gradients"`` the gradients of each layer; ``"ranks"`` and
            ``"hessian"`` what is computed from them; ``"duplicates"`` all that is counted of activations;
            ``"verify_null_space"`` the verification. No device is waited for: on a GPU the stage that reads a result
            first has waited for the work of the stages before it, too.
        step: The number of optimizer steps taken; ``None`` outside of training.
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
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    measure_seconds: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None

    @property
    def log10_loss(self) -> float | None:
        """``log10`` of the loss, at least -40; ``None`` for a negative loss."""
        return None if self.loss is None or self.loss < 0 else math.log10(max(self.loss, 1e-40))

    def quantities(self) -> dict[str, float]:
        """Return every quantity that was measured, by name, in the order of the logged keys."""
        return _measured(self, NETWORK_QUANTITIES)

    def scalars(self, prefix: str = "basin") -> dict[str, float]:
        """The record as logged: ``<prefix>/<name>``, ``<prefix>_layer_<name>/<layer>``, ``<prefix>_stats/<name>_<p>``.

        Above ``MAX_LAYER_CURVES`` layers, ``<prefix>_block_<name>/<range>`` takes the place of the layers' keys.

        Args:
            prefix: The first word of every key. Control characters and markup are percent-encoded, in the prefix and
                in names of layers.
        """
        prefix = escaped(prefix)
        scalars = {f"{prefix}/{name}": float(value) for name, value in self.quantities().items()}
        records, kind = (self.blocks, "block") if self.blocks else (self.layers, "layer")
        tags = tags_of(records)
        for scope, record in records.items():
            for name, value in record.quantities().items():
                scalars[f"{prefix}_{kind}_{name}/{tags[scope]}"] = float(value)
        counts = (
            self.output_duplicated_activations,
            self.output_duplicated_activations_exact,
            self.train_output_duplicated_activations,
        )
        for name, count in zip(OUTPUT_QUANTITIES, counts, strict=True):
            if count is not None and "output" not in tags.values():
                scalars[f"{prefix}_{kind}_{name}/output"] = float(count)
        return scalars | {f"{prefix}_stats/{name}": value for name, value in self._statistics()}

    def _statistics(self) -> Iterator[tuple[str, float]]:
        for name in _STATISTICS:
            values = [value for layer in self.layers.values() if (value := getattr(layer, name)) is not None]
            if len(values) > 1:
                deciles = quantiles(values, n=10, method="inclusive")
                yield f"{name}_p10", deciles[0]
                yield f"{name}_median", deciles[4]
                yield f"{name}_p90", deciles[8]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as builtins, layers as nested dicts; `from_dict` reads them back."""
        plain = _fields(self)
        for name in _MERGED:
            plain[name] = [(merged.index, merged.equals, merged.layer) for merged in plain[name]]
        plain["layers"] = {name: _fields(layer) for name, layer in self.layers.items()}
        plain["blocks"] = {name: _fields(block) for name, block in self.blocks.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "BasinRecord":
        """Read the record that `to_dict` wrote, in this version or an earlier one.

        Args:
            plain: The fields as builtins.
        """
        records = {
            kind: {name: LayerRecord(**record) for name, record in plain[kind].items()} for kind in ("layers", "blocks")
        }
        merged = {name: tuple(MergedInput(*item) for item in plain.get(name, ())) for name in _MERGED}
        return cls(**{**plain, **records, **merged})

    def __str__(self) -> str:
        """Return a table for a terminal of 100 columns."""
        return "\n".join([*heading(self), table(self), *(f"note: {note}" for note in self.notes)])


def _measured(record: LayerRecord, names: Sequence[str]) -> dict[str, float]:
    values = {
        name: record.gradient_rank_at.get(_RANKS_AT[name]) if name in _RANKS_AT else getattr(record, name)
        for name in names
    }
    # A plus makes numbers of False and True.
    return {name: +value for name, value in values.items() if value is not None}


def _fields(record: LayerRecord) -> dict[str, Any]:
    plain = {item.name: getattr(record, item.name) for item in fields(record)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}
