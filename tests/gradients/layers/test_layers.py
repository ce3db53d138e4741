import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from lightning_basin import Probe
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.gradients import layers, structured
from lightning_basin.gradients.sizes import LayerSize, layer_sizes
from lightning_basin.limits import MemoryBudgetError
from lightning_basin.network.network import Network
from tests.networks import Composed, drawn, filled, finite_differences, linear_twice, measured, sequences

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")


def in_place():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


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


def weight_as_left_factor():
    return Composed(lambda m, x: (m.linear.weight @ x.mT).mT.tanh().square(), linear=nn.Linear(3, 2, bias=False))


class Bare(nn.Module):
    """Parameters of its own, without a module around them: a class token, positions, scales, a table, a projection."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 4, 4))
        self.scale = nn.Parameter(torch.zeros(4))
        self.divisor = nn.Parameter(torch.zeros(1))
        self.projection = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = (x * self.scale).tanh() @ self.projection - self.scale[:3]
        return x.square().sum(1) / self.divisor


class Positions(nn.Module):
    """Positional embeddings are looked up without any input."""

    def __init__(self, places=lambda x: torch.arange(x.shape[1])):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 2)
        self.places = places

    def forward(self, x):
        return self.head((x + self.table(self.places(x))).tanh()).sum(1)


class TiedHead(nn.Module):
    """The table of tokens is the output head, too; tokens may be looked up by two calls, of which each has its own."""

    def __init__(self, num_tokens=5, num_calls=1):
        super().__init__()
        self.num_calls = num_calls
        self.table = nn.Embedding(num_tokens, 3)
        self.head = nn.Linear(3, num_tokens)
        self.head.weight = self.table.weight

    def forward(self, x):
        tokens = (x.abs() * 3).long() % self.table.num_embeddings
        looked_up = [self.table((tokens + call) % self.table.num_embeddings) for call in range(self.num_calls)]
        return self.head(sum(looked_up).tanh().sum(1))[:, :4]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return (x @ self.weight.mT).tanh() @ self.weight


def bags(mode):
    def forward(module, x):
        return module.head(module.table((x.abs() * 3).long() % 6).tanh())

    return Composed(forward, table=nn.EmbeddingBag(6, 3, mode=mode), head=nn.Linear(3, 2))


def recurrent(kind, **options):
    return Composed(lambda m, x: m.part(x)[0][:, -1], part=kind(3, 2, batch_first=True, **options))


def attention(**options):
    def forward(module, x):
        return module.part(x, x.tanh(), x * x, need_weights=False)[0].sum(1)

    return Composed(forward, part=nn.MultiheadAttention(4, 2, batch_first=True, **options))


def attention_over_positions_first():
    part = nn.MultiheadAttention(4, 2)
    return Composed(lambda m, x: m.part(*[x.transpose(0, 1)] * 3)[0].sum(0), part=part)


def encoder_layer(**options):
    return Composed(
        lambda m, x: m.part(x).sum(1),
        part=nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True, **options),
    )


def checkpointed(use_reentrant):
    def forward(module, x):
        hidden = torch.utils.checkpoint.checkpoint(lambda y: module.first(y).tanh(), x, use_reentrant=use_reentrant)
        return module.second(hidden)

    return Composed(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 2))


# Modules whose parameters are used by known operations, whatever the module is called.
BY_OPERATION = {
    "transposed sequences": (transposed, (5, 6, 3)),
    "transposed sequences that divide evenly": (transposed, (3, 6, 3)),
    "transposed square sequences": (transposed, (4, 4, 3)),
    "weight_norm": (lambda: normed(nn.utils.parametrizations.weight_norm), (5, 3)),
    "spectral_norm": (lambda: normed(nn.utils.parametrizations.spectral_norm), (5, 3)),
    "tied weights": (tied, (5, 3)),
    "tied table and head": (TiedHead, (5, 3)),
    "tied table of many rows": (lambda: TiedHead(29), (5, 3)),
    "tied table of many rows, called twice": (lambda: TiedHead(29, 2), (5, 3)),
    "tied transposed weights": (Autoencoder, (5, 3)),
    "weight used beside": (weight_used_beside, (5, 3)),
    "weight as left factor": (weight_as_left_factor, (5, 3)),
    "bare parameters": (Bare, (5, 3, 4)),
    "positions": (Positions, (4, 5, 3)),
    "positions of each input": (lambda: Positions(lambda x: torch.arange(5).expand(len(x), -1)), (4, 5, 3)),
    "positions of as many inputs": (lambda: Positions(lambda x: torch.arange(5)[None].expand(len(x), -1)), (5, 5, 3)),
    "repeated positions": (lambda: Positions(lambda x: torch.arange(5).repeat(len(x), 1)), (4, 5, 3)),
    "EmbeddingBag, sums": (lambda: bags("sum"), (5, 3)),
    "EmbeddingBag, means": (lambda: bags("mean"), (5, 3)),
    "RNN": (lambda: recurrent(nn.RNN), (4, 3, 3)),
    "LSTM": (lambda: recurrent(nn.LSTM), (4, 3, 3)),
    "LSTM of two layers, both ways": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True), (4, 3, 3)),
    "LSTM with a projection": (lambda: recurrent(nn.LSTM, proj_size=1), (4, 3, 3)),
    "GRU": (lambda: recurrent(nn.GRU), (4, 3, 3)),
    "attention": (attention, (3, 3, 4)),
    "attention to itself": (
        lambda: Composed(
            lambda m, x: m.part(x, x, x, need_weights=False)[0].sum(1),
            part=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        (3, 3, 4),
    ),
    "attention with bias and zeros": (lambda: attention(add_bias_kv=True, add_zero_attn=True), (3, 3, 4)),
    "attention over positions first": (attention_over_positions_first, (3, 5, 4)),
    "encoder layer": (encoder_layer, (3, 3, 4)),
    "encoder layer, norm first": (lambda: encoder_layer(norm_first=True), (3, 3, 4)),
    "convolution and batch norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (4, 2, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (5, 3)),
    "checkpointing": (lambda: checkpointed(use_reentrant=False), (5, 3)),
    "one input": (encoder_layer, (1, 3, 4)),
}


# Modules with a parameter that is used in a way that is not known.
DENSE = {
    "a function of the weight that is no product": (
        lambda: Composed(lambda m, x: torch.cdist(x, m.linear.weight), linear=nn.Linear(3, 2, bias=False)),
        (5, 3),
    ),
    "EmbeddingBag, largest": (lambda: bags("max"), (5, 3)),
    "a power": (lambda: Composed(lambda m, x: (x.abs() + 1) ** m.part.weight[0], part=nn.Linear(3, 2)), (5, 3)),
}


@pytest.mark.parametrize("name", [*FACTORED, *BY_OPERATION, *DENSE])
def test_gradients_of_every_layer_are_those_of_finite_differences(name):
    build, shape = (FACTORED | BY_OPERATION | DENSE)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    found = measured(network, probe)
    assert set(found) == {layer.name for layer in network.layers}
    for layer in network.layers:
        expected = finite_differences(network, probe, layer)
        # Central differences: truncation near step**2 = 1e-12 and rounding near eps / step = 1e-10 of outputs to 1e2.
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(found[layer.name].gradients.rows(), expected, rtol=0.0, atol=1e-7 * scale)


@pytest.mark.parametrize("name", [*FACTORED, *BY_OPERATION])
def test_layers_whose_operations_are_known_are_measured_without_dense_rows(name):
    build, shape = (FACTORED | BY_OPERATION)[name]
    found = measured(Network(filled(build())), Probe(drawn(*shape)))
    assert {layer: gradients.structured for layer, gradients in found.items()} == dict.fromkeys(found, True)
    assert {gradients.note for gradients in found.values()} == {None}


@pytest.mark.parametrize("name", [*sorted(FACTORED.keys() - {"hooks that change inputs and outputs"}), *BY_OPERATION])
def test_chunks_of_inputs_give_the_same_gradients(name):
    build, shape = (FACTORED | BY_OPERATION)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    whole = measured(network, probe)
    for layer, gradients in measured(network, probe, chunk_size=2).items():
        expected = whole[layer].gradients.rows()
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=0.0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["sequences", "transposed sequences", "convolution and batch norm"])
def test_factors_that_are_larger_than_the_rows_are_multiplied_out_chunk_by_chunk(name):
    build, shape = (FACTORED | BY_OPERATION)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    whole = measured(network, probe)
    largest = max(gradients.gradients.rows().numel() for gradients in whole.values())
    found = measured(network, probe, chunk_size=2, max_elements=largest)
    assert any(type(gradients.gradients) is DenseGradients for gradients in found.values())
    for layer, gradients in found.items():
        assert gradients.structured
        expected = whole[layer].gradients.rows()
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(gradients.gradients.rows(), expected, rtol=0.0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["attention to itself", "a power"])
def test_layers_are_the_same_measured_together_or_one_by_one(name, monkeypatch):
    build, shape = (BY_OPERATION | DENSE)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    whole = measured(network, probe)
    for module in (layers, structured):
        monkeypatch.setattr(module, "GROUP_ELEMENTS", 1)
    for layer, gradients in measured(network, probe).items():
        assert torch.equal(gradients.gradients.rows(), whole[layer].gradients.rows())


@pytest.mark.parametrize("name", ["plain", "a power"])
def test_a_layer_that_fits_by_no_method_is_refused(name):
    build, shape = (FACTORED | DENSE)[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    with pytest.raises(MemoryBudgetError, match=r"rows by .* do not fit into memory_budget: take a smaller probe"):
        measured(network, probe, max_elements=60)


def test_a_layer_that_no_output_depends_on_takes_no_memory():
    network = Network(filled(Composed(lambda m, x: m.used(x), used=nn.Linear(3, 2), unused=nn.Linear(300, 40))))
    trace = network.trace(Probe(drawn(2, 3)))
    sizes = layer_sizes(network, trace, num_inputs=5, num_outputs=2)
    # For each of 5 inputs: 3 numbers that enter, and twice 2 derivatives, also of the bias; and two pairs of vectors
    # of 2 + 3 numbers for each of 10 rows.
    assert sizes["used"] == LayerSize(dense=80, factors=55, held=55, peak=155)
    assert sizes["unused"].least == 0


@pytest.mark.parametrize("name", FACTORED)
def test_gradients_of_plain_linear_layers_stay_factored(name):
    build, shape = FACTORED[name]
    found = measured(Network(filled(build())), Probe(drawn(*shape)))
    parts = [type(part) for gradients in found.values() for part in gradients.gradients.parts]
    if name == "frozen weights":
        assert set(parts) == {DenseGradients}  # Biases alone.
    else:
        assert set(parts) == {KhatriRaoGradients}


def test_of_a_tied_table_the_rows_that_are_looked_up_are_dense():
    build, shape = BY_OPERATION["tied table of many rows"]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    num_rows = ((probe.inputs.abs() * 3).long() % 29).unique().numel()
    by_products, by_rows = measured(network, probe)["table"].gradients.parts
    assert (by_products.num_columns, by_rows.num_columns) == (29 * 3, num_rows * 3)
    assert isinstance(by_products, KhatriRaoGradients)
    size = layer_sizes(network, network.trace(probe), num_inputs=5, num_outputs=4)["table"]
    # 5 inputs of 4 outputs: 3 numbers that enter the head and 29 derivatives of each output by what leaves it; at each
    # of 3 places one of the rows and 3 derivatives of each output; and the columns of these rows for 20 outputs.
    factors = 5 * (3 + 4 * 29) + 5 * 3 * (num_rows + 4 * 3)
    assert (size.factors, size.held) == (factors, factors + 20 * num_rows * 3)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("name", ["tied table of many rows", "EmbeddingBag, means", "positions"])
def test_rows_that_chunks_look_up_are_joined(name, chunk_size):
    build, shape = BY_OPERATION[name]
    network, probe = Network(filled(build())), Probe(drawn(*shape))
    together, in_chunks = measured(network, probe), measured(network, probe, chunk_size=chunk_size)
    for layer, whole in together.items():
        part = in_chunks[layer]
        assert part.structured
        assert type(part.gradients.parts[-1]) is type(whole.gradients.parts[-1])
        assert part.gradients.num_elements == whole.gradients.num_elements
        torch.testing.assert_close(part.gradients.rows(), whole.gradients.rows())


@pytest.mark.parametrize("name", DENSE)
def test_layers_with_an_unknown_operation_are_measured_row_by_row(name):
    build, shape = DENSE[name]
    found = measured(Network(filled(build())), Probe(drawn(*shape)))
    assert not all(gradients.structured for gradients in found.values())


def test_a_use_that_is_not_seen_is_noticed_and_said():
    module = Composed(lambda m, x: m.linear(x) ** m.linear.bias.square(), linear=nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    found = measured(Network(module.double()), Probe(drawn(5, 3).abs()))
    assert type(found["linear"].gradients) is DenseGradients
    assert found["linear"].note == "layer 'linear' is measured row by row: its parameters are used in other ways"


@pytest.mark.parametrize("name", ["called twice", "tied weights", "bare parameters", "attention", "LSTM"])
def test_gradients_stay_right_whichever_use_is_not_recorded(name, monkeypatch):
    build, shape = (FACTORED | BY_OPERATION)[name]
    network, probe, trace = Network(filled(build())), Probe(drawn(*shape)), Network.trace
    expected = {layer: gradients.gradients.rows() for layer, gradients in measured(network, probe).items()}
    dropped = [i for i, use in enumerate(network.trace(probe).operations.uses) if use.output.edge is not None]

    def forgetful(index):
        def run(network, probe):
            forgotten = trace(network, probe)
            forgotten.operations.uses[index : index + 1] = []  # In another precision there may be fewer.
            return forgotten

        return run

    num_noticed = 0
    for index in dropped:
        monkeypatch.setattr(Network, "trace", forgetful(index))
        found = measured(network, probe)
        num_noticed += not all(gradients.structured for gradients in found.values())
        for layer, gradients in found.items():
            rows = gradients.gradients.rows()
            torch.testing.assert_close(rows, expected[layer], rtol=0.0, atol=1e-12 * float(expected[layer].abs().max()))
    # The state that enters a recurrent cell first is zero, and the softmax does not see the bias of the keys.
    assert num_noticed >= len(dropped) - 1


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


def empty_in_turn(m, x):
    outs = torch.empty(len(x), 6, dtype=torch.float64).zero_()
    for position in range(6):
        outs[:, position] = (x == position).double()
    return m.head(outs)


def sums_in_turn(m, x):
    """A state that every step adds to."""
    total = torch.zeros(6, len(x), dtype=torch.float64).mT
    for _ in range(3):
        total += torch.eye(6, dtype=torch.float64)[x] / 3
    return m.head(total)


def into(write, *, dtype=torch.float64, positions=1):
    def function(m, x):
        made = torch.zeros(len(x) * positions, 6, dtype=dtype)
        write(made, x.repeat_interleave(positions))
        return m.head(made.double()).view(len(x), -1)

    return function


def by_out(made, x):
    torch.mul(torch.eye(6, dtype=made.dtype)[x], 1, out=made)


WRITES = {
    "F.one_hot": lambda m, x: m.head(nn.functional.one_hot(x, 6).double()),
    "scatter_ of integers": into(lambda made, x: made.scatter_(1, x[:, None], 1), dtype=torch.long),
    "scatter_": into(lambda made, x: made.scatter_(1, x[:, None], 1.0)),
    "scatter_add_": into(lambda made, x: made.scatter_add_(1, x[:, None], torch.ones(len(x), 1, dtype=made.dtype))),
    "at indices": into(lambda made, x: made.__setitem__((torch.arange(len(x)), x), 1.0)),
    "at indices, of truths": into(lambda made, x: made.__setitem__((torch.arange(len(x)), x), 1), dtype=torch.bool),
    "masked_fill_": into(lambda made, x: made.masked_fill_(x[:, None] == torch.arange(6), 1.0)),
    "copy_": into(lambda made, x: made.copy_(torch.eye(6, dtype=made.dtype)[x])),
    "a view": into(lambda made, x: made.view(-1, 2, 3).copy_(torch.eye(6)[x].view(-1, 2, 3))),
    "out=": into(by_out),
    "two positions": into(lambda made, x: made.scatter_(1, x[:, None], 1.0), positions=2),
    "in turn": empty_in_turn,
    "sums in turn": sums_in_turn,
}


@pytest.mark.parametrize("function", WRITES.values(), ids=WRITES)
def test_what_is_written_into_a_new_tensor_is_seen_to_depend_on_the_inputs(function):
    # Five of six words: with the bias five independent rows, for each of two outputs; 2 positions are the same twice.
    words = torch.tensor([0, 1, 2, 3, 4, 0, 2, 2])
    network = Network(filled(Composed(function, head=nn.Linear(6, 2))))
    found = measured(network, Probe(words))["head"]
    assert found.structured
    assert found.note is None
    assert int(torch.linalg.matrix_rank(found.gradients.rows())) == 10
