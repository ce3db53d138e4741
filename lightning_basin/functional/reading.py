"""Numbers of several computations, read from a device together.

A program that reads a number from an accelerator waits until all that was asked for before is done. A computation that
must read is therefore written as a generator: it yields the tensors it needs, and goes on with their elements. Those of
many layers run side by side, and wait once for each step instead of once for each layer.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

_Result = TypeVar("_Result")

Array: TypeAlias = npt.NDArray[Any]

Reading: TypeAlias = Generator[Sequence[Tensor], Sequence[Array], _Result]
"""A computation that yields tensors of a device, is sent their elements, and returns a result."""


def read(tensors: Sequence[Tensor]) -> list[Array]:
    """Read tensors of any shapes, in one transfer for each device and dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(place)
    arrays: dict[int, Array] = {}
    for together in places.values():
        flat = [tensors[place].flatten() for place in together]
        elements = (torch.cat(flat) if len(flat) > 1 else flat[0]).detach().cpu().numpy()
        start = 0
        for place in together:
            tensor = tensors[place]
            arrays[place] = elements[start : start + tensor.numel()].reshape(tensor.shape)
            start += tensor.numel()
    return [arrays[place] for place in range(len(tensors))]


def read_together(computations: Iterable[Reading[_Result]]) -> list[_Result]:
    """Run computations side by side, step by step, and return their results in the same order.

    Example:
        >>> def doubled(number: Tensor) -> Reading[float]:
        ...     (read_number,) = yield [2 * number]
        ...     return float(read_number)
        >>> read_together([doubled(torch.tensor(1.0)), doubled(torch.tensor(3.0))])
        [2.0, 6.0]
    """
    results: dict[int, _Result] = {}

    def run(place: int, computation: Reading[_Result]) -> Generator[Sequence[Tensor] | None, Sequence[Array], None]:
        results[place] = yield from computation
        yield None

    running = [run(place, computation) for place, computation in enumerate(computations)]
    asked = {place: tensors for place, computation in enumerate(running) if (tensors := next(computation)) is not None}
    while asked:
        arrays = iter(read([tensor for tensors in asked.values() for tensor in tensors]))
        answers = {place: [next(arrays) for _ in tensors] for place, tensors in asked.items()}
        sent = ((place, running[place].send(answer)) for place, answer in answers.items())
        asked = {place: tensors for place, tensors in sent if tensors is not None}
    return [results[place] for place in range(len(running))]
