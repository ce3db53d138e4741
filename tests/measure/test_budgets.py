"""One answer under every memory budget: whatever a measurement is cut into, its integers stay the same."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from lightning_basin import Probe, measure_basin
from lightning_basin.functional.factored import DenseGradients
from lightning_basin.functional.gradients import gram_of
from lightning_basin.functional.hessian import hessian_matrix
from lightning_basin.functional.rank import gradient_rank
from lightning_basin.functional.spectrum import SpectrumAccumulator
from lightning_basin.limits import MemoryBudgetError
from lightning_basin.measure import check_measurable
from lightning_basin.settings import Settings
from tests.exact import exact_rank
from tests.layer_types import TYPES
from tests.layer_types import integer_network as network_of_type
from tests.models import CASE_NAMES, integer_case
from tests.networks import drawn, filled

LAYER_INTEGERS = ("gradient_rank", "hessian_nullity", "hessian_nullity_strict", "hessian_nullity_lower",
                  "hessian_negative", "gauss_newton_nullity", "duplicated_activations", "dead_units")  # fmt: skip


INTEGERS = (*LAYER_INTEGERS, "gradient_rank_bound", "output_duplicated_activations")


def integers_of(record):
    """What was found, by name; a Hessian may be left out for lack of memory."""
    found = {("", name): getattr(record, name) for name in INTEGERS}
    found |= {(layer, name): getattr(part, name) for layer, part in record.layers.items() for name in LAYER_INTEGERS}
    return {key: value for key, value in found.items() if value is not None}


def records_under_budgets(module, inputs, targets, *, factor, **settings):
    """Records from the least budget that is accepted to one that cuts nothing, where ``factor`` lies between two."""
    budget, records = 2.0**27, []
    while True:
        try:
            records.append(
                measure_basin(module, inputs, targets, loss_fn=nn.MSELoss(), memory_budget=int(budget), **settings)
            )
        except MemoryBudgetError:
            return records
        budget /= factor if budget < 2**21 else 8


def assert_one_answer(module, inputs, *, factor):
    with torch.no_grad():
        targets = module.double()(inputs.double() if inputs.is_floating_point() else inputs)
    targets = targets + drawn(*targets.shape)
    for settings in ({"spectrum": True}, {"spectrum": False, "hessian": False}):
        whole, *cut = records_under_budgets(module, inputs, targets, factor=factor, **settings)
        expected = integers_of(whole)
        for record in cut:
            found = integers_of(record)
            assert {key: found[key] for key in expected if key in found} == {
                key: value for key, value in expected.items() if key in found
            }
            assert (whole.hessian_nullity is None) <= (record.hessian_nullity is None)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_networks_have_one_answer_under_all_budgets(name):
    case = integer_case(name, 0)
    assert_one_answer(case.module, case.inputs, factor=1.5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in TYPES])
def test_all_types_of_layers_have_one_answer_under_all_budgets(name):
    assert_one_answer(*network_of_type(name, 0), factor=2.5)


class Patches(nn.Module):
    """Convolutions whose graph is large beside their parameters: the Hessian is measured in chunks of inputs."""

    def __init__(self):
        super().__init__()
        self.low, self.wide = nn.Conv2d(2, 2, 2, stride=2), nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 1, 2)

    def forward(self, x):
        wide = self.wide(F.interpolate(self.low(x), scale_factor=2))
        return F.unfold(self.head(wide.relu()), 2).flatten(1)


def test_a_network_with_a_large_graph_has_one_answer_under_all_budgets():
    assert_one_answer(filled(Patches()), drawn(4, 2, 6, 6), factor=1.05)


class Routed(nn.Module):
    """One layer that some inputs use before a cut, and the others behind it, as experts and shared weights may."""

    def __init__(self):
        super().__init__()
        self.shared, self.first, self.cut = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        is_early = x[:, :1] > 0
        hidden = torch.where(is_early, self.shared(x), x) if is_early.any() else x
        merged = self.cut(self.first(hidden).relu())
        if is_early.all():
            return merged
        return torch.where(is_early, merged, merged + self.shared(x).sum(1, keepdim=True))


@pytest.mark.parametrize(("memory_budget", "chunk_size"), [(None, 16), (98_000, 2)])
def test_a_weight_on_both_sides_of_a_cut_counts_also_where_no_chunk_sees_both(memory_budget, chunk_size):
    module = filled(Routed())
    with torch.no_grad():
        module.first.bias.fill_(-1e6)  # All 16 inputs merge where every unit is off.
    late = torch.eye(8) + torch.tensor([-1.0] + [1.0] * 7)  # Of determinant 1 + 6.
    inputs = torch.cat([late.abs() + 1, late])
    assert check_measurable(module, Probe(inputs), Settings(memory_budget=memory_budget)).chunk_size == chunk_size
    record = measure_basin(module, inputs, memory_budget=memory_budget)
    # The bias of the cut, and the 8 directions of the late inputs.
    assert (record.gradient_rank, record.gradient_rank_bound) == (9, 16)


def normed(width):
    return nn.utils.parametrizations.weight_norm(nn.Linear(width, width))


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize(
    ("build", "least"),
    [
        pytest.param(
            lambda: [nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)], 3e5, id="plain"
        ),
        pytest.param(
            lambda: [nn.Linear(8, 90), nn.ReLU(), normed(90), nn.ReLU(), nn.Linear(90, 2)], 3e6, id="dense rows"
        ),
    ],
)
def test_wide_networks_keep_their_full_rank_under_tight_budgets(build, least, spectrum):
    # Distinct inputs in general position: the last layer alone makes the two outputs of 8 inputs independent.
    module, inputs = filled(nn.Sequential(*build())), drawn(8, 8, seed=1)
    accepted = 0
    for budget in np.geomspace(least, 30 * least, 25):
        try:
            record = measure_basin(module, inputs, memory_budget=int(budget), spectrum=spectrum)
        except MemoryBudgetError:
            continue
        accepted += 1
        assert record.gradient_rank == 16
    assert accepted > 10


@pytest.mark.parametrize("has_grams", [False, True])
@pytest.mark.parametrize("max_waiting", [1, 10, 60, 300, 2**20])
@pytest.mark.parametrize(
    ("rows", "widths"), [(3, (35, 5)), (6, (1, 40, 1, 7)), (9, (3, 3, 3)), (5, (300,)), (8, (2,) * 30)]
)
def test_an_accumulator_sees_every_column_however_little_may_wait(rows, widths, max_waiting, has_grams):
    draw = np.random.default_rng(0)
    # The first half of all rows is zero in all matrices but the last one: no rank is that of some of the columns.
    matrices = [draw.integers(-2, 3, (rows, width)) for width in widths]
    for matrix in matrices[:-1]:
        matrix[: rows // 2] = 0
    expected = exact_rank(np.concatenate(matrices, 1))

    accumulator = SpectrumAccumulator(rows, sum(widths), Generator().manual_seed(1), max_waiting=max_waiting)
    for matrix in matrices:
        gradients = DenseGradients(torch.tensor(matrix, dtype=torch.float64))
        accumulator.add(gradients, partial(gram_of, gradients) if has_grams else None)
    assert gradient_rank(accumulator.spectrum()).rank == expected


def test_an_accumulator_does_not_judge_some_of_the_columns():
    found = SpectrumAccumulator(3, 5, Generator())
    found.add(DenseGradients(torch.ones(3, 4, dtype=torch.float64)))
    for judge in (found.spectrum, found.matrices):
        with pytest.raises(RuntimeError, match="all 5 columns must be added to be judged, got 4"):
            judge()


def test_a_loss_without_a_graph_has_no_hessian():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="must be attached to the graph of the parameters"):
        hessian_matrix(weight.detach().sum(), [weight])
