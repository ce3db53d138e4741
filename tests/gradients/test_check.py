from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.functional.factored import DenseGradients
from lightning_basin.gradients import check
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.gradients.layers import layer_gradients
from lightning_basin.measure import measure
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.operations.uses import ElementwiseUse, ProductUse
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings
from lightning_basin.structure import StructureCache
from tests.counting import Dispatched
from tests.networks import Composed, built, drawn, drawn32, filled, generator_of


def attention(m, x):
    scores = torch.softmax(m.query(x) @ m.key(x).mT / 8**0.5, -1)
    return m.out((scores @ m.value(x)).mean(1))


def attending():
    return filled(Composed(attention, **{name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")}))


@pytest.mark.parametrize("spectrum", [True, False])
def test_bias_of_the_keys_has_rank_zero(spectrum):
    # It adds the same to all scores of a query, which the softmax does not see.
    module = attending()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(requires_grad=name.endswith("bias"))
    record = measure_basin(module, drawn(10, 5, 8), spectrum=spectrum)
    assert record.layers["key"].gradient_rank == 0
    assert (
        record.gradient_rank == 8 + record.layers["query"].gradient_rank
    )  # Those of the values and outputs are parallel.
    assert any("layer 'key' has no effect" in note for note in record.notes)


def test_layer_without_effect_is_measured_if_it_is_the_only_one():
    module = attending()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(requires_grad=name == "key.bias")
    record = measure_basin(module, drawn(10, 5, 8))
    assert (record.gradient_rank, record.gradient_nullity) == (0, 8)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)),
        nn.Sequential(
            nn.Linear(36, 1), Composed(lambda _, x: F.layer_norm(x.expand(-1, 4), (4,)) + x), nn.Linear(4, 2)
        ),
    ],
    ids=["instance norm", "layer norm of equal numbers"],
)
def test_layer_whose_effect_a_normalisation_takes_away(module):
    module = filled(module)
    inputs = drawn(6, 1, 6, 6) if isinstance(module[0], nn.Conv2d) else drawn(6, 36)
    if isinstance(module[0], nn.Conv2d):
        module[0].weight.requires_grad_(requires_grad=False)
        assert measure_basin(module, inputs).layers["0"].gradient_rank == 0
    else:  # Beside the normalised copies, which are zero, the number itself passes: [x, 1] has rank 6.
        assert measure_basin(module, inputs).layers["0"].gradient_rank == 6


def normalised(m, x):
    return m.head(F.layer_norm(m.inner(x).squeeze(2), (5,), eps=0.0))


def test_layer_whose_products_cancel_over_positions_has_rank_zero():
    # A normalisation over the positions takes away both the factor and the shift that are common to all of them.
    module = filled(Composed(normalised, inner=nn.Linear(1, 1), head=nn.Linear(5, 2)))
    record = measure_basin(module, drawn(10, 5, 1))
    assert record.layers["inner"].gradient_rank == 0
    assert record.gradient_rank == record.layers["head"].gradient_rank


def test_a_bias_whose_terms_cancel_beside_weights_whose_terms_do_not_needs_no_other_evaluation(monkeypatch):
    def refuse(*_):
        raise AssertionError("rounding is bounded by the magnitudes of the terms")

    monkeypatch.setattr(check, "in_other_precision", refuse)
    record = measure_basin(attending(), drawn(10, 5, 8))
    # Each of 10 inputs mixes 5 values with weights that sum to one, so that keys move it along 4 directions.
    assert record.layers["key"].gradient_rank == 40
    assert not record.notes


def shifted(function):
    return Composed(lambda m, x: m.head(function(x + m.shift(x))), shift=nn.Linear(8, 1), head=nn.Linear(8, 2))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "function", [lambda x: F.layer_norm(x, (8,)), lambda x: torch.softmax(x, -1)], ids=["layer norm", "softmax"]
)
def test_layer_whose_terms_cancel_inside_of_the_backward_pass_has_rank_zero(function, dtype):
    # The same shift of all elements of an input is taken away, before a gradient reaches the layer.
    record = measure_basin(filled(shifted(function)), drawn(10, 8), dtype=dtype)
    assert record.layers["shift"].gradient_rank == 0
    # Eight elements that sum to zero, or to one: with the bias eight directions for each of two outputs.
    assert record.gradient_rank == 16
    assert any("layer 'shift' has no effect" in note for note in record.notes)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose backward pass multiplies by a random number or divides by the norm."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand(()) if ctx.kind == "random" else gradient / (gradient.norm() + 1e-30), None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["random", "normed"])
