"""Counts of activations that equal an earlier one within a tolerance, by us and by others."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ours import NAME
from benchmarks.timing import Stages, Way
from lightning_basin.functional import duplicate_classes

RTOL = 1e-6


def ours(activations: Tensor) -> Tensor:
    """The class of each activation: those near each other along random directions joined transitively."""
    return duplicate_classes(activations, rtol=RTOL)


def clustering(activations: Tensor) -> Tensor:
    """scikit-learn: in DBSCAN with clusters of one the classes are the connected components within a distance."""
    from sklearn.cluster import DBSCAN

    distance = RTOL * float(activations.abs().max())
    return torch.from_numpy(DBSCAN(eps=distance, min_samples=1, metric="chebyshev").fit_predict(activations.numpy()))


def equality(activations: Tensor) -> Tensor:
    """`torch.unique`: equal bits only."""
    return torch.unique(activations, dim=0, return_inverse=True)[1]


def count(classes: Callable[[Tensor], Tensor], module: nn.Module, inputs: Tensor) -> Stages:
    """The number of activations that are in the class of an earlier one."""
    yield "duplicates", len(inputs) - classes(module(inputs)).unique().numel()


_DOUBLE = (torch.float64,)

DUPLICATES = (
    Way(NAME, partial(count, ours), dtypes=_DOUBLE),
    Way("scikit-learn, DBSCAN", partial(count, clustering), "scikit-learn", _DOUBLE),
    Way("torch.unique", partial(count, equality), dtypes=_DOUBLE),
)
