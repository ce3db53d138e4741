"""Evaluated in float32 the integers are the same, as far as float32 can tell: and the record says how far that is."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_basin import BasinMonitor, measure_basin
from lightning_basin.measure import check_measurable, measure
from lightning_basin.network.rounding import rounding_rtol
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings
from lightning_basin.tensors import tensors_of
from tests import models
from tests.exact import exact_rank, jacobian
from tests.layer_types import TYPES, integer_case, trained_case
from tests.lightning_packages import MisconfigurationException
from tests.measure.records import without_time
from tests.networks import Composed, built, convolutional, drawn32, images

EPSILON = 2.0**-23


BUDGETS = (2**30, 84 * 2**20)


NOTE = "evaluated in float32: singular values below"


def parts(record):
    """The network and its layers."""
    return {None: record, **record.layers}


def ranks(record):
    return {name: part.gradient_rank for name, part in parts(record).items()}


def perceptron(*widths):
    """Linear layers with a ReLU between them."""
    parts = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", models.CASE_NAMES)
def test_ranks_of_integer_networks_are_exact(name, seed):
    case = models.integer_case(name, seed)
    network, outputs = models.evaluated_case(name, seed)
    matrix = jacobian(outputs)
    assert np.abs(matrix).max() < 2**24  # float32 holds it
    record = measure_basin(case.module, case.inputs, dtype="float32")
    expected = {layer: exact_rank(matrix[:, columns]) for layer, columns in network.columns.items()}
    assert ranks(record) == {None: exact_rank(matrix), **expected}


def is_clear(sigmas, rtol):
    """Whether no singular value is near the tolerance."""
    relative = sigmas / sigmas[0] if len(sigmas) and sigmas[0] else sigmas
    return not ((relative > rtol / 30) & (relative < rtol * 30)).any()


def assert_ranks_are_those_of(case, record):
    """The rank of each part, wherever the exact Jacobian has no singular value that float32 cannot judge."""
    num_judged = 0
    for name, part in parts(record).items():
        matrix = (case.jacobian if name is None else case.jacobian[:, case.columns[name]]).astype(np.float64)
        sigmas = np.linalg.svd(matrix, compute_uv=False)
        if is_clear(sigmas, part.gradient_rtol):
            num_judged += 1
            assert part.gradient_rank == int((sigmas > part.gradient_rtol * sigmas[0]).sum())
    return num_judged


@pytest.mark.parametrize("name", TYPES)
def test_ranks_of_every_layer_type_are_exact_as_far_as_float32_tells(name):
    case = integer_case(name, 0)
    record = measure_basin(case.module, case.inputs, dtype="float32")
    if case.number is int:
        assert ranks(record) == {
            None: case.rank(case.jacobian),
            **{layer: case.rank(case.jacobian[:, columns]) for layer, columns in case.columns.items()},
        }
    assert assert_ranks_are_those_of(case, record) > 0
    (note,) = record.notes  # And none of them says that a layer is measured row by row.
    assert note.startswith(NOTE)


@pytest.mark.parametrize("name", TYPES)
def test_ranks_of_trained_networks_are_those_of_float64_as_far_as_float32_tells(name):
    case = trained_case(name, 0)
    assert assert_ranks_are_those_of(case, measure_basin(case.module, case.inputs, dtype="float32")) > 0


def linear_chain(*widths):
    """Deep linear: the rank is known on paper, and nothing about it is exact in float32."""
    return built(lambda: nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(widths))))


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize("memory_budget", [None, 2**29])
def test_rank_of_a_deep_linear_network_is_that_on_paper(spectrum, memory_budget):
    # Matrices of 20 x 20 and rank 6 are a manifold of this dimension (Singh, Bachmann and Hofmann, 2021).
    module, inputs = linear_chain(20, 6, 6, 20), drawn32(40, 20)
    record = measure_basin(module, inputs, dtype="float32", spectrum=spectrum, memory_budget=memory_budget)
    assert record.gradient_rank == 6 * (20 + 20 - 6)
    assert not record.ill_defined


@pytest.mark.parametrize("spectrum", [True, False])
def test_the_gram_matrix_decides_the_rank_of_a_wide_matrix(spectrum):
    # 400 rows by 41,270 parameters: too large to be decomposed as it stands. Half of the inputs are there twice.
    module, inputs = built(lambda: perceptron(20, 200, 180, 5)), drawn32(80, 20)
    inputs[40:] = inputs[:40]
    record = measure_basin(module, inputs, dtype="float32", spectrum=spectrum)
    assert record.gradient_rank == measure_basin(module, inputs).gradient_rank == 200
    assert record.gradient_method == "gram"
    assert record.gradient_rtol == 800 * EPSILON


def test_chunks_of_inputs_give_the_same_integers():
    module, inputs = built(convolutional), images(48)
    whole, chunked = (measure_basin(module, inputs, dtype="float32", memory_budget=budget) for budget in BUDGETS)
    assert check_measurable(module, Probe(inputs), Settings(memory_budget=BUDGETS[1], dtype="float32")).chunk_size < 48
    assert ranks(chunked) == ranks(whole)
    assert chunked.duplicated_activations == whole.duplicated_activations


class SoftThresholds(nn.Module):
    """Takes its parameter into an operation that is not known, so that dense rows are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.thresholds = nn.Parameter(torch.linspace(-1.0, 1.0, 3))

    def forward(self, x):
        return torch.logaddexp(x, self.thresholds)


