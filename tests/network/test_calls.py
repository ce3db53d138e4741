import pytest
import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.network.calls import call_module
from lightning_basin.network.network import Network
from tests.networks import Composed, drawn, filled


class Echo(nn.Module):
    """Returns how it was called."""


def echo(forward):
    module = Echo()
    module.forward = forward
    return module


X, Y = torch.zeros(1), torch.ones(1)


CALLS = {
    "a tensor": (lambda x: ("one", x), X, ("one", X)),
    "a tuple that fits": (lambda x, y: ("two", x, y), (X, Y), ("two", X, Y)),
    "a list that fits": (lambda x, y: ("two", x, y), [X, Y], ("two", X, Y)),
    "a tuple for one argument": (lambda pair: ("one", pair), (X, Y), ("one", (X, Y))),
    "a list for one argument": (lambda pair: ("one", pair), [X, Y], ("one", [X, Y])),
    "a tuple of one": (lambda x: ("one", x), (X,), ("one", X)),
    "a tuple for any number of arguments": (lambda *xs: ("any", xs), (X, Y), ("any", (X, Y))),
    "a tuple with defaults left": (lambda x, y, z=3: (x, y, z), (X, Y), (X, Y, 3)),
    "a dict of arguments": (lambda x, y: ("two", x, y), {"y": Y, "x": X}, ("two", X, Y)),
    "a dict of some arguments": (lambda x, mask=None: (x, mask), {"x": X}, (X, None)),
    "a dict for one argument": (lambda batch: ("one", batch), {"x": X, "y": Y}, ("one", {"x": X, "y": Y})),
    "a dict for any arguments": (lambda **named: named, {"x": X, "y": Y}, {"x": X, "y": Y}),
    "a dict for keyword-only arguments": (lambda *, x, y: (x, y), {"x": X, "y": Y}, (X, Y)),
    "a dict of arguments and others": (
        lambda x, y, **others: (x, y, others),
        {"x": X, "y": Y, "z": X},
        (X, Y, {"z": X}),
    ),
    "a dict with other keys than names": (lambda batch: ("one", batch), {0: X}, ("one", {0: X})),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_unpacked_as_the_forward_takes_them(name):
    forward, inputs, expected = CALLS[name]
    assert str(call_module(echo(forward), inputs)) == str(expected)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m, x: (m.linear(x),), TypeError, "the outputs must be a tensor, got tuple"),
        (lambda m, x: m.linear(x).argmax(1), TypeError, "the outputs must be floating point numbers, got torch.int64"),
        (lambda m, x: m.linear(x).sum(), ValueError, r"one row for each of the 5 inputs, got shape \(\)"),
        (lambda m, x: m.linear(x).mT, ValueError, r"one row for each of the 5 inputs, got shape \(2, 5\)"),
    ],
    ids=["tuple", "integers", "scalar", "transposed"],
)
def test_outputs_without_one_row_per_input_are_refused(function, error, message):
    network = Network(filled(Composed(function, linear=nn.Linear(3, 2))))
    with pytest.raises(error, match=message + ".*pass behavior=lambda"):
        network.outputs(Probe(drawn(5, 3)))
