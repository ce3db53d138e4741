"""The kernel of every type of layer, beside products of rows that are exact or have 60 digits."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_basin import neural_tangent_kernel
from lightning_basin.limits import MAX_ROWS, MemoryBudgetError
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.network.replica import replicas
from lightning_basin.network.rounding import rounding_rtol
from lightning_basin.probe import Probe
from tests import models
from tests.exact import jacobian
from tests.layer_types import TYPES, trained_case
from tests.networks import convolutional, images, measured

DTYPES = {"float64": torch.float64, "float32": torch.float32}
every_precision = pytest.mark.parametrize("dtype", DTYPES)


def as_numpy(kernel, dtype):
    assert kernel.dtype == DTYPES[dtype]
    return kernel.double().numpy()


@every_precision
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", models.CASE_NAMES)
def test_kernels_of_integer_networks_are_exact(name, seed, dtype):
    case = models.integer_case(name, seed)
    matrix = jacobian(models.evaluated_case(name, seed)[1])
    exact = matrix @ matrix.T
    largest = int((np.abs(matrix) @ np.abs(matrix).T).max())
    found = as_numpy(neural_tangent_kernel(case.module, case.inputs, dtype=dtype), dtype)
    if largest < (2**53 if dtype == "float64" else 2**24):  # Then every partial sum is held exactly.
        assert np.array_equal(found, exact.astype(np.float64))
    else:  # Each entry is a sum of that many products, each rounded once, as is each sum.
        units = (matrix.shape[1] + 1) * torch.finfo(DTYPES[dtype]).eps
        assert np.abs(found - exact.astype(np.float64)).max() <= units * largest


@every_precision
@pytest.mark.parametrize("name", TYPES)
def test_kernels_of_every_layer_type_are_those_of_their_exact_jacobian(name, dtype):
    case = trained_case(name, 0)
    exact = case.jacobian.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    found = as_numpy(neural_tangent_kernel(case.module, case.inputs, dtype=dtype), dtype)
    # Both rows of a product are off by the rounding of a network, relative to the longest of them.
    assert np.abs(found - exact @ exact.T).max() <= 2 * rounding_rtol(DTYPES[dtype]) * lengths.max() ** 2
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("name", TYPES)
def test_in_float32_the_same_layers_come_from_factors(name):
    case = trained_case(name, 0)
    ways = {}
    for dtype in DTYPES.values():
        with isolated_evaluation(torch.device("cpu"), dtype):
            network = Network(replicas(case.module, dtype=dtype)[0], dtype=dtype)
            network.gradient_dtype = dtype
            found = measured(network, Probe(case.inputs).to(torch.device("cpu"), dtype))
            ways[dtype] = {layer: gradients.structured for layer, gradients in found.items()}
            assert {gradients.gradients.rows().dtype for gradients in found.values()} == {dtype}
    assert ways[torch.float32] == ways[torch.float64]


@every_precision
@pytest.mark.parametrize("mebibytes", [88, 64])  # Inputs in larger and smaller chunks.
def test_the_kernel_is_the_same_within_any_memory(dtype, mebibytes):
    module, inputs = convolutional(), images(64)
    whole = neural_tangent_kernel(module, inputs, dtype=dtype)
    cut = neural_tangent_kernel(module, inputs, dtype=dtype, memory_budget=mebibytes * 2**20)
    torch.testing.assert_close(cut, whole, rtol=0.0, atol=rounding_rtol(DTYPES[dtype]) * float(whole.abs().max()))
    with pytest.raises(MemoryBudgetError, match="must fit into memory_budget"):
        neural_tangent_kernel(module, inputs, dtype=dtype, memory_budget=2**20)


def test_the_behavior_may_be_any_function_of_module_and_inputs():
    # Twice the outputs have twice the gradients.
    module, inputs = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    found = neural_tangent_kernel(module, inputs, behavior=lambda module, inputs: 2 * module(inputs))
    assert found.tolist() == [[24.0, 16.0], [16.0, 40.0]]


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(requires_grad=False)
    assert neural_tangent_kernel(module, torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist() == [[5.0, 3.0], [3.0, 9.0]]


def test_module_and_random_states_are_left_as_they_were():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    neural_tangent_kernel(module, torch.ones(5, 3))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
        ({"memory_budget": "much"}, TypeError, "memory_budget must be a number of bytes or None, got 'much'"),
        ({"behavior": lambda module, inputs: module(inputs).argmax(1)}, TypeError, "floating point"),
        ({"behavior": lambda module, inputs: module(inputs) - module(inputs).mean(0)}, ValueError, "its own input"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message):
        neural_tangent_kernel(nn.Linear(2, 3), torch.rand(4, 2), **arguments)


def test_more_outputs_than_can_be_decomposed_have_a_kernel():
    # The gradient by a bias is 1, whatever enters.
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1)).requires_grad_(requires_grad=False)
    module[1].bias.requires_grad_(requires_grad=True)
    # The matrix takes 128 MiB; what decomposes it would take 1.7 GiB.
    kernel = neural_tangent_kernel(module, torch.rand(MAX_ROWS + 1, 1), memory_budget=400 * 2**20)
    assert kernel.shape == (MAX_ROWS + 1, MAX_ROWS + 1)
    assert bool((kernel == 1).all())
    with pytest.raises(MemoryBudgetError, match=r"Gram matrix of 4097 rows .*: take a smaller probe, or a larger"):
        neural_tangent_kernel(module, torch.rand(MAX_ROWS + 1, 1), memory_budget=200 * 2**20)
