"""Brackets against all eigenvalues of Hessians that torch.func and numpy compute; products against differences."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_basin import measure_basin
from lightning_basin.functional import null_space
from lightning_basin.functional.factored import DenseGradients, KhatriRaoGradients
from lightning_basin.functional.gradients import StackedGradients
from lightning_basin.functional.output_curvature import output_curvature
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.network import Network
from lightning_basin.probe import Probe
from lightning_basin.quantities import hessian_products, quadratic_model
from lightning_basin.quantities.hessian_products import hessian_operator, residual_matrix
from tests.networks import Composed, drawn, filled

# --- products -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.attend(inputs, inputs, inputs)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.head(self.cell(inputs)[0][:, -1])


def checkpointed(*, twice=False):
    def function(m, x):
        hidden = checkpoint(lambda h: m.inner(h).tanh(), x, use_reentrant=False)
        if twice:
            hidden = checkpoint(lambda h: m.inner(h).tanh(), hidden, use_reentrant=False)
        return m.head(hidden)

    return Composed(function, inner=nn.Linear(3, 3), head=nn.Linear(3, 2))


SMOOTH = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)),
        (5, 3),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 2)),
        (4, 1, 3, 3),
    ),
    "attention": (Attention, (3, 4, 4)),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(12, 2)),
        (4, 3, 4),
    ),
    "LSTM": (Recurrent, (4, 3, 2)),
    "checkpointing": (checkpointed, (5, 3)),
    "checkpointing of one layer twice": (lambda: checkpointed(twice=True), (5, 3)),
}
every_smooth = pytest.mark.parametrize("kind", SMOOTH)


def slopes(network, probe, loss_fn, at):
    """Gradient of the loss where the parameters are moved by one vector, flat."""
    with torch.no_grad():
        for parameter, part in zip(network.parameters(), at, strict=True):
            parameter += part
    loss = loss_fn(network.outputs(probe))
    gradients = torch.autograd.grad(loss, network.parameters(), materialize_grads=True)
    with torch.no_grad():
        for parameter, part in zip(network.parameters(), at, strict=True):
            parameter -= part
    return torch.cat([gradient.flatten() for gradient in gradients])


def differences(network, probe, loss_fn, direction):
    """Central differences of the gradient along a direction, with Richardson's extrapolation."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    parts = [p.view_as(q) for p, q in zip(direction.split(sizes), network.parameters(), strict=True)]

    def central(step):
        ahead, behind = (slopes(network, probe, loss_fn, [sign * step * part for part in parts]) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    return (4 * central(5e-4) - central(1e-3)) / 3


def soft_labels(outputs, targets):
    return F.cross_entropy(outputs, targets.softmax(1))


def coupled_squares(outputs, targets):
    """Of a batch whose inputs the loss compares with each other."""
    return (outputs - targets).square().mean() + (outputs - targets).sum().square()


@every_smooth
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", [soft_labels, coupled_squares])
def test_products_are_differences_of_gradients(kind, chunk_size, loss):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        trace = network.trace(probe)
        targets = trace.outputs.detach() + drawn(*trace.outputs.shape, seed=2)
        found = output_curvature(lambda outputs: loss(outputs, targets), trace.outputs)
        model = quadratic_model.quadratic_model(network, probe, trace, found, chunk_size=chunk_size)
        direction = drawn(sum(layer.num_parameters for layer in network.layers), seed=3)
        direction /= direction.norm()

        def linear(outputs):
            return (found.slope * outputs).sum()

        for part, differentiated in ((model, lambda outputs: loss(outputs, targets)), (model.linear_part, linear)):
            expected = differences(network, probe, differentiated, direction)
            product = hessian_operator(part, network.layers)(direction)
            # The error is of fourth order in the step, 1e-12 times fifth derivatives near 1e3 of the scale; rounding
            # adds 1e-16 / 1e-3 of the gradient.
            torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


@every_smooth
def test_residual_curvature_of_chunks_adds_up_to_the_matrix_of_all_products(kind):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        trace = network.trace(probe)
        found = output_curvature(lambda outputs: outputs.pow(4).sum(), trace.outputs)
        model = quadratic_model.quadratic_model(network, probe, trace, found)
        product = hessian_operator(model.linear_part, network.layers)
        chunked = quadratic_model.quadratic_model(network, probe, trace, found, chunk_size=2)
        matrix = residual_matrix(chunked, chunk_size=7)
        for index in range(0, len(matrix), 10):
            unit = torch.eye(len(matrix), dtype=torch.float64)[index]
            torch.testing.assert_close(matrix[index], product(unit), rtol=1e-9, atol=1e-12 * float(matrix.abs().max()))


@every_smooth
def test_products_with_a_layer_are_those_of_its_diagonal_block(kind):
    build, shape = SMOOTH[kind]
    probe = Probe(drawn(*shape, seed=1))
    with isolated_evaluation(torch.device("cpu")):
        network = Network(filled(build()))
        trace = network.trace(probe)
        found = output_curvature(lambda outputs: outputs.pow(4).sum(), trace.outputs)
        model = quadratic_model.quadratic_model(network, probe, trace, found).linear_part
        sizes = [layer.num_parameters for layer in network.layers]
        whole = hessian_operator(model, network.layers)
        for index, layer in enumerate(network.layers):
            direction = drawn(sizes[index], seed=index)
            parts = [torch.zeros(size, dtype=torch.float64) for size in sizes]
            parts[index] = direction
            expected = whole(torch.cat(parts)).split(sizes)[index]
            torch.testing.assert_close(hessian_operator(model, [layer])(direction), expected)


# --- brackets -------------------------------------------------------------------------------------------------------

LOSSES = {
    "mean squares": lambda f, y: F.mse_loss(f, y),
    "sum of squares": lambda f, y: (f - y).square().sum(),
    "weighted squares": lambda f, y: ((f - y).square() * torch.arange(1, 1 + f.shape[1])).sum(),
    "soft labels": lambda f, y: F.cross_entropy(f, y.softmax(1)),
    "smoothed labels": lambda f, y: F.cross_entropy(f, y.argmax(1), label_smoothing=0.2),
    "hard labels": lambda f, y: F.cross_entropy(f, y.argmax(1), reduction="sum"),
    "class weights": lambda f, y: F.cross_entropy(f, y.argmax(1), weight=torch.arange(1.0, 1 + f.shape[1]).to(f)),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, y.sigmoid()),
    "huber": lambda f, y: F.huber_loss(f, y),
    "coupled": lambda f, y: (f - y).square().sum() + (f - y).sum().square(),
    "cosh": lambda f, y: (f - y).cosh().sum(),
}


