"""The bound on the rank: worked examples, and cuts that are none."""

import pytest
import torch
from torch import Tensor, nn

from lightning_basin import Probe, measure_basin
from lightning_basin.network.layers import reached_parameters
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.quantities.rank_bound import merging_error
from tests.measure.records import SEEDS, generic
from tests.models import Chain, with_integer_weights
from tests.networks import Composed, drawn, filled, generator_of


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("widths", [(2, 2, 2, 2, 1), (3, 1, 6, 2), (2, 4, 4, 4, 4, 4, 1)])
def test_bound_by_merged_inputs_is_never_violated(widths, seed):
    module = generic(Chain(*widths), seed)
    with torch.no_grad():  # Zero bias, as at initialisation: many units die with depth.
        for layer in module.layers:
            layer.bias.zero_()
    record = measure_basin(module, drawn(16, widths[0], seed=seed))
    assert record.gradient_rank <= record.gradient_rank_bound <= min(record.num_rows, record.num_parameters)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("widths", [(3, 2), (3, 6), (4, 1, 5), (2, 3, 3, 3)])
def test_tighter_bounds_are_never_violated(widths, num_outputs, bias):
    for seed in range(6):
        module = generic(Chain(*widths, num_outputs), seed)
        generator = generator_of(seed)
        with torch.no_grad():
            for layer in module.layers:
                layer.bias.sub_(float(seed % 3))  # More and more units are dead.
            module.layers[0].weight[:, 0] = 0  # Inputs that differ in the first feature only are merged at once.
        if not bias:
            for layer in module.layers:
                layer.bias.requires_grad_(requires_grad=False)
        inputs = torch.randint(-1, 2, (20, widths[0]), generator=generator).double()
        record = measure_basin(module, inputs)
        assert record.gradient_rank <= record.gradient_rank_bound <= min(record.num_rows, record.num_parameters)


def test_inputs_that_are_dead_before_the_merge_add_nothing_before_it():
    # relu(w x + b) of two units: ten inputs switch both off and are one class whose gradients before the cut are zero.
    module = Chain(1, 2, 1).double()
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        module.layers[0].bias.zero_()
        module.layers[1].weight.fill_(1.0)
    inputs = torch.cat([-torch.arange(1.0, 11.0), torch.arange(1.0, 6.0)]).unsqueeze(1)
    record = measure_basin(module, inputs)
    # B2: 4 + 1 * 6 = 10 on 7 parameters. B3: 6 classes + 0. Five points on a line beside zero: columns x, 1, and 1.
    assert record.layers["layers.1"].duplicated_activations == 9
    assert record.gradient_rank_bound == 6
    assert record.gradient_rank == 3


class TiedAcross(nn.Module):
    """f = relu(x Wᵀ - 1000) W: the weight before the merge is used behind it again."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.shift, self.decode = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.shift(self.encode(x).relu()))


def test_weight_that_is_tied_across_the_cut_counts_before_it():
    module = with_integer_weights(TiedAcross(), generator_of(3))
    with torch.no_grad():
        module.encode.bias.fill_(-1000.0)
        module.shift.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    inputs = torch.randint(-3, 4, (20, 3), generator=generator_of(4)).float()
    record = measure_basin(module, inputs)
    assert record.layers["shift"].duplicated_activations == 19
    # All inputs are one behind ``encode``, whose weight still has gradients: through ``decode``, 3 of them.
    assert record.gradient_rank == 3
    assert record.gradient_rank <= record.gradient_rank_bound


class TiedAndRead(nn.Module):
    """One weight before the merge; and again behind it, on a vector that all inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        merged = (self.first(x) - 1000).relu()
        return self.gain(merged) + self.first.weight.sum(1)


def test_parameter_that_bypasses_the_layer_before_a_cut_is_noticed():
    module = with_integer_weights(TiedAndRead(), generator_of(3))
    inputs = torch.randint(-3, 4, (9, 2), generator=generator_of(4)).float()
    record = measure_basin(module, inputs)
    # The gradient before the cut is zero through the layer, and one of each of two outputs beside it.
    assert record.gradient_rank == 2
    assert record.gradient_rank <= record.gradient_rank_bound