def weight_normalised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


OTHER_NETWORKS = {
    "dense rows": (lambda: nn.Sequential(nn.Linear(4, 3), SoftThresholds(), nn.Linear(3, 2)), {}),
    "computed weights": (weight_normalised, {}),
    "combined outputs": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 30)), {"max_outputs": 4}),
    "probabilities": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        {"behavior": "probabilities"},
    ),
    "half precision": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16(), {}),
    "unused layer": (lambda: Composed(lambda m, x: m.used(x), unused=nn.Linear(2, 2), used=nn.Linear(4, 3)), {}),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_ways_to_the_gradients_give_the_integers_of_float64(name):
    build, options = OTHER_NETWORKS[name]
    module, inputs = built(build), drawn32(6, 4)
    high = measure_basin(module, inputs, **options)
    low = measure_basin(module, inputs, **options, dtype="float32")
    assert not high.ill_defined
    assert ranks(low) == ranks(high)


class SwitchesAutocastOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(self.inner(x).relu())


def test_autocast_inside_of_the_forward_does_not_lower_the_rank():
    module, inputs = built(SwitchesAutocastOn), drawn32(30, 5)
    inputs[15:] = inputs[:15]
    assert ranks(measure_basin(module, inputs, dtype="float32")) == ranks(measure_basin(module, inputs))


@pytest.fixture
def low_precision_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("low_precision_products")
def test_products_of_lower_precision_that_training_allows_are_not_measured():
    # As Lightning advises on many devices; some processors then multiply in bfloat16.
    module, inputs = linear_chain(20, 6, 6, 20), drawn32(40, 20)
    assert measure_basin(module, inputs, dtype="float32").gradient_rank == 204


def test_the_note_says_what_counts_as_zero():
    module, inputs = built(lambda: perceptron(6, 8, 4)), drawn32(20, 6)
    record = measure_basin(module, inputs, dtype="float32")
    assert record.gradient_rtol == max(80, 92) * EPSILON
    (note,) = record.notes
    assert note == (
        "evaluated in float32: singular values below 1.1e-05 of the largest count as zero, activations within 3.8e-06 "
        "as the same"
    )


def test_float64_is_the_default_on_a_cpu_and_has_no_note():
    module, inputs = built(lambda: perceptron(6, 8, 4)), drawn32(20, 6)
    default, named = measure_basin(module, inputs), measure_basin(module, inputs, dtype="float64")
    assert default.notes == named.notes == ()
    assert default.dtype == "float64"
    assert without_time(default) == without_time(named)


def test_a_record_says_that_float32_was_taken_and_what_measures_the_hessian():
    module, inputs, targets = built(lambda: perceptron(6, 8, 4)), drawn32(20, 6), drawn32(20, 4, seed=1)
    asked = {"loss_fn": nn.MSELoss()}
    taken = measure(module, Probe(inputs, targets), Settings(taken_dtype="float32", **asked))  # As on a slow device.
    named = measure_basin(module, inputs, targets, dtype="float32", **asked)
    (note,) = set(taken.notes) - set(named.notes)
    assert note.startswith("dtype='auto' took float32")
    assert "pass dtype='float64' to measure the Hessian too" in note
    assert taken.dtype == named.dtype == "float32"
    assert without_time(taken) | {"notes": ()} == without_time(named) | {"notes": ()}


def test_full_rank_is_proved_by_the_last_layers_in_float32_too():
    module, inputs = built(lambda: perceptron(20, 300, 300, 2)), drawn32(40, 20)
    low, high = (
        measure_basin(module, inputs, layers=[], spectrum=False, dtype=dtype) for dtype in ("float32", "float64")
    )
    assert (low.gradient_rank, low.gradient_method) == (high.gradient_rank, high.gradient_method) == (80, "cholesky")
    assert set(low.gradient_rank_at) <= {1e-4, 1e-2}


