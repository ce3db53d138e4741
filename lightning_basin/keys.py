"""The keys of a monitor's values: which there can be, what a key is about, and which one was meant."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Literal

from lightning_basin.layer_names import layer_blocks, tags_of
from lightning_basin.naming import escaped
from lightning_basin.record import (
    BLOCK_QUANTITIES,
    LAYER_QUANTITIES,
    NETWORK_QUANTITIES,
    OUTPUT_QUANTITIES,
    STATISTICS,
    BasinRecord,
    LayerRecord,
)
from lightning_basin.settings import LayerSelection

Group = Literal["network", "layer", "block", "stats"]

_STARTS: dict[Group, str] = {"layer": "_layer_", "block": "_block_", "stats": "_stats/", "network": "/"}
"""What stands between the prefix of a key and the quantity."""

FIRST_QUANTITIES = (
    *("gradient_rank", "gradient_rank_bound", "gradient_rank_deficit", "hessian_nullity", "hessian_nullity_lower"),
    *("hessian_nullity_upper", "duplicated_activations", "log10_loss"),
)
"""Quantities of the network that TensorBoard shows first."""

_LAYER_CURVES = ("gradient_rank", "duplicated_activations", "gradient_rank_deficit", "hessian_nullity_lower")
"""Quantities of layers and blocks that TensorBoard shows, the most important one first."""

_MANY_CURVES = 64
"""The number of curves of layers up to which TensorBoard shows more than one quantity of each."""

_BANDS = tuple(name for name in STATISTICS if name.startswith(("gradient_rank_deficit", "duplicated_activations")))
"""Statistics over the layers that TensorBoard shows."""

_MORE = "_more"
"""The end of the group of TensorBoard in which all other values of the network are."""

_MOVED = {*NETWORK_QUANTITIES, "zero_loss_step", "skipped_measurements"} - {*FIRST_QUANTITIES}

_SIMILARITY = 0.85
"""Two keys of at least this similarity may be meant for each other: one character in seven differs."""


@dataclass(frozen=True)
class Key:
    """What a key is about: a quantity, and the tag of its layer or block, which is empty for the other groups."""

    group: Group
    quantity: str
    scope: str = ""

    @classmethod
    def of(cls, key: str, prefix: str) -> "Key | None":
        """Take a key apart; ``None`` where it does not begin as the keys of a prefix do.

        Example:
            >>> Key.of("basin_layer_dead_units/fc1", "basin")
            Key(group='layer', quantity='dead_units', scope='fc1')
        """
        start = escaped(prefix)
        rest = key[len(start) :] if key.startswith(start) else ""
        for group, separator in _STARTS.items():
            if rest.startswith(separator):
                name = rest.removeprefix(separator)
                quantity, _, scope = name.partition("/") if group in ("layer", "block") else (name, "", "")
                return cls(group, quantity, scope)
        return None

    def records_in(self, record: BasinRecord) -> list[LayerRecord]:
        """Return the records from which the value is computed; none where the scope was not measured."""
        if self.group == "network":
            return [record]
        if self.group == "stats":
            return list(record.layers.values())
        scopes = record.blocks if self.group == "block" else record.layers
        return [scopes[name] for name, tag in tags_of(scopes).items() if tag == self.scope]


def tensorboard_values(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return what TensorBoard shows of a record, by tag: all keys of a deep network would hide the first ones.

    It opens the first groups of the alphabet. There the `FIRST_QUANTITIES` stay; other values of the network go to
    ``<prefix>_more``; of layers and of statistics over them some are shown. About 100 tags are left.
    """
    keys = {name: key for name in values if (key := Key.of(name, prefix)) is not None}
    num_scopes = sum(bool(key.scope) and key.quantity == _LAYER_CURVES[0] for key in keys.values())
    curves = _LAYER_CURVES[: max(1, _MANY_CURVES // max(1, num_scopes))]
    shown = {}
    for name, key in keys.items():
        if key.group == "network" and key.quantity in _MOVED:
            shown[f"{escaped(prefix)}{_MORE}/{key.quantity}"] = values[name]
        elif key.group == "network" or key.quantity in (_BANDS if key.group == "stats" else curves):
            shown[name] = values[name]
    return shown


def key_of_tag(tag: str) -> str:
    """Return the key that is shown under a tag in TensorBoard; the tag itself where they are the same."""
    group, _, quantity = tag.rpartition("/")
    is_moved = group.endswith(_MORE) and quantity in _MOVED
    return f"{group.removesuffix(_MORE)}/{quantity}" if is_moved else tag


def possible_keys(prefix: str, layers: Sequence[str], selection: LayerSelection) -> list[str]:
    """Return every key that a record of a network can have, whatever is measured of it."""
    prefix = escaped(prefix)
    names = layers if isinstance(selection, str) else selection
    blocks = layer_blocks(names) if selection == "auto" else {}
    group, tags = ("block" if blocks else "layer"), list(tags_of(blocks or names).values())
    quantities = BLOCK_QUANTITIES if blocks else LAYER_QUANTITIES
    scoped = [(quantity, tag) for quantity in quantities for tag in tags]
    if "output" not in tags:
        scoped += [(quantity, "output") for quantity in OUTPUT_QUANTITIES]
    return [
        *(f"{prefix}/{quantity}" for quantity in (*NETWORK_QUANTITIES, "zero_loss_step")),
        *(f"{prefix}_{group}_{quantity}/{tag}" for quantity, tag in scoped),
        *(f"{prefix}_stats/{name}" for name in STATISTICS),
    ]


def did_you_mean(key: str, keys: Iterable[str]) -> str:
    """Return a question that ends a sentence, where another key looks like this one; else nothing."""
    alike = get_close_matches(key, keys, n=1)
    return f". Did you mean {alike[0]!r}?" if alike else ""


def mistaken_for(key: str, keys: Collection[str], prefixes: Sequence[str]) -> str | None:
    """Return the key that was meant by one that no monitor has; ``None`` for what is likely the user's own value."""
    if key_of_tag(key) != key and key_of_tag(key) in keys:  # As it stands in TensorBoard.
        return key_of_tag(key)
    if Key.of(key, "basin") is not None and "basin" not in prefixes:
        candidates = [f"{escaped(prefix)}{key.removeprefix('basin')}" for prefix in prefixes]
    else:  # A loss is what everybody logs, under any name.
        candidates, keys = [key], [other for other in keys if not other.endswith("loss")]
    matches = (get_close_matches(candidate, keys, n=1, cutoff=_SIMILARITY) for candidate in candidates)
    return next(chain.from_iterable(matches), None)
