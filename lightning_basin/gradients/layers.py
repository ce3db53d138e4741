"""Behavioral gradients of each layer, by the cheapest way that is right.

The operations that use a layer's parameters say what its gradients are. Nothing is concluded from them alone: what
every way gives must reproduce a random combination of all rows that plain autograd computes, else the next is taken.
Where that combination is no larger than what rounding leaves of terms that cancel, the gradients are zero.
"""

from collections.abc import Iterator, Sequence

from lightning_basin.gradients.check import AutogradCheck, MeasuredGradients
from lightning_basin.gradients.dense import dense_gradients, dense_in_pieces
from lightning_basin.gradients.sizes import groups_of
from lightning_basin.gradients.structured import structured_gradients
from lightning_basin.limits import GROUP_ELEMENTS
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.runs import TracedProbe


def layer_gradients(
    traced: TracedProbe,
    check: "AutogradCheck",
    *,
    layers: Sequence[Layer] | None = None,
    max_elements: int = GROUP_ELEMENTS,
) -> Iterator[MeasuredGradients]:
    """Behavioral gradients of each layer in turn, checked against autograd.

    Args:
        traced: The network on the probe.
        check: Of this network and probe.
        layers: Whose; ``None`` means all.
        max_elements: Numbers that may be held at once, in factors or in dense rows.

    Raises:
        RuntimeError: If no way of computing a layer's gradients agrees with autograd.
    """
    layers = traced.network.layers if layers is None else layers
    waiting: list[tuple[Layer, str | None]] = []
    for layer, gradients in structured_gradients(traced, check, layers, max_elements):
        if gradients is None:
            waiting.append((layer, None))
        elif (measured := check.measured(layer, gradients, structured=True)) is not None:
            yield measured
        else:
            waiting.append(
                (layer, f"layer {escaped(layer.name)!r} is measured row by row: its parameters are used in other ways")
            )
    for group in groups_of(waiting, lambda item: item[0].num_parameters * check.num_rows, max_elements):
        if sum(layer.num_parameters for layer, _ in group) * check.num_rows <= max_elements:
            yield from dense_gradients(traced, group, check)
        else:
            yield dense_in_pieces(traced, *group[0], check, max_elements)
