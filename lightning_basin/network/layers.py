"""Which module of a network owns which parameter."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A module that directly owns trainable parameters.

    Attributes:
        name: Its name in ``named_modules()``; ``""`` for the root.
        parameters: Full names of the parameters it owns; one shared by two modules belongs to the first.
        num_parameters: Their number of entries.
    """

    name: str
    parameters: tuple[str, ...]
    num_parameters: int


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """The layers of a module, in the order of ``named_modules()``.

    A parameter without elements, as some modules hold one to know their device, is left out like a frozen one.

    Raises:
        ValueError: If the module has no trainable parameters.

    Example:
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))]
        ['0', '2']
    """
    seen: set[int] = set()
    layers = []
    for name, part in module.named_modules():
        owned = {
            f"{name}.{own}" if name else own: parameter
            for own, parameter in part.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.numel() > 0 and id(parameter) not in seen
        }
        seen |= {id(parameter) for parameter in owned.values()}
        if owned:
            layers.append(Layer(name, tuple(owned), sum(parameter.numel() for parameter in owned.values())))
    if not layers:
        raise ValueError(
            f"the module must have at least one trainable parameter, got {type(module).__name__} with none: "
            f"set requires_grad=True on those to measure"
        )
    return tuple(layers)


def parameters_in_graph(result: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters on which a result depends, by its graph.

    Args:
        result: A tensor with or without a graph.
        parameters: Tensors that may be in it, by name.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> sorted(parameters_in_graph(layer(torch.ones(1, 2)), dict(layer.named_parameters())))
        ['bias', 'weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: set[str] = set()
    waiting, seen = [result.grad_fn], {result.grad_fn}
    while waiting:
        node = waiting.pop()
        name = names.get(id(getattr(node, "variable", None)))
        found |= set() if name is None else {name}
        for following, _ in () if node is None else node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
