"""What no single number says of a measurement, as one JSON object in tables and event files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_basin.history.columns import Column, History
from lightning_basin.history.spectra import SpectrumHistory, spectrum_history
from lightning_basin.layer_names import MAX_LAYER_CURVES, layer_blocks, tags_of
from lightning_basin.record import BasinRecord, LayerRecord, MergedInput

DETAILS = "details"
"""The name under which details stand in a table or in event files, where a value has that of its quantity."""


def details_of(record: BasinRecord) -> dict[str, Any]:
    """Return what a record's logged values do not say: sizes, singular values and merged inputs.

    Scopes are those of the logged keys, and the network, under an empty name. Above 32 of them only the network has
    singular values.

    Returns:
        Builtins for JSON: ``inputs``; ``outputs``, m; ``parameters``, N of each scope; ``spectra`` as
        `SpectrumHistory.to_dict` writes them; and ``merged_inputs`` as ``[index, equals, layer]``.
    """
    scopes = record.blocks or record.layers
    tags = tags_of(scopes)
    named: dict[str, LayerRecord] = {"": record, **{tags[name]: scope for name, scope in scopes.items()}}
    blocks = layer_blocks([*record.layers]) if record.blocks else {layer: [layer] for layer in record.layers}
    tag_of = {layer: tags[block] for block, layers in blocks.items() for layer in layers}
    spectra = {name: spectrum_history([named[name]]) for name in (named if len(scopes) <= MAX_LAYER_CURVES else [""])}
    return {
        "inputs": record.num_inputs,
        "outputs": record.num_rows,
        "parameters": {name: scope.num_parameters for name, scope in named.items()},
        "spectra": {name: spectrum.to_dict() for name, spectrum in spectra.items() if spectrum is not None},
        "merged_inputs": [[m.index, m.equals, m.layer and tag_of[m.layer]] for m in record.merged_inputs],
    }


def with_details(history: History, details: Mapping[int, Mapping[str, Any]]) -> History:
    """Return a history with what `details_of` has returned, by step, beside its columns; some steps may be missing."""
    found = [details.get(step) for step in history.steps.tolist()]
    known = [item for item in found if item is not None]
    if not known:
        return history
    outputs, parameters = known[-1]["outputs"], known[-1]["parameters"]
    scopes = dict.fromkeys(scope for item in known for scope in item["spectra"])
    return replace(
        history,
        num_inputs=known[-1]["inputs"],
        network=_with_sizes(history.network, outputs, parameters.get("")),
        layers={
            layer: _with_sizes(columns, outputs, parameters.get(layer)) for layer, columns in history.layers.items()
        },
        merged_inputs=tuple(
            None if item is None else tuple(MergedInput(*merged) for merged in item["merged_inputs"]) for item in found
        ),
        spectra={scope or None: _spectrum(found, scope) for scope in scopes},
    )


def _with_sizes(columns: Mapping[str, Column], outputs: int, parameters: int | None) -> Mapping[str, Column]:
    """Columns with what follows from a rank and a size: event files of deep networks leave it out."""
    if parameters is None:
        return columns
    rank = columns["gradient_rank"]
    derived = {"gradient_rank_deficit": min(outputs, parameters) - rank, "gradient_nullity": parameters - rank}
    return {**derived, **columns}


def _spectrum(details: list[Mapping[str, Any] | None], scope: str) -> SpectrumHistory:
    spectra = [{} if item is None else item["spectra"].get(scope, {}) for item in details]
    plain = {name: [item.get(name, [None])[0] for item in spectra] for name in ("counts", "cuts")}
    return SpectrumHistory.from_dict(plain)
