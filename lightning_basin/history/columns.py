"""One run as columns: each quantity over the steps, for the network and for each layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_basin.history.spectra import SpectrumHistory, spectrum_history
from lightning_basin.layer_names import tags_of
from lightning_basin.record import BasinRecord, LayerRecord, MergedInput

SCHEMA = 1
"""The form of a history as builtins; a later form has a larger number."""

_KEPT_SPECTRA = 8
"""The largest number of layers whose singular values are written: they are long beside a column."""

Column = NDArray[np.float64]
"""The values of a quantity, one for each measurement; NaN where it was not measured."""


@dataclass(frozen=True, eq=False)
class Logged:
    """What else a run has logged under one key: ascending steps of its own, and values, both of shape ``(n,)``."""

    steps: NDArray[np.int64]
    values: Column


@dataclass(frozen=True, eq=False, kw_only=True)
class History:
    """The measurements of one run, oldest first.

    Attributes:
        name: The name of the run in figures and tables.
        steps: The optimizer steps taken at each measurement, shape ``(n,)``.
        network: The columns of the network by quantity, as `BasinRecord.quantities` names them.
        layers: The columns of each layer by quantity, by the layer's name in logged keys, in the order of the network.
            In a table or event files of a network with more than 32 layers, these are blocks.
        zero_loss_step: The step at which the loss had reached zero; ``None`` where it has not.
        merged_inputs: The merged inputs of each measurement; ``None`` where the source does not say them.
        num_inputs: The number of inputs of the probe; ``None`` where the source does not say it.
        is_projected: Whether ranks are lower bounds, because only random combinations of outputs were measured.
        labels: A number or a text for each input of the probe, its class for example; ``None`` where nobody gave them.
        stopped: Why training was stopped; ``None`` where it ended by itself, or the source does not say it.
        spectra: The singular values of the network, under ``None``, and of layers by their names in logged keys, where
            there are any.
        logged: What else the run has logged, by key.
    """

    name: str
    steps: NDArray[np.int64]
    network: Mapping[str, Column]
    layers: Mapping[str, Mapping[str, Column]] = field(default_factory=dict)
    zero_loss_step: int | None = None
    merged_inputs: Sequence[tuple[MergedInput, ...] | None] = ()
    num_inputs: int | None = None
    is_projected: bool = False
    labels: Sequence[float | str] | None = None
    stopped: str | None = None
    spectra: Mapping[str | None, SpectrumHistory] = field(default_factory=dict)
    logged: Mapping[str, Logged] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, int]:
        """The measurements at the start, at zero loss where it was reached, and at the end, by index."""
        last = len(self.steps) - 1
        at_zero = {} if self.zero_loss_step is None else {"zero loss": self.index_at(self.zero_loss_step)}
        return {"start": 0, **at_zero, "end": last}

    def index_at(self, step: int) -> int:
        """Return the index of the last measurement that is not after a step."""
        return max(0, int(np.searchsorted(self.steps, step, side="right")) - 1)

    def column(self, quantity: str, layer: str | None = None) -> Column:
        """Return a quantity of the network, or of a layer, over the steps; all NaN where it was never measured."""
        columns = self.network if layer is None else self.layers[layer]
        return columns.get(quantity, np.full(len(self.steps), np.nan))

    def largest_rank(self, layer: str | None = None) -> Column:
        """Return ``min(m, N)``, the largest rank that there can be, from the rank and what it lacks."""
        return self.column("gradient_rank", layer) + self.column("gradient_rank_deficit", layer)

    def to_dict(self) -> dict[str, Any]:
        """Return all but ``logged`` as builtins for JSON, in which ``None`` stands for NaN; `from_dict` reads it back.

        ``merged_inputs`` has ``None`` also where the merged inputs are those of the measurement before. ``spectra`` has
        the network's, under an empty name, and those of the layers that have lost most.
        """
        merged = [None if item is None else [[m.index, m.equals, m.layer] for m in item] for item in self.merged_inputs]
        repeated = [item if index == 0 or item != merged[index - 1] else None for index, item in enumerate(merged)]
        return {
            "schema": SCHEMA,
            "name": self.name,
            "steps": self.steps.tolist(),
            "zero_loss_step": self.zero_loss_step,
            "num_inputs": self.num_inputs,
            "is_projected": self.is_projected,
            "labels": None if self.labels is None else list(self.labels),
            "stopped": self.stopped,
            "network": _plain(self.network),
            "layers": {layer: _plain(columns) for layer, columns in self.layers.items()},
            "merged_inputs": repeated,
            "spectra": {
                layer or "": self.spectra[layer].to_dict()
                for layer in [None, *self.lossiest_layers(_KEPT_SPECTRA)]
                if layer in self.spectra
            },
        }

    def lossiest_layers(self, number: int) -> list[str]:
        """Return the layers that lack the largest shares of their directions at the end, in the network's order."""
        shares = {layer: self.lost_share(layer)[-1] for layer in self.layers}
        chosen = sorted(shares, key=lambda layer: -np.nan_to_num(shares[layer]))[:number]
        return [layer for layer in self.layers if layer in chosen]

    def lost_share(self, layer: str | None = None) -> Column:
        """Return the share of the ``min(m, N)`` directions that the rank lacks, from 0 to 1."""
        return self.column("gradient_rank_deficit", layer) / np.maximum(self.largest_rank(layer), 1.0)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "History":
        """Read what `to_dict` wrote; what a later version wrote in a form of its own is refused."""
        if plain.get("schema") != SCHEMA:
            raise ValueError(
                f"a history must have the schema {SCHEMA}, got {plain.get('schema')!r}: update the package"
            )
        merged: list[tuple[MergedInput, ...] | None] = []
        for item in plain["merged_inputs"]:
            before = merged[-1] if merged else None
            merged.append(before if item is None else tuple(MergedInput(*parts) for parts in item))
        return cls(
            name=plain["name"],
            steps=np.array(plain["steps"]),
            network=_read(plain["network"]),
            layers={layer: _read(columns) for layer, columns in plain["layers"].items()},
            zero_loss_step=plain["zero_loss_step"],
            merged_inputs=tuple(merged),
            num_inputs=plain["num_inputs"],
            is_projected=plain["is_projected"],
            labels=plain["labels"],
            stopped=plain["stopped"],
            spectra={
                layer or None: SpectrumHistory.from_dict(item) for layer, item in plain.get("spectra", {}).items()
            },
        )

    def num_parameters(self, layer: str | None = None) -> Column:
        """Return N, from the rank and the dimension of what it leaves free."""
        return self.column("gradient_rank", layer) + self.column("gradient_nullity", layer)


