import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import Probe
from lightning_basin.activations import cuts, layer_activations
from lightning_basin.functional.sketch import DenseGradients, KhatriRaoGradients
from lightning_basin.gradients import layer_gradients
from lightning_basin.layers import Network, call_module, find_layers

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module, seed=0):
    """The module in float64 and evaluation mode with reproducible weights."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


class Composed(nn.Module):
    """Parts by name, and a function that says how they work together."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def measured(network, probe):
    trace = network.trace(probe)
    found = layer_gradients(network, probe, trace, generator=torch.Generator().manual_seed(0))
    return {gradients.layer.name: gradients for gradients in found}


def finite_differences(network, probe, layer):
    """Central differences of the outputs by each entry of each parameter of a layer."""
    step = 1e-6
    columns = []
    with torch.no_grad():
        for parameter in network.parameters([layer]):
            for index in range(parameter.numel()):
                moved = []
                for sign in (1, -1):
                    before = parameter.flatten()[index].item()
                    parameter.view(-1)[index] += sign * step
                    moved.append(network.outputs(probe).flatten().clone())
                    parameter.view(-1)[index] = before
                columns.append((moved[0] - moved[1]) / (2 * step))
    return torch.stack(columns, dim=1)


# Finding layers.


def names_and_sizes(module):
    return [(layer.name, layer.parameters, layer.num_parameters) for layer in find_layers(module)]


def test_layers_own_their_parameters_directly():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1, bias=False)))
    assert names_and_sizes(module) == [("0", ("0.weight", "0.bias"), 9), ("2.0", ("2.0.weight",), 3)]


def test_parameters_of_the_root_stand_under_the_empty_name():
    module = nn.Sequential(nn.Linear(1, 1))
    module.scale = nn.Parameter(torch.ones(3))
    assert names_and_sizes(module) == [("", ("scale",), 3), ("0", ("0.weight", "0.bias"), 2)]


def test_frozen_parameters_belong_to_no_layer():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(requires_grad=False)
    module[1].bias.requires_grad_(requires_grad=False)
    assert names_and_sizes(module) == [("1", ("1.weight",), 2)]


def test_a_tied_parameter_belongs_to_the_first_owner():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert names_and_sizes(module) == [("0", ("0.weight", "0.bias"), 6), ("1", ("1.bias",), 2)]


def test_a_module_whose_parameters_are_all_owned_elsewhere_is_no_layer():
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    module["head"].weight = module["embedding"].weight
    assert names_and_sizes(module) == [("embedding", ("embedding.weight",), 6)]


def test_a_module_used_under_two_names_is_one_layer():
    part = nn.Linear(1, 1)
    assert names_and_sizes(nn.ModuleDict({"a": part, "b": part})) == [("a", ("a.weight", "a.bias"), 2)]


def test_one_parameter_under_two_names_of_a_module_is_counted_once():
    module = nn.Module()
    module.first = nn.Parameter(torch.ones(2))
    module.second = module.first
    assert names_and_sizes(module) == [("", ("first",), 2)]


def test_containers_of_parameters_are_layers():
    module = nn.Module()
    module.items = nn.ParameterList([torch.ones(2), torch.ones(1)])
    module.table = nn.ParameterDict({"a": torch.ones(4)})
    assert [(name, size) for name, _, size in names_and_sizes(module)] == [("items", 3), ("table", 4)]


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Linear(1, 1).requires_grad_(requires_grad=False)], ids=["none", "frozen"]
)
def test_a_module_without_trainable_parameters_is_refused(module):
    with pytest.raises(ValueError, match=r"must have at least one trainable parameter, got .* with none"):
        find_layers(module)


# Calling modules.


class Echo(nn.Module):
    """Returns how it was called."""


def echo(forward):
    module = Echo()
    module.forward = forward
    return module


X, Y = torch.zeros(1), torch.ones(1)

