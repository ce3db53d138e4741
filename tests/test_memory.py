"""Budgets are kept: seen from outside, as the growth of the process, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_basin import BasinMonitor, Probe, measure_basin, memory
from lightning_basin.limits import MemoryBudgetError
from lightning_basin.measure import check_measurable
from lightning_basin.settings import Settings
from tests.networks import convolutional, huge, images
from tests.training import Regressor, loader, make_trainer

MEBIBYTE = 2**20


PEAK = """
import resource, sys
import torch
from tests.networks import convolutional, images
from lightning_basin import measure_basin

torch.manual_seed(0)
module, inputs = convolutional(), images(48)
measure_basin(module, inputs[:2])  # What is loaded at the first measurement is not the measurement's.
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = measure_basin(module, inputs, memory_budget=int(sys.argv[1]))
print(record.gradient_rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


PEAK_OF_A_HUGE_LAYER = """
import resource, sys
import torch
from tests.networks import huge
from lightning_basin import measure_basin

torch.manual_seed(0)
measure_basin(huge(40), torch.randn(2, 8))
module, inputs = huge(40_000), torch.randn(48, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = measure_basin(module, inputs, memory_budget=int(sys.argv[1]))
print(record.layers["0"].gradient_rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # Small matrices: a second thread only waits.
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def rank_and_peak(budget, script=PEAK):
    rank, kibibytes = run(sys.executable, "-c", script, str(budget)).split()
    return int(rank), int(kibibytes) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [112, 192, 1024])
def test_the_peak_stays_under_the_budget_and_the_rank_is_the_same(mebibytes):
    rank, peak = rank_and_peak(mebibytes * MEBIBYTE)
    assert rank == 96  # Two outputs on each of 48 random images: no direction is lost.
    assert peak < mebibytes * MEBIBYTE


@pytest.mark.slow
def test_a_layer_of_many_parameters_is_measured_from_its_factors_under_the_budget():
    # Its factors, 48 x 8 + 96 x 40000 numbers, are 29 MiB, its dense rows 264; the plan reserves room for copies.
    rank, peak = rank_and_peak(600 * MEBIBYTE, PEAK_OF_A_HUGE_LAYER)
    assert rank == 96
    assert peak < 264 * MEBIBYTE


PEAK_OF_A_HESSIAN = """
import resource, sys
import torch
from torch import nn
from tests.networks import convolutional, images
from lightning_basin import measure_basin

torch.manual_seed(0)
module, inputs = convolutional(), images(48)
targets = (module(inputs) + torch.randn(48, 2)).detach().softmax(1)
measure_basin(module, inputs[:2], targets[:2], loss_fn=nn.CrossEntropyLoss())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = measure_basin(module, inputs, targets, loss_fn=nn.CrossEntropyLoss(), memory_budget=int(sys.argv[1]))
print(record.gauss_newton_nullity, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_hessian_in_chunks_stays_under_the_budget():
    nullity, peak = rank_and_peak(112 * MEBIBYTE, PEAK_OF_A_HESSIAN)
    # Of two classes only the difference of the logits is seen: one direction for each of 48 images.
    assert nullity == sum(parameter.numel() for parameter in convolutional().parameters()) - 48
    assert peak < 112 * MEBIBYTE


def test_the_plan_says_what_the_hessian_may_take():
    module, inputs, targets = convolutional(), images(48), torch.randn(48, 2)

    def planned(mebibytes, **settings):
        return check_measurable(
            module, Probe(inputs, targets), Settings(memory_budget=mebibytes * MEBIBYTE, **settings)
        )

    assert planned(1024).hessian_limits is None
    roomy, narrow = (planned(mebibytes, loss_fn=nn.MSELoss()) for mebibytes in (1024, 112))
    assert roomy.hessian_limits.chunk_size is None
    assert narrow.hessian_limits.chunk_size <= narrow.chunk_size < 48
    assert narrow.hessian_limits.basis_elements * 8 < 112 * MEBIBYTE


def test_the_plan_says_how_each_layer_is_measured():
    def methods(module, inputs, mebibytes):
        plan = check_measurable(module, Probe(inputs), Settings(memory_budget=mebibytes * MEBIBYTE))
        return dict(plan.methods), str(plan)

    assert methods(convolutional(), images(48), 1024)[0] == {"0": "factors", "2": "factors", "5": "factors"}
    pooled = [nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool1d(64), nn.Flatten(), nn.Linear(256, 2)]
    found, words = methods(nn.Sequential(*pooled), torch.randn(48, 1, 1024), 64)
    assert found == {"0": "chunks", "4": "factors"}
    assert "(2 layers, 1 of them chunk by chunk)" in words


def test_one_of_a_kind_is_said_in_the_singular():
    plan = check_measurable(nn.Linear(1, 1, bias=False), Probe(torch.ones(1, 1)), Settings(memory_budget=2**30))
    assert str(plan).startswith("1 input x 1 output = 1 row by 1 parameter (1 layer, all factored): about ")


def test_a_layer_that_fits_by_no_method_is_refused_before_any_work():
    with pytest.raises(
        MemoryBudgetError,
        match=r"the gradients of layer '0' need .* take a smaller probe, fewer outputs \(max_outputs\), or a larger",
    ):
        check_measurable(huge(40_000), Probe(torch.randn(48, 8)), Settings(memory_budget=130 * MEBIBYTE))


def test_one_layer_may_take_more_than_layers_together(monkeypatch):
    monkeypatch.setattr(memory, "GROUP_ELEMENTS", 1)
    module, inputs = huge(4000), torch.randn(48, 8)
    alone, together = (
        check_measurable(module, Probe(inputs), Settings(memory_budget=size * MEBIBYTE)) for size in (200, 400)
    )
    assert alone.methods == together.methods == {"0": "factors", "3": "factors"}
    # The same peak: that of the largest layer, and not of all of the budget.
    assert alone.layer_elements < together.layer_elements


@pytest.mark.slow
def test_memory_is_flat_over_many_measurements():
    script = (
        "import resource, torch; from torch import nn; from lightning_basin import measure_basin\n"
        "module, inputs, targets = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 8), "
        "torch.randn(16, 2)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(20): measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())\n"
        "before = peak()\n"
        "for _ in range(200): measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())\n"
        "print(peak() - before)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(printed.stdout) < 8 * 1024  # KiB: one leaked graph of this network a time would be 200 x 50.


def test_inputs_in_chunks_give_the_same_record():
    torch.manual_seed(0)
    module, inputs = convolutional(), images(48)
    whole, chunked = measure_basin(module, inputs), measure_basin(module, inputs, memory_budget=112 * MEBIBYTE)
    for name, layer in whole.layers.items():
        assert layer.gradient_rank == chunked.layers[name].gradient_rank
        assert layer.duplicated_activations == chunked.layers[name].duplicated_activations
        assert layer.dead_units == chunked.layers[name].dead_units
    assert whole.gradient_rank == chunked.gradient_rank


def variance_of_outputs(outputs, targets):
    """Couples the inputs."""
    return (outputs - targets).square().mean() + (outputs - outputs.mean(0)).square().mean()


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss_fn", "hessian"),
    [
        (nn.MSELoss(), "bracket"),
        (nn.CrossEntropyLoss(), "bracket"),
        (variance_of_outputs, "bracket"),
        (variance_of_outputs, "dense"),
    ],
    ids=["squares", "cross-entropy", "coupled", "coupled, dense"],
)
def test_the_hessian_of_inputs_in_chunks_is_that_of_all_at_once(loss_fn, hessian):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Tanh(), nn.AvgPool2d(10), nn.Flatten(), nn.Linear(8, 2)
    )
    inputs = torch.randn(24, 1, 28, 28)
    targets = module(inputs).detach() + 1e-4 * torch.randn(24, 2)
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        targets = targets.softmax(1)
    plans = [
        check_measurable(module, Probe(inputs), Settings(memory_budget=mebibytes * MEBIBYTE)).chunk_size < 24
        for mebibytes in (1024, 20)
    ]
    assert plans == [False, True]
    whole, chunked = (
        measure_basin(module, inputs, targets, loss_fn=loss_fn, hessian=hessian, memory_budget=mebibytes * MEBIBYTE)
        for mebibytes in (1024, 20)
    )
    assert (chunked.notes, chunked.gradient_rank_bound) == (whole.notes, whole.gradient_rank_bound)
    for one, other in [(whole, chunked), *((whole.layers[name], chunked.layers[name]) for name in whole.layers)]:
        assert other.gradient_rank == one.gradient_rank
        assert other.hessian_nullity == one.hessian_nullity
        assert other.hessian_nullity_strict == one.hessian_nullity_strict
        assert other.hessian_nullity_upper == one.hessian_nullity_upper
        assert other.gauss_newton_nullity == one.gauss_newton_nullity
        # The same numbers added up in another order.
        assert other.hessian_largest == pytest.approx(one.hessian_largest, rel=1e-3)


def test_a_penalty_on_parameters_does_not_add_up_over_chunks():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(13), nn.Flatten(), nn.Linear(16, 2))
    inputs = torch.randn(48, 1, 28, 28)

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

        def loss(self, outputs, targets):
            return (outputs - targets).square().mean() + self.module[0].weight.square().sum()

    penalised = Penalised()
    record = measure_basin(penalised, inputs, torch.randn(48, 2), loss_fn=penalised.loss, memory_budget=20 * MEBIBYTE)
    assert record.hessian_nullity is None
    assert record.loss is not None
    assert "takes a memory_budget that holds all inputs at once" in record.notes[0]


