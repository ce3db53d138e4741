"""What one measurement finds out about a module and the next one takes over changes no number, and hides no fault."""

import pytest
import torch
from torch import nn

from benchmarks.networks import RANKED
from lightning_basin.measure import check_measurable, measure
from lightning_basin.probe import Probe
from lightning_basin.settings import Settings
from lightning_basin.structure import StructureCache
from tests.counting import Dispatched
from tests.exact import exact_rank, jacobian
from tests.layer_types import TYPES
from tests.layer_types import integer_case as layer_case
from tests.measure.records import without_time
from tests.models import CASE_NAMES, evaluated_case, integer_case
from tests.network.cut_modules import PAIRS, EnabledByTraining, StraightThroughInTraining, blocks, trained
from tests.networks import drawn, filled


class Counting(nn.Sequential):
    """Counts the passes through all of its copies."""

    passes = 0

    def forward(self, x):
        Counting.passes += 1
        return super().forward(x)


def passes_of(module, probe, settings, cache):
    before = Counting.passes
    measure(module, probe, settings, cache=cache)
    return Counting.passes - before


def small():
    return filled(Counting(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


@pytest.mark.parametrize("name", CASE_NAMES)
def test_ranks_of_later_measurements_are_exact(name):
    cache, settings = StructureCache(), Settings()
    for seed in range(3):
        case, (network, outputs) = integer_case(name, seed), evaluated_case(name, seed)
        record = measure(case.module, Probe(case.inputs), settings, cache=cache)
        gradients = jacobian(outputs)
        assert record.gradient_rank == exact_rank(gradients)
        for layer, columns in network.columns.items():
            assert record.layers[layer].gradient_rank == exact_rank(gradients[:, columns])


@pytest.mark.parametrize("name", PAIRS)
def test_a_module_that_evaluation_cuts_off_is_measured_as_at_first(name):
    cache, probe = StructureCache(), Probe(drawn(9, 3), drawn(9, 2))
    settings = Settings(loss_fn=nn.MSELoss())
    module = trained(PAIRS[name][0]())
    first = without_time(measure(module, probe, settings, cache=cache))
    assert without_time(measure(module, probe, settings, cache=cache)) == first
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    later = measure(module, probe, settings, cache=cache)
    assert without_time(later) == without_time(measure(module, probe, settings))


def test_a_later_measurement_passes_all_inputs_once_and_half_of_them_once():
    cache, probe = StructureCache(), Probe(drawn(6, 3))
    passes = [passes_of(small(), probe, Settings(hessian=False), cache) for _ in range(3)]
    assert passes[0] > 2
    assert passes[1:] == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda module, probe: (module[0].requires_grad_(requires_grad=False), probe),
        lambda module, probe: (module.append(nn.ReLU()), probe),
        lambda module, probe: (module.register_forward_pre_hook(lambda _, args: (2 * args[0],)), probe),
        lambda module, probe: (module, Probe(drawn(5, 3))),
    ],
    ids=["a frozen layer", "another layer", "a hook", "another number of inputs"],
)
def test_all_is_found_anew_after_a_change(change):
    cache, module, probe = StructureCache(), small(), Probe(drawn(6, 3))
    at_first = passes_of(module, probe, Settings(), cache)
    _, probe = change(module, probe)
    assert passes_of(module, probe, Settings(), cache) >= at_first
    assert passes_of(module, probe, Settings(), cache) == 2


# With a pass for each output, and a check of each layer by itself, it was 6571 and 22975 for the transformer.
@pytest.mark.parametrize(
    ("name", "layers", "num_operations", "num_waits"),
    [
        ("seed", [], 305, 6),
        ("seed", "all", 375, 8),
        ("mlp", "all", 950, 10),
        ("cnn", "all", 1400, 10),
        ("transformer", [], 1500, 25),
        ("transformer", "all", 4000, 25),
    ],
)
def test_a_later_measurement_asks_little_of_a_device(name, layers, num_operations, num_waits):
    workload, cache = RANKED[name], StructureCache()
    module, probe = workload.module(torch.float32), Probe(workload.probe(torch.float32))
    settings = Settings(layers=layers, spectrum=False, hessian=False)
    measure(module, probe, settings, cache=cache)
    with Dispatched() as dispatched:
        measure(module, probe, settings, cache=cache)
    assert dispatched.count <= num_operations
    assert dispatched.waits <= num_waits


