"""Names of layers as they stand in keys and tables, and blocks of layers."""

from collections.abc import Iterable, Sequence

from lightning_basin.naming import escaped

MAX_LAYER_CURVES = 32
"""The largest number of layers with a curve each: a larger network is drawn by blocks."""


def layer_blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Group the layers of a deep network into at most ``MAX_LAYER_CURVES`` blocks; none for fewer layers.

    The layers of a block share their names up to the first number. Where there are too many blocks, neighbours are
    joined.
    """
    if len(names) <= MAX_LAYER_CURVES:
        return {}
    blocks: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        numbers = [i for i, word in enumerate(words) if word.isdigit()]
        blocks.setdefault(".".join(words[: numbers[0] + 1] if numbers else words), []).append(name)
    if len(blocks) <= MAX_LAYER_CURVES:
        return blocks
    keys = list(blocks)
    size = -(-len(keys) // MAX_LAYER_CURVES)
    joined = {}
    for start in range(0, len(keys), size):
        neighbours = keys[start : start + size]
        name = neighbours[0] if len(neighbours) == 1 else _range_name(neighbours[0], neighbours[-1])
        joined[name] = [layer for key in neighbours for layer in blocks[key]]
    return joined


def _range_name(first: str, last: str) -> str:
    """``layers.0-1`` from ``layers.0`` and ``layers.1``; both names where their stems differ."""
    stem, _, number = last.rpartition(".")
    is_shared = first.rpartition(".")[0] == stem and number.isdigit()
    return f"{_without_slash(first)}-{number if is_shared else _without_slash(last)}"


def tag(layer: str) -> str:
    """Write a layer's name for a logged key: ``root`` for the root, no slash, special characters escaped.

    Example:
        >>> tag(""), tag("fc1"), tag("a/[b]")
        ('root', 'fc1', 'a.%5Bb%5D')
    """
    return escaped(_without_slash(layer))


def _without_slash(layer: str) -> str:
    return layer.replace("/", ".") or "root"


def tags_of(layers: Iterable[str]) -> dict[str, str]:
    """Return the tag of each layer, with a prime where two names look the same without their slash."""
    tags: dict[str, str] = {}
    for layer in layers:
        tags[layer] = tag(layer)
        while tags[layer] in list(tags.values())[:-1]:
            tags[layer] += "'"
    return tags


def shortened(name: str, length: int) -> str:
    """Leave out the beginning of a long name, whose end says more.

    Example:
        >>> shortened("encoder.layers.11.attention.output.dense", 23)
        '…attention.output.dense'
    """
    return name if len(name) <= length else f"…{name[1 - length :]}"
