"""What is measured of ranks in `lightning_basin` itself. Weights are float32, all else is float64."""

import time

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin
from lightning_basin.gradients import layer_gradients
from lightning_basin.measurement import evaluated
from lightning_basin.probe import Probe

RANKS = "lightning_basin"
SPECTRA = "lightning_basin, with all singular values"

_BLOCK_ROWS = 256


def ranks(module: nn.Module, inputs: Tensor) -> Stages:
    """The Gram matrix, and whole measurements, which start anew: of the network, and of it with every layer."""
    yield from gram(module, inputs)
    yield "rank", measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank
    yield from layers(module, inputs)


def large_ranks(module: nn.Module, inputs: Tensor) -> Stages:
    """The same where a measurement takes long: the one of every layer measures the network too."""
    yield from gram(module, inputs)
    yield from layers(module, inputs)


def layers(module: nn.Module, inputs: Tensor) -> Stages:
    """A whole measurement of the network and every layer."""
    record = measure_basin(module, inputs, spectrum=False)
    yield "layers", (record.gradient_rank, *(layer.gradient_rank for layer in record.layers.values()))


def gram(module: nn.Module, inputs: Tensor) -> Stages:
    """Products of all pairs of rows of the gradients, checked against autograd as in every measurement.

    The copy in float64, its run and the checks of its outputs are a stage of their own; and the products of factors
    are timed apart from the derivatives that give the factors.
    """
    products = 0.0
    with evaluated(module, Probe(inputs), None, None) as evaluation:
        yield "copy", None
        total = inputs.new_zeros(evaluation.num_rows, evaluation.num_rows, dtype=torch.float64)
        for measured in layer_gradients(evaluation.traced, generator=torch.Generator().manual_seed(0)):
            started = time.perf_counter()
            measured.gradients.add_lower_gram(total)
            products += time.perf_counter() - started
    started = time.perf_counter()
    _mirror(total)
    products += time.perf_counter() - started
    yield "gram", total  # Out here, where float32 is what it is called.
    yield "products", {"seconds": products}


def _mirror(lower: Tensor) -> None:
    """Fill the upper half of a symmetric matrix."""
    for block in torch.arange(len(lower)).split(_BLOCK_ROWS):
        rows = slice(int(block[0]), int(block[-1]) + 1)
        lower[: rows.start, rows] = lower[rows, : rows.start].mT
        diagonal = lower[rows, rows]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)


def spectra(module: nn.Module, inputs: Tensor) -> Stages:
    """The default of `measure_basin`: ranks with all singular values."""
    record = measure_basin(module, inputs)
    yield "layers", (record.gradient_rank, *(layer.gradient_rank for layer in record.layers.values()))


def training_step(module: nn.Module, inputs: Tensor) -> Stages:
    """One step of gradient descent on the probe."""
    module.zero_grad()
    module(inputs).square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(parameter.grad, alpha=1e-6)
    yield "step", None


_SMALL = ("seed", "seed-repeated", "mlp", "mlp-large", "cnn", "cnn-repeated", "transformer")
_OWN_TYPES = (torch.float32,)

OURS = (
    Way(RANKS, ranks, dtypes=_OWN_TYPES, is_cumulative=False, only=_SMALL),
    Way(RANKS, large_ranks, dtypes=_OWN_TYPES, is_cumulative=False, only=("resnet",), patience=300.0),
    Way(SPECTRA, spectra, dtypes=_OWN_TYPES, only=_SMALL, is_quick=False),
)
STEP = Way("training step", training_step, dtypes=_OWN_TYPES)
SCALING = (Way(RANKS, layers, dtypes=_OWN_TYPES), STEP)
