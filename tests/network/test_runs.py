import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin
from lightning_basin.network.network import Network
from lightning_basin.quantities.activations import layer_activations
from tests.networks import Composed, drawn, filled


def activations_of(module, inputs):
    network, probe = Network(module), Probe(inputs)
    return layer_activations(network, probe, network.trace(probe))


def test_what_enters_and_leaves_a_linear_layer_is_kept_by_input():
    module, inputs = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), drawn(5, 3)
    found = activations_of(module, inputs)
    before = inputs @ module[0].weight.mT + module[0].bias
    torch.testing.assert_close(found["0"].entering.rows, inputs)
    torch.testing.assert_close(found["0"].leaving, before.unsqueeze(1).detach())
    torch.testing.assert_close(found["2"].entering.rows, before.relu().detach())


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "flattened"])
def test_all_positions_of_an_input_are_one_activation(layout):
    def function(m, x):
        if layout == "flattened":
            return m.linear(x.flatten(0, 1)).view(x.shape[0], -1, 2).sum(1)
        arranged = x if layout == "batch first" else x.transpose(0, 1)
        return m.linear(arranged).sum(1 if layout == "batch first" else 0)

    module, inputs = filled(Composed(function, linear=nn.Linear(3, 2))), drawn(5, 4, 3)
    found = activations_of(module, inputs)["linear"]
    torch.testing.assert_close(found.entering.rows, inputs.flatten(1))
    torch.testing.assert_close(found.leaving, (inputs @ module.linear.weight.mT + module.linear.bias).detach())


def test_all_calls_of_a_layer_are_one_activation():
    module = filled(Composed(lambda m, x: m.a(m.a(x)), a=nn.Linear(2, 2)))
    inputs = drawn(4, 2)
    once = (inputs @ module.a.weight.mT + module.a.bias).detach()
    torch.testing.assert_close(activations_of(module, inputs)["a"].entering.rows, torch.cat([inputs, once], dim=1))


def test_channels_of_a_convolution_are_its_units():
    module, inputs = filled(nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten())), drawn(4, 2, 5)
    expected = torch.einsum("kit,oi->kto", inputs, module[0].weight.squeeze(2)) + module[0].bias
    torch.testing.assert_close(activations_of(module, inputs)["0"].leaving, expected.detach())


def test_tensors_that_all_inputs_share_are_no_activation():
    module = filled(
        Composed(
            lambda m, x: m.a(x) + m.positions(torch.zeros(1, dtype=torch.int64)),
            a=nn.Linear(2, 2),
            positions=nn.Embedding(1, 2),
        )
    )
    found = activations_of(module, drawn(4, 2))
    assert found["positions"].entering is None
    assert found["positions"].leaving is None


def test_what_enters_is_kept_also_if_it_is_overwritten_later():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.shift

    def function(m, x):
        x = x.clone()
        shifted = m.shift(x)
        x.zero_()
        return shifted + x

    inputs = drawn(4, 3)
    found = activations_of(filled(Composed(function, shift=Shift())), inputs)
    torch.testing.assert_close(found["shift"].entering.rows, inputs)


def test_a_layer_that_is_never_called_has_no_activation():
    module = filled(Composed(lambda m, x: m.used(x), used=nn.Linear(2, 1), unused=nn.Linear(2, 1)))
    assert set(activations_of(module, drawn(3, 2))) == {"used"}


class Routed(nn.Module):
    """A layer that sees only the tokens whose second feature is set: another number of each input's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.readout = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, tokens):
        chosen = tokens[..., 1] > 0
        hidden = torch.zeros(*tokens.shape[:2], 3, dtype=tokens.dtype)
        hidden[chosen] = self.inner(tokens[..., :1][chosen]).relu()
        return self.readout(hidden).sum(1)


def test_tokens_that_are_routed_are_no_activation_even_if_their_number_divides():
    # 2, 1, 3 and 2 tokens are 2 for each of 4 inputs on average, and for the first and the last.
    chosen = [[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [2.0, 5.0, 6.0], [7.0, 8.0, 0.0]]
    tokens = torch.tensor([[[value, float(value != 0)] for value in row] for row in chosen], dtype=torch.float64)
    assert activations_of(filled(Routed()), tokens)["inner"].entering is None


def test_token_indices_are_compared_exactly_beside_small_weights():
    bag = filled(nn.EmbeddingBag(100_000, 2, mode="sum"))
    weights = torch.linspace(0.0, 0.5, 16, dtype=torch.float64).view(8, 2)
    tokens = torch.tensor([[99_999, 5]]).repeat(8, 1)
    record = measure_basin(Composed(lambda m, x, w: m.bag(x, per_sample_weights=w), bag=bag), (tokens, weights))
    assert record.layers["bag"].duplicated_activations == 0


def test_infinities_of_a_mask_do_not_make_inputs_look_the_same():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = filled(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[3, 4] = mask[5, 3] = True
    record = measure_basin(encoder, {"src": drawn(6, 5, 4), "src_key_padding_mask": mask})
    assert record.layers["layers.0.self_attn"].duplicated_activations == 0
