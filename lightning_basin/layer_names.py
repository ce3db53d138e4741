"""Names of layers as they stand in keys and tables, and blocks of layers."""

from collections.abc import Iterable, Sequence

from lightning_basin.naming import escaped

MAX_LAYER_CURVES = 32
"""Above this number of layers a network is drawn by blocks: more curves than this nobody reads."""


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
