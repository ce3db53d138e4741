import pytest
import torch

from lightning_basin.network.speed import has_slow_float64


@pytest.mark.parametrize(("name", "is_slow"), [("cpu", False), ("mps", True), ("meta", False)])
def test_devices_whose_float64_needs_no_timing(name, is_slow):
    assert has_slow_float64(torch.device(name)) == is_slow


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_once_and_draws_no_random_numbers():
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state(device)
    assert has_slow_float64(device) == has_slow_float64(device)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
