from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_basin import Probe, measure_basin
from lightning_basin.measure import check_measurable
from lightning_basin.settings import Settings
from tests.models import Chain, sum_of_squares
from tests.networks import Composed, OnceOnly, built, drawn32


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TimeFirst(LastState):
    """The recurrent layer wants time first: inside, the inputs are along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(0, 1))[0][-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class WeightUsedTwice(nn.Module):
    """A linear layer whose weight the forward also uses on its own: no longer what its type says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh() @ self.inner.weight)


class HookedLinear(nn.Module):
    """A linear layer whose output a hook changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.inner.register_forward_hook(lambda module, args, output: output * output.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh())


class InPlaceActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh_())


def normalised_by_weight() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def normalised_by_spectrum() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def normalised_by_batch() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    module(drawn32(20, 3, seed=9))  # fills the running statistics
    return module


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (LastState, (20, 3, 2)),
    "LSTM time first": (TimeFirst, (20, 3, 2)),
    "attention": (Attention, (20, 3, 4)),
    "encoder": (Encoder, (30, 3, 4)),
    "weight norm": (normalised_by_weight, (20, 3)),
    "spectral norm": (normalised_by_spectrum, (20, 3)),
    "batch norm and dropout": (normalised_by_batch, (20, 3)),
    "convolution 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (20, 2, 4),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)),
        (30, 2, 3, 3),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.SiLU(), nn.Linear(3, 2)), (15, 3)),
    "weight used twice": (WeightUsedTwice, (20, 3)),
    "hooked": (HookedLinear, (20, 3)),
    "in place": (InPlaceActivation, (20, 3)),
}


def plain_jacobian(module: nn.Module, inputs: Tensor) -> np.ndarray:
    """One backward pass through the batch for each output of a float64 module in evaluation mode."""
    outputs, parameters = module.double().eval()(inputs.double()), list(module.parameters())
    gradients = [torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in gradients]).numpy()


def differences(module: nn.Module, inputs: Tensor) -> np.ndarray:
    """The Jacobian by central differences in float64: no derivative rule of anybody is involved.

    Steps of 1e-3 and 2e-3 with Richardson's extrapolation leave an error near 1e-11.
    """
    module, inputs = module.double().eval(), inputs.double()
    columns = []
    with torch.no_grad():
        for parameter in module.parameters():
            for entry in range(parameter.numel()):
                flat, slopes = parameter.view(-1), []
                original = flat[entry].clone()
                for step in (1e-3, 2e-3):
                    ends = []
                    for sign in (1, -1):
                        flat[entry] = original + sign * step
                        ends.append(module(inputs).flatten())
                    slopes.append((ends[0] - ends[1]) / (2 * step))
                flat[entry] = original
                columns.append((4 * slopes[0] - slopes[1]) / 3)
    return torch.stack(columns, dim=1).numpy()


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_gradient_rank_of_any_module_is_that_of_its_differences(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs, rtol=1e-8)
    sigmas = np.linalg.svd(differences(module, inputs), compute_uv=False)
    assert record.gradient_rank == (sigmas > 1e-8 * sigmas[0]).sum()


@every_kind
def test_gradient_rank_of_any_module_is_that_of_its_rows_one_by_one(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs)
    # NumPy's rule for the tolerance is the same.
    assert record.gradient_rank == np.linalg.matrix_rank(plain_jacobian(module, inputs))


@every_kind
def test_layer_ranks_of_any_module_are_those_of_its_rows_one_by_one(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build), drawn32(*shape, seed=1)
    record = measure_basin(module, inputs)
    sizes = [part.num_parameters for part in record.layers.values()]
    blocks = np.split(plain_jacobian(module, inputs), np.cumsum(sizes)[:-1], axis=1)
    expected = dict(zip(record.layers, map(np.linalg.matrix_rank, blocks), strict=True))
    assert {name: part.gradient_rank for name, part in record.layers.items()} == expected


@every_kind
def test_hessian_of_any_module_has_the_rank_of_its_gradients_at_zero_loss(kind):
    build, shape = KINDS[kind]
    module, inputs = built(build).double(), drawn32(*shape, seed=1).double()
    targets = module.eval()(inputs).detach()
    record = measure_basin(module, inputs, targets, loss_fn=sum_of_squares, rtol=1e-10)
    sigmas = np.linalg.svd(plain_jacobian(module, inputs), compute_uv=False)
    # The residual may be rounding instead of zero; the eigenvalues above 1e-10 are the squares of those above 1e-5.
    assert record.loss == pytest.approx(0.0, abs=1e-28)
    assert record.num_parameters - record.hessian_nullity_strict >= (sigmas > 2e-5 * sigmas[0]).sum()
    assert record.num_parameters - record.hessian_nullity_strict <= (sigmas > 0.5e-5 * sigmas[0]).sum()


def test_parametrized_weight_needs_no_note():
    assert measure_basin(WeightUsedTwice(), drawn32(5, 3)).notes == ()


def test_plain_network_has_nothing_to_note():
    assert measure_basin(Chain(2, 3, 1), drawn32(5, 2)).notes == ()


class HoldsItself(nn.Module):
    """Keeps a function of itself, as `self.encode = lambda x: ...` does in many modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.encode = lambda inputs: self.linear(inputs).tanh()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs)