def test_tensors_that_a_module_holds_count_in_the_budget():
    module = convolutional()
    module.tables = [torch.zeros(2**24)]  # 128 MiB in float64.
    with pytest.raises(MemoryBudgetError, match=r"beside 0\.12 GiB of other tensors of the module, needs"):
        measure_basin(module, images(48), memory_budget=112 * MEBIBYTE)
    assert check_measurable(module, Probe(images(48)), Settings(memory_budget=1024 * MEBIBYTE)).memory_bytes > 2**27


@pytest.mark.parametrize(
    ("mebibytes", "message"),
    [(1, "the decomposition of 96 rows by"), (8, "take a smaller probe")],
)
def test_what_cannot_be_cut_to_the_budget_is_refused_with_what_to_change(mebibytes, message):
    with pytest.raises(MemoryBudgetError, match=message):
        measure_basin(convolutional(), images(48), memory_budget=mebibytes * MEBIBYTE)


@pytest.mark.parametrize("budget", [4e6, 1e6, 4e5])
@pytest.mark.parametrize("hessian", ["auto", "bracket"])
def test_a_budget_may_be_any_number(budget, hessian):
    # 16 independent directions of the last layer see both outputs of all 8 inputs.
    module, inputs = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 2)), torch.randn(8, 8)
    settings = {"loss_fn": nn.MSELoss(), "hessian": hessian}
    try:
        record = measure_basin(module, inputs, torch.zeros(8, 2), memory_budget=budget, **settings)
    except MemoryBudgetError:
        assert (hessian, budget) != ("bracket", 4e6)
    else:
        assert record.gradient_rank == 16
    for number in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be a finite number of bytes"):
            measure_basin(module, inputs, memory_budget=number)


