"""The scopes of a quantity: each layer, blocks of layers, and the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_basin.layer_names import layer_blocks
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.settings import LayerSelection


@dataclass(frozen=True)
class Scope:
    """Layers that are reported together: a single layer, a block, or the network, whose name is empty."""

    kind: Literal["layer", "block", "network"]
    name: str
    layers: tuple[Layer, ...]

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters of all its layers."""
        return sum(layer.num_parameters for layer in self.layers)


def select_scopes(layers: Sequence[Layer], selection: LayerSelection) -> tuple[Scope, ...]:
    """Return the scopes to report: the chosen layers, their blocks where the layers are many, and last the network.

    A name is that of a layer, or of a module that holds layers, which is a block then.
    """
    by_name = {layer.name: (layer,) for layer in layers}
    if isinstance(selection, str) and selection not in ("auto", "all"):
        raise ValueError(f"layers must be 'auto', 'all' or a list of names of layers, got {selection!r}")
    names = list(by_name) if isinstance(selection, str) else list(selection)
    inside = {name: tuple(layer for layer in layers if layer.name.startswith(f"{name}.")) for name in names}
    unknown = [name for name in names if name not in by_name and not inside[name]]
    if unknown:
        raise ValueError(
            f"layers must be among {[*map(escaped, by_name)]} or hold some of these, got {[*map(escaped, unknown)]}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"layers must be named once each, got {[*map(escaped, names)]}")
    scopes = [
        Scope("layer", name, by_name[name]) if name in by_name else Scope("block", name, inside[name]) for name in names
    ]
    if selection == "auto":
        for block, members in layer_blocks(names).items():
            scopes.append(Scope("block", block, tuple(by_name[name][0] for name in members)))
    return (*scopes, Scope("network", "", tuple(layers)))
