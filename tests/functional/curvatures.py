"""Losses whose second derivatives are known on paper."""

import numpy as np
import torch
from torch import nn

from tests.networks import drawn


def linear(weight, bias, num_inputs=3, seed=0):
    """A linear layer with inputs that see all of its parameters: the rank of a loss is that of its curvature."""
    module = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        module.bias.copy_(torch.tensor(bias))
    return module, drawn(num_inputs, len(weight[0]), seed=seed)


def softmax_curvature(logits):
    """diag(p) - p p^T of each row, in numpy."""
    exponentials = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    p = exponentials / exponentials.sum(1, keepdims=True)
    return torch.from_numpy(np.stack([np.diag(row) - np.outer(row, row) for row in p]))


def assert_factored(curvature):
    torch.testing.assert_close(curvature.factors.mT @ curvature.factors, curvature.matrices)
