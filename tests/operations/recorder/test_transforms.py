"""Modules that call layers inside of `torch.func` transforms; ranks are known on paper, or those of plain calls."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lightning_basin import measure_basin
from tests.measure.records import without_time
from tests.networks import Composed, drawn, filled


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def inside(function):
    """A network of one hidden layer that ``function`` calls."""
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    return filled(Composed(lambda m, x: function(m.net, x), net=net), seed=1)


def integers(record):
    fields = without_time(record)
    return {name: value for name, value in fields.items() if isinstance(value, int | dict)} | {
        "layers": {
            name: (layer.gradient_rank, layer.hessian_nullity, layer.duplicated_activations, layer.dead_units)
            for name, layer in record.layers.items()
        }
    }


MAPPED = {
    "each input": lambda net, x: vmap(net)(x),
    "along the second axis": lambda net, x: vmap(net, in_dims=1)(x.mT),
    "results along the second axis": lambda net, x: vmap(net, out_dims=1)(x).mT,
    "twice": lambda net, x: vmap(vmap(net))(x.unsqueeze(1)).squeeze(1),
    "with its parameters passed": lambda net, x: vmap(
        lambda row: functional_call(net, dict(net.named_parameters()), (row,))
    )(x),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("function", MAPPED.values(), ids=MAPPED)
def test_a_network_that_is_mapped_over_the_inputs_has_the_record_of_its_plain_call(function, chunked):
    inputs = drawn(10, 2, seed=2)
    inputs[[3, 7]] = inputs[4].clone()
    targets = drawn(10, 3, seed=3)
    settings = {"loss_fn": nn.MSELoss(), "memory_budget": 600_000 if chunked else None}
    found = measure_basin(inside(function), inputs, targets, **settings)
    expected = measure_basin(inside(lambda net, x: net(x)), inputs, targets, **settings)
    assert integers(found) == integers(expected)
    assert found.layers["net.2"].duplicated_activations == 2


def laplacian(net, x):
    return vmap(lambda row: hessian(lambda v: net(v).squeeze(-1))(row).trace())(x).unsqueeze(1)


DERIVATIVES = {
    # Of sum_j w_j (W_j x)^2 the Laplacian is 2 sum_j w_j |W_j|^2, the same at all inputs.
    "Laplacian": (laplacian, 1, {"net.0": 1, "net.2": 1}),
    # Its gradient 2 sum_j w_j (W_j x) W_j is M x for a symmetric M = 2 W^T diag(w) W of two rows: three numbers.
    "gradient": (lambda net, x: grad(lambda v: net(v).sum())(x), 3, {"net.0": 3, "net.2": 3}),
    "gradient, by reverse mode": (lambda net, x: vmap(jacrev(net))(x).flatten(1), 3, {"net.0": 3, "net.2": 3}),
    "gradient, by forward mode": (lambda net, x: vmap(jacfwd(net))(x).flatten(1), 3, {"net.0": 3, "net.2": 3}),
    # 2 sum_j w_j (W_j x) (W_j 1) = 1^T M x: two numbers.
    "along a direction": (lambda net, x: jvp(net, (x,), (torch.ones_like(x),))[1], 2, {"net.0": 2, "net.2": 2}),
}


@pytest.mark.parametrize(("function", "rank", "layers"), DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_by_the_inputs_have_the_rank_of_the_formula(function, rank, layers):
    net = nn.Sequential(nn.Linear(2, 3, bias=False), Square(), nn.Linear(3, 1, bias=False))
    module = filled(Composed(lambda m, x: function(m.net, x), net=net))
    record = measure_basin(module, drawn(7, 2, seed=1))
    assert record.gradient_rank == rank
    assert {name: layer.gradient_rank for name, layer in record.layers.items()} == layers


def by_autograd(net, x):
    x.requires_grad_()
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def energy_and_forces(net, x):
    x = x.clone().requires_grad_()
    energy = net(x)
    return torch.cat([energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]], 1)


def by_backward(net, x):
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch warns once a process: the graph would keep itself alive.
        net(x).sum().backward(create_graph=True)
    return x.grad


@pytest.mark.parametrize("memory_budget", [None, 300_000])
@pytest.mark.parametrize("function", [by_autograd, energy_and_forces, by_backward])
def test_a_module_that_takes_derivatives_by_its_inputs_is_measured(function, memory_budget):
    # All of it is linear in the three numbers of M, see above; targets of it make the loss zero and H = P.
    net = nn.Sequential(nn.Linear(2, 3, bias=False), Square(), nn.Linear(3, 1, bias=False))
    module = filled(Composed(lambda m, x: function(m.net, x), net=net))
    inputs = drawn(7, 2, seed=1)
    inputs[5] = inputs[2]
    targets = module(inputs.clone()).detach()
    record = measure_basin(
        module, inputs, targets, loss_fn=nn.MSELoss(), memory_budget=memory_budget, duplicates_over=[inputs]
    )
    assert (record.gradient_rank, record.hessian_nullity) == (3, 9 - 3)
    assert {name: layer.gradient_rank for name, layer in record.layers.items()} == {"net.0": 3, "net.2": 3}
    assert record.output_duplicated_activations == record.train_output_duplicated_activations == 1