class WrongSquare(torch.autograd.Function):
    """A square whose derivative forgets the factor 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(WrongSquare.apply(self.first(x)))


def test_a_wrong_derivative_is_found_each_time():
    cache, probe = StructureCache(), Probe(drawn(6, 3), drawn(6, 2))
    for _ in range(2):
        with pytest.warns(UserWarning, match="the derivatives of the module do not agree with differences"):
            record = measure(filled(Squared()), probe, Settings(loss_fn=nn.MSELoss()), cache=cache)
        assert record.hessian_nullity is None


def test_derivatives_are_compared_with_differences_once():
    cache, probe = StructureCache(), Probe(drawn(6, 3), drawn(6, 2))
    settings = Settings(loss_fn=nn.MSELoss(), hessian="bracket", layers=[])
    passes = [passes_of(small(), probe, settings, cache) for _ in range(3)]
    assert passes[0] > 2 * passes[1] == 2 * passes[2]


class Gated(nn.Module):
    """Adds the mean over the inputs, times a number that begins with zero."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x):
        h = self.linear(x)
        return h + self.gate * h.mean(0)


def test_inputs_that_begin_to_influence_each_other_are_refused_later_too():
    cache, module, probe = StructureCache(), filled(Gated()), Probe(drawn(6, 3))
    measure(module, probe, Settings(), cache=cache)
    module.gate.fill_(0.5)
    with pytest.raises(ValueError, match="each output must depend on its own input only"):
        measure(module, probe, Settings(), cache=cache)


class ComparesThree(nn.Module):
    """Compares each input with all others by a head, which two inputs alone do not reach."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        encoded = self.encoder(x)
        if len(x) < 3:
            return encoded
        projected = torch.nn.functional.normalize(self.head(encoded))
        return encoded + (projected @ projected.mT).softmax(1).max(1, keepdim=True).values


def test_inputs_that_are_compared_are_not_called_a_cut():
    settings = Settings(trained=("encoder.weight", "head.weight"))
    with pytest.raises(ValueError, match=r"must depend on its own input only.* Pass a behavior that returns"):
        measure(filled(ComparesThree()), Probe(drawn(9, 3)), settings)


def test_a_cut_that_zero_weights_hide_is_found_when_they_grow():
    # With a last layer of zeros, no gradient tells training, which passes a rounding by, from evaluation.
    cache, probe = StructureCache(), Probe(drawn(5, 3))
    module = trained(StraightThroughInTraining(*blocks()))
    last = [module for module in module.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
    measure(module, probe, Settings(), cache=cache)
    trained(module)
    later = measure(module, probe, Settings(), cache=cache)
    assert without_time(later) == without_time(measure(module, probe, Settings()))
    assert later.layers["first"].gradient_rank > 0


class Switched(nn.Module):
    """Takes no gradients in evaluation from some moment on."""

    is_cut = False

    def __init__(self):
        super().__init__()
        self.inside = EnabledByTraining(*blocks())

    def forward(self, x):
        return self.inside(x) if self.is_cut else self.inside.rest(self.inside.first(x))


def test_a_module_that_begins_to_cut_gradients_off_is_found_anew():
    cache, probe, module = StructureCache(), Probe(drawn(5, 3)), trained(Switched())
    assert measure(module, probe, Settings(), cache=cache).notes == ()
    module.is_cut = True
    record = measure(module, probe, Settings(), cache=cache)
    assert "are measured in training mode" in record.notes[0]
    assert without_time(record) == without_time(measure(module, probe, Settings()))


def test_outputs_that_become_infinite_are_refused_in_the_same_words():
    cache, module, probe = StructureCache(), small(), Probe(drawn(6, 3))
    measure(module, probe, Settings(), cache=cache)
    with torch.no_grad():
        module[2].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"outputs must be finite.*\['2.bias'\] of the module are not finite"):
        measure(module, probe, Settings(), cache=cache)


def test_a_measurement_in_chunks_stays_in_chunks():
    module = filled(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2)))
    cache, probe, settings = StructureCache(), Probe(drawn(48, 1, 16, 16)), Settings(memory_budget=16 * 2**20)
    assert check_measurable(module, probe, settings).chunk_size < 48
    first, second = (without_time(measure(module, probe, settings, cache=cache)) for _ in range(2))
    assert first == second == without_time(measure(module, probe, settings))


@pytest.mark.parametrize("name", TYPES)
def test_later_measurements_of_every_layer_type_are_exact(name):
    cache = StructureCache()
    for seed in range(2):
        case = layer_case(name, seed)
        record = measure(case.module, Probe(case.inputs), Settings(), cache=cache)
        assert record.gradient_rank == case.rank(case.jacobian)
