"""How fast a device multiplies in float64."""

import time
from functools import cache

import torch

from lightning_basin.network.isolation import isolated_evaluation

_SIZE, _NUM_PRODUCTS, _NUM_TRIALS = 1024, 8, 4  # 2e9 operations in a product, which is more than it takes to start it

_SLOW = 8.0
"""Ratio of times from which on float64 is slow. On a data center's GPU the ratio is 1 to 2, on others 16 to 64."""


@cache
def has_slow_float64(device: torch.device) -> bool:
    """Whether a device takes much longer for products in float64 than in float32; found once in a process.

    It is true for MPS, which has no float64; false for a CPU, whose ratio is 2, and for a device of another kind.
    """
    if device.type not in ("cuda", "xpu"):
        return device.type == "mps"
    with isolated_evaluation(device, torch.float32), torch.no_grad():  # Without TF32, as networks are evaluated.
        return _seconds(device, torch.float64) > _SLOW * _seconds(device, torch.float32)


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The time of some products of square matrices, the shortest of several trials, in seconds."""
    matrix = torch.ones(_SIZE, _SIZE, device=device, dtype=dtype)
    trials = []
    for _ in range(_NUM_TRIALS):
        started = time.perf_counter()
        product = matrix
        for _ in range(_NUM_PRODUCTS):
            product = matrix @ matrix
        product[0, 0].item()  # Waits for the device.
        trials.append(time.perf_counter() - started)
    return min(trials[1:])  # The first one prepares the kernels.
