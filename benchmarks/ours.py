"""What is timed of `lightning_basin` itself, and one training step beside it."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin, neural_tangent_kernel

NAME = "lightning_basin"


def gram(module: nn.Module, inputs: Tensor) -> Stages:
    """The Gram matrix of the gradients, in the module's floating point type."""
    is_single = next(module.parameters()).dtype == torch.float32
    yield "gram", neural_tangent_kernel(module, inputs, dtype="float32" if is_single else "float64")


def rank(module: nn.Module, inputs: Tensor) -> Stages:
    """A measurement of the rank of the network alone."""
    yield "rank", measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank


def ranks(module: nn.Module, inputs: Tensor, *, spectrum: bool = False) -> Stages:
    """A measurement of the network and every layer."""
    record = measure_basin(module, inputs, spectrum=spectrum)
    yield "layers", (record.gradient_rank, *(layer.gradient_rank for layer in record.layers.values()))


def training_step(module: nn.Module, inputs: Tensor) -> Stages:
    """One step of gradient descent on the probe, to compare ranks with."""
    module.zero_grad()
    module(inputs).square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(parameter.grad, alpha=1e-6)
    yield "rank", ""


_SINGLE = (torch.float32,)  # Our ranks take float32 weights, and compute in float64.
_SPECTRA = ("seed", "seed-repeated", "mlp", "mlp-large", "cnn", "cnn-repeated", "transformer")

STEP = Way("one training step", training_step, dtypes=_SINGLE)
RANKS = (Way(f"{NAME}, rank", rank, dtypes=_SINGLE), Way(f"{NAME}, with layers", ranks, dtypes=_SINGLE))
OURS = (
    Way(f"{NAME}, Gram matrix", gram),
    *RANKS,
    Way(f"{NAME}, all singular values", partial(ranks, spectrum=True), dtypes=_SINGLE, only=_SPECTRA),
)