def test_a_function_of_itself_that_a_module_holds_is_that_of_the_copy():
    # Two units, each with a bias and weights of three inputs in general position.
    record = measure_basin(HoldsItself(), drawn32(5, 3).double())
    assert record.gradient_rank == 8


def test_a_loss_that_closes_over_the_module_gets_the_copy():
    module = nn.Linear(3, 2, dtype=torch.float64)
    inputs, targets = drawn32(5, 3).double(), drawn32(5, 2).double()

    def penalised(outputs, targets):
        return (outputs - targets).square().sum() + sum(p.square().sum() for p in module.parameters())

    record = measure_basin(module, inputs, targets, loss_fn=penalised, hessian="dense")
    assert record.loss == pytest.approx(float(penalised(module(inputs), targets)), rel=1e-12)


def test_rank_bound_is_not_below_the_rank_where_one_feature_is_huge():
    inputs = drawn32(30, 3).double()
    inputs[0, 0] = 1e7
    record = measure_basin(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), inputs)
    assert record.gradient_rank <= record.gradient_rank_bound


def test_a_parameter_without_effect_behind_a_softmax_is_measured():
    class ShiftedSoftmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.linear(inputs) + self.shift).softmax(1)

    # Three logits of four count; each sees the 3 + 1 dimensions of its input.
    assert measure_basin(ShiftedSoftmax(), drawn32(9, 3)).gradient_rank == 12


def test_ranks_stay_where_the_loss_cannot_be_differentiated_twice():
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return OnceOnly.apply(self.linear(inputs))

    with pytest.warns(UserWarning, match="the Hessian is left out") as warned:
        record = measure_basin(Squares(), drawn32(9, 3), drawn32(9, 2), loss_fn=nn.MSELoss())
    assert warned[0].filename == __file__  # The line that asked for it.
    assert (record.gradient_rank, record.hessian_nullity) == (8, None)


def test_packed_sequences_between_layers_are_measured():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(2, 3, batch_first=True)
            self.head = nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            lengths = torch.full((inputs.shape[0],), inputs.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True)
            return self.head(self.recurrent(packed)[1][-1])

    assert measure_basin(Packed(), drawn32(6, 4, 2)).gradient_rank == 6


def test_a_float32_constant_that_is_no_attribute_is_raised_to_float64():
    constant = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs) @ constant

    assert measure_basin(Mixing(), drawn32(9, 3)).gradient_rank == 8


def test_sparse_embeddings_are_measured_like_dense_ones():
    tokens = torch.tensor([[0, 1], [2, 2], [1, 0], [3, 1]])
    ranks = []
    for sparse in (False, True):
        torch_generator = torch.Generator().manual_seed(0)
        table = nn.EmbeddingBag(5, 2, mode="sum", sparse=sparse)
        with torch.no_grad():
            table.weight.copy_(torch.randn(5, 2, generator=torch_generator))
        ranks.append(measure_basin(table, tokens).gradient_rank)
    # Counts of tokens (1,1,0,0), (0,0,2,0), (1,1,0,0), (0,1,0,1): three independent ones, for each of two outputs.
    assert ranks == [6, 6]


class WithLength(nn.Linear):
    """A module that is false, as an empty memory bank would be."""

    def __len__(self) -> int:
        return 0

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(inputs, training=self.training))


def test_a_module_of_length_zero_is_evaluated_like_any_other():
    assert measure_basin(WithLength(3, 1), drawn32(6, 3)).gradient_rank == 4


def test_activations_that_differ_in_their_imaginary_part_are_distinct():
    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Linear(1, 1)
            self.scale = Scale()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale(torch.complex(torch.ones_like(inputs), self.shift(inputs))).imag

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.factor * inputs

    inputs = torch.arange(5.0).unsqueeze(1)
    assert measure_basin(Phases(), inputs).layers["scale"].duplicated_activations == 0


def test_channels_are_the_units_of_a_prelu():
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.PReLU(2), nn.Flatten())
    with torch.no_grad():
        module[0].weight[1] = 0
    assert measure_basin(module, drawn32(5, 1, 3, 3)).layers["1"].dead_units == 1