def test_a_hessian_that_is_too_large_is_refused_with_what_does_without():
    module, inputs = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 1)), torch.randn(2, 40)
    with pytest.raises(MemoryBudgetError, match=r"parameters, with the Hessian, needs .*: take hessian='bracket', a"):
        measure_basin(
            module, inputs, torch.zeros(2, 1), loss_fn=nn.MSELoss(), hessian="dense", memory_budget=64 * MEBIBYTE
        )
    settings = {"loss_fn": nn.MSELoss(), "hessian": "bracket", "memory_budget": 64 * MEBIBYTE}
    assert measure_basin(module, inputs, torch.zeros(2, 1), **settings).gradient_rank == 2


def test_inputs_that_are_run_in_chunks_are_in_no_graph_of_the_hessian():
    # Beside the graph lie the factors of the wide convolutions, which the products with the Hessian do not need.
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Flatten())
    probe, cut = Probe(torch.randn(6, 1, 5, 5), torch.zeros(6, 25)), 0
    for budget in range(4_850_000, 6_000_000, 50_000):
        plan = check_measurable(module, probe, Settings(loss_fn=nn.MSELoss(), hessian="bracket", memory_budget=budget))
        if plan.chunk_size < 6:
            cut += 1
            assert plan.hessian_limits.chunk_size is not None
            assert plan.hessian_limits.chunk_size <= plan.chunk_size
    assert cut > 10


@pytest.mark.fits
def test_a_monitor_says_before_it_measures_that_the_hessian_does_not_fit(tmp_path):
    module = Regressor()
    module.hidden, module.readout = nn.Linear(3, 100), nn.Linear(100, 2)  # 602 parameters, six times squared: 17 MB.
    monitor = BasinMonitor(probe=8, hessian="dense", memory_budget=8 * MEBIBYTE)
    with pytest.warns(UserWarning, match="with the Hessian, needs .*: take hessian='bracket', ") as warned:
        make_trainer(tmp_path, monitor).fit(module, loader())
    first, *_ = [str(warning.message) for warning in warned if "BasinMonitor" in str(warning.message)]
    assert first.startswith("BasinMonitor will not be able to measure")
    assert module.num_training_steps == 6