class TwoBranches(nn.Module):
    """A live branch and one that is dead on every input, entered in this order, side by side in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.head = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.live(x).relu(), self.dead(x).relu()], dim=1))


def test_layer_before_a_cut_that_only_some_parameters_act_through_does_not_tighten_the_bound():
    module = TwoBranches().double()
    with torch.no_grad():
        module.live.weight.copy_(torch.tensor([[1.0, 0.0]]))
        module.live.bias.zero_()
        module.dead.bias.fill_(-1000.0)
        module.head.weight.fill_(1.0)
    record = measure_basin(module, torch.cartesian_prod(torch.tensor([1.0, 2.0]), torch.arange(4.0)))
    assert record.layers["head"].duplicated_activations == 6
    # The live branch alone has rank [x, 1] = 3. Two codes, and no directions through the dead branch, would make 2.
    assert record.gradient_rank == 3
    assert record.gradient_rank_bound == 6 + 2


class TokensBeside(nn.Module):
    """Merged features, and a token index that reaches the outputs through a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head, self.table = nn.Linear(1, 2), nn.Linear(2, 2), nn.Embedding(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        merged = (self.encode(x) - 1000).relu()
        return self.head(merged) * self.table(x.squeeze(1).long())


def test_token_index_that_bypasses_the_merge_leaves_no_cut():
    module = with_integer_weights(TokensBeside(), generator_of(2))
    with torch.no_grad():
        module.head.bias.copy_(torch.tensor([1.0, 2.0]))
    record = measure_basin(module, torch.arange(6.0).unsqueeze(1))
    assert record.layers["head"].duplicated_activations == 5
    # Row (x, j) of the table's gradients is head_j at entry (x, j): 6 * 2 independent rows, though one code is left.
    assert record.gradient_rank == 12
    assert record.gradient_rank_bound == 12


class Constant(nn.Module):
    """Outputs that depend on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(torch.zeros(1, dtype=torch.int64)).expand(len(x), 2)


def test_outputs_that_depend_on_no_input_are_bounded_by_those_of_one():
    record = measure_basin(Constant(), torch.arange(5.0).unsqueeze(1))
    assert (record.gradient_rank, record.gradient_rank_bound) == (2, 2)


class BesideSkip(nn.Module):
    """f = head(x + down(relu(up(x)))): the input of ``down`` is not all that reaches the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 1), nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.up(x).relu()))


def test_merged_branch_beside_a_skip_connection_is_no_cut():
    module = with_integer_weights(BesideSkip(), generator_of())
    with torch.no_grad():
        module.up.bias.fill_(-1000.0)
    # The simplex and one more point: [x, 1] has rank 5, and the head alone rank 3 * 5.
    inputs = torch.cat([torch.zeros(1, 4), torch.eye(4), torch.ones(1, 4)])
    record = measure_basin(module, inputs)
    assert record.layers["down"].duplicated_activations == 5
    assert record.gradient_rank == 15
    # Taking the branch for a cut would give 5 parameters of ``up`` + 3 outputs * 1 code = 8 < 15.
    assert record.gradient_rank_bound == 18


