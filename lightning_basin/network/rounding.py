"""How far rounding moves the results of a network."""

import torch
from torch import Tensor

from lightning_basin.network.network import Network
from lightning_basin.probe import Probe

_ROUNDINGS = 32.0
"""Rounding units by which two evaluations may differ; 1 to 4 were seen in networks of 128 units and 20 layers."""

_GROWTH = 1e4
"""Factor by which a rounding error grows, relative to the result, where most of its terms cancel."""


def rounding_rtol(dtype: torch.dtype) -> float:
    """Return how far rounding moves an element of a result, relative to the largest element of its tensor."""
    return max(1e-14, _ROUNDINGS * torch.finfo(dtype).eps)


def agreement_rtol(dtype: torch.dtype) -> float:
    """Return the tolerance, relative to the largest element, within which results agree but wrong formulas do not."""
    return max(1e-9, _GROWTH * torch.finfo(dtype).eps)


def agree(result: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> bool:
    """Return whether two evaluations agree, relative to the largest element; results of two shapes do not.

    NaN agrees with NaN, as in a run that diverged: it is refused for what it is, and not for a difference.
    """
    if result.shape != expected.shape or expected.numel() == 0:
        return result.shape == expected.shape
    result, expected = result.detach(), expected.detach()
    difference, rtol = (result - expected).abs(), agreement_rtol(dtype)
    if bool((difference / expected.abs().max() <= rtol).all()):  # Never with an infinite one.
        return True
    is_same = (result == expected) | (result.isnan() & expected.isnan())
    size = expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max()
    return bool((is_same | (difference <= rtol * size)).all())


def in_other_precision(network: Network, probe: Probe) -> tuple[Network, Probe]:
    """Copy a network and a probe from float64 to float32, or from float32 to float64.

    The results in two precisions differ by the rounding of the lower one, in all operations together. The difference
    shows how much of a result is rounding, also where terms cancel inside of the network.
    """
    dtype = torch.float32 if network.dtype == torch.float64 else torch.float64
    return network.in_precision(dtype), probe.to(network.parameters()[0].device, dtype)
