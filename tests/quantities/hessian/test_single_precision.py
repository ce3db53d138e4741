"""Products in float32 with the residual part of a linear network, which is known on paper.

Of outputs W2 W1 x with slopes s the residual part has no diagonal blocks, and is, with M = sum of s x^T, the map from
directions (V1, V2) to (V2^T M, M V1^T): its norm is the largest singular value of M.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin import measure_basin
from lightning_basin.functional.output_curvature import output_curvature
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.probe import Probe
from lightning_basin.quantities.hessian.quadratic_model import quadratic_model
from lightning_basin.quantities.hessian.single_precision import BlockOperator, RoundedModel
from tests.networks import Composed, drawn, filled

WIDTHS = 128, 256, 4
NUM_INPUTS = 256


def linear_network(*widths):
    first, hidden, last = widths
    return filled(nn.Sequential(nn.Linear(first, hidden, bias=False), nn.Linear(hidden, last, bias=False)), 0)


def linear_part(module, inputs, targets, *, scale=1.0):
    network, probe = Network(module.double()), Probe(inputs)
    runs = ProbeRuns(network, probe)
    curvature = output_curvature(lambda outputs: scale * F.mse_loss(outputs, targets), runs.full_trace.outputs.detach())
    return quadratic_model(runs, curvature).linear_part


def case(*, scale=1.0):
    """The linear part of a linear network's loss, and M."""
    module, inputs = linear_network(*WIDTHS), drawn(NUM_INPUTS, WIDTHS[0], seed=1)
    targets = drawn(NUM_INPUTS, WIDTHS[2], seed=2)
    model = linear_part(module, inputs, targets, scale=scale)
    slopes = scale * 2 * (module(inputs) - targets).detach() / targets.numel()
    return model, slopes.mT @ inputs


def product_on_paper(matrix, direction):
    first, hidden, last = WIDTHS
    v1, v2 = direction.split([hidden * first, last * hidden])
    v1, v2 = v1.view(hidden, first), v2.view(last, hidden)
    return torch.cat([(v2.mT @ matrix).flatten(), (matrix @ v1.mT).flatten()])


@pytest.mark.parametrize("scale", [1.0, 1e-60])
def test_rounded_products_differ_by_no_more_than_is_said(scale):
    model, matrix = case(scale=scale)
    operator = BlockOperator(RoundedModel(model), model.network.layers)
    directions = F.normalize(drawn(4, sum(p.numel() for p in model.parameters), seed=3))
    first = operator(directions[0])
    assert torch.allclose(
        first, product_on_paper(matrix, directions[0]), rtol=1e-9, atol=1e-12 * float(first.abs().max())
    )
    noise = operator.round_products()
    largest = float(torch.linalg.svdvals(matrix)[0])
    assert 0.0 < noise < 0.1 * largest
    for direction in directions:
        difference = (operator(direction) - product_on_paper(matrix, direction)).norm()
        assert 0.0 < difference <= noise


def test_blocks_that_vanish_are_found_once_float32_was_seen_to_agree():
    model, matrix = case()
    rounded, layers = RoundedModel(model), model.network.layers
    assert rounded.vanishing_norm(layers[:1]) is None
    operator = BlockOperator(rounded, layers)
    operator(F.normalize(drawn(1, sum(p.numel() for p in model.parameters), seed=3))[0])
    operator.round_products()
    for layer in layers:
        assert rounded.vanishing_norm([layer]) <= 1e-30 * float(matrix.abs().max())
    assert rounded.vanishing_norm(layers) is None


def rounds_products(module, *, inputs=None):
    inputs = drawn(NUM_INPUTS, WIDTHS[0], seed=1) if inputs is None else inputs
    targets = drawn(len(inputs), WIDTHS[2], seed=2)
    model = linear_part(module, inputs, targets)
    operator = BlockOperator(RoundedModel(model), model.network.layers)
    operator(F.normalize(drawn(1, sum(p.numel() for p in model.parameters), seed=3))[0])
    return operator.round_products() > 0.0


def parts():
    return {f"part{number}": layer for number, layer in enumerate(linear_network(*WIDTHS))}


def test_products_are_rounded_where_that_pays_and_float32_has_the_digits():
    assert rounds_products(linear_network(*WIDTHS))
    assert not rounds_products(linear_network(*WIDTHS), inputs=drawn(16, WIDTHS[0], seed=1))
    lost = Composed(lambda m, x: m.part1(torch.sin(1e6 * m.part0(x))), **parts())
    assert not rounds_products(lost)
    refused = Composed(lambda m, x: m.part1(torch.mm(m.part0(x), torch.eye(256, dtype=torch.float64))), **parts())
    assert not rounds_products(refused)


class SinglePrecisionProducts(TorchDispatchMode):
    """Counts products of matrices in float32."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.mm.default and result.dtype == torch.float32
        return result


@pytest.mark.parametrize("distance", [3e2, 1e3])
def test_norm_of_the_residual_part_is_bounded_as_closely_as_far_from_a_fit_is_asked_for(distance):
    module, inputs = linear_network(*WIDTHS), drawn(NUM_INPUTS, WIDTHS[0], seed=1)
    targets = (module.double()(inputs) + distance * drawn(NUM_INPUTS, WIDTHS[2], seed=2)).detach()
    matrix = 2 * (module(inputs) - targets).detach().mT @ inputs / targets.numel()
    with SinglePrecisionProducts() as products:
        record = measure_basin(module, inputs, targets, loss_fn=F.mse_loss, layers=[])
    assert products.count > 0
    norm = record.residual_curvature * record.hessian_largest
    assert float(torch.linalg.svdvals(matrix)[0]) <= norm <= 10 * float(torch.linalg.svdvals(matrix)[0])


@pytest.mark.parametrize(("distance", "is_certified"), [(1e3, False), (1e-3, True)])
def test_a_certificate_comes_from_float64_alone(distance, is_certified):
    module, inputs = linear_network(*WIDTHS), drawn(NUM_INPUTS, WIDTHS[0], seed=1)
    targets = (module.double()(inputs) + distance * drawn(NUM_INPUTS, WIDTHS[2], seed=2)).detach()
    with SinglePrecisionProducts() as products:
        record = measure_basin(module, inputs, targets, loss_fn=F.mse_loss, layers=[])
    assert (record.hessian_nullity_lower == record.hessian_nullity_upper) == is_certified
    assert (products.count == 0) == is_certified
