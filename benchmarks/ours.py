"""What is measured of ranks and Gram matrices in `lightning_basin` itself."""

import time

import torch
from torch import Tensor, nn

from benchmarks.timing import Stages, Way
from lightning_basin import measure_basin, neural_tangent_kernel
from lightning_basin.evaluation import open_evaluation
from lightning_basin.functional.gram import GramMatrix
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.probe import Probe
from lightning_basin.settings import Precision, Settings

RANKS = "lightning_basin"
SPECTRA = "lightning_basin, with all singular values"
KERNEL = "lightning_basin, Gram matrix"
PARTS = "parts of our Gram matrix"


def ranks(module: nn.Module, inputs: Tensor) -> Stages:
    """Whole measurements, which start anew: of the network, and of it with every layer."""
    yield "rank", measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank
    yield from layers(module, inputs)


def layers(module: nn.Module, inputs: Tensor) -> Stages:
    """A whole measurement of the network and every layer."""
    record = measure_basin(module, inputs, spectrum=False)
    yield "layers", (record.gradient_rank, *(layer.gradient_rank for layer in record.layers.values()))


def kernel(module: nn.Module, inputs: Tensor) -> Stages:
    """The Gram matrix in the precision of the module."""
    precision: Precision = "float32" if next(module.parameters()).dtype == torch.float32 else "float64"
    yield "gram", neural_tangent_kernel(module, inputs, dtype=precision)


def parts(module: nn.Module, inputs: Tensor) -> Stages:
    """The same: the copy, its run and the checks of its outputs apart; and of the rest the products of factors."""
    dtype = next(module.parameters()).dtype
    precision: Precision = "float32" if dtype == torch.float32 else "float64"
    products = 0.0
    with open_evaluation(module, Probe(inputs), Settings(dtype=precision), gradient_dtype=dtype) as evaluation:
        yield "copy", None
        total = GramMatrix(evaluation.num_rows, dtype=dtype)
        check = AutogradCheck(evaluation.traced, torch.Generator().manual_seed(0))
        for measured in layer_gradients(evaluation.traced, check):
            started = time.perf_counter()
            measured.gradients.add_gram(total)
            products += time.perf_counter() - started
    started = time.perf_counter()
    total.whole()
    products += time.perf_counter() - started
    yield "gram", None
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
    Way(KERNEL, kernel),
    Way(PARTS, parts, is_cumulative=False),
    Way(RANKS, ranks, dtypes=_OWN_TYPES, is_cumulative=False, patience=300.0),
    Way(SPECTRA, spectra, dtypes=_OWN_TYPES, only=_SMALL, is_quick=False),
)
STEP = Way("training step", training_step, dtypes=_OWN_TYPES)
SCALING = (Way(RANKS, layers, dtypes=_OWN_TYPES), STEP)