def random_case(seed):
    """A small network, inputs, a loss, and targets near the outputs by a random distance."""
    random = np.random.default_rng(seed)
    widths = [int(random.integers(1, 5)) for _ in range(int(random.integers(1, 3)))]
    d, c, k = int(random.integers(1, 4)), int(random.integers(2, 4)), int(random.integers(2, 7))
    parts = []
    for before, after in zip([d, *widths[:-1]], widths, strict=True):
        parts += [nn.Linear(before, after), (nn.Tanh, nn.ReLU, nn.GELU, nn.Identity)[random.integers(4)]()]
    module = filled(nn.Sequential(*parts, nn.Linear(widths[-1], c)), seed)
    inputs = drawn(k, d, seed=seed + 1)
    distance = 10.0 ** random.uniform(-9, 0.5)
    targets = module(inputs).detach() + distance * drawn(k, c, seed=seed + 2)
    return module, inputs, targets, list(LOSSES)[seed % len(LOSSES)]


def true_eigenvalues(module, inputs, targets, loss_fn):
    """All eigenvalues of H in magnitude, and the norm of R = H - P, from forward-mode Hessians."""
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]
    flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def outputs(vector):
        parts = vector.split(sizes)
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(module, values, (inputs,))

    at = outputs(flat)
    curved = torch.func.hessian(lambda vector: loss_fn(outputs(vector), targets))(flat).numpy()
    jacobian = torch.func.jacrev(outputs)(flat).reshape(at.numel(), -1).numpy()
    inner = torch.func.hessian(lambda f: loss_fn(f, targets))(at).reshape(at.numel(), at.numel()).numpy()
    residual = np.abs(np.linalg.eigvalsh(curved - jacobian.T @ inner @ jacobian)).max()
    return np.abs(np.linalg.eigvalsh(curved)), residual


