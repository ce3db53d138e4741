"""What is measured of ranks in `lightning_basin` itself. Weights are float32, all else is float64."""

import time

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.gradients import AutogradCheck, layer_gradients
from lightning_basin.measurement import evaluated
from lightning_basin.probe import Probe

RANKS = "lightning_basin"
SPECTRA = "lightning_basin, with all singular values"


def ranks(module: nn.Module, inputs: Tensor) -> Stages:
    """The Gram matrix, and whole measurements, which start anew: of the network, and of it with every layer."""
    yield from gram(module, inputs)
    yield "rank", measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank
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
        total = GramMatrix(evaluation.num_rows)
        check = AutogradCheck(evaluation.traced, torch.Generator().manual_seed(0))
        for measured in layer_gradients(evaluation.traced, check):
            started = time.perf_counter()
            measured.gradients.add_gram(total)
            products += time.perf_counter() - started
    started = time.perf_counter()
    gram = total.whole()
    products += time.perf_counter() - started
    yield "gram", gram  # Out here, where float32 is what it is called.
    yield "products", {"seconds": products}


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
    Way(RANKS, ranks, dtypes=_OWN_TYPES, is_cumulative=False, patience=300.0),
    Way(SPECTRA, spectra, dtypes=_OWN_TYPES, only=_SMALL, is_quick=False),
)
STEP = Way("training step", training_step, dtypes=_OWN_TYPES)
SCALING = (Way(RANKS, layers, dtypes=_OWN_TYPES), STEP)