def test_a_backward_pass_that_is_no_derivative_is_refused_and_not_taken_for_rounding(kind, dtype):
    module = Composed(
        lambda m, x: m.head(ScaledGradient.apply(m.inner(x), kind).relu()), inner=nn.Linear(3, 4), head=nn.Linear(4, 2)
    )
    with pytest.raises(RuntimeError, match="two evaluations of them disagree"):
        measure_basin(filled(module), drawn(6, 3), dtype=dtype)


class Weak(nn.Module):
    """p_0 x_0 + scale * sum_i atan2(x_i, p_i): the second use is of an operation that is not known."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.values, self.scale = nn.Parameter(torch.arange(1.0, 9.0, dtype=torch.float64)), scale

    def forward(self, x):
        return x[:, :1] * self.values[0] + self.scale * torch.atan2(x, self.values).sum(1, keepdim=True)


@pytest.mark.parametrize("scale", [1e-8, 1e-9, 1e-10])
def test_weak_use_of_a_parameter_that_was_not_recorded_counts(scale):
    # Columns -scale * x_i / (x_i² + p_i²) of eight different functions of 20 random points, the first plus x_0.
    assert measure_basin(Weak(scale), drawn(20, 8)).gradient_rank == 8


def test_layer_of_tiny_gradients_beside_a_large_one_keeps_its_rank():
    module = Composed(
        lambda m, x: torch.cat([m.linear(x), 1e-15 * m.weak(x)], dim=1), linear=nn.Linear(8, 1), weak=Weak(1.0)
    )
    assert measure_basin(module.double(), drawn(20, 8)).layers["weak"].gradient_rank == 8


def test_difference_of_large_numbers_is_not_taken_for_coupling():
    # l(a) - l(b) at 1.7e9: 8 inputs, W of 2 x 3 entries with rank 3 x 2, and a bias that cancels exactly.
    module = filled(Composed(lambda m, pair: m.linear(pair[:, 0]) - m.linear(pair[:, 1]), linear=nn.Linear(3, 2)))
    assert measure_basin(module, drawn(8, 2, 3) * 100 + 1.7e9).gradient_rank == 6


def test_coupling_is_not_taken_for_cancellation():
    module = filled(
        Composed(
            lambda m, pair: (
                m.linear(pair[:, 0]) - m.linear(pair[:, 1]) + 1e-3 * pair[:, 0].mean(0, keepdim=True)[:, :2]
            ),
            linear=nn.Linear(3, 2),
        )
    )
    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure_basin(module, drawn(8, 2, 3) * 100 + 1.7e9)


class Deep(nn.Module):
    """A hundred layers of 16 units whose gradients grow by a tenth in each, so that those of the last layers are weak.

    In float32 the rounding of backward passes through so many layers exceeds that of a sum over the rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(100))
        self.head = nn.Linear(16, 2)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x):
        for layer in self.layers:
            x = (1.1 * layer(x)).tanh()
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.mixed, self.after, self.wide, self.narrow = (
            *(nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)),
            *(nn.Linear(16, 64), nn.Linear(64, 16)),
        )

    def forward(self, x):
        y = self.before(x)
        x = x + self.mixed(y, y, y, need_weights=False)[0]
        return x + self.narrow(F.gelu(self.wide(self.after(x))))


def transformer():
    parts = {f"block{index}": Block() for index in range(12)}

    def forward(m, tokens):
        x = m.table(tokens)
        for name in parts:
            x = getattr(m, name)(x)
        return m.head(x[:, -1])

    return Composed(forward, table=nn.Embedding(20, 16), head=nn.Linear(16, 2), **parts)


def residual():
    parts = {f"layer{index}": nn.Linear(16, 16) for index in range(50)}

    def forward(m, x):
        for name in parts:
            x = x + F.relu(getattr(m, name)(x)) / 4
        return m.head(x)

    return Composed(forward, head=nn.Linear(16, 2), **parts)


def recurrent():
    return Composed(
        lambda m, x: m.head(m.cells(x)[0][:, -1]),
        cells=nn.LSTM(16, 12, num_layers=2, batch_first=True),
        head=nn.Linear(12, 2),
    )


