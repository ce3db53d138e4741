from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_basin.figures import plot_history, plot_loss, plot_nullity, plot_tolerances
from lightning_basin.figures.style import LINE_STYLES
from lightning_basin.history.columns import history_of
from tests.runs import RANKS, STEPS, records
from tests.whole_records import basin_record


def texts(ax):
    return {text.get_text() for text in ax.texts}


def test_rank_bound_and_largest_rank_are_drawn_with_their_last_value():
    ax = plot_history(history_of(records(), zero_loss_step=10))
    assert {"rank 2", "allowed by merges 2", "largest possible 8", "zero loss"} <= texts(ax)
    drawn = [list(line.get_ydata()) for line in ax.lines]
    assert [8, 8, 8, 8] in drawn
    assert [8, 8, 6, 2] in drawn
    assert list(ax.lines[-1].get_xdata()) == [10, 10]


def test_an_ill_defined_rank_is_drawn_in_another_style_up_to_the_next_one():
    ax = plot_history(records())
    pieces = [(line.get_linestyle(), line.get_xdata().tolist()) for line in ax.lines if line.get_linewidth() == 2.4]
    assert [steps for _, steps in pieces] == [[0, 10, 20], [20, 30], [30]]
    styles = [style for style, _ in pieces]
    assert styles[0] == styles[2] != styles[1]


def test_several_runs_are_told_apart_by_their_names():
    shorter = history_of(records()[:3], name="short")
    ax = plot_history([history_of(records(), name="long", zero_loss_step=10), shorter])
    assert {"long 2", "short 5"} <= texts(ax)


def test_nullity_is_a_band_that_closes_at_parameters_minus_rank():
    ax = plot_nullity(records())
    assert {"nullity 38", "N − rank 38"} <= texts(ax)
    open_ax = plot_nullity(records()[:2])
    assert {"at most 39", "at least 32", "N − rank 32"} <= texts(open_ax)


def test_a_nullity_that_was_counted_without_a_bracket_is_drawn_as_ill_defined_until_no_residual_is_left():
    without = {"hessian_nullity_lower": None, "hessian_nullity_upper": None}
    made = [
        replace(record, hessian_nullity=30 + i, residual_curvature=residual, **without)
        for i, (record, residual) in enumerate(zip(records(), (0.5, 0.1, 0.1, 0.0), strict=True))
    ]
    ax = plot_nullity(made)
    pieces = [line for line in ax.lines if line.get_linewidth() == 2.4]
    assert [line.get_ydata().tolist() for line in pieces] == [[30, 31, 32, 33], [33]]
    solid, dotted = (Line2D([], [], linestyle=LINE_STYLES[kind]).get_linestyle() for kind in ("proved", "ill-defined"))
    assert pieces[1].get_linestyle() == solid
    assert pieces[0].get_linestyle() == dotted != solid
    assert "nullity 33" in texts(ax)
    assert "nullity, ill-defined 32" in texts(plot_nullity(made[:3]))


def test_the_line_of_parameters_minus_rank_says_what_is_known_of_the_rank():
    bounds = [replace(record, projected=True) for record in records()]
    (line,) = [line for line in plot_nullity(bounds).lines if line.get_ydata().tolist() == [32, 32, 35, 38]]
    expected = Line2D([], [], linestyle=LINE_STYLES["lower bound"], linewidth=line.get_linewidth())
    assert line.get_linestyle() == expected.get_linestyle() == "--"
    assert line._dash_pattern == expected._dash_pattern


def test_loss_is_drawn_as_its_logarithm():
    (line,) = plot_loss(records()).lines
    assert np.allclose(line.get_ydata(), [0, -8, -9, -12])


def test_ranks_at_five_tolerances_are_a_staircase():
    assert {"σ > 1e-12: 5", "σ > 1e-02: 1"} <= texts(plot_tolerances(records()))


def test_axes_of_the_caller_are_used_and_pyplot_knows_of_none():
    import matplotlib.pyplot as plt

    ax = Figure().add_subplot()
    assert plot_history(records(), ax) is ax
    assert plot_history(records()) is not ax
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", [plot_history, plot_nullity, plot_loss, plot_tolerances])
def test_runs_of_one_measurement_or_of_ranks_alone_are_drawn(draw):
    for made in (records()[:1], [basin_record()], [basin_record(step=i) for i in STEPS]):
        draw(made).figure.draw_without_rendering()


def test_ranks_stand_where_they_were_measured():
    ax = plot_history(records())
    drawn = {x: y for line in ax.lines if line.get_linewidth() == 2.4 for x, y in zip(*line.get_data(), strict=True)}
    assert drawn == dict(zip(STEPS, RANKS, strict=True))
