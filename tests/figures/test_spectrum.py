import numpy as np
import pytest

from lightning_basin.figures import plot_spectrum
from lightning_basin.history.columns import history_of
from tests.runs import records
from tests.whole_records import basin_record


def cells(ax):
    """The edges along the steps, those along the singular values, and the counts by row and column."""
    mesh = ax.collections[0]
    edges = mesh.get_coordinates()
    return edges[0, :, 0].tolist(), edges[:, 0, 1], mesh.get_array()


def test_a_cell_is_as_dark_as_it_has_singular_values_and_lasts_until_the_next_measurement():
    steps, heights, counts = cells(plot_spectrum(records()))
    assert steps == [0, 20, 30, 40]  # At step 10 there were none.
    assert (heights[0], heights[-1]) == (-11.0, 1.5)  # -44 quarters, up to the end of the fifth.
    assert counts[0].filled(0).tolist() == [0, 1, 0]
    assert counts[44].filled(0).tolist() == [6, 2, 0]
    assert counts[-1].filled(0).tolist() == [0, 0, 1]
    assert counts.count() == 7


def test_the_dashed_line_is_the_tolerance():
    line = plot_spectrum(records()).lines[0]
    assert np.allclose(line.get_ydata(), np.log10([12e-14, 15e-14, 20e-14, 20e-14]))
    assert line.get_xdata().tolist() == [0, 20, 30, 40]


def test_the_zero_loss_line_and_the_number_of_the_darkest_cell_are_drawn():
    ax = plot_spectrum(history_of(records(), zero_loss_step=10))
    assert {"zero loss", "darkest: 6", "zero up to here"} <= {text.get_text() for text in ax.texts}
    assert list(ax.lines[-1].get_xdata()) == [10, 10]


def test_a_layer_is_drawn_as_long_as_it_has_singular_values():
    steps, _, counts = cells(plot_spectrum(records(), layer="fc1"))
    assert steps == [0, 10, 20, 40]  # At the end its rank is zero.
    assert counts.tolist() == [[5, 5, 3]]


def test_a_single_measurement_is_drawn():
    plot_spectrum(records()[:1]).figure.draw_without_rendering()


@pytest.mark.parametrize("layer", [None, "fc9"])
def test_singular_values_that_the_source_does_not_hold_are_refused(layer):
    with pytest.raises(ValueError, match=r"must hold singular values of the (network|layer 'fc9'), but has those of"):
        plot_spectrum([basin_record()], layer=layer)
