import pytest
import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.network.network import Network
from tests.counting import Dispatched
from tests.networks import Composed, drawn, filled, finite_differences, measured, sequences


def cost_of_gradients(module, probe):
    """Without the operations of the forward pass."""
    network = Network(filled(module))
    with Dispatched() as forward:
        network.trace(probe)
    with Dispatched() as all_of_it:
        measured(network, probe)
    return all_of_it.count - forward.count, all_of_it.waits - forward.waits


def test_gradients_of_more_layers_and_outputs_wait_no_more():
    costs = {}
    for depth, num_outputs in ((1, 2), (8, 2), (8, 9)):
        hidden = [part for _ in range(depth) for part in (nn.Linear(6, 6), nn.ReLU())]
        costs[depth, num_outputs] = cost_of_gradients(
            nn.Sequential(*hidden, nn.Linear(6, num_outputs)), Probe(drawn(5, 6))
        )
    assert {waits for _, waits in costs.values()} == {0}
    # Seven layers more: three backward passes, factors and one combination, of some ten operations each.
    assert costs[8, 2][0] - costs[1, 2][0] < 7 * 60
    # All outputs are differentiated together.
    assert costs[8, 9][0] == costs[8, 2][0]


def test_layers_of_sequences_wait_no_more():
    count, waits = cost_of_gradients(sequences(flatten=True), Probe(drawn(4, 5, 3)))
    assert waits == 0
    assert count < 200


class Looking(torch.autograd.Function):
    """The square, whose backward pass looks at the numbers, so that several cannot be computed together."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return 2 * inputs * gradient if bool(gradient.any()) else torch.zeros_like(gradient)


@pytest.mark.parametrize("max_elements", [None, 100])
def test_a_backward_pass_that_cannot_be_batched_is_taken_for_each_output(max_elements):
    module = Composed(lambda m, x: m.head(Looking.apply(m.inner(x))), inner=nn.Linear(3, 4), head=nn.Linear(4, 3))
    network, probe = Network(filled(module)), Probe(drawn(5, 3))
    options = {} if max_elements is None else {"max_elements": 2000}
    for layer in network.layers:
        gradients = measured(network, probe, **options)[layer.name]
        assert gradients.structured
        expected = finite_differences(network, probe, layer)
        torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=1e-7, atol=1e-6)


def test_one_pass_for_each_output_gives_the_same_gradients_as_one_for_all():
    module = filled(sequences(flatten=False))
    network, probe = Network(module), Probe(drawn(4, 5, 3))
    # 4 inputs x 2 outputs x 5 places x (4 + 2) derivatives of the two products fit, all of the graph twice does not.
    together, apart = measured(network, probe), measured(network, probe, max_elements=500)
    for layer, gradients in together.items():
        assert apart[layer].structured
        torch.testing.assert_close(apart[layer].gradients.rows(), gradients.gradients.rows(), rtol=1e-13, atol=0.0)
