"""The keys of a monitor's values: which there can be, what a key is about, and which one was meant."""

from collections.abc import Collection, Iterable, Sequence
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

_SIMILARITY = 0.85
"""Two keys of at least this similarity may be meant for each other: one character in seven differs."""


@dataclass(frozen=True)
class Key:
    """What a key is about.

    Attributes:
        group: Whether the value is of the network, of one of its layers or blocks, or a statistic over layers.
        quantity: The quantity's name.
        scope: The tag of the layer or block; empty for the other groups.
    """

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
        for group, separator in _STARTS.items():
            start = f"{escaped(prefix)}{separator}"
            if key.startswith(start):
                rest = key.removeprefix(start)
                quantity, _, scope = rest.partition("/") if group in ("layer", "block") else (rest, "", "")
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


def possible_keys(prefix: str, layers: Sequence[str], selection: LayerSelection) -> list[str]:
    """Return every key that a record of a network can have, whatever is measured of it.

    Args:
        prefix: The first characters of every key.
        layers: The names of the layers of the network, in order.
        selection: The layers that are measured, as `measure_basin` takes them.

    Example:
        >>> keys = possible_keys("basin", ["fc1", "fc2"], "auto")
        >>> "basin/gradient_rank" in keys, "basin_layer_gradient_rank/fc3" in keys
        (True, False)
    """
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
    """Return a question that ends a sentence, where another key looks like this one; else nothing.

    Example:
        >>> did_you_mean("basin/gradient_rnak", ["basin/loss", "basin/gradient_rank"])
        ". Did you mean 'basin/gradient_rank'?"
    """
    alike = get_close_matches(key, keys, n=1)
    return f". Did you mean {alike[0]!r}?" if alike else ""


def mistaken_for(key: str, keys: Collection[str], prefixes: Sequence[str]) -> str | None:
    """Return the key that was meant by one that no monitor has; ``None`` for what is most likely the user's own value.

    Args:
        key: A key that begins with none of the prefixes.
        keys: The possible keys of one prefix.
        prefixes: The prefixes of all monitors.

    Example:
        >>> keys = possible_keys("held_out", [], "auto")
        >>> mistaken_for("basin/gradient_rank", keys, ["held_out"])
        'held_out/gradient_rank'
        >>> mistaken_for("val/loss", keys, ["held_out"])
    """
    if Key.of(key, "basin") is not None and "basin" not in prefixes:
        candidates = [f"{escaped(prefix)}{key.removeprefix('basin')}" for prefix in prefixes]
    else:  # A loss is what everybody logs, under any name.
        candidates, keys = [key], [other for other in keys if not other.endswith("loss")]
    matches = (get_close_matches(candidate, keys, n=1, cutoff=_SIMILARITY) for candidate in candidates)
    return next(chain.from_iterable(matches), None)
