import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.network.network import Network
from lightning_basin.network.rounding import in_other_precision
from tests.networks import drawn, filled


def test_a_network_in_the_other_precision_computes_the_same_up_to_its_rounding():
    network, probe = Network(filled(nn.Linear(3, 2))), Probe(drawn(5, 3))
    other, converted = in_other_precision(network, probe)
    back, _ = in_other_precision(other, converted)
    assert (other.dtype, back.dtype) == (torch.float32, torch.float64)
    outputs = network.outputs(probe)
    torch.testing.assert_close(other.outputs(converted).double(), outputs, rtol=0.0, atol=1e-6)
    assert not torch.equal(other.outputs(converted).double(), outputs)
