import pytest
import torch
from torch import nn

from lightning_basin import Probe, measure_basin
from lightning_basin.network.network import Network
from lightning_basin.network.runs import TracedProbe
from lightning_basin.quantities.activations import layer_activations
from lightning_basin.quantities.passage import merging_error, parameters_before
from tests.networks import Composed, drawn, filled


def activations_of(module, inputs):
    network, probe = Network(module), Probe(inputs)
    return layer_activations(network, probe, network.trace(probe))


def test_what_enters_and_leaves_a_linear_layer_is_kept_by_input():
    module, inputs = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), drawn(5, 3)
    found = activations_of(module, inputs)
    before = inputs @ module[0].weight.mT + module[0].bias
    torch.testing.assert_close(found["0"].entering, inputs)
    torch.testing.assert_close(found["0"].leaving, before.unsqueeze(1).detach())
    torch.testing.assert_close(found["2"].entering, before.relu().detach())


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "flattened"])
def test_all_positions_of_an_input_are_one_activation(layout):
    def function(m, x):
        if layout == "flattened":
            return m.linear(x.flatten(0, 1)).view(x.shape[0], -1, 2).sum(1)
        arranged = x if layout == "batch first" else x.transpose(0, 1)
        return m.linear(arranged).sum(1 if layout == "batch first" else 0)

    module, inputs = filled(Composed(function, linear=nn.Linear(3, 2))), drawn(5, 4, 3)
    found = activations_of(module, inputs)["linear"]
    torch.testing.assert_close(found.entering, inputs.flatten(1))
    torch.testing.assert_close(found.leaving, (inputs @ module.linear.weight.mT + module.linear.bias).detach())


def test_all_calls_of_a_layer_are_one_activation():
    module = filled(Composed(lambda m, x: m.a(m.a(x)), a=nn.Linear(2, 2)))
    inputs = drawn(4, 2)
    once = (inputs @ module.a.weight.mT + module.a.bias).detach()
    torch.testing.assert_close(activations_of(module, inputs)["a"].entering, torch.cat([inputs, once], dim=1))


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
    torch.testing.assert_close(found["shift"].entering, inputs)


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


# What crosses a layer.


def parameters_before_layers(module, inputs):
    network, probe = Network(module), Probe(inputs)
    trace = network.trace(probe)
    sizes = [parameter.numel() for parameter in network.parameters()]
    return {
        name: sum(
            size for size, is_before in zip(sizes, parameters_before(network, trace, name), strict=True) if is_before
        )
        for name in trace.entering
    }


def test_parameters_before_each_layer_of_a_chain_are_those_of_the_layers_before():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert parameters_before_layers(module, drawn(6, 3)) == {"0": 0, "2": 16, "4": 41}


def test_parameters_of_a_tied_layer_count_before_each_layer_that_they_are_used_before():
    module = filled(Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    module.b.weight = module.a.weight
    assert parameters_before_layers(module, drawn(6, 3)) == {"a": 0, "b": 12}


def test_frozen_parameters_do_not_count_before_a_layer():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module[0].weight.requires_grad_(requires_grad=False)
    assert parameters_before_layers(module, drawn(6, 3))["2"] == 4


def merging_error_of(module, inputs, classes, **kwargs):
    traced = TracedProbe(Network(module), Probe(inputs), **kwargs)
    return merging_error(traced, torch.tensor(classes), [False] * len(traced.network.parameters()))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_merging_error_is_the_deviation_of_gradients_from_their_class_means(chunk_size):
    # Gradients of w x are x: 1 and 4 deviate from their mean by 3/2 each, which random weights see times |g| sqrt(2).
    module = filled(nn.Linear(1, 1, bias=False))
    inputs = torch.tensor([[1.0], [5.0], [4.0]], dtype=torch.float64)
    found = merging_error_of(module, inputs, [0, 1, 0], chunk_size=chunk_size)
    assert found == pytest.approx(merging_error_of(module, 2 * inputs, [0, 1, 0]) / 2)
    weights = torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).squeeze(2)
    assert found == pytest.approx(float(((weights[:, 2] - weights[:, 0]) * 1.5).abs().max()))


def test_merging_error_of_inputs_with_the_same_gradients_is_zero():
    module = filled(nn.Linear(2, 3))
    inputs = drawn(3, 2)[[0, 1, 0, 2, 1]]
    assert merging_error_of(module, inputs, [0, 1, 0, 3, 1]) < 1e-14
    assert merging_error_of(module, inputs, [0, 1, 0, 3, 3]) > 1e-3


class Conditioned(nn.Module):
    """A category that skips the encoder, times a gate that may be shut."""

    def __init__(self, num_units: int, *, gated: bool) -> None:
        super().__init__()
        self.encode, self.merge = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.mix, self.readout = nn.Linear(2, num_units), nn.Linear(num_units, 1)
        self.gated = gated

    def forward(self, x):
        merged = self.merge(self.encode(x[:, :1]).relu())
        merged = merged.relu() if self.gated else merged
        return self.readout(torch.tanh(self.mix(torch.cat([merged, x[:, 1:] * (merged if self.gated else 1)], dim=1))))


@pytest.mark.parametrize("memory_budget", [None, 3_700_000])
def test_category_that_skips_a_layer_counts_also_where_a_chunk_holds_only_one(memory_budget):
    module = filled(Conditioned(300, gated=False))
    with torch.no_grad():
        module.encode.weight.fill_(1.0)
    # Sorted by category: 6 codes times 4 categories are 24 inputs, with 24 different rows of the readout alone.
    inputs = torch.stack([torch.arange(64.0) % 6 + 1, (torch.arange(64.0) / 16).floor()], dim=1)
    record = measure_basin(module, inputs, memory_budget=memory_budget)
    assert record.gradient_rank_bound >= 24


def test_skip_connection_whose_gate_is_shut_at_the_borders_of_sorted_data_counts():
    module = filled(Conditioned(40, gated=True))
    with torch.no_grad():
        module.encode.weight.fill_(1.0)
        module.merge.weight.fill_(0.3)
    codes = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, -1] * 2)
    record = measure_basin(module, torch.stack([codes, (torch.arange(20.0) / 10).floor()], dim=1))
    # Two times nine inputs with an open gate, and one row for the two with a shut one.
    assert record.gradient_rank_bound == 19


def test_layer_that_a_large_feature_makes_look_merged_does_not_lower_the_bound():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double().eval()
    module[0].running_mean[:] = torch.tensor([1e15 - 1, 5.0])
    module[0].running_var[:] = torch.tensor([1.0, 9.0])
    inputs = torch.stack([torch.full((10,), 1e15), torch.arange(10.0)], dim=1).double()
    # Ten different inputs of a network of 29 parameters: the normalised feature is 1, and -5/3 to 4/3 in ten steps.
    assert measure_basin(module, inputs).gradient_rank_bound == 10


class Discards(nn.Module):
    """Calls a layer and makes no use of what leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.discarded, self.readout = nn.Linear(2, 3), nn.Linear(2, 1)

    def forward(self, inputs):
        self.discarded(inputs)
        return self.readout(inputs.sign())


def test_layer_whose_output_is_not_used_before_a_cut_adds_no_rank():
    record = measure_basin(Discards(), torch.arange(1.0, 9.0).reshape(4, 2))
    # All four inputs cross to the readout as one, and nothing is trained before it.
    assert record.gradient_rank == record.gradient_rank_bound == 1
    assert record.layers["discarded"].gradient_rank == 0