def history_of(records: Iterable[BasinRecord], *, name: str = "run", zero_loss_step: int | None = None) -> History:
    """Turn the records of one run, oldest first, into columns; records without a step are numbered."""
    records = list(records)
    if not records:
        raise ValueError("a history needs at least one record, got none: measure first")
    tags = tags_of(dict.fromkeys(layer for record in records for layer in record.layers))
    scopes: dict[str | None, list[LayerRecord | None]] = {None: [*records]}
    scopes |= {tags[layer]: [record.layers.get(layer) for record in records] for layer in tags}
    spectra = {scope: spectrum_history(found) for scope, found in scopes.items()}
    return History(
        name=name,
        steps=np.array([index if record.step is None else record.step for index, record in enumerate(records)]),
        network=columns_of([record.quantities() for record in records]),
        layers={
            tags[layer]: columns_of(
                [record.layers[layer].quantities() if layer in record.layers else {} for record in records]
            )
            for layer in tags
        },
        zero_loss_step=zero_loss_step,
        merged_inputs=tuple(_with_tags(record.merged_inputs, tags) for record in records),
        num_inputs=records[-1].num_inputs,
        is_projected=any(record.projected for record in records),
        spectra={scope: spectrum for scope, spectrum in spectra.items() if spectrum is not None},
    )


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Column]:
    """Turn rows with values by name into columns with NaN for what a row lacks."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in names}


def _with_tags(merged: Iterable[MergedInput], tags: Mapping[str, str]) -> tuple[MergedInput, ...]:
    """Merged inputs with the names of layers as in logged keys."""
    return tuple(
        MergedInput(item.index, item.equals, None if item.layer is None else tags[item.layer]) for item in merged
    )


def _plain(columns: Mapping[str, Column]) -> dict[str, list[float | int | None]]:
    """Columns as lists: integers as such, other numbers to six digits, ``None`` for NaN."""
    return {name: [_plain_number(value) for value in column.tolist()] for name, column in columns.items()}


def _plain_number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def _read(columns: Mapping[str, Sequence[float | None]]) -> dict[str, Column]:
    return {
        name: np.array([np.nan if value is None else value for value in column], dtype=np.float64)
        for name, column in columns.items()
    }
