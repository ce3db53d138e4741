from dataclasses import replace

import numpy as np

from lightning_basin.figures import plot_band, plot_final
from lightning_basin.figures.runs import comparison_figure
from lightning_basin.history.columns import Logged, history_of
from tests.runs import records

RUNS = [
    replace(
        history_of(records()[: 4 - i], name=f"seed {i}", zero_loss_step=10),
        logged={"val_loss": Logged(np.array([0]), np.array([0.1 * i]))},
    )
    for i in range(2)
]


def test_median_of_two_runs_is_their_mean():
    (median,) = [line for line in plot_band(RUNS).lines if len(line.get_xdata()) > 1]
    # The second run ends at step 20, where both have rank 5.
    assert median.get_ydata().tolist() == [8, 8, 5, 2]


def test_dots_are_the_last_values_of_each_run():
    (dots,) = plot_final(RUNS, against="val_loss").lines
    assert np.allclose(dots.get_xydata(), [[2, 0.0], [5, 0.1]])


def test_a_comparison_has_a_figure_for_each_question():
    assert len(comparison_figure(RUNS, None).axes) == 2
    assert len(comparison_figure(RUNS, "val_loss").axes) == 3
