"""Matrices for tests of the functional core."""

import math

import numpy as np
import pytest
import torch

from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.spectrum import SpectrumAccumulator
from tests.networks import drawn, generator_of


def khatri_rao(k=5, c=3, t=1, d_in=4, d_out=2, columns="weight and bias", seed=0):
    activations = drawn(k, t, d_in, seed=seed) if "weight" in columns else drawn(k, t, 0)
    if "bias" in columns:
        activations = torch.cat([activations, activations.new_ones(k, t, 1)], dim=2)
    return KhatriRaoGradients(activations, drawn(k, c, t, d_out, seed=seed + 1))


FLOAT32 = 2.0**-23


def rounded_to_float32(num_rows, num_columns, rank, smallest=1e-2):
    """A matrix of a rank whose singular values fall to ``smallest``, up to the rounding of its entries."""
    left, right = torch.linalg.qr(drawn(num_rows, rank)).Q, torch.linalg.qr(drawn(num_columns, rank, seed=1)).Q
    exact = (left * torch.logspace(0, math.log10(smallest), rank, dtype=torch.float64)) @ right.mT
    return DenseGradients(exact.float().double())


def rows_by_loop(gradients):
    """Row (x, j): sum over t of b outer a."""
    activations, signals = gradients.activations.numpy(), gradients.output_gradients.numpy()
    rows = []
    for x in range(signals.shape[0]):
        for j in range(signals.shape[1]):
            outer = sum(np.outer(signals[x, j, t], activations[x, t]) for t in range(signals.shape[2]))
            rows.append(outer.ravel())
    return np.stack(rows)


LAYOUTS = [
    pytest.param({"t": t, "columns": columns}, id=f"t={t}, {columns}")
    for t in (1, 4)
    for columns in ("weight and bias", "weight", "bias")
]


def wide_blocks(num_rows=200, rank=None, seed=0):
    """Two layers with 250 x 160 and 250 x 101 entries: 200**2 * 65250 is above what is decomposed as it stands."""
    activations = drawn(num_rows, 1, 250, seed=seed)
    signals = [drawn(num_rows, 1, 1, width, seed=seed + width) for width in (160, 101)]
    if rank is not None:  # Inputs beyond the first ``rank`` repeat them.
        repeated = torch.arange(num_rows) % rank
        activations, signals = activations[repeated], [signal[repeated] for signal in signals]
    return [KhatriRaoGradients(activations, signal) for signal in signals]


def integer_product(rows, columns, rank, seed):
    """A product of integer matrices that contain an identity: its rank is exact."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (rows, rank), generator=generator, dtype=torch.float64)
    right = torch.randint(-3, 4, (rank, columns), generator=generator, dtype=torch.float64)
    left[:rank], right[:, :rank] = torch.eye(rank), torch.eye(rank)
    return left @ right


def spectrum_of(blocks, seed=0):
    """The singular values of blocks side by side."""
    num_columns = sum(block.num_columns for block in blocks)
    accumulator = SpectrumAccumulator(blocks[0].num_rows, num_columns, generator_of(seed))
    for block in blocks:
        accumulator.add(block)
    return accumulator.spectrum()


INFINITE = float("inf")