DEEP = {
    "tanh": (Deep, lambda: drawn32(3, 16)),
    "transformer": (transformer, lambda: torch.randint(20, (4, 6), generator=generator_of())),
    "residual": (residual, lambda: drawn32(6, 16)),
    "recurrent": (recurrent, lambda: drawn32(3, 40, 16)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DEEP)
def test_no_layer_of_a_deep_network_falls_to_dense_rows_for_rounding(name, seed):
    build, inputs = DEEP[name]
    record = measure_basin(built(build, seed), inputs(), dtype="float32")
    assert not [note for note in record.notes if "row by row" in note]


@pytest.mark.long
@pytest.mark.parametrize("name", DEEP)
def test_float32_asks_a_device_for_what_float64_does_and_casts(name):
    build, inputs = DEEP[name]
    module, probe, counts = built(build), Probe(inputs()), {}
    for dtype in ("float64", "float32"):
        cache, settings = StructureCache(), Settings(layers=[], hessian=False, dtype=dtype)
        measure(module, probe, settings, cache=cache)
        with Dispatched() as counts[dtype]:
            measure(module, probe, settings, cache=cache)
    assert counts["float32"].waits <= counts["float64"].waits
    # Casts, and a second search for duplicates where float32 cannot tell equal from near: 2 to 12 % when written.
    assert counts["float32"].count <= 1.15 * counts["float64"].count


def deep_runs():
    return ProbeRuns(Network(built(Deep, seed=3).eval(), dtype=torch.float32), Probe(drawn32(3, 16)))


def confirmed(runs, change=lambda gradients: gradients):
    """The names of the layers whose structured gradients are confirmed."""
    structured = AutogradCheck(runs, generator_of())
    found = {gradients.layer: gradients for gradients in layer_gradients(runs, structured)}
    changed = {layer: change(gradients.gradients) for layer, gradients in found.items() if gradients.structured}
    return {layer.name for layer in structured.confirm(changed, structured=True, notes={})}


def test_rounding_is_measured_in_a_deep_network(monkeypatch):
    runs, names = deep_runs(), []

    def noted(network, chunk, layers, *args):
        names.extend(layer.name for layer in layers)
        return compared(network, chunk, layers, *args)

    compared = check.compare_backward_passes
    monkeypatch.setattr(check, "compare_backward_passes", noted)
    assert len(confirmed(runs)) == 101
    assert names  # Otherwise nothing below is about depth.


FAULTS = {
    "dropped": lambda use: None,
    "scaled": lambda use: (
        replace(use, arrange=lambda derivative: (1 + 1e-3) * use.arrange(derivative))
        if isinstance(use, ProductUse)
        else replace(use, contributions=lambda derivative: (1 + 1e-3) * use.contributions(derivative), shifts=None)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [ProductUse, ElementwiseUse])
@pytest.mark.parametrize("name", ["layers.0", "layers.50", "layers.99", "head"])
def test_a_fault_in_a_use_is_found_in_a_deep_network(name, kind, fault):
    runs = deep_runs()
    uses = runs.full_trace.operations.uses
    (at,) = (
        index
        for index, use in enumerate(uses)
        if isinstance(use, kind) and (use.source.name or "").rpartition(".")[0] == name
    )
    uses[at : at + 1] = [changed] if (changed := FAULTS[fault](uses[at])) is not None else []
    structured = AutogradCheck(runs, generator_of())
    found = {gradients.layer.name: gradients for gradients in layer_gradients(runs, structured)}
    assert {layer for layer, gradients in found.items() if not gradients.structured} == {name}


@pytest.mark.parametrize("name", ["layers.0", "layers.20"])
def test_a_fault_in_a_use_below_the_rounding_of_its_depth_is_found(name):
    # Backward passes through these layers round by 1.7e-5 and more, a sum over six rows by 1.2e-6.
    runs = deep_runs()
    uses = runs.full_trace.operations.uses
    (at,) = (
        index
        for index, use in enumerate(uses)
        if isinstance(use, ProductUse) and (use.source.name or "").rpartition(".")[0] == name
    )
    product = uses[at]
    uses[at] = replace(product, arrange=lambda derivative: (1 + 4e-6) * product.arrange(derivative))
    found = layer_gradients(runs, AutogradCheck(runs, generator_of()))
    assert [gradients.layer.name for gradients in found if not gradients.structured] == [name]


@pytest.mark.long
def test_a_fault_in_output_gradients_is_found_in_a_deep_network():
    runs, generator = deep_runs(), generator_of(5)

    def moved(gradients):
        rows = gradients.rows()
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        return DenseGradients(rows + 1e-3 * noise * rows.norm() / noise.norm())

    assert confirmed(runs, moved) == set()