@pytest.mark.parametrize("spectrum", [True, False])
def test_ranks_are_given_at_tolerances_that_are_resolved_only(spectrum):
    module, inputs = built(lambda: perceptron(20, 200, 180, 5)), drawn32(80, 20)
    record = measure_basin(module, inputs, dtype="float32", spectrum=spectrum)
    assert set(record.gradient_rank_at) <= {1e-4, 1e-2}  # 800 eps = 9.5e-5
    if spectrum:
        assert set(record.gradient_rank_at) == {1e-4, 1e-2}


def test_the_gap_ends_at_the_rounding_of_float32():
    # All singular values of the gradients of a bias are the same.
    record = measure_basin(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 2), dtype="float32")
    assert record.layers["0"].gradient_rank == 3
    assert record.gradient_rank_gap == pytest.approx(-np.log10(EPSILON))


def test_a_tolerance_of_ones_own_decides():
    module, inputs = linear_chain(20, 6, 6, 20), drawn32(40, 20)
    record = measure_basin(module, inputs, dtype="float32", rtol=1e-6)
    assert (record.gradient_rtol, record.gradient_rank) == (1e-6, 204)
    assert set(record.gradient_rank_at) == {1e-4, 1e-2}


def test_activations_that_float32_cannot_tell_apart_are_the_same():
    module = built(lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    inputs = torch.tensor([[1.0, 0.0], [1.0, 1e-6], [1.0, 1e-5], [0.0, 1.0]])
    asked = {"duplicate_rtol": 1e-8}
    assert measure_basin(module, inputs, **asked).layers["0"].duplicated_activations == 0
    assert measure_basin(module, inputs, **asked, dtype="float32").layers["0"].duplicated_activations == 1
    assert 1e-6 < rounding_rtol(torch.float32) < 9e-6
    coarse = measure_basin(module, inputs, duplicate_rtol=1e-4, dtype="float32")
    assert coarse.layers["0"].duplicated_activations == 2


def test_units_that_move_by_less_than_rounding_are_dead():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0.0], [1e-6, 0.0]]))
    inputs = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert measure_basin(module, inputs, duplicate_rtol=1e-8).layers["0"].dead_units == 0
    assert measure_basin(module, inputs, duplicate_rtol=1e-8, dtype="float32").layers["0"].dead_units == 1


def test_a_training_set_is_streamed_in_float32():
    module, inputs = built(lambda: perceptron(4, 5, 2)), drawn32(30, 4)
    training_set = torch.cat([inputs, inputs + 1e-7 * drawn32(30, 4, seed=1)])
    record = measure_basin(module, inputs, duplicates_over=[training_set], duplicate_rtol=1e-9, dtype="float32")
    assert record.train_num_inputs == 60
    assert record.train_duplicated_activations == 30


def nearly_merging(gain):
    return Composed(
        lambda m, x: m.head((gain * m.wide(m.narrow(x))).tanh()),
        narrow=nn.Linear(2, 3),
        wide=nn.Linear(3, 20),
        head=nn.Linear(20, 2),
    )


@pytest.mark.parametrize("distance", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("gain", [1.0, 30.0])
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"rtol": 1e-6}, {"rtol": 1e-4}], ids=str)
def test_the_bound_holds_where_what_nearly_merged_is_told_apart_again(options, gain, distance):
    module, inputs = built(lambda: nearly_merging(gain)).double(), drawn32(4, 2)
    inputs = torch.cat([inputs, inputs + distance * drawn32(4, 2, seed=1)])
    record = measure_basin(module, inputs.double(), **options)
    assert record.gradient_rank <= record.gradient_rank_bound


@pytest.mark.parametrize("strength", [1e-2, 1e-3, 1e-4, 3e-5])
def test_a_weak_skip_connection_is_not_taken_for_none(strength):
    module = built(
        lambda: Composed(
            lambda m, x: m.head(m.narrow(m.first(x).tanh())).tanh() + strength * m.first(x).tanh()[:, :2],
            first=nn.Linear(4, 6),
            narrow=nn.Linear(6, 1),
            head=nn.Linear(1, 2),
        )
    )
    inputs = drawn32(30, 4)
    with torch.no_grad():
        module.narrow.weight.zero_()  # All inputs are the same behind it.
    record = measure_basin(module, inputs, dtype="float32")
    assert record.gradient_rank <= record.gradient_rank_bound
    assert record.gradient_rank_bound > 6 + 6 + 1 + 2 * 1


def test_the_loss_is_measured_and_the_hessian_left_out():
    module, inputs, targets = built(lambda: perceptron(4, 5, 2)), drawn32(30, 4), drawn32(30, 2, seed=1)
    record = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), dtype="float32")
    with torch.no_grad():
        assert record.loss == pytest.approx(float((module(inputs) - targets).square().mean()), rel=1e-6)
    assert (record.hessian_nullity, record.gauss_newton_nullity, record.hessian_method) == (None, None, None)
    assert record.notes[0] == "the Hessian is left out: its null space is not resolved by second derivatives in float32"
    without = measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), hessian=False, dtype="float32")
    assert len(without.notes) == 1


