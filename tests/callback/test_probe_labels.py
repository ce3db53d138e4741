import torch

from lightning_basin import Probe
from lightning_basin.callback.probe_labels import labels_of
from tests.training import regression_data


def test_labels_are_targets_that_are_few_numbers():
    inputs = torch.eye(3)
    assert labels_of(Probe(inputs, torch.tensor([2, 0, 2]))) == [2, 0, 2]
    assert labels_of(Probe(inputs, torch.tensor([[0.5], [1.0], [0.5]]))) == [0.5, 1, 0.5]
    assert labels_of(Probe(inputs)) is None
    assert labels_of(Probe(inputs, {"label": torch.zeros(3)})) is None
    assert labels_of(Probe(*regression_data(20).tensors)) is None
    assert labels_of(Probe(torch.zeros(20, 1), torch.arange(20))) is None
    assert labels_of(None) is None
