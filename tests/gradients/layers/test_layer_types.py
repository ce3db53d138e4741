"""The integers of every type of layer, against arithmetic that is exact or has 60 digits."""

import copy

import numpy as np
import pytest
import torch

from lightning_basin import measure_basin
from lightning_basin.functional.rank import EPSILON
from tests.layer_types import TYPES, integer_case, trained_case

every_type = pytest.mark.parametrize("name", TYPES)


both_seeds = pytest.mark.parametrize("seed", [0, 1])


@every_type
@both_seeds
def test_the_exact_network_computes_what_the_module_does(name, seed):
    case = integer_case(name, seed)
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    outputs = copy.deepcopy(case.module).double()(inputs)
    torch.testing.assert_close(outputs.detach(), torch.tensor(case.outputs.astype(np.float64)), rtol=1e-12, atol=1e-12)


@every_type
@both_seeds
def test_ranks_are_exact_in_total_and_per_layer(name, seed):
    case = integer_case(name, seed)
    expected = {layer: case.rank(case.jacobian[:, columns]) for layer, columns in case.columns.items()}
    record = measure_basin(case.module, case.inputs)
    assert record.gradient_rank == case.rank(case.jacobian)
    assert {layer: part.gradient_rank for layer, part in record.layers.items()} == expected
    assert record.notes == ()


def numerical_rank(matrix):
    """By NumPy's singular values, with the gap behind it in digits."""
    sigmas = np.linalg.svd(matrix, compute_uv=False)
    rank = int((sigmas > max(matrix.shape) * EPSILON * sigmas[0]).sum())
    if rank == 0:
        return rank, None
    following = sigmas[rank] if rank < len(sigmas) else 0.0
    return rank, np.log10(sigmas[rank - 1] / max(following, EPSILON * sigmas[0]))


def is_clear(gap):
    return gap is None or gap > 3


@every_type
@both_seeds
def test_ranks_of_trained_float32_networks_are_those_of_the_svd_of_their_exact_jacobian(name, seed):
    case = trained_case(name, seed)
    exact = case.jacobian.astype(np.float64)
    record = measure_basin(case.module, case.inputs)
    parts = {layer: (exact[:, columns], record.layers[layer]) for layer, columns in case.columns.items()}
    for matrix, part in [(exact, record), *parts.values()]:
        rank, gap = numerical_rank(matrix)
        assert (part.gradient_rank, is_clear(part.gradient_rank_gap)) == (rank, is_clear(gap)) == (rank, True)
