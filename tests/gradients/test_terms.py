import torch
from torch import nn

from lightning_basin import Probe
from lightning_basin.gradients.terms import sum_term_magnitudes
from lightning_basin.network.network import Network
from lightning_basin.network.runs import ProbeRuns
from tests.networks import filled


def test_terms_are_counted_by_their_magnitudes():
    network, probe = Network(filled(nn.Linear(2, 1))), Probe(torch.tensor([[1.0, 2.0], [3.0, -4.0]]).double())
    (chunk,) = ProbeRuns(network, probe).chunks()
    weights = torch.tensor([[2.0], [-1.0]]).double()
    # The gradient of 2 f(1, 2) - f(3, -4): 2 * 1 - 1 * 3, 2 * 2 + 1 * 4, and 2 - 1 by the bias.
    assert sum_term_magnitudes(network, chunk, network.layers[0], weights).tolist() == [5.0, 8.0, 3.0]
