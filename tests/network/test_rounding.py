import math

import pytest
import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import agree, in_other_precision
from tests.networks import drawn, filled


def test_a_network_in_the_other_precision_computes_the_same_up_to_its_rounding():
    network, probe = Network(filled(nn.Linear(3, 2))), Probe(drawn(5, 3))
    other, converted = in_other_precision(network, probe)
    back, _ = in_other_precision(other, converted)
    assert (other.dtype, back.dtype) == (torch.float32, torch.float64)
    outputs = network.outputs(probe)
    torch.testing.assert_close(other.outputs(converted).double(), outputs, rtol=0.0, atol=1e-6)
    assert not torch.equal(other.outputs(converted).double(), outputs)


@pytest.mark.parametrize(
    ("result", "expected", "is_same"),
    [
        ([1.0, math.nan], [1.0, math.nan], True),
        ([1.0, math.inf], [1.0, math.inf], True),
        ([1.0 + 1e-12, math.nan], [1.0, math.nan], True),
        ([1.1, math.nan], [1.0, math.nan], False),
        ([1.0, 2.0], [1.0, math.nan], False),
        ([1.0, math.nan], [1.0, math.inf], False),
        ([1.0, -math.inf], [1.0, math.inf], False),
    ],
)
def test_nan_and_infinity_agree_with_themselves_alone(result, expected, is_same):
    assert agree(torch.tensor(result, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)) == is_same
