import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin import measure_basin
from lightning_basin.gradients.check import AutogradCheck
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from lightning_basin.probe import Probe
from lightning_basin.quantities.ranks import RankMeasurement
from lightning_basin.quantities.scopes import Scope
from lightning_basin.stages import StageClock
from tests.exact import exact_pseudodeterminant, exact_rank, jacobian
from tests.models import CASE_NAMES, evaluated_case, integer_case
from tests.networks import Composed, drawn, filled


def wide(*widths, seed=0):
    """Layers of many parameters, tanh between them."""
    torch.manual_seed(seed)
    layers = []
    for entering, leaving in itertools.pairwise(widths):
        layers += [nn.Linear(entering, leaving), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def convolutions(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 16, 4)
    ).double()


NETWORKS = {
    "full in every layer but the first": (lambda: wide(6, 40, 40, 5), lambda: drawn(40, 6)),
    "full in the last layer only": (lambda: wide(3, 4, 60, 5), lambda: drawn(40, 3)),
    "full in the sum of all layers only": (lambda: wide(20, 9, 9, 4), lambda: drawn(64, 20)),
    "convolutions": (convolutions, lambda: drawn(32, 2, 6, 6)),
}


def repeated(inputs):
    return torch.cat([inputs[:-5], inputs[:5]])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize("layers", [[], "all", "auto", ["2"]])
def test_proved_ranks_are_those_of_singular_values(name, is_repeated, layers):
    build, draw = NETWORKS[name]
    module, inputs = build(), repeated(draw()) if is_repeated else draw()
    proved = measure_basin(module, inputs, spectrum=False, layers=layers)
    whole = measure_basin(module, inputs, layers=layers)
    assert proved.gradient_rank == whole.gradient_rank
    ranks = {layer: found.gradient_rank for layer, found in proved.layers.items()}
    assert ranks == {layer: found.gradient_rank for layer, found in whole.layers.items()}
    assert proved.gradient_rank_bound == whole.gradient_rank_bound
    for tolerance, rank in proved.gradient_rank_at.items():
        assert rank == whole.gradient_rank_at[tolerance]
    # What is said of the gap is on the safe side, but for a digit.
    assert proved.gradient_rank_gap < whole.gradient_rank_gap + 1


def test_a_network_of_full_rank_is_proved_by_a_layer():
    module, inputs = wide(6, 40, 40, 5), drawn(40, 6)
    record = measure_basin(module, inputs, spectrum=False, layers=[])
    assert (record.gradient_rank, record.gradient_method) == (200, "cholesky")
    assert record.gradient_effective_rank is record.log_det_gram is None


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
def test_layers_of_small_gradients_do_not_decide_where_those_of_another_are_large(scale):
    """Gradients of the first layer are as large as the inputs: beside it a full rank of the last may be rounding."""
    module, inputs = wide(6, 40, 40, 5), scale * drawn(40, 6)
    with torch.no_grad():
        module[0].weight.div_(scale)
    for layers, rtol in itertools.product(([], "all"), (None, 1e-6)):
        proved = measure_basin(module, inputs, spectrum=False, layers=layers, rtol=rtol)
        whole = measure_basin(module, inputs, layers=layers, rtol=rtol)
        assert proved.gradient_rank == whole.gradient_rank


def test_a_layer_with_independent_rows_does_not_stand_for_a_network_with_larger_gradients():
    module, inputs = wide(2, 30, 20, 10), 1e9 * drawn(20, 2)
    with torch.no_grad():
        module[0].weight.div_(1e9)
    proved, whole = (measure_basin(module, inputs, spectrum=spectrum, rtol=1e-6) for spectrum in (False, True))
    # Beside the gradients by the 90 parameters of the first layer, all others are below the tolerance.
    assert (proved.layers["2"].gradient_rank, proved.layers["2"].gradient_method) == (200, "cholesky")
    assert proved.gradient_rank == whole.gradient_rank <= 90


