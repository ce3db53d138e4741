import copy
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils.data import DataLoader

from lightning_basin import measure_basin
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.precision import RaisedPrecision
from lightning_basin.network.replica import replicas
from tests.network.replica.weights import CPU, THIRD, filled
from tests.networks import Composed, drawn32
from tests.training import timeless


class Bookkeeping(nn.Module):
    """Changes everything it can when it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.history = []
        self.cache = {"outputs": [torch.zeros(1)]}
        self.plain = torch.zeros(2)

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.plain += 1
        self.cache["outputs"][0] += 1
        self.cache["new"] = x
        self.history.append(x)
        return self.linear(x)


def test_a_forward_pass_of_the_replica_changes_nothing_in_the_original():
    module = Bookkeeping()
    (replica,) = replicas(module)
    replica(torch.ones(1, 2, dtype=torch.float64))
    assert (module.calls, module.history, set(module.cache)) == (0, [], {"outputs"})
    assert (float(module.seen), module.plain.tolist(), module.cache["outputs"][0].tolist()) == (0.0, [0.0, 0.0], [0.0])


def test_tensors_that_are_no_parameters_follow_into_float64():
    (replica,) = replicas(Bookkeeping())
    dtypes = [replica.seen.dtype, replica.plain.dtype, replica.cache["outputs"][0].dtype]
    assert dtypes == [torch.float64] * 3


def test_integers_stay_integers():
    module = nn.BatchNorm1d(2)
    (replica,) = replicas(module)
    assert (replica.num_batches_tracked.dtype, replica.running_mean.dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_numbers_of_the_weights_are_the_same(dtype):
    module = filled(nn.Linear(3, 2).to(dtype))
    (replica,) = replicas(module)
    assert replica.weight.dtype == torch.float64
    assert replica.weight.tolist() == module.weight.tolist()


def test_the_original_keeps_its_mode_and_the_replica_evaluates():
    module = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    (replica,) = replicas(module)
    assert [part.training for part in module.modules()] == [True] * 3
    assert [part.training for part in replica.modules()] == [False] * 3


def test_no_parameter_shares_memory_with_the_original():
    module = nn.Linear(2, 2).double()
    (replica,) = replicas(module)
    assert {p.data_ptr() for p in replica.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())


def test_gradients_of_the_original_are_not_copied_and_not_touched():
    module = nn.Linear(1, 1)
    module.weight.grad = torch.ones(1, 1)
    (replica,) = replicas(module)
    assert replica.weight.grad is None
    replica(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    assert module.weight.grad.tolist() == [[1.0]]
    assert module.bias.grad is None


def test_frozen_parameters_stay_frozen():
    module = nn.Linear(1, 1)
    module.bias.requires_grad_(requires_grad=False)
    (replica,) = replicas(module)
    assert (replica.weight.requires_grad, replica.bias.requires_grad) == (True, False)


def test_tied_parameters_stay_tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    (replica,) = replicas(module)
    assert replica[1].weight is replica[0].weight


def test_a_module_used_twice_is_copied_once():
    part = nn.Linear(2, 2)
    (replica,) = replicas(nn.Sequential(part, part))
    assert replica[0] is replica[1]


class WithMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.calls = 0

    def loss(self, outputs, targets):
        self.calls += 1
        return (outputs - targets).sum()


def test_methods_of_the_module_follow_the_copy():
    module = WithMethods()
    replica, loss = replicas(module, module.loss)
    loss(torch.ones(1), torch.ones(1))
    assert loss.__self__ is replica
    assert module.calls == 0


def test_a_partial_method_of_the_module_follows_the_copy():
    module = WithMethods()
    _, loss = replicas(module, partial(module.loss, targets=torch.ones(1)))
    loss(torch.ones(1))
    assert module.calls == 0


def test_methods_of_a_submodule_follow_the_copy():
    module = nn.ModuleDict({"part": WithMethods()})
    replica, loss = replicas(module, module["part"].loss)
    assert loss.__self__ is replica["part"]


def test_a_loss_module_is_copied_into_float64():
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3))
    _, copied = replicas(nn.Linear(1, 1), loss_fn)
    assert (copied.weight.dtype, loss_fn.weight.dtype) == (torch.float64, torch.float32)


def test_a_loss_that_is_a_part_of_the_module_is_the_part_of_the_copy():
    module = nn.Module()
    module.loss_fn = nn.MSELoss()
    module.linear = nn.Linear(1, 1)
    replica, loss_fn = replicas(module, module.loss_fn)
    assert loss_fn is replica.loss_fn


def test_plain_functions_and_none_stay():
    _, function, nothing = replicas(nn.Linear(1, 1), F.mse_loss, None)
    assert function is F.mse_loss
    assert nothing is None


def uncopyable(kind, folder):
    return threading.Lock() if kind == "lock" else (folder / "log").open("w")


@pytest.mark.parametrize("kind", ["lock", "open file"])
def test_an_attribute_that_cannot_be_copied_is_shared(kind, tmp_path):
    module = Bookkeeping()
    module.handle = uncopyable(kind, tmp_path)
    (replica,) = replicas(module)
    assert replica.handle is module.handle
    replica(torch.ones(1, 2, dtype=torch.float64))
    assert (module.calls, module.history, module.plain.tolist()) == (0, [], [0.0, 0.0])


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_a_copy_takes_no_item_of_an_iterator_that_the_original_goes_on_with(workers):
    module, numbers = nn.Linear(1, 1), [torch.tensor(float(number)) for number in range(3)]
    module.numbers = (
        (number for number in numbers)
        if workers is None
        else iter(DataLoader(numbers, batch_size=None, num_workers=workers))
    )
    (replica,) = replicas(module)
    with pytest.raises(TypeError, match="an iterator that training goes on with"):
        next(replica.numbers)
    assert next(module.numbers) == 0.0


def test_an_attribute_of_a_part_that_cannot_be_copied_is_shared():
    module = nn.Sequential(Bookkeeping(), nn.Linear(2, 2))
    module[0].lock = threading.Lock()
    (replica,) = replicas(module)
    assert replica[0].lock is module[0].lock
    assert replica[0].linear.weight.dtype == torch.float64


def test_a_cached_activation_that_carries_a_graph_is_copied():
    module = nn.Linear(2, 2)
    module.cached = module(torch.ones(1, 2))
    module.by_name = {"last": [module(torch.ones(1, 2))]}
    (replica,) = replicas(module)
    assert replica.cached.dtype == replica.by_name["last"][0].dtype == torch.float64
    assert replica.cached.tolist() == module.cached.tolist()
    assert replica.cached is not module.cached


def with_old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 2))


SPECIAL_MODULES = {
    "weight_norm": (with_old_weight_norm, (4, 3)),
    "parametrized weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), (4, 3)),
    "parametrized spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), (4, 3)),
    "LSTM": (lambda: nn.Sequential(nn.LSTM(3, 2, batch_first=True)), (4, 5, 3)),
    "GRU": (lambda: nn.Sequential(nn.GRU(3, 2, num_layers=2, bidirectional=True)), (4, 5, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), (4, 3)),
}


def first_tensor(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.mark.parametrize("name", SPECIAL_MODULES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_replica_computes_the_same_function_in_float64(name):
    build, shape = SPECIAL_MODULES[name]
    module = filled(build())
    inputs = drawn32(*shape)
    module.train()
    first_tensor(module(inputs))  # Old normalisations set their weight in a forward pass.
    module.eval()
    expected = first_tensor(module(inputs)).detach()
    (replica,) = replicas(module)
    with isolated_evaluation(CPU):
        found = first_tensor(replica(inputs.double()))
    assert found.dtype == torch.float64
    # The float32 evaluation is the one with rounding: a few hundred operations of numbers near 1.
    torch.testing.assert_close(found.detach(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECIAL_MODULES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_outputs_of_the_replica_depend_on_its_own_parameters(name):
    build, shape = SPECIAL_MODULES[name]
    (replica,) = replicas(filled(build()))
    with isolated_evaluation(CPU):
        outputs = first_tensor(replica(drawn32(*shape).double()))
        gradients = torch.autograd.grad(outputs.square().sum(), list(replica.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float64}


def test_a_compiled_part_is_replaced_by_its_original():
    module = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    (replica,) = replicas(module)
    assert type(replica[1]) is nn.Linear
    assert list(dict(replica.named_parameters())) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_compiled_module_is_replaced_by_its_original():
    (replica,) = replicas(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert type(replica) is nn.Linear
    assert replica.weight.dtype == torch.float64


def test_a_module_compiled_in_place_runs_its_copy():
    module = filled(nn.Linear(1, 1))
    module.compile(backend="eager")
    (replica,) = replicas(module)
    with torch.no_grad():
        replica.weight.fill_(3.0)
        replica.bias.fill_(0.0)
    assert replica(torch.ones(1, 1, dtype=torch.float64)).tolist() == [[3.0]]


class CompiledForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = filled(nn.Linear(1, 1))
        self.forward = torch.compile(self.forward, backend="eager")

    def forward(self, inputs):
        return self.layer(inputs)


def test_a_compiled_method_of_the_replica_is_its_own():
    module = nn.Sequential(CompiledForward())
    (replica,) = replicas(module)
    inputs = torch.full((1, 1), 3.0, dtype=torch.float64)
    outputs = replica(inputs)
    (gradient,) = torch.autograd.grad(outputs.sum(), [replica[0].layer.weight])
    assert (outputs.dtype, gradient.item()) == (torch.float64, 3.0)


def test_a_lazy_module_is_refused():
    with pytest.raises(ValueError, match="parameter 'weight' has no shape yet: run one forward pass"):
        replicas(nn.Sequential(nn.LazyLinear(2)))


def test_trainable_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="trainable parameters must be real, but 'weight' is complex"):
        replicas(nn.Linear(1, 1, dtype=torch.complex64))


def test_parameters_made_in_inference_mode_become_trainable_in_the_replica():
    with torch.inference_mode():
        module = nn.Linear(1, 1)
    with isolated_evaluation(CPU):
        (replica,) = replicas(module)
        replica(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    assert replica.weight.grad.tolist() == [[1.0]]


def test_copies_in_float32():
    module = nn.Sequential(
        nn.BatchNorm1d(2), nn.Linear(2, 1, dtype=torch.float64), nn.Linear(1, 1, dtype=torch.float16)
    )
    (replica,) = replicas(module, dtype=torch.float32)
    assert {tensor.dtype for tensor in replica.state_dict().values()} == {torch.float32, torch.int64}
    assert replica[1].weight.tolist() == module[1].weight.float().tolist()
    assert replica[2].weight.tolist() == module[2].weight.tolist()


def test_a_forward_that_asks_for_float32_by_name_has_float64_gradients():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0]))

        def forward(self, x):
            return (self.scale * x).float().softmax(-1, dtype=torch.float32) + torch.zeros(2, dtype=torch.float32)

    with isolated_evaluation(CPU), RaisedPrecision(torch.float64):
        (replica,) = replicas(Named())
        outputs = replica(THIRD.unsqueeze(0))
        (gradient,) = torch.autograd.grad(outputs[0, 0], [replica.scale])
    # p = sigmoid((1/3 - 2/3) s), dp/ds = -p (1 - p) / 3 at s = 1: to float64, not to float32.
    p = 1 / (1 + np.exp(1 / 3))
    torch.testing.assert_close(gradient.item(), -p * (1 - p) / 3, rtol=1e-14, atol=0.0)


def test_the_replica_can_be_deep_copied_again():
    (replica,) = replicas(Bookkeeping())
    assert copy.deepcopy(replica).linear.weight.tolist() == replica.linear.weight.tolist()


class Checkpointed(nn.Module):
    """Two layers, the first of which is run again in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def hidden(self, x):
        return self.first(x).float().tanh() * torch.ones(4)

    def forward(self, x):
        if self.use_reentrant is None:
            hidden = self.hidden(x)
        else:
            hidden = checkpoint.checkpoint(self.hidden, x, use_reentrant=self.use_reentrant)
        return self.second(hidden)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_modules_measure_as_plain_ones(use_reentrant):
    plain, checkpointed = Checkpointed(None), Checkpointed(use_reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    inputs, targets = torch.randn(5, 3), torch.randn(5, 2)
    records = [measure_basin(m, inputs, targets, loss_fn=nn.MSELoss()) for m in (plain, checkpointed)]
    first, second = timeless(records)
    assert first.to_dict() == second.to_dict()
    # And training still checkpoints: its function is back in place.
    assert checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"


KEPT = {
    "a view": (lambda m: setattr(m, "tied", m.first.weight.t()), lambda m, x: m.first(x).relu() @ m.tied.T, "tied"),
    "in a dict": (
        lambda m: setattr(m, "cut", {"half": [m.first.weight[:2]]}),
        lambda m, x: m.second(m.first(x).tanh()) + nn.functional.linear(x, m.cut["half"][0]),
        "cut",
    ),
    "scaled": (lambda m: setattr(m, "scaled", 2 * m.second.weight), lambda m, x: m.first(x) @ m.scaled.T, "scaled"),
    "a buffer": (lambda m: m.register_buffer("mean", m.first.weight.mean()), lambda m, x: m.first(x) * m.mean, "mean"),
}


@pytest.mark.parametrize(("keep", "function", "name"), KEPT.values(), ids=KEPT)
def test_what_was_computed_from_parameters_before_and_is_used_is_refused_by_its_name(keep, function, name):
    # A copy of it leads to no parameter: the rank would be too small.
    module = Composed(function, first=nn.Linear(3, 3), second=nn.Linear(3, 2))
    keep(module)
    with pytest.raises(ValueError, match=rf"uses tensors from before, as \['{name}'\]: compute them in forward"):
        measure_basin(module, torch.randn(5, 3))


@pytest.mark.parametrize(("keep", "function", "name"), KEPT.values(), ids=KEPT)
def test_what_was_computed_from_parameters_before_is_of_no_account_where_it_is_made_anew(keep, function, name):
    def anew(m, x):
        keep(m)
        return function(m, x)

    module = Composed(anew, first=nn.Linear(3, 3), second=nn.Linear(3, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    parameters = list(module.parameters())
    rows = [
        torch.cat([part.flatten() for part in grad(number, parameters, retain_graph=True, materialize_grads=True)])
        for number in module(inputs).flatten()
    ]
    assert hasattr(module, name)  # The user's module keeps it too.
    assert measure_basin(module, inputs).gradient_rank == int(torch.linalg.matrix_rank(torch.stack(rows)))


def test_a_tensor_on_the_meta_device_and_a_lazy_buffer_are_refused_by_their_names():
    with pytest.raises(ValueError, match=r"but \['weight', 'bias'\] are on the device 'meta': load them"):
        measure_basin(nn.Linear(3, 2, device="meta"), torch.randn(5, 3))
    module = nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ValueError, match="buffer 'running_mean' has no shape yet: run one forward pass"):
        measure_basin(module, torch.randn(5, 3))
    module(torch.randn(5, 3))
    assert measure_basin(module, torch.randn(5, 3)).gradient_rank > 0


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_cache_of_parametrizations_is_neither_read_nor_filled(is_filled):
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    inputs = torch.randn(5, 3)
    with nn.utils.parametrize.cached():
        before = module.weight if is_filled else None
        assert measure_basin(module, inputs).gradient_rank == 8
        assert module.weight.dtype == torch.float32
        assert module.weight.requires_grad
        assert before is None or module.weight is before
