import numpy as np
import pytest
import torch

from lightning_basin.functional.smallest_values import smallest_singular_values
from tests.networks import with_singular_values

SPECTRA = {
    "zeros after a gap": np.append(np.geomspace(1.0, 1e-3, 260), np.zeros(40)),
    "zeros after a smaller gap": np.append(np.geomspace(1.0, 1e-6, 260), np.zeros(40)),
    "hardly resolved before zeros": np.append(np.geomspace(1.0, 3e-7, 260), np.zeros(40)),
    "one": np.append(np.geomspace(1.0, 1e-5, 299), 1e-12),
    "several": np.concatenate([np.geomspace(1.0, 1e-4, 294), [1e-8, 1e-9, 1e-11, 1e-12, 1e-13, 0.0]]),
    "no gap at the resolution": np.append(np.geomspace(1.0, 1e-5, 280), np.geomspace(1e-6, 1e-13, 20)),
    "full": np.geomspace(1.0, 1e-4, 300),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 300), (300, 375), (375, 300), (300, 3000)])
def test_the_smallest_singular_values_are_found_without_squaring(spectrum, shape):
    values = SPECTRA[spectrum]
    matrix = with_singular_values(*shape, values, seed=4)
    found = smallest_singular_values(matrix)
    exact = torch.linalg.svdvals(matrix).numpy()
    is_small = found.spectrum.numpy() < found.least
    assert is_small.sum() >= (values < 1e-7).sum()
    # All others are above, and those told apart are exact to what a decomposition leaves.
    assert exact[~is_small].min() > found.least
    np.testing.assert_allclose(found.spectrum.numpy()[is_small], exact[is_small], rtol=1e-3, atol=5e-15)
    assert found.spectrum.numpy()[~is_small][-1] == pytest.approx(exact[~is_small].min(), rel=0.2)
    assert 0.9 < float(found.spectrum[0]) <= 1 + 1e-12


def test_many_small_singular_values_are_left_to_a_decomposition():
    values = np.append(np.geomspace(1.0, 1e-3, 100), np.zeros(200))
    assert smallest_singular_values(with_singular_values(300, 400, values, seed=0)) is None
    assert smallest_singular_values(torch.zeros(300, 300, dtype=torch.float64)) is None
