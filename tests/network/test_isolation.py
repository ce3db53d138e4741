import random
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.network.isolation import isolated_evaluation
from lightning_basin.network.replica import replicas
from tests.exact import exact_rank, jacobian
from tests.measure.records import KEPT, kept_behavior, without_time
from tests.models import evaluated_case, integer_case, sum_of_squares
from tests.network.replica.weights import CPU, THIRD
from tests.networks import built, drawn32


@contextmanager
def products_in_bfloat16(place):
    """As training may allow them."""
    if place == "matmul precision":  # As Lightning advises.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        yield
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision(before)
    else:
        part = {"everywhere": torch.backends, "matmul": mkldnn.matmul, "conv": mkldnn.conv}[place]
        before, part.fp32_precision = part.fp32_precision, "bf16"
        yield
        assert part.fp32_precision == "bf16"
        part.fp32_precision = before


@pytest.mark.parametrize("place", ["matmul precision", "everywhere", "matmul", "conv"])
def test_in_float32_products_are_multiplied_in_float32(place):
    left, right, kernel, images = (
        drawn32(*shape).float() for shape in [(64, 64), (64, 64), (8, 8, 3, 3), (2, 8, 6, 6)]
    )
    with products_in_bfloat16(place), isolated_evaluation(CPU, torch.float32):
        product, convolved = left @ right, F.conv2d(images, kernel)
    for found, exact in (
        (product, left.double() @ right.double()),
        (convolved, F.conv2d(images.double(), kernel.double())),
    ):
        # Some roundings of 1.2e-7, in sums of up to 72 products; those of bfloat16 are of 8e-3.
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


def global_states():
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.random.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "oneDNN": torch.backends.mkldnn.enabled,
        "NNPACK": torch._C._get_nnpack_enabled(),
        "products": torch.backends.fp32_precision,
        "math attention": torch.backends.cuda.math_sdp_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }


def disturb_global_states():
    random.random()
    np.random.rand()
    torch.rand(1)
    torch.set_default_dtype(torch.float16)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)


def disturb_and_raise():
    with isolated_evaluation(CPU):
        disturb_global_states()
        raise KeyError("in the middle")


SURROUNDINGS = {
    "nothing": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_every_global_state_is_put_back(name, dtype):
    with SURROUNDINGS[name]():
        before = global_states()
        with isolated_evaluation(CPU, dtype):
            disturb_global_states()
        assert global_states() == before


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_every_global_state_is_put_back_when_the_body_raises(name):
    with SURROUNDINGS[name]():
        before = global_states()
        with pytest.raises(KeyError, match="in the middle"):
            disturb_and_raise()
        assert global_states() == before


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_gradients_are_taken_whatever_surrounds_the_evaluation(name):
    with SURROUNDINGS[name](), isolated_evaluation(CPU):
        (replica,) = replicas(nn.Linear(1, 1))
        outputs = replica(torch.full((1, 1), 3.0, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(outputs.sum(), [replica.weight])
    assert gradient.tolist() == [[3.0]]
    assert gradient.dtype == torch.float64


def test_inside_all_switches_are_set_for_exact_derivatives():
    with torch.no_grad(), isolated_evaluation(CPU):
        states = global_states()
    names = ["grad", "inference", "anomaly", "fastpath", "autocast", "math attention", "flash attention"]
    assert [states[name] for name in names] == [True, False, False, False, False, True, False]


def test_a_fastpath_that_was_off_stays_off():
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with isolated_evaluation(CPU):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_a_compiled_function_runs_without_compilation():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    compiled = torch.compile(lambda x: 2 * x, backend=backend)
    with isolated_evaluation(CPU):
        assert compiled(THIRD).tolist() == (2 * THIRD).tolist()
    assert calls == []


class Stateful(nn.Module):
    """Changes itself, its buffers and every random state when it runs; raises if told to."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.cached: Tensor | None = None
        self.history: list[int] = []
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(len(x))
        random.random(), np.random.rand(), torch.rand(1)
        self.cached = self.drop(self.norm(self.inner(x)))
        if self.fails:
            raise KeyError("broken in the middle")
        return self.head(self.cached)


def ready_to_train(*, fails: bool = False) -> Stateful:
    """A module in the middle of training: mixed train flags, some gradients, a hook."""
    module = built(lambda: Stateful(fails=fails))
    module.train()
    module.norm.eval()
    module.inner.weight.grad = torch.ones_like(module.inner.weight)
    module.head.register_forward_hook(lambda *_: None)
    return module


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a measurement might disturb, as comparable values."""
    return {
        "tensors": {name: tensor.tolist() for name, tensor in module.state_dict(keep_vars=True).items()},
        "identities": [id(tensor) for tensor in (*module.parameters(), *module.buffers())],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()],
        "requires": [p.requires_grad for p in module.parameters()],
        "training": [part.training for part in module.modules()],
        "hooks": [
            [list(vars(part)[hooks]) for hooks in vars(part) if hooks.endswith("_hooks")] for part in module.modules()
        ],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "history": list(module.history),
        "cached": module.cached,
    }


def random_states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_module_is_left_as_it_was():
    module = ready_to_train()
    before = state_of(module)
    measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=sum_of_squares)
    assert state_of(module) == before


def test_random_states_are_left_as_they_were():
    module = ready_to_train()
    before = random_states()
    measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=sum_of_squares)
    assert random_states() == before