class Experts(nn.Module):
    """Each input goes to the expert of its largest feature; experts with no input are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.shift = nn.ModuleList(nn.Linear(4, 2) for _ in range(3)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :3].argmax(1)
        outputs = torch.zeros(len(x), 2, dtype=x.dtype)
        for index, expert in enumerate(self.experts):
            members = (chosen == index).nonzero().squeeze(1)
            if members.numel():
                outputs = outputs.index_add(0, members, expert(x[members]))
        return outputs + self.shift


@pytest.mark.parametrize(("loss_fn", "memory_budget"), [(None, None), (None, 320_000), (nn.MSELoss(), 460_000)])
def test_experts_that_are_not_called_in_a_chunk_add_nothing_there(loss_fn, memory_budget):
    module, inputs, targets = Experts(), drawn32(24, 4), torch.zeros(24, 2)
    inputs = inputs[inputs[:, :3].argmax(1).argsort()]
    settings = {"loss_fn": loss_fn, "hessian": "bracket", "memory_budget": memory_budget}
    plan = check_measurable(module, Probe(inputs, targets), Settings(**settings))
    assert (plan.chunk_size < 24) == (memory_budget is not None)
    record = measure_basin(module, inputs, targets, **settings)
    # [x, 1] has rank min(n, 5) for the n inputs of an expert, twice; the common shift is the sum of theirs.
    counts = inputs[:, :3].argmax(1).bincount(minlength=3)
    assert record.gradient_rank == 2 * int(counts.clamp(max=5).sum())
    assert record.gradient_rank_bound >= record.gradient_rank
    if loss_fn is not None:  # Outputs are linear in the parameters: H = 2 GᵀG / m.
        assert record.hessian_nullity == record.gradient_nullity


@pytest.mark.parametrize("max_outputs", [None, 1])
@pytest.mark.parametrize(
    ("layer", "inputs_of"),
    [
        (nn.Linear(4, 2), lambda x: x),
        (nn.Embedding(3, 2), lambda x: x.argmax(1)),
        (nn.EmbeddingBag(3, 2, mode="sum"), lambda x: x.argsort(1)[:, :2]),
    ],
)
def test_a_layer_that_is_called_with_no_input_adds_nothing(layer, inputs_of, max_outputs):
    def routed(m, x):
        nobody = (x[:, 0] > torch.inf).nonzero().squeeze(1)
        return m.all(x).index_add(0, nobody, m.layer(inputs_of(x[nobody])))

    module, inputs = Composed(routed, layer=layer, all=nn.Linear(4, 2)), drawn32(9, 4)
    record = measure_basin(module, inputs, max_outputs=max_outputs)
    # [x, 1] has rank 5, once for each output. One combination of the two outputs has the same inputs.
    assert record.gradient_rank == record.layers["all"].gradient_rank == 5 * (max_outputs or 2)
    assert record.layers["layer"].gradient_rank == 0


def test_a_tied_table_in_which_nothing_is_looked_up_has_the_rank_of_the_head():
    def tied(m, x):
        nobody = (x[:, 0] > torch.inf).nonzero().squeeze(1)
        return (x @ m.table.weight.T).index_add(0, nobody, m.table(x[nobody].argmax(1)))

    record = measure_basin(Composed(tied, table=nn.Embedding(4, 4)), drawn32(9, 4))
    assert record.gradient_rank == 4 * 4  # x has rank 4, once for each output.


def test_gradients_scaled_by_frequency_are_measured_as_derivatives():
    plain = Composed(
        lambda m, x: m.readout(m.table(x).sum(1)).relu(), table=nn.Embedding(6, 2), readout=nn.Linear(2, 1)
    )
    tokens = torch.randint(0, 6, (40, 3), generator=torch.Generator().manual_seed(5))
    expected = measure_basin(plain, tokens)
    plain.table.scale_grad_by_freq = True
    for memory_budget in (None, 250_000):
        record = measure_basin(plain, tokens, memory_budget=memory_budget)
        assert record.gradient_rank == expected.gradient_rank
        assert record.gradient_effective_rank == pytest.approx(expected.gradient_effective_rank)


def test_table_with_a_largest_norm_that_is_tied_to_the_output_head_is_measured():
    module = Composed(lambda m, x: m.table(x).squeeze(1) @ m.table.weight.T, table=nn.Embedding(3, 2, max_norm=1.0))
    with torch.no_grad():
        module.table.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5], [1.0, 0.0]]))
    record = measure_basin(module, torch.arange(3).unsqueeze(1))
    # Outputs are the entries of W Wᵀ: symmetric, and of rank 2, which leaves 3 * 2 - 1 rotations of W.
    assert record.gradient_rank == 6 - 1
    assert record.notes == ()
    assert module.table.weight[0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize(
    ("module", "num_features", "rank"),
    [
        (nn.Linear(0, 2), 0, 2),
        (Composed(lambda m, x: torch.cat([m.a(x), m.b(x)], dim=1), a=nn.Linear(4, 0), b=nn.Linear(4, 2)), 4, 2 * 5),
        (nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)), 4, 2),
    ],
    ids=["no inputs", "no outputs of a layer", "nothing in between"],
)
def test_layers_without_entries_are_measured(module, num_features, rank, spectrum):
    # [x, 1] of five inputs in general position has rank 5, and only the bias acts on nothing.
    assert measure_basin(module, drawn32(5, num_features), spectrum=spectrum).gradient_rank == rank
