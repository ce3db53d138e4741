"""Messages name the cause, and the remedy that helps."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_basin import Probe, measure_basin
from lightning_basin.probe import ProbeCollector
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
        (Single(keeps=True), torch.ones(5, 3), "neither float64 nor float32 runs Single: .* two evaluations differ"),
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
        ((torch.ones(5, 2), torch.ones(5, 3), nn.Linear(3, 2)), "got Tensor: pass the module first, then the inputs"),
        ((nn.Linear(3, 2), nn.MSELoss(), torch.ones(5, 2)), "inputs must be data, got MSELoss: pass the inputs second"),
        ((nn.MSELoss(), torch.ones(5, 3), nn.Linear(3, 2)), "targets must be data, got Linear.*: pass loss_fn="),
        ((nn.Linear(3, 2), Probe(torch.ones(5, 3)), torch.ones(5, 2)), r"pass Probe\(inputs, targets\)"),
        ((nn.Linear(3, 2), np.ones((5, 3))), r"got ndarray: pass torch.as_tensor\(inputs\)"),
        ((nn.Linear(3, 2), [[1.0, 2.0, 3.0]]), r"got list: pass torch.as_tensor\(inputs\)"),
    ],
    ids=[
        *("swapped", "class", "function", "loss as targets", "loader", "module third", "loss second", "loss first"),
        *("targets twice", "NumPy", "list of numbers"),
    ],
)
def test_arguments_in_another_order_are_refused_with_what_to_pass(arguments, message):
    with pytest.raises(TypeError, match=message):
        measure_basin(*arguments)


NET = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": nn.MSELoss}, "loss_fn must be .* got the class MSELoss: pass an instance of it"),
        (
            {"loss_fn": torch.ones(5, 2)},
            "loss_fn must be a function of outputs and targets or 'behavioral', got Tensor",
        ),
        ({"behavior": torch.ones(5, 2)}, "behavior must be a function of module and inputs, .* got Tensor"),
        ({"behavior": NET}, "behavior must be .* got the module, which is called without it"),
        (
            {"loss_fn": lambda a, b, c: a},
            "['float64 (5, 2)'].* 'c'; pass loss_fn=lambda outputs, targets: ... that brings",
        ),
        (
            {"loss_fn": nn.CrossEntropyLoss(), "targets": torch.ones(5)},
            "['float64 (5,)'].* Double; pass loss_fn=lambda",
        ),
        ({"loss_fn": nn.MSELoss(reduction="none")}, r"a tensor of shape (5, 2): pass loss_fn=lambda outputs, targets"),
        (
            {"loss_fn": lambda a, b: {"loss": a.sum()}},
            "got dict with keys ['loss']: pass loss_fn=lambda outputs, targets",
        ),
    ],
    ids=["class", "tensor", "tensor as behavior", "itself", "three arguments", "floats", "all losses", "dict"],
)
def test_functions_of_another_kind_are_refused_with_what_to_pass(arguments, message):
    pattern = message.translate({ord(mark): f"\\{mark}" for mark in "()[]"})
    with pytest.raises(TypeError, match=pattern) as refused:
        measure_basin(NET, **{"inputs": drawn(5, 3), "targets": drawn(5, 2), **arguments})
    assert "\n" not in str(refused.value)


def test_what_helps_is_tried_where_a_module_cannot_be_called():
    inputs, targets = drawn(5, 3), drawn(5, 2)
    with pytest.raises(
        ValueError, match="the module runs on the targets: pass these as inputs, and the inputs as targets"
    ):
        measure_basin(NET, targets, inputs, loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match="on the first of the pair that inputs is: pass inputs and targets apart"):
        measure_basin(NET, (inputs, targets))
    module = Composed(lambda m, x: m.net(x.to_mkldnn().to_dense()), net=NET)
    with pytest.raises(ValueError, match="float32 only is measured with dtype='float32'"):
        measure_basin(module, inputs)
    assert measure_basin(module, inputs, dtype="float32").gradient_rank == 8


def test_messages_of_torch_are_cut_to_their_first_sentence():
    module = Composed(lambda m, x: m.net(x).to_sparse().amax(1), net=NET)  # A page of kernels.
    with pytest.raises(ValueError, match="failed with NotImplementedError: Could not run 'aten::amax") as refused:
        measure_basin(module, drawn(5, 3))
    assert "\n" not in str(refused.value)


def not_finite(place):
    inputs, targets, module = drawn(5, 3), drawn(5, 2), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    tensors = {"input": inputs, "target": targets, "weight": module[0].weight.data, "buffer": module[1].running_var}
    if place in tensors:
        tensors[place][1] = torch.inf if place == "buffer" else torch.nan
    if place == "layer":
        module[0].weight.data.fill_(1e200)
        inputs *= 1e200
    return module, inputs, targets


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("input", r"on 1 of the 5 inputs, the first of them input 1: leave out the inputs \[1\]"),
        ("weight", r"the first of them input 0: \['0.weight'\] of the module are not finite"),
        ("layer", "layer '0' is the first whose results are not finite, of finite inputs"),
        ("target", r"the loss on the probe must be finite, got nan, as the targets of the inputs \[1\] are not"),
    ],
)
def test_what_is_not_finite_is_named(place, message):
    module, inputs, targets = not_finite(place)
    with pytest.raises(ValueError, match=message):
        measure_basin(module, inputs, targets, loss_fn=nn.MSELoss())


def test_a_pair_as_inputs_is_asked_about_where_targets_are_missing():
    with pytest.raises(ValueError, match="inputs is a pair: if it is one of inputs and targets, pass these apart"):
        measure_basin(nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2)), loss_fn=nn.MSELoss())


LENGTHS = [2, 1, 3, 2, 1]


NESTED = torch.nested.nested_tensor([torch.ones(length, 3) for length in LENGTHS])


JAGGED = torch.nested.nested_tensor([torch.ones(length, 3) for length in LENGTHS], layout=torch.jagged)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.net(x).to_sparse(), r"must be dense, got torch.sparse_coo: pass a behavior .*to_dense"),
        (lambda m, x: nested(m.net(x)), r"must be dense, got a nested tensor: pass a behavior .*to_padded_tensor"),
        (
            lambda m, x: m.net(nested(x)),
            "layer 'net' must be called with dense tensors, got a nested one; pass behavior",
        ),
        (lambda m, x: torch.fft.fft(m.net(x)), "got torch.complex128: pass behavior=.* torch.view_as_real of them"),
        (lambda m, x: m.net(x) > 0, "got torch.bool: pass behavior=.* the numbers from which they are made"),
        (lambda m, x: {"logits": m.net(x)}, r"must be a tensor, got dict with keys \['logits'\]: pass behavior"),
    ],
    ids=["sparse", "nested", "nested inside", "complex", "booleans", "a dict"],
)
def test_outputs_of_another_kind_are_refused_with_what_helps(function, message):
    module = Composed(function, net=nn.Linear(3, 2))
    with pytest.raises((TypeError, ValueError), match=message):
        measure_basin(module, drawn(5, 3))


def nested(x):
    return torch.nested.as_nested_tensor([row.unsqueeze(0) for row in x], layout=torch.jagged)


@pytest.mark.parametrize("tensor", [NESTED, JAGGED, torch.ones(5, 3).to_sparse()], ids=["nested", "jagged", "sparse"])
@pytest.mark.parametrize("take", [Probe, ProbeCollector(3).add], ids=["a probe", "from batches"])
def test_tensors_without_plain_axes_are_refused_with_what_makes_them_dense(tensor, take):
    method = "to_padded_tensor" if tensor.is_nested else "to_dense"
    with pytest.raises(ValueError, match=rf"must be dense, got .*: pass tensor.{method}\("):
        take((tensor, torch.ones(5)))


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