def test_module_and_random_states_are_left_as_they_were_when_forward_raises():
    module = ready_to_train(fails=True)
    before = state_of(module), random_states()
    with pytest.raises(ValueError, match="KeyError: 'broken in the middle'"):
        measure_basin(module, drawn32(6, 3))
    assert (state_of(module), random_states()) == before


def test_module_and_random_states_are_left_as_they_were_when_the_loss_raises():
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        torch.rand(1)
        raise KeyError("broken loss")

    module = ready_to_train()
    before = state_of(module), random_states()
    with pytest.raises(TypeError, match="KeyError: 'broken loss'"):
        measure_basin(module, drawn32(6, 3), drawn32(6, 2), loss_fn=broken)
    assert (state_of(module), random_states()) == before


def test_global_modes_are_left_as_they_were_when_forward_raises():
    with torch.no_grad(), pytest.raises(ValueError, match="broken in the middle"):
        measure_basin(ready_to_train(fails=True), drawn32(6, 3))
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_measurement_works_where_gradients_are_off_and_leaves_them_off(mode):
    case = integer_case("mlp", 0)
    with mode():
        record = measure_basin(case.module, case.inputs)
        assert not torch.is_grad_enabled()
    assert record.gradient_rank == exact_rank(jacobian(evaluated_case("mlp", 0)[1]))


def test_inputs_and_targets_are_left_as_they_were():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            return self.inner(x)

    inputs, targets = drawn32(6, 3), drawn32(6, 2, seed=1)
    inputs_before, targets_before = inputs.clone(), targets.clone()
    with suppress(ValueError):  # Refusing such a module is fine too; writing to the caller's tensors is not.
        measure_basin(built(InPlace), inputs, targets, loss_fn=sum_of_squares)
    assert torch.equal(inputs, inputs_before)
    assert torch.equal(targets, targets_before)


def test_training_module_is_measured_in_evaluation_mode():
    module = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2)))
    inputs = drawn32(6, 3)
    training = measure_basin(module.train(), inputs)
    assert without_time(training) == without_time(measure_basin(module.eval(), inputs))


def test_a_module_can_run_again_after_a_measurement(monkeypatch):
    module = nn.Linear(3, 2, dtype=torch.float64)
    monkeypatch.setitem(KEPT, "module", module)
    with pytest.raises(ValueError, match="the module itself is run"):
        measure_basin(module, drawn32(5, 3).double(), behavior=kept_behavior)
    assert module(drawn32(5, 3).double()).shape == (5, 2)
