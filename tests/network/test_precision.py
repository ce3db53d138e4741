import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_basin import measure_basin
from lightning_basin.network.precision import RaisedPrecision

THIRD = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)


REQUESTS = {
    "float()": lambda x: x.float(),
    "half()": lambda x: x.half(),
    "bfloat16()": lambda x: x.bfloat16(),
    "to(dtype)": lambda x: x.to(torch.float32),
    "to(device, dtype)": lambda x: x.to("cpu", torch.float16),
    "to(dtype=)": lambda x: x.to(dtype=torch.bfloat16),
    "type(dtype)": lambda x: x.type(torch.float32),
    "type(name)": lambda x: x.type("torch.FloatTensor"),
    "type(class)": lambda x: x.type(torch.FloatTensor),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float32)),
    "softmax": lambda x: x.softmax(0, dtype=torch.float32),
    "functional.softmax": lambda x: F.softmax(x, 0, dtype=torch.float32),
    "sum": lambda x: torch.sum(x, dtype=torch.float32),
    "torch.zeros": lambda x: torch.zeros(2, dtype=torch.float32) + x,
    "torch.tensor": lambda x: torch.tensor([0.1], dtype=torch.float32),
    "torch.full": lambda x: torch.full((2,), 0.1, dtype=torch.float16),
    "torch.arange": lambda x: torch.arange(3, dtype=torch.float32),
    "torch.empty_like": lambda x: torch.zeros_like(x, dtype=torch.float32),
    "new_zeros": lambda x: x.new_zeros(2, dtype=torch.float32),
    "a module": lambda x: nn.Linear(2, 1, dtype=torch.float32)(x),
    "module.float()": lambda x: nn.Linear(2, 1).float()(x),
    "the default dtype": lambda x: torch.zeros(2),
    "the default dtype, given as None": lambda x: torch.ones(2, dtype=None),
    "tensor": lambda x: torch.tensor([1 / 3, 2 / 3]),
    "as_tensor": lambda x: torch.as_tensor(1 / 3),
    "new_tensor": lambda x: x.new_tensor([1 / 3]),
    "full": lambda x: torch.full((2,), 1 / 3),
    "arange": lambda x: torch.arange(0.0, 1.0, 1 / 3),
    "linspace": lambda x: torch.linspace(0, 1, 4),
    "eye": lambda x: torch.eye(2),
    "empty": lambda x: torch.empty(2),
    "rand": lambda x: torch.rand(2),
    "randn": lambda x: torch.randn(2),
    "normal": lambda x: torch.normal(0.0, 1.0, (2,)),
    "hann_window": lambda x: torch.hann_window(4),
    "integers divided": lambda x: torch.arange(3) / 3,
    "integers times a number": lambda x: (1 / 3) * torch.ones(2, dtype=torch.int64),
    "a function of integers": lambda x: torch.arange(3).exp(),
    "where": lambda x: torch.where(x > 0.5, 1.0, 0.0),
    "a module of default dtype": lambda x: nn.Linear(2, 1)(x),
    "a NumPy array": lambda x: torch.tensor(np.ones(2, dtype=np.float32)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_for_a_lower_precision_is_answered_in_float64(name):
    with RaisedPrecision(torch.float64):
        assert REQUESTS[name](THIRD).dtype == torch.float64


THIRDS = ["tensor", "as_tensor", "new_tensor", "full", "linspace", "integers divided", "integers times a number"]


@pytest.mark.parametrize("name", THIRDS)
def test_a_third_made_without_a_dtype_has_every_digit(name):
    with RaisedPrecision(torch.float64):
        assert 1 / 3 in REQUESTS[name](THIRD).flatten().tolist()


def test_the_default_dtype_of_the_process_stays_for_other_threads():
    made = []
    with RaisedPrecision(torch.float64):
        thread = threading.Thread(target=lambda: made.append(torch.tensor([0.1])))
        thread.start()
        thread.join()
    assert [tensor.dtype for tensor in made] == [torch.float32]


def test_random_numbers_are_drawn_once():
    with RaisedPrecision(torch.float64):
        torch.manual_seed(0)
        drawn = [torch.rand(2), torch.randn(2), torch.normal(0.0, 1.0, (2,))]
        torch.manual_seed(0)
        options = {"dtype": torch.float64}
        again = [torch.rand(2, **options), torch.randn(2, **options), torch.normal(0.0, 1.0, (2,), **options)]
    assert all(torch.equal(*pair) for pair in zip(drawn, again, strict=True))


@pytest.mark.parametrize("name", ["float()", "to(dtype)", "to(dtype=)", "type(dtype)", "type_as"])
def test_a_cast_to_a_lower_precision_keeps_every_digit(name):
    with RaisedPrecision(torch.float64):
        assert torch.equal(REQUESTS[name](THIRD), THIRD)


@pytest.mark.parametrize("name", REQUESTS)
def test_in_float32_a_request_for_a_lower_precision_is_answered_in_float32(name):
    with RaisedPrecision(torch.float32):
        assert REQUESTS[name](THIRD.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["half()", "bfloat16()", "to(device, dtype)", "to(dtype=)"])
def test_in_float32_a_cast_to_a_lower_precision_keeps_every_digit(name):
    with RaisedPrecision(torch.float32):
        assert torch.equal(REQUESTS[name](THIRD.float()), THIRD.float())


def test_in_float32_what_a_module_computes_in_float64_stays_so():
    with RaisedPrecision(torch.float32):
        assert torch.equal(THIRD.float().double() / 3, THIRD.float().to(torch.float64) / 3)
        assert THIRD.float().double().dtype == torch.zeros(1, dtype=torch.float64).dtype == torch.float64


def test_in_float32_autocast_inside_of_the_forward_does_not_lower_the_precision():
    with RaisedPrecision(torch.float32), torch.autocast("cpu", dtype=torch.bfloat16):
        product = nn.functional.linear(THIRD.float(), THIRD.float().unsqueeze(0))
        assert product.dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["to(complex64)", "cfloat()"])