@pytest.mark.parametrize("rtol", [1e-14, 1e-9, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("layers", [[], "all"])
def test_ranks_at_another_tolerance(rtol, layers):
    module, inputs = wide(6, 40, 40, 5), drawn(40, 6)
    proved = measure_basin(module, inputs, spectrum=False, layers=layers, rtol=rtol)
    whole = measure_basin(module, inputs, layers=layers, rtol=rtol)
    assert proved.gradient_rank == whole.gradient_rank
    assert {name: layer.gradient_rank for name, layer in proved.layers.items()} == {
        name: layer.gradient_rank for name, layer in whole.layers.items()
    }


def test_probabilities_are_of_lower_rank_than_the_outputs_that_are_independent():
    module, inputs = wide(6, 40, 40, 5), drawn(40, 6)
    record = measure_basin(module, inputs, spectrum=False, layers=[], behavior="probabilities")
    assert record.gradient_rank == 40 * 4


def test_equal_outputs_may_belong_to_independent_rows():
    """A head that starts at zero gives every input the same outputs."""
    module, inputs = wide(6, 40, 40, 5), drawn(40, 6)
    with torch.no_grad():
        module[-1].weight.zero_()
    record = measure_basin(module, inputs, spectrum=False)
    assert record.gradient_rank == 200
    assert record.gradient_rank == measure_basin(module, inputs).gradient_rank


@pytest.mark.parametrize("num_tried", [0, 1, 2])
def test_layers_that_are_not_needed_are_not_differentiated(num_tried):
    """With a frozen head, and frozen layers before it, an earlier one must do; in the end all are looked at."""
    module, inputs = wide(6, 40, 40, 40, 5), drawn(40, 6)
    for layer in (6, 4, 2)[:num_tried]:
        module[layer].requires_grad_(requires_grad=False)
    network = Network(module)
    runs = ProbeRuns(network, Probe(inputs))
    whole = Scope("network", "", network.layers)
    generator = torch.Generator().manual_seed(0)
    measurement = RankMeasurement(
        [whole],
        runs,
        AutogradCheck(runs, generator),
        rtol=None,
        generator=generator,
        max_waiting=2**20,
        needs_spectra=False,
        behavior_is_outputs=True,
    )
    measurement.try_last_layers(max_elements=2**20, clock=StageClock())
    assert measurement.is_complete
    ranks, spectra = measurement.results()
    assert (ranks[whole].rank, ranks[whole].method, spectra) == (200, "cholesky", {})


@pytest.mark.parametrize("is_repeated", [False, True])
def test_ranks_in_float32_are_proved_where_they_are_full(is_repeated):
    module, inputs = wide(6, 40, 40, 5), repeated(drawn(40, 6)) if is_repeated else drawn(40, 6)
    proved = measure_basin(module, inputs, spectrum=False, layers=["2"], dtype="float32")
    whole = measure_basin(module, inputs, layers=["2"], dtype="float32")
    assert proved.gradient_rank == whole.gradient_rank
    assert proved.layers["2"].gradient_rank == whole.layers["2"].gradient_rank
    is_full = proved.gradient_rank == 200
    assert proved.gradient_method == ("cholesky" if is_full else "gram")


def test_rows_that_only_all_layers_together_tell_apart_are_proved_by_the_sum_of_their_gram_matrices():
    build, draw = NETWORKS["full in the sum of all layers only"]
    record = measure_basin(build(), draw(), spectrum=False)
    assert (record.gradient_rank, record.gradient_method) == (256, "cholesky")
    assert max(layer.gradient_rank for layer in record.layers.values()) < 256


@pytest.mark.long
@pytest.mark.parametrize("spectrum", [False, True])
def test_channels_that_are_dead_at_equal_distances_leave_the_rank_of_the_others(spectrum):
    # Of 64 channels 8 are alive: 8 x 64 weights act, fewer than the 123 x 8 outputs that differ.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(64, 64, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 4, 8, bias=False))
    inputs = torch.zeros(128, 64, 4)
    inputs[:, ::8] = drawn(128, 8, 4).float()
    record = measure_basin(module, repeated(inputs), spectrum=spectrum)
    assert record.layers["0"].gradient_rank == 512


def log_det(gradients):
    """The exact logarithm for integer gradients; ``None`` where all of them are zero."""
    return math.log(exact_pseudodeterminant(gradients)) if exact_rank(gradients) else None


@pytest.mark.parametrize("name", CASE_NAMES)
def test_log_det_gram_of_the_network_and_each_layer_is_exact(name):
    case, (network, outputs) = integer_case(name, 0), evaluated_case(name, 0)
    record = measure_basin(case.module, case.inputs)
    expected = {layer: log_det(jacobian(outputs)[:, columns]) for layer, columns in network.columns.items()}
    # Rounding moves each singular value by less than 200 epsilon of the largest, which is below 1e3 times the smallest;
    # at most 100 of them count.
    assert record.log_det_gram == pytest.approx(log_det(jacobian(outputs)), abs=1e-8)
    assert {layer: part.log_det_gram for layer, part in record.layers.items()} == pytest.approx(expected, abs=1e-8)


def test_log_det_gram_of_a_block_is_that_of_its_layers_side_by_side():
    torch.manual_seed(0)
    module, inputs = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))).double(), drawn(5, 3)
    record = measure_basin(module, inputs, layers="auto")
    for part in (*record.blocks.values(), *record.layers.values(), record):
        assert part.log_det_gram is not None
    (first, *_), (block, *_) = record.layers.values(), record.blocks.values()
    # More columns make each eigenvalue of a Gram matrix larger, and here the rank of the block is that of its layer.
    assert block.gradient_rank == first.gradient_rank
    assert block.log_det_gram > first.log_det_gram


