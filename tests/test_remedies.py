"""Messages name the cause, and the remedy that helps."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import measure_basin
from tests.networks import Composed, drawn

LONG = torch.zeros(5, 3, dtype=torch.long)


class Headless(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x, mask):
        return self.net(x) * mask


class Single(nn.Module):
    """An operation for float32 only, as kernels of one's own are."""

    def __init__(self, *, keeps=False):
        super().__init__()
        self.net, self.keeps = nn.Linear(3, 2), keeps
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found Double")
        if self.keeps:
            self.seen += 1
        return self.net(x) + self.seen


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Headless(), torch.ones(5, 3), "it has no forward: pass behavior=.* as training_step does"),
        (Two(), torch.ones(5, 3), "missing 1 required positional argument: 'mask'; pass all that forward takes"),
        (nn.Linear(4, 2), torch.ones(5, 3), r"got float64 \\(5, 3\\): bring the inputs into the shape"),
        (nn.Conv2d(3, 2, 2), torch.ones(5, 2, 4, 4), "bring the inputs into the shape"),
        (nn.Linear(3, 2), LONG, r"got int64 \\(5, 3\\): convert the inputs to the type"),
        (nn.Embedding(3, 2), torch.zeros(5), "convert the inputs to the type"),
        (Single(), torch.ones(5, 3), "float32 only is measured with dtype='float32'"),
        (Single(keeps=True), torch.ones(5, 3), "neither float64 nor float32 runs Single: two evaluations differ"),
    ],
    ids=["no forward", "missing argument", "shape", "channels", "integers", "floats", "float32", "neither"],
)
def test_a_module_that_cannot_be_called_is_refused_with_what_helps(module, inputs, message):
    with pytest.raises(ValueError, match=message.replace("\\\\", "\\")):
        measure_basin(module, inputs)


def test_what_the_message_proposes_helps():
    assert measure_basin(Single(), drawn(5, 3).float(), dtype="float32").gradient_rank == 8


def rooted(m, x):
    h = m.first(x)
    return m.last(torch.where(h > 0, h.sqrt(), torch.zeros_like(h)))


@pytest.mark.parametrize("memory_budget", [None, 700_000])
def test_gradients_that_are_not_finite_are_refused_with_layers_and_inputs(memory_budget):
    # The square root of what is below zero is not taken, and its derivative is NaN all the same.
    module = Composed(rooted, first=nn.Linear(2, 2), last=nn.Linear(2, 1)).double()
    with torch.no_grad():
        module.first.weight.copy_(torch.eye(2))
        module.first.bias.zero_()
    inputs = drawn(9, 2).abs() + 0.1
    inputs[3, 0] = inputs[6, 1] = -1.0
    message = (
        r"in the layers \['first'\] on 2 of the 9 inputs, the first of them input 3, although all outputs are finite"
    )
    with pytest.raises(ValueError, match=message):
        measure_basin(module, inputs, memory_budget=memory_budget)


def test_attention_over_a_set_that_is_all_padding_is_refused_with_its_input():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, padding):
            attended, _ = self.attention(x, x, x, key_padding_mask=padding)
            return self.last(attended.masked_fill(padding[..., None], 0.0).mean(1))

    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[2] = True
    with pytest.raises(ValueError, match="on 1 of the 6 inputs, the first of them input 2"):
        measure_basin(Masked(), (drawn(6, 5, 4), padding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(5, 3), nn.Linear(3, 2)), "got Tensor: pass the module first, then the inputs"),
        ((nn.Linear, torch.ones(5, 3)), "got the class Linear: pass an instance of it"),
        ((lambda x: x, torch.ones(5, 3)), "module must be a torch.nn.Module, got function"),
        ((nn.Linear(3, 2), torch.ones(5, 3), nn.MSELoss()), "targets must be data, got MSELoss.*: pass loss_fn="),
        (
            (nn.Linear(3, 2), DataLoader(TensorDataset(torch.ones(5, 3)))),
            "inputs must be a batch, got DataLoader: pass",
        ),
        ((nn.Linear(3, 2), np.ones((5, 3))), r"got ndarray: pass torch.as_tensor\(inputs\)"),
        ((nn.Linear(3, 2), [[1.0, 2.0, 3.0]]), r"got list: pass torch.as_tensor\(inputs\)"),
    ],
    ids=["swapped", "class", "function", "loss as targets", "loader", "NumPy", "list of numbers"],
)
def test_arguments_in_another_order_are_refused_with_what_to_pass(arguments, message):
    with pytest.raises(TypeError, match=message):
        measure_basin(*arguments)


def test_a_pair_as_inputs_is_asked_about_where_targets_are_missing():
    with pytest.raises(ValueError, match="inputs is a pair: if it is one of inputs and targets, pass these apart"):
        measure_basin(nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2)), loss_fn=nn.MSELoss())


def test_sparse_outputs_are_refused_with_what_helps():
    module = Composed(lambda m, x: m.net(x).to_sparse(), net=nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"must be dense, got torch.sparse_coo: pass a behavior .*to_dense"):
        measure_basin(module, drawn(5, 3))


@pytest.mark.parametrize("hessian", ["bracket", "dense"])
def test_second_derivatives_that_are_not_finite_leave_the_hessian_out_with_their_layer(hessian):
    # |h|^1.5 has the slope 0 at 0, and an infinite second derivative.
    module = Composed(
        lambda m, x: m.last(m.first(x).abs().pow(1.5)), first=nn.Linear(2, 2, bias=False), last=nn.Linear(2, 1)
    )
    inputs = drawn(6, 2)
    inputs[2] = 0.0
    with pytest.warns(UserWarning, match=r"NaN or infinite in the layers \['first'"):
        record = measure_basin(module, inputs, drawn(6, 1, seed=1), loss_fn=nn.MSELoss(), hessian=hessian)
    assert record.hessian_nullity is None
    assert record.gradient_rank > 0
