from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_basin import measure_basin
from tests.networks import built, drawn32


class Returns(nn.Module):
    """Calls a function on the outputs of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


def frozen_linear() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (frozen_linear, ValueError, "must have at least one trainable parameter, got Linear with none"),
        (nn.Tanh, ValueError, "must have at least one trainable parameter, got Tanh with none"),
        (lambda: nn.LazyLinear(2), ValueError, "has no shape yet: run one forward pass"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, "trainable parameters must be real"),
        (lambda: Returns(lambda h: (h, h)), TypeError, "outputs must be a tensor, got tuple"),
        (lambda: Returns(lambda h: {"logits": h}), TypeError, "outputs must be a tensor, got dict"),
        (lambda: Returns(lambda h: h.argmax(1)), TypeError, "outputs must be floating point numbers, got torch.int64"),
        (lambda: Returns(lambda h: h.mean()), ValueError, r"one row for each of the 4 inputs, got shape \(\)"),
        (lambda: Returns(lambda h: h[1:]), ValueError, r"one row for each of the 4 inputs, got shape \(3, 2\)"),
        (lambda: Returns(lambda h: h / 0.0 * 0.0), ValueError, "outputs must be finite, .* on 4 of the 4 inputs"),
        (lambda: Returns(lambda h: h + torch.rand(2)), ValueError, "two evaluations differ: .* draws random"),
        (lambda: Returns(lambda h: h - h.mean(0)), ValueError, "each output must depend on its own input only"),
        (lambda: Returns(lambda h: h.cumsum(0)), ValueError, "each output must depend on its own input only"),
        (lambda: nn.Linear(3, 2), ValueError, "calling the module on the inputs failed with RuntimeError"),
    ],
    ids=[
        "all frozen",
        "no parameters",
        "lazy",
        "complex",
        "tuple",
        "dict",
        "integers",
        "mean over inputs",
        "too few rows",
        "not finite",
        "random",
        "centred over inputs",
        "summed over inputs",
        "wrong width",
    ],
)
def test_module_that_cannot_be_measured_is_refused(build, error, message):
    module = built(build)
    with pytest.raises(error, match=message):
        measure_basin(module, drawn32(4, 2))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(0, 2), ValueError, "at least one input, got an empty batch"),
        (torch.tensor(1.0), ValueError, "must have the inputs along their first axis"),
        ((torch.zeros(3, 2), torch.zeros(4, 2)), ValueError, r"in the same number, got shapes \[\(3, 2\), \(4, 2\)\]"),
        ([1.0, 2.0], TypeError, "must be a tensor or a tuple, list or dict with tensors"),
        (np.zeros((3, 2)), TypeError, "got ndarray"),
    ],
    ids=["empty", "scalar", "unequal", "plain list", "numpy"],
)
def test_inputs_that_are_no_probe_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(2, 2), inputs)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda f, y: (f - y).square(), TypeError, r"one floating point number as a tensor, got a tensor of shape"),
        (lambda f, y: 0.5, TypeError, "one floating point number as a tensor, got float"),
        (lambda f, y: (f - y).sum() * float("nan"), ValueError, "loss on the probe must be finite, got nan"),
        (lambda f, y: (f @ y).sum(), TypeError, r"loss_fn must take the outputs, shape \(4, 2\), .* RuntimeError"),
    ],
    ids=["vector", "float", "nan", "raises"],
)
def test_loss_that_is_no_finite_number_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        measure_basin(nn.Linear(2, 2), drawn32(4, 2), drawn32(4, 2), loss_fn=loss_fn)


def test_nan_in_one_input_names_how_many_inputs_are_wrong():
    inputs = drawn32(4, 2)
    inputs[2, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite on 1 of the 4 inputs"):
        measure_basin(nn.Linear(2, 2), inputs)


def test_too_many_outputs_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="pass max_outputs"):
        measure_basin(nn.Linear(2, 1000), drawn32(100, 2))
    assert measure_basin(nn.Linear(2, 1000), drawn32(100, 2), max_outputs=3).gradient_rank == 9


def test_a_scripted_module_is_refused():
    with pytest.raises(TypeError, match="holds a scripted module"):
        measure_basin(nn.Sequential(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))), drawn32(4, 3))


def test_inputs_without_numbers_are_refused():
    with pytest.raises(ValueError, match="inputs must hold numbers to be measured"):
        measure_basin(nn.Linear(4, 2), torch.ones(5, 4, device="meta"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_module_without_outputs_is_refused():
    with pytest.raises(ValueError, match=r"outputs must hold at least one number per input, got shape \(5, 0\)"):
        measure_basin(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 0)), torch.ones(5, 4))
