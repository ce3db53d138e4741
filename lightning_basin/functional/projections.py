"""Random projections of matrices of gradients: fewer columns, the same rank."""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from lightning_basin.functional.gram import is_cached

CHUNK_ELEMENTS = 2**21
"""Float64 elements of a temporary: 16 MiB."""

CACHED_ELEMENTS = 2**18
"""Float64 elements of a temporary that stays in the cache until it is used: 2 MiB."""

_DEVICE_ELEMENTS = 2**24  # float64 elements of a temporary on an accelerator, which takes few large products: 128 MiB

WAITING_ELEMENTS = 2**26
"""Float64 elements of matrices or factors that wait for their sketch: 512 MiB."""


def temporary_elements(device: torch.device, on_cpu: int) -> int:
    """Return the elements that a temporary may have: ``on_cpu`` on a CPU, many on a device that would wait for work."""
    return on_cpu if is_cached(device) else _DEVICE_ELEMENTS


def fourier_sketch(
    parts: Iterable[Tensor], shape: tuple[int, int], num_columns: int, generator: Generator, device: torch.device
) -> Tensor:
    """Multiply a matrix by a subsampled random Fourier transform, shape ``(m, num_columns)``.

    The transform costs ``N log N`` a row where a Gaussian matrix costs ``N * num_columns`` (Woolfe, Liberty, Rokhlin
    and Tygert, 2008). Its frequencies repeat on columns at equal distances, and only these may be used, as where every
    eighth channel is alive. So the columns are put into a random order first. The diagonal is random and continuous: it
    keeps the rank almost surely if any diagonal does, and for almost every order one does. The sketch is scaled so that
    ``Y @ Y.T`` has the Gram matrix as its mean.
    """
    length = _fast_length(max(shape[1], num_columns + 2))
    order = torch.randperm(shape[1], generator=generator).to(device)
    diagonal = torch.rand(shape[1], generator=generator, dtype=torch.float64).add_(0.5)
    diagonal = diagonal.mul_(torch.randint(0, 2, diagonal.shape, generator=generator).mul_(2).sub_(1)).to(device)
    # The imaginary parts of the first and the last frequency are always zero: leave both out.
    picked = torch.randperm(length - 2, generator=generator)[:num_columns].add_(2).to(device)
    sketch, start = torch.empty(shape[0], num_columns, dtype=torch.float64, device=device), 0
    for part in parts:
        for rows in torch.split(part, max(1, temporary_elements(device, CACHED_ELEMENTS) // length)):
            mixed = torch.gather(rows, 1, order.expand_as(rows)).mul_(diagonal)  # Faster than any indexing.
            spectrum = torch.view_as_real(torch.fft.rfft(mixed, n=length)).flatten(1)
            torch.gather(spectrum, 1, picked.expand(len(rows), -1), out=sketch[start : start + len(rows)])
            start += len(rows)
    # Each picked cosine or sine has mean square 1/2; the diagonal has mean square 13/12.
    return sketch.mul_(math.sqrt(2 * 12 / 13 / num_columns))


def _fast_length(least: int) -> int:
    """The smallest even number without other prime factors than 2, 3 and 5: transforms of this length are fast."""
    lengths: list[int] = []
    for odd in (3**i * 5**j for i in range(4) for j in range(3)):
        length = 2 * odd
        while length < least:
            length *= 2
        lengths.append(length)
    return min(lengths)


def mix(tensor: Tensor, count: int, generator: Generator) -> Tensor:
    """Mix the last axis along random orthonormal directions; leave it where there are no more than ``count``."""
    length = tensor.shape[-1]
    return (
        tensor if count >= length else tensor @ torch.linalg.qr(draw_gaussian(length, count, generator, like=tensor)).Q
    )


def draw_gaussian(rows: int, columns: int, generator: Generator, *, like: Tensor) -> Tensor:
    """Draw a standard normal matrix in float64 on the device of another tensor."""
    # On the CPU, for the same elements on every device. In float32: as random, in a fifth of the time.
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like.device, torch.float64)
