"""The keys under which a monitor's values are found: which there can be, what one is about, and which one was meant."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

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

_GROUPS = {"network": "/", "layer": "_layer_", "block": "_block_", "stats": "_stats/"}
_ALIKE = 0.85  # of two keys: one character in seven is another


@dataclass(frozen=True)
class Key:
    """What a key is about.

    Attributes:
        group: The network, one of its layers or blocks, or statistics over layers.
        quantity: Its name.
        part: The tag of the layer or block, empty for the others.
    """

    group: Literal["network", "layer", "block", "stats"]
    quantity: str
    part: str = ""

    @classmethod
    def of(cls, key: str, prefix: str) -> "Key | None":
        """A key taken apart; ``None`` where it does not begin as those of a prefix do.

        Example:
            >>> Key.of("basin_layer_dead_units/fc1", "basin")
            Key(group='layer', quantity='dead_units', part='fc1')
        """
        for group in ("layer", "block", "stats", "network"):
            start = f"{escaped(prefix)}{_GROUPS[group]}"
            if key.startswith(start):
                has_part = group in ("layer", "block")
                quantity, _, part = key.removeprefix(start).partition("/") if has_part else (key[len(start) :], "", "")
                return cls(group, quantity, part)
        return None

    def measured(self, record: BasinRecord) -> list[LayerRecord]:
        """The parts of a record that the value is computed from; none where it has none of this name."""
        if self.group == "network":
            return [record]
        if self.group == "stats":
            return list(record.layers.values())
        parts = record.blocks if self.group == "block" else record.layers
        return [parts[name] for name, tag in tags_of(parts).items() if tag == self.part]


def possible_keys(prefix: str, layers: Sequence[str], selection: Literal["auto", "all"] | Sequence[str]) -> list[str]:
    """Every key that a record of a network can have, whatever is measured of it.

    Args:
        prefix: First part of every key.
        layers: Names of its layers, in order.
        selection: Which of them are measured, as `measure_basin` takes it.

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
    parts = [(quantity, tag) for quantity in quantities for tag in tags]
    if "output" not in tags:
        parts += [(quantity, "output") for quantity in OUTPUT_QUANTITIES]
    return [
        *(f"{prefix}/{quantity}" for quantity in (*NETWORK_QUANTITIES, "zero_loss_step")),
        *(f"{prefix}_{group}_{quantity}/{tag}" for quantity, tag in parts),
        *(f"{prefix}_stats/{name}" for name in STATISTICS),
    ]


def did_you_mean(key: str, keys: Iterable[str]) -> str:
    """A question that ends a sentence, where one of the keys looks like another one; else nothing.

    Example:
        >>> did_you_mean("basin/gradient_rnak", ["basin/loss", "basin/gradient_rank"])
        ". Did you mean 'basin/gradient_rank'?"
    """
    alike = get_close_matches(key, keys, n=1)
    return f". Did you mean {alike[0]!r}?" if alike else ""


def mistaken_for(key: str, keys: Collection[str], prefixes: Sequence[str]) -> str | None:
    """The key that was meant by one that no monitor has; ``None`` where it is a value of the user's own, most likely.

    Args:
        key: Begins with none of the prefixes.
        keys: Those that there can be, of one prefix.
        prefixes: Of all monitors.

    Example:
        >>> keys = possible_keys("held_out", [], "auto")
        >>> mistaken_for("basin/gradient_rank", keys, ["held_out"])
        'held_out/gradient_rank'
        >>> mistaken_for("val/loss", keys, ["held_out"])
    """
    default = Key.of(key, "basin")
    if default is not None and "basin" not in prefixes:
        renamed = [f"{escaped(prefix)}{key.removeprefix('basin')}" for prefix in prefixes]
        alike = [match for name in renamed for match in get_close_matches(name, keys, n=1, cutoff=_ALIKE)]
        return alike[0] if alike else None
    # A loss is what everybody logs, under any name.
    own = [one for one in keys if not one.endswith("loss")]
    alike = get_close_matches(key, own, n=1, cutoff=_ALIKE)
    return alike[0] if alike else None


def left_out(settings: Mapping[str, Any]) -> dict[str, str]:
    """Quantities that no measurement with some settings has, each with the setting that leaves it out.

    Args:
        settings: Arguments of a `BasinMonitor` by name.

    Example:
        >>> left_out({"hessian": False, "dtype": "float64", "verify_null_space": 3, "duplicates_over": "train"})[
        ...     "gauss_newton_nullity"
        ... ]
        'hessian=False'
    """
    missing: dict[str, str] = {}
    of_training_set = [name for name in NETWORK_QUANTITIES if name.startswith("train_")]
    of_hessian = [name for name in NETWORK_QUANTITIES if name.startswith(_OF_HESSIAN)]
    for name, leaves_out, quantities in (
        ("hessian", settings["hessian"] is False, of_hessian),
        ("dtype", settings["dtype"] == "float32", of_hessian),
        ("verify_null_space", settings["verify_null_space"] is None, ["surviving_fraction"]),
        ("duplicates_over", settings["duplicates_over"] is None, of_training_set),
    ):
        if leaves_out:
            missing |= dict.fromkeys(quantities, f"{name}={settings[name]!r}")
    return missing


_OF_HESSIAN = ("hessian_", "residual_curvature", "smallest_curvature", "gauss_newton_nullity")