def test_a_request_for_low_precision_complex_numbers_is_answered_in_complex128(name):
    request = {"to(complex64)": lambda x: x.to(torch.complex64), "cfloat()": lambda x: x.cfloat()}[name]
    with RaisedPrecision(torch.float64):
        assert request(THIRD).dtype == torch.complex128


def test_requests_for_integers_are_left_alone():
    with RaisedPrecision(torch.float64):
        assert THIRD.to(torch.int64).dtype == torch.int64


def test_autocast_inside_of_the_forward_does_not_lower_the_precision():
    with RaisedPrecision(torch.float64), torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(THIRD, THIRD.unsqueeze(0)).dtype == torch.float64


def test_one_inside_of_another_changes_nothing():
    with RaisedPrecision(torch.float64), RaisedPrecision(torch.float64):
        assert {REQUESTS[name](THIRD).dtype for name in REQUESTS} == {torch.float64}


class Recording(nn.Module):
    """Notes the precision of what is made by default wherever code of its own runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.dtypes = {}

    def note(self, place):
        self.dtypes.setdefault(place, set()).add(torch.tensor([0.1]).dtype)

    def __deepcopy__(self, memo):
        made = Recording()
        made.linear = copy.deepcopy(self.linear, memo)
        made.dtypes = self.dtypes
        made.note("copying")
        return made

    def train(self, mode=True):  # noqa: FBT002  # as in torch
        self.note("eval")
        return super().train(mode)

    def forward(self, inputs):
        self.note("forward")
        return self.linear(inputs)

    def loss(self, outputs, targets):
        self.note("loss")
        return (outputs - targets).square().mean()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_code_of_the_user_runs_in_the_precision_of_the_evaluation_wherever_it_is(dtype):
    module, inputs, targets = Recording(), torch.randn(6, 2), torch.randn(6, 1)
    module.dtypes.clear()

    def behavior(part, inputs):
        part.note("behavior")
        return part(inputs)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        measure_basin(module, inputs, targets, loss_fn=module.loss, behavior=behavior, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    expected = {getattr(torch, dtype)}
    assert module.dtypes == dict.fromkeys(["copying", "eval", "behavior", "forward", "loss"], expected)


def test_a_quantized_constant_is_read_in_the_precision_of_the_evaluation():
    scale = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 0, torch.qint8)
    with RaisedPrecision(torch.float64):
        assert torch.equal(scale.dequantize(), torch.tensor([1.0, 2.0], dtype=torch.float64))
