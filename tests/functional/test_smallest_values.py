import numpy as np
import pytest
import torch

from lightning_basin.functional.smallest_values import mixed_triangle, num_before_gap, values_behind_gap
from tests.networks import with_singular_values

SPECTRA = {
    "zeros after a gap": (260, np.append(np.geomspace(1.0, 1e-3, 260), np.zeros(40))),
    "zeros after a smaller gap": (260, np.append(np.geomspace(1.0, 1e-6, 260), np.zeros(40))),
    "hardly resolved before zeros": (260, np.append(np.geomspace(1.0, 3e-7, 260), np.zeros(40))),
    "mostly zeros": (20, np.append(np.geomspace(1.0, 1e-5, 20), np.zeros(280))),
    "one": (299, np.append(np.geomspace(1.0, 1e-5, 299), 1e-12)),
    "one before": (1, np.append(1.0, np.geomspace(1e-9, 1e-12, 299))),
    "several": (294, np.append(np.geomspace(1.0, 1e-3, 294), np.geomspace(1e-9, 1e-13, 6))),
    "full": (300, np.geomspace(1.0, 1e-4, 300)),
}
SHAPES = [(300, 300), (300, 375), (375, 300), (300, 3000)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_behind_a_gap_are_found_without_squaring(spectrum, shape):
    num_before, values = SPECTRA[spectrum]
    matrix = with_singular_values(*shape, values, seed=4)
    exact = torch.linalg.svdvals(matrix).numpy()
    triangle = mixed_triangle(matrix)
    assert num_before_gap(triangle) == num_before
    small = values_behind_gap(triangle, num_before)
    np.testing.assert_allclose(small.values, exact[num_before:], rtol=0.1, atol=5e-15)
    assert small.least == pytest.approx(exact[num_before - 1], rel=0.2)
    assert 0.9 < small.largest <= 1 + 1e-12


@pytest.mark.parametrize("count", [1, 2, 5, 300, 301])
def test_mixing_keeps_singular_values(count):
    values = np.geomspace(1.0, 1e-3, count)
    triangle = mixed_triangle(with_singular_values(count, count + 3, values, seed=1))
    assert float(triangle.triu(1).abs().max()) == 0.0
    np.testing.assert_allclose(torch.linalg.svdvals(triangle), values, rtol=1e-12)


def test_rows_that_are_equal_at_first_do_not_hide_others():
    distinct = torch.randn(40, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triangle = mixed_triangle(torch.cat([distinct[:1].expand(260, -1), distinct]))
    assert num_before_gap(triangle) == 40
    small = values_behind_gap(triangle, 40)
    assert float(small.values.max()) < 1e-14 * small.largest


def test_a_mixture_that_misses_a_direction_is_left_to_a_decomposition():
    triangle = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1e-9, 0.0], [0.0, 1.0, 1e-12]], dtype=torch.float64)
    assert values_behind_gap(triangle, 2) is None


@pytest.mark.parametrize(
    ("num_before", "values"),
    [
        pytest.param(280, np.append(np.geomspace(1.0, 1e-5, 280), np.geomspace(9e-6, 1e-13, 20)), id="no gap"),
        pytest.param(299, np.append(np.geomspace(1.0, 1e-3, 290), np.zeros(10)), id="zeros before"),
        pytest.param(300, np.zeros(300), id="nothing"),
    ],
)
def test_without_a_gap_nothing_is_said(num_before, values):
    assert values_behind_gap(mixed_triangle(with_singular_values(300, 400, values, seed=0)), num_before) is None