CALLS = {
    "a tensor": (lambda x: ("one", x), X, ("one", X)),
    "a tuple that fits": (lambda x, y: ("two", x, y), (X, Y), ("two", X, Y)),
    "a list that fits": (lambda x, y: ("two", x, y), [X, Y], ("two", X, Y)),
    "a tuple for one argument": (lambda pair: ("one", pair), (X, Y), ("one", (X, Y))),
    "a list for one argument": (lambda pair: ("one", pair), [X, Y], ("one", [X, Y])),
    "a tuple of one": (lambda x: ("one", x), (X,), ("one", X)),
    "a tuple for any number of arguments": (lambda *xs: ("any", xs), (X, Y), ("any", (X, Y))),
    "a tuple with defaults left": (lambda x, y, z=3: (x, y, z), (X, Y), (X, Y, 3)),
    "a dict of arguments": (lambda x, y: ("two", x, y), {"y": Y, "x": X}, ("two", X, Y)),
    "a dict of some arguments": (lambda x, mask=None: (x, mask), {"x": X}, (X, None)),
    "a dict for one argument": (lambda batch: ("one", batch), {"x": X, "y": Y}, ("one", {"x": X, "y": Y})),
    "a dict for any arguments": (lambda **named: named, {"x": X, "y": Y}, {"x": X, "y": Y}),
    "a dict for keyword-only arguments": (lambda *, x, y: (x, y), {"x": X, "y": Y}, (X, Y)),
    "a dict of arguments and others": (
        lambda x, y, **others: (x, y, others),
        {"x": X, "y": Y, "z": X},
        (X, Y, {"z": X}),
    ),
    "a dict with other keys than names": (lambda batch: ("one", batch), {0: X}, ("one", {0: X})),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_unpacked_as_the_forward_takes_them(name):
    forward, inputs, expected = CALLS[name]
    assert str(call_module(echo(forward), inputs)) == str(expected)


# Gradients.


def linear_twice():
    return Composed(lambda m, x: m.head(m.inner(m.inner(x).tanh()).tanh()), inner=nn.Linear(3, 3), head=nn.Linear(3, 2))


def in_place():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def sequences(flatten):
    def function(m, x):
        hidden = x.flatten(0, 1) if flatten else x
        return m.second(m.first(hidden).tanh()).view(x.shape[0], -1, 2).square().sum(1)

    return Composed(function, first=nn.Linear(3, 4), second=nn.Linear(4, 2))


def transposed():
    return Composed(
        lambda m, x: m.second(m.first(x.transpose(0, 1)).tanh()).square().sum(0),
        first=nn.Linear(3, 4),
        second=nn.Linear(4, 2),
    )


def hooked():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].register_forward_hook(lambda part, args, output: output * output + args[0].sum())
    module[2].register_forward_pre_hook(lambda part, args: (2 * args[0],))
    return module


def half_frozen(name):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for part in (module[0], module[2]):
        getattr(part, name).requires_grad_(requires_grad=False)
    return module


def normed(norm):
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def tied():
    module = Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    module.b.weight = module.a.weight
    return module


def weight_used_beside():
    return Composed(lambda m, x: m.linear(x).tanh() @ m.linear.weight, linear=nn.Linear(3, 4))


class Scaled(nn.Linear):
    """A linear layer that does more than one."""

    def forward(self, x):
        return super().forward(x) * self.weight.square().sum()


FACTORED = {
    "plain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "root": (lambda: nn.Linear(3, 2), (5, 3)),
    "called twice": (linear_twice, (5, 3)),
    "in-place activation": (in_place, (5, 3)),
    "sequences": (lambda: sequences(flatten=False), (5, 6, 3)),
    "flattened sequences": (lambda: sequences(flatten=True), (5, 6, 3)),
    "hooks that change inputs and outputs": (hooked, (5, 3)),
    "frozen weights": (lambda: half_frozen("weight"), (5, 3)),
    "frozen biases": (lambda: half_frozen("bias"), (5, 3)),
}

