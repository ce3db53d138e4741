"""Which way to the Hessian is taken."""

import pytest
from torch import nn

from lightning_basin import measure_basin
from tests.networks import drawn, filled


@pytest.mark.parametrize(
    ("mode", "expected"), [("auto", "dense"), ("dense", "dense"), ("bracket", "bracket"), (False, None)]
)
def test_the_mode_decides_the_method(mode, expected):
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    record = measure_basin(module, drawn(5, 3), drawn(5, 2, seed=1), loss_fn=nn.MSELoss(), hessian=mode)
    assert record.hessian_method == expected
    assert (record.hessian_negative is None) == (expected != "dense")
