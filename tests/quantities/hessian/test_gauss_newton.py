"""Nullities of Gauss-Newton matrices, which take no product with the Hessian."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import StackedGradients
from lightning_basin.quantities.hessian import products
from tests.networks import drawn, filled


def test_weighted_gradients_are_the_weighted_rows():
    factored = KhatriRaoGradients(drawn(4, 2, 5), drawn(4, 3, 2, 6, seed=1))
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(5)).split([30, 7, 3])[:2]  # Three are zero.
    stacked = StackedGradients(
        (factored, DenseGradients(drawn(12, 7, seed=2))),
        columns,
        num_rows=12,
        num_columns=40,
        device=torch.device("cpu"),
    )
    for blocks in (drawn(4, 2, 3, seed=3), drawn(1, 12, 12, seed=4)):
        expected = torch.block_diag(*blocks).numpy() @ stacked.rows().numpy()
        torch.testing.assert_close(stacked.weighted(blocks).rows(), torch.from_numpy(expected))


def test_the_gauss_newton_mode_takes_no_product(monkeypatch):
    def refuse(*_):
        raise AssertionError("a product was taken")

    monkeypatch.setattr(products, "hessian_product", refuse)
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian="gauss-newton")
    assert record.gauss_newton_nullity == record.gradient_nullity == 26 - 10
    assert record.hessian_method == "gauss-newton"
    assert (record.hessian_nullity, record.hessian_nullity_upper, record.residual_curvature) == (None, None, None)


@pytest.mark.parametrize("mode", ["auto", "bracket", "gauss-newton"])
def test_behavioral_hessian_has_the_rank_of_the_gradients_at_any_weights(mode):
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)))
    record = measure_basin(module, drawn(5, 3), loss_fn="behavioral", hessian=mode)
    for part in (record, *record.layers.values()):
        assert part.hessian_certified is True
        assert part.hessian_nullity == part.hessian_nullity_strict == part.gradient_nullity
    assert record.loss is None


# Torch has no second derivative of the bag. Its two inputs look up a row of the table each: two independent gradients.
@pytest.mark.parametrize("mode", ["auto", "dense", "bracket"])
def test_behavioral_hessian_needs_no_second_derivative_of_the_network(mode):
    module = filled(nn.Sequential(nn.EmbeddingBag(4, 2), nn.Linear(2, 1, bias=False)))
    record = measure_basin(module, torch.tensor([[0], [1]]), loss_fn="behavioral", hessian=mode)
    assert (record.num_parameters, record.hessian_nullity_strict, record.notes) == (10, 10 - 2, ())


def test_behavioral_hessian_is_twice_the_gradients_product():
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)))
    inputs = drawn(5, 3)
    record = measure_basin(module, inputs, loss_fn="behavioral", hessian="bracket")
    parameters = list(module.parameters())
    rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in module(inputs).flatten()]
    sigmas = np.linalg.svd(np.stack([torch.cat([g.flatten() for g in row]).numpy() for row in rows]), compute_uv=False)
    assert record.hessian_largest == pytest.approx(2 * sigmas[0] ** 2, rel=1e-12)


def test_probabilities_have_the_rank_of_the_centred_logits():
    # 4 inputs of 3 classes and 27 parameters: 12 logits, of which the probabilities forget one direction per input.
    module, inputs = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), drawn(4, 3)
    assert measure_basin(module, inputs).gradient_rank == 12
    record = measure_basin(module, inputs, torch.arange(4) % 3, loss_fn=nn.CrossEntropyLoss(), behavior="probabilities")
    assert record.gradient_rank == 8
    # The loss still takes the logits.
    assert record.loss == pytest.approx(float(F.cross_entropy(module(inputs).detach(), torch.arange(4) % 3)), rel=1e-12)
    assert record.gauss_newton_nullity == record.gradient_nullity


def test_probabilities_are_those_of_a_callable_that_returns_them():
    module, inputs = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6))), drawn(4, 3)
    shaped = nn.Sequential(module, nn.Unflatten(1, (3, 2)))  # Three classes at two positions.
    found = measure_basin(shaped, inputs, behavior="probabilities")
    expected = measure_basin(shaped, inputs, behavior=lambda network, x: network(x).softmax(1))
    assert found.gradient_rank == expected.gradient_rank == 16
    assert found.gradient_effective_rank == pytest.approx(expected.gradient_effective_rank, rel=1e-9)
    for name, layer in found.layers.items():
        assert layer.gradient_rank == expected.layers[name].gradient_rank


def test_saturated_probabilities_keep_their_rank():
    module, inputs = filled(nn.Linear(3, 3)), drawn(4, 3)
    with torch.no_grad():
        module.bias[0] += 25
    # Linear in 4 features: every centred logit sees all of them, though p is 1 - 1e-11.
    assert measure_basin(module, inputs, behavior="probabilities").gradient_rank == 8


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_probabilities_of_a_single_class_are_refused(shape):
    module = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0) if len(shape) == 1 else nn.Identity())
    with pytest.raises(ValueError, match="at least two classes along their second axis, got shape"):
        measure_basin(module, drawn(4, 3), behavior="probabilities")


def test_probabilities_and_projections_are_refused_together():
    with pytest.raises(ValueError, match="cannot be combined with max_outputs"):
        measure_basin(nn.Linear(3, 20), drawn(4, 3), behavior="probabilities", max_outputs=5)


def test_outputs_are_the_default_behavior():
    module, inputs = filled(nn.Linear(3, 2)), drawn(4, 3)
    assert (
        measure_basin(module, inputs, behavior="outputs").gradient_rank == measure_basin(module, inputs).gradient_rank
    )
