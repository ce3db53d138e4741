"""Which module of a network owns which parameter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


@dataclass(frozen=True)
class Layer:
    """A module that directly owns trainable parameters.

    Attributes:
        name: The module's name in ``named_modules()``; ``""`` for the root.
        parameters: The full names of its trainable parameters; one shared by two modules belongs to the first.
    """

    name: str
    parameters: tuple[str, ...]
    num_parameters: int


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """Find the layers of a module, in the order of ``named_modules()``.

    A parameter without elements, which some modules hold to know their device, is left out like a frozen one.
    """
    seen: set[int] = set()
    layers = []
    for name, submodule in module.named_modules():
        owned = {
            f"{name}.{attribute}" if name else attribute: parameter
            for attribute, parameter in submodule.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.numel() > 0 and id(parameter) not in seen
        }
        seen |= {id(parameter) for parameter in owned.values()}
        if owned:
            layers.append(Layer(name, tuple(owned), sum(parameter.numel() for parameter in owned.values())))
    if not layers:
        raise ValueError(
            f"the module must have at least one trainable parameter, got {type(module).__name__} with none: "
            f"set requires_grad=True on the parameters to measure"
        )
    return tuple(layers)


def parameters_in_graph(result: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters on which a result depends, by its graph."""
    reached = reached_parameters([result], [*parameters.values()])
    return {name for name, is_reached in zip(parameters, reached, strict=True) if is_reached}


def reached_parameters(
    tensors: Iterable[Tensor], parameters: Sequence[Tensor], *, barrier: Tensor | None = None
) -> list[bool]:
    """For each parameter whether the graph of some tensors leads to it on a way that does not pass a barrier."""
    stop = None if barrier is None else tuple(get_gradient_edge(barrier)[:2])
    waiting = [get_gradient_edge(tensor).node for tensor in tensors if tensor.requires_grad]
    seen = set(waiting)
    while waiting:
        for edge in waiting.pop().next_functions:
            if edge[0] is not None and edge[0] not in seen and edge != stop:
                seen.add(edge[0])
                waiting.append(edge[0])
    reached = {id(getattr(node, "variable", None)) for node in seen}
    return [id(parameter) in reached for parameter in parameters]