def assert_bracket_holds(seed):
    module, inputs, targets, loss = random_case(seed)
    eigenvalues, residual = true_eigenvalues(module, inputs, targets, LOSSES[loss])
    rounding = 1e-14 * eigenvalues.max()
    record = measure_basin(module, inputs, targets, loss_fn=LOSSES[loss], hessian="bracket", layers=[])
    assert record.hessian_nullity_lower <= record.hessian_nullity_upper
    assert record.residual_curvature * record.hessian_largest >= residual - rounding
    # Eigenvalues may be the norm of R itself, up to rounding: where R acts in the null space of P.
    assert record.hessian_nullity_lower <= (eigenvalues <= residual + rounding).sum(), (seed, loss)
    if residual > rounding:  # Else all eigenvalues do not resolve what the bracket does.
        assert (eigenvalues <= residual - rounding).sum() <= record.hessian_nullity_upper, (seed, loss)
    return record.hessian_certified


@pytest.mark.parametrize("seed", range(44))
def test_the_bracket_holds_all_eigenvalues(seed):
    assert_bracket_holds(seed)


@pytest.mark.slow
def test_the_bracket_holds_all_eigenvalues_of_five_hundred_networks():
    certified = sum(assert_bracket_holds(seed) for seed in range(44, 544))
    assert certified > 100  # Distances reach from 1e-9 to 3: neither end of the bracket is empty words.


def tanh_network(seed):
    return filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)), seed)


def test_the_share_that_is_certified_grows_to_all_as_the_loss_falls():
    shares = []
    for digits in range(1, 11):
        records = []
        for seed in range(6):
            module, inputs = tanh_network(seed), drawn(5, 3, seed=seed + 100)
            targets = module(inputs).detach() + 10.0**-digits * drawn(5, 1, seed=seed + 200)
            records.append(measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket", layers=[]))
        assert all(r.hessian_nullity == r.gradient_nullity == 26 for r in records if r.hessian_certified)
        shares.append(sum(record.hessian_certified for record in records))
    # Losses of 1e-2 to 1e-20.
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 6


def test_training_below_the_stated_loss_certifies():
    module, inputs = tanh_network(0), drawn(5, 3, seed=100)
    outputs, away = module(inputs).detach(), drawn(5, 1, seed=200)

    def measured(distance):
        return measure_basin(
            module, inputs, outputs + distance * away, loss_fn=nn.MSELoss(), hessian="bracket", layers=[]
        )

    record = measured(1.0)
    assert not record.hessian_certified
    # The loss falls with the square of the distance; "about", as R's bound is known within a factor of two.
    below = (record.hessian_resolving_loss / record.loss) ** 0.5
    assert measured(0.5 * below).hessian_certified
    assert not measured(4 * below).hessian_certified


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_networks_have_brackets(size):
    module = filled(nn.Linear(1, size, bias=False))
    record = measure_basin(module, drawn(3, 1), drawn(3, size, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    # Outputs are linear in the parameters: R = 0 at any residual.
    assert (record.hessian_nullity, record.hessian_nullity_strict, record.hessian_negative) == (0, 0, 0)
    assert record.residual_curvature == 0.0


def test_layers_in_whose_weights_outputs_are_piecewise_linear_have_no_residual_curvature():
    module = filled(nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)))
    inputs, targets = drawn(6, 1, 5, 5), drawn(6, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.residual_curvature > 0
    for layer in record.layers.values():
        assert (layer.residual_curvature, layer.hessian_certified) == (0.0, True)
        assert layer.hessian_nullity == layer.hessian_nullity_strict == layer.gradient_nullity


def test_a_smooth_layer_has_residual_curvature_of_its_own():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.layers["0"].residual_curvature > 0
    assert record.layers["2"].residual_curvature == 0.0


def test_brackets_of_layers_hold_the_eigenvalues_of_their_blocks():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs, targets = drawn(6, 3), module(drawn(6, 3)).detach() + 1e-4 * drawn(6, 2, seed=1)
    settings = {"loss_fn": nn.MSELoss()}
    found = measure_basin(module, inputs, targets, hessian="bracket", **settings)
    dense = measure_basin(module, inputs, targets, hessian="dense", **settings)
    for name, layer in found.layers.items():
        assert layer.hessian_nullity_lower <= dense.layers[name].hessian_nullity <= layer.hessian_nullity_upper
        assert layer.residual_curvature >= dense.layers[name].residual_curvature * (1 - 1e-3)


def test_chunks_change_nothing_but_rounding(monkeypatch):
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
    inputs, targets = drawn(7, 3), drawn(7, 2, seed=1)
    whole = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    monkeypatch.setattr(quadratic_model, "_GRAPH_ELEMENTS", 20)
    chunked = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    assert chunked.residual_curvature == pytest.approx(whole.residual_curvature, rel=1e-9)
    assert chunked.hessian_largest == pytest.approx(whole.hessian_largest, rel=1e-9)


def test_a_large_network_has_a_bracket():
    module = filled(nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3)))
    inputs = drawn(4, 60)
    targets = module(inputs).detach() + 1e-9 * drawn(4, 3, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())
    assert (record.hessian_method, record.hessian_certified) == ("bracket", True)
    assert record.hessian_nullity == record.gradient_nullity == record.num_parameters - 12


