import torch
from torch import nn

from lightning_basin.operations.recorder import record_operations


def test_views_have_no_elements_of_their_own():
    layer, inputs = nn.Linear(3, 4).double(), torch.zeros(5, 2, 3, dtype=torch.float64)
    with record_operations(dict(layer.named_parameters()), [], num_inputs=5) as operations:
        layer(inputs).transpose(1, 2).relu().reshape(5, 8)
    # 5 * 2 * 4 of the layer, of the rectifier, and of the copy that reshapes what was transposed.
    assert operations.num_elements == 3 * 40