class Passed(torch.autograd.Function):
    """The identity, which counts the backward passes that reach it."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Passed.count += 1
        return gradient


def passes_to_the_first_layer(num_outputs=5, **options):
    """The backward passes that reach the first of four layers, whose gradients take one for each output."""
    layers = [nn.Linear(6, 40), *(nn.Linear(40, 40) for _ in range(2)), nn.Linear(40, num_outputs)]
    module = Composed(
        lambda m, x: m.head(m.third(m.second(Passed.apply(m.first(x))).tanh()).tanh()),
        **dict(zip(("first", "second", "third", "head"), layers, strict=True)),
    )
    Passed.count = 0
    record = measure_basin(filled(module), drawn(40, 6), **options)
    assert record.gradient_rank == 200
    return Passed.count


def test_only_the_layers_that_are_asked_for_are_differentiated_where_they_prove_the_rank():
    at_least = passes_to_the_first_layer(layers=[], spectrum=False)
    # One of the combination of all rows, by which gradients are checked, and two that compare training with evaluation.
    assert at_least == 3
    for layers in (["third"], ["head"], ["second", "head"], ["head", "third"]):
        assert passes_to_the_first_layer(layers=layers, spectrum=False) == at_least
    assert passes_to_the_first_layer(layers=["first"], spectrum=False) > at_least
    # All columns have singular values, and all layers are needed for them.
    assert passes_to_the_first_layer(layers=["third"]) > at_least


def test_layers_that_are_asked_for_are_not_differentiated_twice():
    asked = passes_to_the_first_layer(layers=["first"], spectrum=False)
    assert asked == passes_to_the_first_layer(layers="all", spectrum=False)


class SquareMatrices(TorchDispatchMode):
    """Counts the new matrices of so many rows and columns."""

    def __init__(self, size):
        super().__init__()
        self.count, self.shape = 0, (size, size)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and not (function.is_view or function._schema.is_mutable)
        self.count += is_new and result.shape == self.shape
        return result


def square_matrices(num_layers, **options):
    """The new matrices of as many columns as rows, where the rows depend on each other and all layers are looked at."""
    module = wide(30, *num_layers * (30,), 6)
    with SquareMatrices(240) as matrices:
        record = measure_basin(module, repeated(drawn(40, 30)), **options)
    assert record.num_rows == 240
    return matrices.count


@pytest.mark.parametrize("spectrum", [True, False])
def test_no_matrix_of_a_layer_is_formed_where_none_is_asked_for(spectrum):
    assert square_matrices(1, layers=[], spectrum=spectrum) == square_matrices(6, layers=[], spectrum=spectrum)


def test_each_layer_that_is_asked_for_has_a_matrix():
    assert square_matrices(6, layers="all") >= square_matrices(1, layers="all") + 5


def test_singular_values_are_counted_by_quarters_of_a_decade_in_every_scope():
    # f = D x with inputs e_i: the gradients are orthogonal, of the lengths on the diagonal; 1e-20 is rounding beside 5.
    lengths = torch.tensor([5.0, 2e-3, 3e-3, 1e-20], dtype=torch.float64)
    record = measure_basin(nn.Sequential(nn.Linear(4, 1, bias=False)), torch.diag(lengths))
    for scope in (record, record.layers["0"]):
        assert scope.gradient_spectrum == {2: 1, -11: 2}  # 4 log10 of 5, 3e-3 and 2e-3: 2.8, -10.1 and -10.8
        assert scope.gradient_largest == pytest.approx(5.0)


@pytest.mark.parametrize("name", CASE_NAMES[:6])
def test_as_many_singular_values_are_counted_by_magnitude_as_the_rank_says(name):
    case = integer_case(name, 0)
    network, outputs = evaluated_case(name, 0)
    exact, record = jacobian(outputs), measure_basin(case.module, case.inputs)
    assert sum(record.gradient_spectrum.values()) == exact_rank(exact)
    counts = {layer: sum(record.layers[layer].gradient_spectrum.values()) for layer in network.columns}
    assert counts == {layer: exact_rank(exact[:, columns]) for layer, columns in network.columns.items()}


def test_a_rank_that_is_proved_without_singular_values_has_none_by_magnitude():
    record = measure_basin(wide(6, 40, 40, 5), drawn(40, 6), spectrum=False, layers=[])
    assert record.gradient_spectrum is record.gradient_largest is None
