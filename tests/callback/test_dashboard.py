import re
from itertools import chain

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_basin import BasinMonitor
from lightning_basin.callback.dashboard import layout_of
from tests.callback.monitor.modules import events_of
from tests.lightning_packages import CSVLogger, TensorBoardLogger
from tests.training import Regressor, loader, make_trainer

pytestmark = [pytest.mark.fits, pytest.mark.figures]


def fit(root, monitor, logger=None, **options):
    logger = logger or TensorBoardLogger(root, name="runs")
    make_trainer(root, monitor, logger=logger, **options).fit(Regressor(), loader())
    logger.finalize("success")
    return logger


def layouts(events):
    """The charts in an event file, by category: title and expressions or tags."""
    found = {}
    for event in events.Tensors("custom_scalars__config__"):
        for category in layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category:
            for chart in category.chart:
                series = [[s.value, s.lower, s.upper] for s in chart.margin.series]
                found.setdefault(category.title, {})[chart.title] = [*chart.multiline.tag, *chain(*series)]
    return found


def test_every_chart_of_the_layout_finds_its_curves(tmp_path):
    events = events_of(fit(tmp_path, BasinMonitor(probe=20)))
    scalars = events.Tags()["scalars"]
    charts = [tags for category in layouts(events).values() for tags in category.values()]
    assert len(charts) == 6
    for expressions in charts:
        for expression in expressions:
            assert any(re.match(expression, tag) for tag in scalars), expression


def test_summary_and_figures_stand_at_the_end_and_no_tag_is_there_twice(tmp_path):
    logger = fit(tmp_path, BasinMonitor(probe=20))
    tags = events_of(logger).Tags()
    assert tags["images"] == [
        f"basin_figures/{n}" for n in ("1_rank", "2_null_space", "3_lost_rank_by_layer", "4_duplicates_by_layer")
    ]
    (summary,) = events_of(logger).Tensors("basin/summary/text_summary")
    assert summary.step == 5  # The x axis of Lightning's curves.
    assert "**The rank" in summary.tensor_proto.string_val[0].decode()
    every = [tag for kind in ("images", "scalars", "tensors", "histograms") for tag in tags[kind]]
    assert len(every) == len(set(every))


def test_zero_loss_is_a_dot_on_each_curve_and_a_set_of_figures(tmp_path):
    logger = fit(tmp_path, BasinMonitor(probe=20, zero_loss_threshold=1e3))
    dots = EventAccumulator(f"{logger.log_dir}/zero_loss").Reload()
    curves = events_of(logger)
    for tag in dots.Tags()["scalars"]:
        (dot,) = dots.Scalars(tag)
        assert (dot.step, dot.value) in [(event.step, event.value) for event in curves.Scalars(tag)]
    assert "basin/hessian_nullity_upper" in dots.Tags()["scalars"]
    assert [image.step for image in curves.Images("basin_figures/1_rank")] == [0, 5]


def test_a_run_that_does_not_reach_zero_loss_has_no_dots(tmp_path):
    logger = fit(tmp_path, BasinMonitor(probe=20))
    assert not (tmp_path / "runs" / "version_0" / "zero_loss").exists()
    assert len(events_of(logger).Images("basin_figures/1_rank")) == 1


def test_a_layout_of_the_user_stays(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="runs")
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["train_loss"]]}})
    fit(tmp_path, BasinMonitor(probe=20), logger)
    assert layouts(events_of(logger)) == {"mine": {"loss": ["train_loss"]}}


def test_two_monitors_have_categories_of_their_own():
    one, other = (layout_of(prefix, ["gradient_rank"]) for prefix in ("basin", "held_out"))
    assert not one.keys() & other.keys()


def test_a_prefix_with_signs_of_expressions_is_taken_literally():
    expression = layout_of("a.b+c", [])["a.b+c: layer by layer"]["rank of each layer"][1][0]
    assert re.match(expression, "a.b+c_layer_gradient_rank/fc1")
    assert not re.match(expression, "axb+c_layer_gradient_rank/fc1")


def test_charts_match_the_keys_of_a_logger_with_a_prefix_too():
    (expressions,) = [charts[1] for charts in layout_of("basin", [])["basin: layer by layer"].values()][:1]
    assert re.match(expressions[0], "fold_1-basin_layer_gradient_rank/fc1")
    assert re.match(expressions[0], "basin_block_gradient_rank/layers.0-1")
    assert not re.match(expressions[0], "basin_layer_gradient_rank_deficit/fc1")


@pytest.mark.parametrize("arguments", [{"figures": False}, {}])
def test_nothing_is_added_where_no_figures_are_asked_for_or_nobody_looks(tmp_path, arguments):
    logger_class = TensorBoardLogger if arguments else CSVLogger
    logger = fit(tmp_path, BasinMonitor(probe=20, **arguments), logger_class(tmp_path, name="runs"))
    if arguments:
        tags = events_of(logger).Tags()
        assert tags["images"] == tags["tensors"] == []
    assert np.all([path.suffix != ".0" or arguments for path in (tmp_path / "runs").rglob("events*")])