REFUSED = {
    "half": ({"dtype": "float16"}, "dtype must be one of"),
    "dense": ({"dtype": "float32", "hessian": "dense"}, "hessian must be 'auto' or False with dtype='float32'"),
    "bracket": ({"dtype": "float32", "hessian": "bracket"}, "second derivatives do not resolve a null space"),
    "gauss-newton": ({"dtype": "float32", "hessian": "gauss-newton"}, "got 'gauss-newton'"),
    "fine tolerance": ({"dtype": "float32", "rtol": 1e-8}, "rtol must be at least 1.2e-07 with dtype='float32'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_float32_cannot_tell_is_refused_in_one_sentence(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        measure_basin(nn.Linear(2, 1), drawn32(3, 2), drawn32(3, 1), loss_fn=nn.MSELoss(), **options)
    with pytest.raises(MisconfigurationException, match=message):
        BasinMonitor(**options)


def test_the_plan_counts_four_bytes_for_each_number_in_the_graph():
    module, probe = built(convolutional), Probe(images(48))
    plans = [
        check_measurable(module, probe, Settings(memory_budget=BUDGETS[1], dtype=dtype))
        for dtype in ("float64", "float32")
    ]
    # What is kept beside the graph takes eight bytes in both.
    assert 1.4 * plans[0].chunk_size <= plans[1].chunk_size < 48


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", TYPES)
def test_a_gpu_finds_the_same_integers(name, dtype):
    case = trained_case(name, 0)
    on_cpu = measure_basin(case.module, case.inputs, dtype=dtype)
    module = built(lambda: case.module).to("cuda")
    try:
        on_gpu = measure_basin(module, case.inputs.to("cuda"), dtype=dtype)
    finally:
        module.to("cpu")
    assert ranks(on_gpu) == ranks(on_cpu)
    assert on_gpu.gradient_rank_bound == on_cpu.gradient_rank_bound
    assert on_gpu.merged_inputs == on_cpu.merged_inputs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spectrum", [True, False])
def test_a_gpu_measures_all_quantities(spectrum):
    module, inputs, targets = built(lambda: perceptron(20, 200, 180, 5)), drawn32(80, 20), drawn32(80, 5, seed=1)
    options = {"loss_fn": nn.MSELoss(), "spectrum": spectrum, "duplicates_over": [inputs]}
    on_cpu = measure_basin(module, inputs, targets, **options)
    on_gpu = measure_basin(module.to("cuda"), inputs.to("cuda"), targets.to("cuda"), **options)
    assert ranks(on_gpu) == ranks(on_cpu)
    assert on_gpu.hessian_nullity_upper == on_cpu.hessian_nullity_upper
    assert on_gpu.train_duplicated_activations == on_cpu.train_duplicated_activations


class TwoDevices(TorchDispatchMode):
    """Sees float32 as the tensors of a device without float64, and float64 as those of the CPU.

    It notes where an operation takes tensors of both, and where one is converted outside of the functions that bring
    it to the other device. Numbers that the mathematics draws in float32 are on the CPU from the start.
    """

    def __init__(self):
        super().__init__()
        self.faults = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        before = {tensor.dtype for tensor in tensors_of((args, kwargs))} & {torch.float32, torch.float64}
        is_moved = name in ("aten::_to_copy", "aten::copy_")
        is_raised = is_moved and before == {torch.float32} and result.dtype == torch.float64
        if (len(before) == 2 and not is_moved) or is_raised:
            frame = sys._getframe()
            while frame is not None and "/lightning_basin/" not in frame.f_code.co_filename:
                frame = frame.f_back
            place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            if not is_raised or not (
                place.endswith((":as_result", ":as_dtype", ":_beside")) or "/functional/" in place
            ):
                self.faults.add(f"{name} in {place}")
        return result


@pytest.mark.parametrize("options", [{}, {"spectrum": False}, {"layers": []}, {"behavior": "probabilities"}], ids=str)
@pytest.mark.parametrize("name", ["perceptron", "convolutional", "normalised", "merging"])
def test_what_leaves_a_network_of_a_device_without_float64_passes_one_function(name, options):
    module, inputs = {
        "perceptron": (built(lambda: perceptron(6, 8, 4)), drawn32(20, 6)),
        "convolutional": (built(convolutional), images(6)),
        "normalised": (built(lambda: nn.Sequential(weight_normalised(), nn.LayerNorm(3))), drawn32(8, 4)),
        "merging": (built(lambda: nearly_merging(30.0)), drawn32(4, 2).repeat(2, 1)),
    }[name]
    with TwoDevices() as devices:
        measure_basin(module, inputs, duplicates_over=[inputs], dtype="float32", **options)
    assert devices.faults == set()