@pytest.mark.parametrize("seed", range(8))
def test_a_sketch_does_not_overstate_singular_values_by_more_than_the_certificate_allows(seed):
    k, c = ((10, 2), (30, 3), (20, 1), (5, 4))[seed % 4]
    decay = torch.logspace(0, -4, k, dtype=torch.float64).view(k, 1, 1)
    factored = KhatriRaoGradients(decay * drawn(k, 1, 30, seed=seed), drawn(k, c, 1, 20, seed=seed + 50))
    exact = torch.from_numpy(np.linalg.svd(factored.rows().numpy(), compute_uv=False))
    for gradients in (factored, DenseGradients(factored.rows())):
        found = torch.linalg.svdvals(gradients.sketch(2 * k * c, torch.Generator().manual_seed(seed)))
        assert (found / exact).max() < null_space.SKETCH_FACTOR


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


# --- modes ----------------------------------------------------------------------------------------------------------


def test_the_gauss_newton_mode_takes_no_product(monkeypatch):
    def refuse(*_):
        raise AssertionError("a product was taken")

    monkeypatch.setattr(hessian_products, "hessian_product", refuse)
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian="gauss-newton")
    assert record.gauss_newton_nullity == record.gradient_nullity == 26 - 10
    assert record.hessian_method == "gauss-newton"
    assert (record.hessian_nullity, record.hessian_nullity_upper, record.residual_curvature) == (None, None, None)


@pytest.mark.parametrize(
    ("mode", "expected"), [("auto", "dense"), ("dense", "dense"), ("bracket", "bracket"), (False, None)]
)
def test_the_mode_decides_the_method(mode, expected):
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian=mode)
    assert record.hessian_method == expected
    assert (record.hessian_negative is None) == (expected != "dense")


@pytest.mark.parametrize("mode", ["auto", "bracket", "gauss-newton"])
def test_behavioral_hessian_has_the_rank_of_the_gradients_at_any_weights(mode):
    module = filled(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)))
    record = measure_basin(module, drawn(5, 3), loss_fn="behavioral", hessian=mode)
    for part in (record, *record.layers.values()):
        assert part.hessian_certified is True
        assert part.hessian_nullity == part.hessian_nullity_strict == part.gradient_nullity
    assert record.loss is None


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


# --- losses ---------------------------------------------------------------------------------------------------------


