"""Modules with reproducible weights in float32."""

import torch

CPU = torch.device("cpu")


def filled(module, seed=0):
    """The module with reproducible weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


THIRD = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