# Modules for which the formula of a plain linear layer is wrong or not at hand, at least in one layer.
DENSE = {
    "transposed sequences": (transposed, (5, 6, 3)),
    "transposed sequences that divide evenly": (transposed, (3, 6, 3)),
    "transposed square sequences": (transposed, (4, 4, 3)),
    "weight_norm": (lambda: normed(nn.utils.parametrizations.weight_norm), (5, 3)),
    "spectral_norm": (lambda: normed(nn.utils.parametrizations.spectral_norm), (5, 3)),
    "tied weights": (tied, (5, 3)),
    "weight used beside": (weight_used_beside, (5, 3)),
    "a subclass that does more": (lambda: nn.Sequential(Scaled(3, 2)), (5, 3)),
    "LSTM": (lambda: Composed(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(3, 2, batch_first=True)), (4, 3, 3)),
    "attention": (
        lambda: Composed(
            lambda m, x: m.attention(x, x, x, need_weights=False)[0].sum(1),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        (3, 3, 4),
    ),
    "convolution and batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (4, 2, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
}


@pytest.mark.parametrize("name", [*FACTORED, *DENSE])
def test_gradients_of_every_layer_are_those_of_finite_differences(name):
    build, shape = (FACTORED | DENSE)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    found = measured(network, probe)
    assert set(found) == {layer.name for layer in network.layers}
    for layer in network.layers:
        expected = finite_differences(network, probe, layer)
        # Central differences: truncation near step**2 = 1e-12 and rounding near eps / step = 1e-10 of outputs to 1e2.
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(found[layer.name].gradients.rows(), expected, rtol=0.0, atol=1e-7 * scale)


@pytest.mark.parametrize("name", FACTORED)
def test_gradients_of_plain_linear_layers_stay_factored(name):
    build, shape = FACTORED[name]
    found = measured(Network(filled(build())), Probe(drawn(*shape)))
    assert {type(gradients.gradients) for gradients in found.values()} == {KhatriRaoGradients}
    assert {gradients.note for gradients in found.values()} == {None}


def test_a_linear_layer_that_does_more_is_measured_row_by_row_and_said_so():
    found = measured(Network(filled(nn.Sequential(Scaled(3, 2)))), Probe(drawn(5, 3)))
    assert type(found["0"].gradients) is DenseGradients
    assert "layer '0' is measured row by row: it does not act as a plain linear layer" in found["0"].note


def test_layers_that_are_no_linear_ones_are_measured_without_a_note():
    found = measured(Network(filled(nn.Sequential(nn.LayerNorm(3)))), Probe(drawn(5, 3)))
    assert type(found["0"].gradients) is DenseGradients
    assert found["0"].note is None


def test_a_layer_that_is_never_called_has_zero_gradients():
    network = Network(filled(Composed(lambda m, x: m.used(x), used=nn.Linear(3, 2), unused=nn.Linear(3, 4))))
    found = measured(network, Probe(drawn(5, 3)))
    assert torch.equal(found["unused"].gradients.rows(), torch.zeros(10, 16, dtype=torch.float64))


def test_outputs_that_depend_on_nothing_have_zero_gradients():
    network = Network(filled(Composed(lambda m, x: m.linear(x).detach(), linear=nn.Linear(3, 2))))
    found = measured(network, Probe(drawn(4, 3)))
    assert torch.equal(found["linear"].gradients.rows(), torch.zeros(8, 8, dtype=torch.float64))


def test_gradients_of_a_behavior_are_those_of_what_it_returns():
    network = Network(filled(nn.Linear(3, 2)), behavior=lambda module, x: module(x)[:, :1] ** 2)
    probe = Probe(drawn(4, 3))
    (layer,) = network.layers
    expected = finite_differences(network, probe, layer)
    # As above: 1e-10 of outputs to 1e2.
    torch.testing.assert_close(measured(network, probe)[""].gradients.rows(), expected, rtol=0.0, atol=1e-6)


def test_gradients_of_several_inputs_are_those_of_finite_differences():
    network = Network(filled(nn.Bilinear(2, 3, 2)))
    probe = Probe((drawn(4, 2), drawn(4, 3, seed=1)))
    (layer,) = network.layers
    expected = finite_differences(network, probe, layer)
    # As above: 1e-10 of outputs to 1e2.
    torch.testing.assert_close(measured(network, probe)[""].gradients.rows(), expected, rtol=0.0, atol=1e-7)


def test_measuring_leaves_no_hooks_and_no_gradients():
    module = filled(in_place())
    network, probe = Network(module), Probe(drawn(5, 3))
    measured(network, probe)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_hooks_are_gone_when_the_forward_raises():
    module = filled(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="calling the module on the inputs failed with RuntimeError"):
        Network(module).trace(Probe(drawn(5, 4)))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m, x: (m.linear(x),), TypeError, "the outputs must be a tensor, got tuple"),
        (lambda m, x: m.linear(x).argmax(1), TypeError, "the outputs must be floating point numbers, got torch.int64"),
        (lambda m, x: m.linear(x).sum(), ValueError, r"one row for each of the 5 inputs, got shape \(\)"),
        (lambda m, x: m.linear(x).mT, ValueError, r"one row for each of the 5 inputs, got shape \(2, 5\)"),
    ],
    ids=["tuple", "integers", "scalar", "transposed"],
)
def test_outputs_without_one_row_per_input_are_refused(function, error, message):
    network = Network(filled(Composed(function, linear=nn.Linear(3, 2))))
    with pytest.raises(error, match=message + ".*pass behavior=lambda"):
        network.outputs(Probe(drawn(5, 3)))