def test_an_absolute_error_has_no_gauss_newton_part_and_says_so():
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.L1Loss())
    assert any("the loss is piecewise linear in the outputs" in note for note in record.notes)
    assert record.gauss_newton_nullity == record.num_parameters
    # Each layer's weights enter the loss piecewise linearly: no curvature at all.
    assert [layer.hessian_nullity_strict for layer in record.layers.values()] == [16, 10]


def not_convex(outputs, targets):
    return -(outputs - targets).square().sum()


def test_a_loss_that_is_not_convex_proves_nothing_and_is_formed_where_that_is_possible():
    module, inputs, targets = filled(nn.Linear(3, 2)), drawn(5, 3), drawn(5, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=not_convex)
    assert any("the loss is not convex in the outputs" in note and "it is formed" in note for note in record.notes)
    assert (record.hessian_certified, record.hessian_nullity, record.hessian_negative) == (None, 0, 8)
    bracket = measure_basin(module, inputs, targets, loss_fn=not_convex, hessian="bracket")
    assert any("the loss is not convex in the outputs" in note and "it is left out" in note for note in bracket.notes)
    assert (bracket.hessian_method, bracket.gauss_newton_nullity) == (None, None)


class Penalised(nn.Module):
    """Its loss is a method, which follows the copy that is measured, and so may hold its weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, inputs):
        return self.last(self.first(inputs).tanh())

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum() + 1e-3 * sum(p.square().sum() for p in self.parameters())


def test_weight_decay_inside_of_the_loss_leaves_no_null_space():
    module, inputs = filled(Penalised()), drawn(5, 3)
    targets = module(inputs).detach()
    record = measure_basin(module, inputs, targets, loss_fn=module.loss)
    # At zero residual H = 2 G^T G + 2e-3 I.
    assert (record.hessian_nullity_strict, record.hessian_negative) == (0, 0)
    assert record.residual_curvature * record.hessian_largest == pytest.approx(2e-3, rel=1e-6)
    assert any("the loss holds parameters themselves" in note for note in record.notes)
    assert measure_basin(module, inputs, targets, loss_fn=module.loss, hessian="bracket").hessian_method is None


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda f, y: (f - y).square(), TypeError, "one floating point number as a tensor"),
        (lambda f, y: f.detach().sum(), ValueError, "got the constant"),
        (lambda f, y: torch.tensor(1.5), ValueError, "got the constant 1.5"),
        (lambda f, y: (f - y + torch.randn_like(f)).square().sum(), ValueError, "two evaluations differ"),
        (lambda f, y: F.mse_loss(f, y[:, :1]), TypeError, "targets must have the shape of the outputs"),
        (lambda f, y: F.binary_cross_entropy_with_logits(f, y[:, :1]), TypeError, "loss_fn must take the outputs"),
    ],
    ids=["vector", "detached", "constant", "random", "broadcast", "wrong shape"],
)
def test_a_loss_that_is_no_function_of_outputs_and_targets_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(3, 2), drawn(5, 3), drawn(5, 2, seed=1), loss_fn=loss_fn)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class SilentlyOnce(OnceOnly):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy((2 * ctx.saved_tensors[0] * gradient).detach().numpy())


@pytest.mark.parametrize("operation", [OnceOnly, SilentlyOnce])
@pytest.mark.parametrize("place", ["network", "loss"])
def test_what_cannot_be_differentiated_twice_leaves_the_bracket_out(operation, place):
    inputs, targets = drawn(5, 3), drawn(5, 2, seed=1)
    if place == "network":
        module = Composed(lambda m, x: m.last(operation.apply(m.first(x))), first=nn.Linear(3, 2), last=nn.Linear(2, 2))
        loss_fn = nn.MSELoss()
    else:
        module = filled(nn.Linear(3, 2))

        def loss_fn(outputs, labels):
            return operation.apply(outputs - labels).sum()

    with pytest.warns(UserWarning, match="the Hessian is left out"):
        record = measure_basin(filled(module), inputs, targets, loss_fn=loss_fn, hessian="bracket")
    assert record.gradient_rank > 0
    assert record.hessian_method is None


class Lopsided(torch.autograd.Function):
    """x -> x_0 x_1 with a first derivative that forgets that the factors depend on each other."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x[:, :1] * x[:, 1:]

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.cat([x[:, 1:], x[:, :1].detach()], dim=1)