class BesideGatedSkip(nn.Module):
    """The skip connection carries large inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x - 5).relu() + self.down(self.up(x).relu()))


def test_skip_connection_that_is_silent_on_the_first_inputs_still_leaves_no_cut():
    module = with_integer_weights(BesideGatedSkip(), generator_of(1))
    with torch.no_grad():
        module.up.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, -1000.0]]))
        module.up.bias.zero_()
    # Three small inputs that only the branch tells apart, then ten large ones that only the skip tells apart.
    small = torch.zeros(3, 8)
    small[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    large = torch.cat([torch.full((1, 8), 6.0), torch.full((1, 8), 9.0), 6.0 + torch.eye(8)])
    record = measure_basin(module, torch.cat([small, large]))
    assert record.layers["down"].duplicated_activations == 9
    # Without the branch's input being a cut, outputs and parameters are all that bounds the rank.
    assert record.gradient_rank <= record.gradient_rank_bound
    assert record.gradient_rank_bound == min(13 * 4, 9 + 16 + 36)


class BesideZeroSkip(nn.Module):
    """f = skip(x) + down(relu(up(x))); with zero weights the skip adds nothing, but its gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(4, 1), nn.Linear(1, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.down(self.up(x).relu())


@pytest.mark.parametrize("dead", [True, False], ids=["dead branch", "live branch"])
def test_skip_connection_of_zero_weight_still_leaves_no_cut(dead):
    # Zero is where such weights often start (a zero-initialised branch); outputs alone do not show the connection.
    module = with_integer_weights(BesideZeroSkip(), generator_of(2))
    with torch.no_grad():
        module.skip.weight.zero_()
        # Live: of the codes 0 and 1 most inputs share one.
        module.up.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        module.up.bias.fill_(-1000.0 if dead else 0.0)
    inputs = torch.cat([torch.zeros(1, 4), torch.eye(4), torch.ones(1, 4)])
    record = measure_basin(module, inputs)
    assert record.gradient_rank >= 15  # the skip alone: 3 outputs times rank [x, 1] = 5
    assert record.gradient_rank <= record.gradient_rank_bound
    assert record.gradient_rank_bound == 3 * 6


@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_inputs_do_not_raise_the_rank(seed):
    module, inputs = generic(Chain(3, 5, 2), seed), drawn(6, 3, seed=seed)
    once, twice = measure_basin(module, inputs), measure_basin(module, torch.cat([inputs, inputs[:4]]))
    assert twice.gradient_rank == once.gradient_rank
    assert twice.layers["layers.0"].duplicated_activations_exact == 4


def test_linear_model_has_low_rank_without_merged_inputs():
    # Ten inputs in three dimensions: rank 3, and no two of them alike.
    record = measure_basin(nn.Linear(3, 1, bias=False), drawn(10, 3))
    assert (record.gradient_rank, record.layers[""].duplicated_activations) == (3, 0)


def test_inputs_that_merge_at_different_layers_are_bounded_each_at_its_own():
    # For the left half all units of the first layer are off; for the right half, of which this layer tells every input,
    # all of the second. So either half moves each of two outputs in one way. No single cut says it: 27 activations
    # enter the second layer, and 26 inputs on the left reach the third one through units that are on.
    net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2).repeat(10, 1))
        net[0].bias.zero_()
        net[2].weight.zero_()
        net[2].weight[:, 0] = -1.0
        net[2].bias.fill_(1.0)
        net[4].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
    steps = torch.arange(2.0, 28.0).double()
    inputs = torch.cat([torch.stack([-steps, -steps], 1), torch.stack([steps, torch.ones_like(steps)], 1)])
    record = measure_basin(net, inputs)
    assert (record.gradient_rank, record.gradient_rank_bound) == (4, 4)


def parameters_before_layers(module, inputs):
    network, probe = Network(module), Probe(inputs)
    parameters = network.parameters()
    counts = {}
    for name, entering in network.trace(probe).entering.items():
        reached = zip(parameters, reached_parameters(entering, parameters), strict=True)
        counts[name] = sum(parameter.numel() for parameter, is_reached in reached if is_reached)
    return counts


def test_parameters_before_each_layer_of_a_chain_are_those_of_the_layers_before():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert parameters_before_layers(module, drawn(6, 3)) == {"0": 0, "2": 16, "4": 41}


def test_parameters_of_a_tied_layer_count_before_each_layer_that_they_are_used_before():
    module = filled(Composed(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    module.b.weight = module.a.weight
    assert parameters_before_layers(module, drawn(6, 3)) == {"a": 0, "b": 12}


def test_no_parameter_is_reached_through_a_barrier():
    weight, bias = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    barrier = (weight + bias).tanh()
    assert reached_parameters([barrier * 2], [weight, bias]) == [True, True]
    assert reached_parameters([barrier * 2], [weight, bias], barrier=barrier) == [False, False]
    assert reached_parameters([barrier * bias], [weight, bias], barrier=barrier) == [False, True]
    assert reached_parameters([weight, torch.ones(1)], [weight, bias]) == [True, False]


def test_frozen_parameters_do_not_count_before_a_layer():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    module[0].weight.requires_grad_(requires_grad=False)
    assert parameters_before_layers(module, drawn(6, 3))["2"] == 4


def merging_error_of(module, inputs, classes, **kwargs):
    runs = ProbeRuns(Network(module), Probe(inputs), **kwargs)
    return merging_error(runs, torch.tensor(classes), [False] * len(runs.network.parameters()))


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