# Activations.


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
    assert found["positions"].rows_per_input == (0,)


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


# Cuts.


def cuts_of(module, inputs):
    network, probe = Network(module), Probe(inputs)
    trace = network.trace(probe)
    return dict(cuts(network, probe, trace, layer_activations(network, probe, trace)))


def test_every_layer_of_a_chain_is_a_cut():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert cuts_of(module, drawn(6, 3)) == {"0": 0, "2": 16, "4": 41}


def skipping():
    return filled(
        Composed(
            lambda m, x: m.head(x + m.up(m.down(x).tanh())),
            down=nn.Linear(4, 1),
            up=nn.Linear(1, 4),
            head=nn.Linear(4, 2),
        )
    )


def test_a_branch_beside_a_skip_connection_is_no_cut():
    # The input of "down" is the whole input, but it also passes by; behind the sum all is one again.
    assert cuts_of(skipping(), drawn(6, 4)) == {"head": 5 + 8}


def test_a_gate_beside_a_layer_is_no_cut():
    module = filled(
        Composed(lambda m, x: m.gate(x).sigmoid() * m.value(x), gate=nn.Linear(3, 2), value=nn.Linear(3, 2))
    )
    assert cuts_of(module, drawn(6, 3)) == {}


@pytest.mark.parametrize("blind", ["zero head", "dead units"])
def test_a_branch_is_no_cut_where_all_outputs_are_the_same(blind):
    module = skipping()
    with torch.no_grad():
        module.head.weight.zero_()
        if blind == "dead units":
            module.down.weight.zero_()
    assert not {"down", "up"} & set(cuts_of(module, drawn(6, 4)))


def test_sequences_with_adjacent_rows_are_cut_too():
    assert cuts_of(filled(sequences(flatten=True)), drawn(5, 6, 3)) == {"first": 0, "second": 16}


def test_parameters_of_a_tied_layer_count_before_each_cut_that_they_are_used_before():
    module = filled(Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    module.b.weight = module.a.weight
    assert cuts_of(module, drawn(6, 3)) == {"a": 0, "b": 12}


def test_frozen_parameters_do_not_count_before_a_cut():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module[0].weight.requires_grad_(requires_grad=False)
    assert cuts_of(module, drawn(6, 3))["2"] == 4


def test_a_layer_that_is_called_twice_is_not_taken_for_a_cut():
    module = filled(linear_twice())
    assert set(cuts_of(module, drawn(6, 3))) == {"head"}


def test_the_number_of_first_layers_counts_what_the_first_one_sits_in():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(3, 2)
            self.last = nn.Linear(2, 2)

        def forward(self, x):
            return self.last(F.relu(self.inner(x))) * self.scale

    assert Network(filled(Outer())).trace(Probe(drawn(4, 3))).num_first == 2