def test_a_wrong_second_derivative_leaves_the_bracket_out():
    module = filled(Composed(lambda m, x: Lopsided.apply(m.first(x)), first=nn.Linear(3, 2)))
    with pytest.warns(
        UserWarning, match="do not agree with differences of its outputs and gradients, in layer 'first'"
    ):
        record = measure_basin(module, drawn(5, 3), drawn(5, 1, seed=1), loss_fn=nn.MSELoss(), hessian="bracket")
    assert record.hessian_method is None


# --- outputs without a second axis ----------------------------------------------------------------------------------


def one_number(function=lambda outputs: outputs):
    return filled(Composed(lambda m, x: function(m.linear(x).squeeze(1)), linear=nn.Linear(3, 1)))


@pytest.mark.parametrize("hessian", ["dense", "bracket"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: (outputs - outputs.mean() - targets).square().sum(),
        lambda outputs, targets: F.cross_entropy(outputs.unsqueeze(0), targets.softmax(0).unsqueeze(0)),
    ],
    ids=["contrast", "softmax over the inputs"],
)
def test_a_loss_that_couples_single_outputs_is_blind_to_what_they_share(loss_fn, hessian):
    # The bias moves all six outputs alike.
    record = measure_basin(one_number(), drawn(6, 3, seed=1), drawn(6, seed=2), loss_fn=loss_fn, hessian=hessian)
    assert (record.gradient_rank, record.hessian_nullity) == (4, 1)


def test_single_outputs_that_depend_on_other_inputs_are_refused():
    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure_basin(one_number(lambda outputs: outputs - outputs.mean()), drawn(6, 3, seed=1))


# --- parameters that torch treats in a way of its own ---------------------------------------------------------------


@pytest.mark.parametrize("hessian", ["dense", "bracket"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_a_parameter_without_elements_changes_no_nullity(shape, hessian):
    # Two outputs of a linear layer on four inputs in general position: all ten parameters are seen, H has full rank.
    module = nn.Linear(4, 2)
    module.dummy = nn.Parameter(torch.empty(shape))
    inputs = torch.cat([torch.zeros(1, 4), torch.eye(4)])
    record = measure_basin(module, inputs, torch.zeros(5, 2), loss_fn=nn.MSELoss(), hessian=hessian)
    assert (record.num_parameters, record.gradient_rank, record.hessian_nullity) == (10, 10, 0)


def weight_normed(*, old):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
    if not old:
        return nn.utils.parametrizations.weight_norm(layer)
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "hook"])
def test_the_hessian_of_weight_norm_is_that_of_its_formula(old):
    # f = g (v x) / |v| at g = 1, v = (1, 0), x = (1, 1). By (g, v1, v2) its second derivative is
    # [[0, 0, 1], [0, 0, -1], [1, -1, -1]], with eigenvalues 0, 1 and -2.
    record = measure_basin(
        weight_normed(old=old),
        torch.ones(1, 2),
        torch.zeros(1),
        loss_fn=lambda outputs, _: outputs.sum(),
        hessian="dense",
    )
    assert (record.hessian_nullity_strict, record.hessian_negative) == (1, 1)
    assert record.hessian_largest == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_of_a_convolution_has_a_certified_nullity(dim):
    # Of each norm g and direction v one combination is never seen: moving v along itself.
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 2).double(), dim=dim)
    inputs = drawn(40, 2, 3, 3, seed=3)
    targets = layer(inputs).detach()
    record = measure_basin(layer, inputs, targets, loss_fn=nn.MSELoss(), hessian="bracket")
    unseen = {0: 3, 1: 2, None: 1}[dim]
    assert (record.hessian_nullity, record.hessian_certified) == (unseen, True)
