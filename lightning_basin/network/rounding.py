"""How far rounding moves what a network computes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin.tensors import map_tensors

_ROUNDINGS = 32.0  # 1 to 4 in networks of all kinds, of 128 units and 20 layers; twice that between two evaluations

_GROWTH = 1e4  # of a rounding where most of what it is part of cancels


def rounding_rtol(dtype: torch.dtype) -> float:
    """How far rounding moves a number that a network computes, relative to the largest of its kind.

    Example:
        >>> f"{rounding_rtol(torch.float64):.0e} {rounding_rtol(torch.float32):.1e}"
        '1e-14 3.8e-06'
    """
    return max(1e-14, _ROUNDINGS * torch.finfo(dtype).eps)


def agreement_rtol(dtype: torch.dtype) -> float:
    """To which fraction of the largest number two evaluations agree, as a wrong formula does not.

    Example:
        >>> f"{agreement_rtol(torch.float64):.0e} {agreement_rtol(torch.float32):.1e}"
        '1e-09 1.2e-03'
    """
    return max(1e-9, _GROWTH * torch.finfo(dtype).eps)


_ENLARGED = 2.0**12
"""By how much perturbations exceed rounding: what is discontinuous (a maximum of equals) is then not taken for it."""

_NUM_EVALUATIONS = 3

_NUM_DRAWN = 2**20  # random factors

_COMPARISONS = {
    *(torch.ops.aten.eq, torch.ops.aten.ne, torch.ops.aten.lt, torch.ops.aten.le, torch.ops.aten.gt, torch.ops.aten.ge),
    *(torch.ops.aten.equal, torch.ops.aten.isnan, torch.ops.aten._local_scalar_dense),
}
"""Do not round; a number is equal to itself, as many modules make sure."""


def rounding_noise(evaluate: Callable[[], Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """How far the rounding of all operations may have moved some results, by Monte Carlo arithmetic (Parker, 1997).

    Whatever enters an operation is perturbed by a random relative error, and what this moves in the results is taken in
    proportion to the rounding unit. So terms that cancel leave the noise of the terms, also where the result is zero.

    Args:
        evaluate: Computes the results, with all their gradients.
        dtype: In which it does.

    Returns:
        For each result the largest deviation of each entry over a few evaluations, in its shape.
    """
    exact = [result.detach() for result in evaluate()]
    noise = [torch.zeros_like(result) for result in exact]
    for seed in range(_NUM_EVALUATIONS):
        with _Perturbed(Generator().manual_seed(seed), _ENLARGED * torch.finfo(dtype).eps):
            moved = [result.detach() for result in evaluate()]
        noise = [largest.maximum((a - b).abs() / _ENLARGED) for largest, a, b in zip(noise, moved, exact, strict=True)]
    return noise


class _Perturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch 2.13 leaves its base untyped
    """Changes a little what enters every operation, forwards and backwards."""

    def __init__(self, generator: Generator, perturbation: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator
        drawn = torch.rand(_NUM_DRAWN, generator=generator, dtype=torch.float64)
        # Uniform, with the variance of a standard error of the same size.
        self._factors = 1 + math.sqrt(12) * perturbation * (drawn - 0.5)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _COMPARISONS:
            return func(*args, **(kwargs or {}))
        aliased = [argument.alias_info is not None for argument in func._schema.arguments]
        # Views stay views, and what is written to is read again by others.
        args = tuple(
            argument if index < len(aliased) and aliased[index] else map_tensors(self._moved, argument)
            for index, argument in enumerate(args)
        )
        return func(*args, **(kwargs or {}))

    def _moved(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # Some of the same factors every time, as drawing takes longer than computing: from another place on.
        start = int(torch.randint(_NUM_DRAWN, (), generator=self._generator))
        count = -(-(start + tensor.numel()) // _NUM_DRAWN)
        factors = self._factors.repeat(count) if count > 1 else self._factors
        return tensor * factors[start : start + tensor.numel()].view(tensor.shape).to(tensor)
