"""Behavioral gradients of each layer, by the cheapest method that is right.

The recorded operations say what the gradients of a layer are. Nothing is concluded from them alone: the gradients must
reproduce a random combination of all rows that plain autograd computes. Those of other layers are dense rows, from
automatic differentiation.
"""

from collections.abc import Iterator, Sequence

from lightning_basin.gradients.check import AutogradCheck, MeasuredGradients
from lightning_basin.gradients.dense import dense_gradients
from lightning_basin.gradients.sizes import split_by_size
from lightning_basin.gradients.structured import structured_gradients
from lightning_basin.limits import GROUP_ELEMENTS, MemoryBudgetError
from lightning_basin.naming import escaped
from lightning_basin.network.layers import Layer
from lightning_basin.network.runs import ProbeRuns

_UNKNOWN_USE = "layer {!r} is measured row by row: its parameters are used in other ways"


def layer_gradients(
    runs: ProbeRuns,
    check: AutogradCheck,
    *,
    layers: Sequence[Layer] | None = None,
    max_elements: int = GROUP_ELEMENTS,
) -> Iterator[MeasuredGradients]:
    """Yield the behavioral gradients of each layer, checked against autograd.

    Args:
        runs: The network's runs over the probe.
        check: The check for this network and probe.
        layers: The layers to measure; ``None`` means all.
        max_elements: Elements that the factors or the dense rows of one layer may have. Smaller layers are measured
            together, up to ``GROUP_ELEMENTS``.

    Raises:
        MemoryBudgetError: If a layer must be measured row by row, and its rows have more elements.
        RuntimeError: If no method of computing a layer's gradients agrees with autograd.
    """
    layers = runs.network.layers if layers is None else layers
    waiting: list[tuple[Layer, str | None]] = []
    for group in structured_gradients(runs, check, layers, max_elements):
        known = {layer: gradients for layer, gradients in group.items() if gradients is not None}
        confirmed = check.confirm(known, structured=True, notes={})
        notes = {layer: _UNKNOWN_USE.format(escaped(layer.name)) if layer in known else None for layer in group}
        known.clear()  # Of a layer that has been looked at nothing shall be held.
        group.clear()
        for layer, note in notes.items():
            if layer in confirmed:
                yield confirmed.pop(layer)
                continue
            _check_dense_size(layer, check.num_rows, max_elements)
            waiting.append((layer, note))
    group_elements = min(max_elements, GROUP_ELEMENTS)
    for dense in split_by_size(waiting, lambda item: item[0].num_parameters * check.num_rows, group_elements):
        yield from dense_gradients(runs, dense, check)


def _check_dense_size(layer: Layer, num_rows: int, max_elements: int) -> None:
    if num_rows * layer.num_parameters > max_elements:
        raise MemoryBudgetError(
            f"layer {escaped(layer.name)!r} must be measured row by row, but its {num_rows} rows by "
            f"{layer.num_parameters} parameters do not fit into memory_budget: take a smaller probe, fewer outputs "
            f"(max_outputs of measure_basin), or a larger memory_budget"
        )
