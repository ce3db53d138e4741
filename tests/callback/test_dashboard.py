import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_basin import BasinMonitor
from lightning_basin.callback.dashboard import layout_of
from lightning_basin.callback.publish import Publisher
from tests.callback.monitor.modules import events_of
from tests.lightning_packages import CSVLogger, TensorBoardLogger
from tests.runs import deep_records
from tests.tensorboards import tensorboard, wait_for
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


@pytest.mark.parametrize("prefix", ["", "fold_1"])
def test_every_chart_of_the_layout_finds_its_curves(tmp_path, prefix):
    events = events_of(fit(tmp_path, BasinMonitor(probe=20), TensorBoardLogger(tmp_path, prefix=prefix)))
    scalars = events.Tags()["scalars"]
    charts = [tags for category in layouts(events).values() for tags in category.values()]
    assert len(charts) == 8
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


class Configured(Regressor):
    def __init__(self, rate):
        super().__init__()
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What TensorBoard serves of two runs that reach zero loss, by plugin, and the answer to a question of its page."""
    root = tmp_path_factory.mktemp("served")
    for rate in (0.1, 0.2):
        logger = TensorBoardLogger(root, name="runs", default_hp_metric=False)
        monitor = BasinMonitor(probe=20, zero_loss_threshold=1e3, every_n_epochs=1)
        make_trainer(root, monitor, logger=logger).fit(Configured(rate), loader())
        logger.finalize("success")
    plugins = ("scalars", "histograms", "images", "text")
    with tensorboard(root / "runs") as ask:
        wait_for(ask, "plugin/scalars/tags", lambda runs: len(runs) == 4)
        tags = {plugin: ask(f"plugin/{plugin}/tags") for plugin in plugins}
        images = [
            ask("plugin/images/images", run="version_0", tag=tag, sample=0) for tag in tags["images"]["version_0"]
        ]
        yield {
            "tags": {plugin: {run: sorted(found) for run, found in runs.items()} for plugin, runs in tags.items()},
            "images": images,
            "layout": ask("plugin/custom_scalars/layout"),
            "histogram": ask("plugin/histograms/histograms", run="version_0", tag="basin_spectrum/network"),
            "compared": ask("plugin/hparams/session_groups", post=ALL_RUNS),
            "points": ask("plugin/scalars/scalars", run="version_0", tag="basin/gradient_rank"),
        }


ALL_RUNS = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}


def test_tensorboard_serves_every_tag_in_one_plugin(served):
    tags = served["tags"]
    for run in ("version_0", "version_1"):
        every = [tag for plugin in tags.values() for tag in plugin[run]]
        assert len(every) == len(set(every))
    assert tags["scalars"]["version_0/zero_loss"] == tags["scalars"]["version_0"]
    assert "train_loss" not in [tag for tag in tags["scalars"]["version_0"] if tag.startswith("basin")]
    assert [tag for tag in tags["scalars"]["version_0"] if tag.startswith("basin/")] == [
        f"basin/{name}"
        for name in (
            *("duplicated_activations", "gradient_rank", "gradient_rank_bound", "gradient_rank_deficit"),
            *("hessian_nullity", "hessian_nullity_lower", "hessian_nullity_upper", "log10_loss"),
        )
    ]
    assert tags["histograms"]["version_0"] == [
        *("basin_layer_spectrum/hidden", "basin_layer_spectrum/readout", "basin_spectrum/network")
    ]
    assert tags["text"]["version_0"] == ["basin/summary/text_summary"]


def test_tensorboard_serves_one_point_for_each_measurement_and_few_images(served):
    assert [step for _, step, _ in served["points"]] == [0, 2, 5]
    assert [len(images) for images in served["images"]] == [2] * 4  # At zero loss, and at the end.


def test_tensorboard_serves_a_layout_whose_every_chart_has_curves(served):
    tags = served["tags"]["scalars"]["version_0"]
    charts = [chart for category in served["layout"]["category"] for chart in category["chart"]]
    assert len(charts) == 8  # Two runs have one layout.
    for chart in charts:
        for expression in chart.get("multiline", {"tag": []})["tag"]:
            assert any(re.match(expression, tag) for tag in tags)
        for series in chart.get("margin", {"series": []})["series"]:
            assert set(series.values()) <= set(tags)


def test_tensorboard_serves_singular_values_between_fixed_edges(served):
    for _, _, buckets in served["histogram"]:
        assert sum(count for _, _, count in buckets) == 26  # All parameters count.
        assert all(4 * left == round(4 * left) and right == left + 0.25 for left, right, _ in buckets)


def test_tensorboard_compares_runs_by_what_they_ended_with(served):
    groups = served["compared"]["sessionGroups"]
    assert [group["hparams"] for group in groups] == [{"rate": 0.1}, {"rate": 0.2}]
    for group in groups:
        ends = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert ends["basin/gradient_rank"] == 26
        assert len(ends) == 8


@pytest.mark.parametrize(("num_layers", "mebibytes"), [(8, 2), pytest.param(200, 6, marks=pytest.mark.slow)])
def test_two_hundred_measurements_fit_into_few_mebibytes(tmp_path, num_layers, mebibytes):
    logger, monitor = TensorBoardLogger(tmp_path), BasinMonitor(report=False)
    trainer, session = make_trainer(tmp_path, monitor, logger=logger), monitor.progress.session
    publisher = Publisher(trainer, session)
    for record in deep_records(num_layers, 200):
        session.keep(record, None)
        publisher.log(record, record.step)
    publisher.end()
    logger.finalize("success")
    files = [path for path in Path(logger.log_dir).rglob("events*") if path.is_file()]
    assert len(files) == 2  # That of the dots at zero loss, too.
    assert sum(path.stat().st_size for path in files) < mebibytes * 2**20
    events = events_of(logger)
    assert max(len(events.Images(tag)) for tag in events.Tags()["images"]) <= 10
    assert {len(events.Histograms(tag)) for tag in events.Tags()["histograms"]} == {73}
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("basin")]) <= 101


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
    one, other = (layout_of(prefix, [f"{prefix}/gradient_rank"]) for prefix in ("basin", "held_out"))
    assert one
    assert other
    assert not one.keys() & other.keys()


def test_a_prefix_with_signs_of_expressions_is_taken_literally():
    layout = layout_of("a.b+c", ["a.b+c_layer_gradient_rank/fc1"])
    (expression,) = layout["a.b+c: layer by layer"]["rank of each layer"][1]
    assert re.match(expression, "a.b+c_layer_gradient_rank/fc1")
    assert not re.match(expression, "axb+c_layer_gradient_rank/fc1")


def test_charts_match_the_keys_of_a_logger_with_a_prefix_too():
    layout = layout_of("basin", ["fold_1-basin_layer_gradient_rank/fc1"])
    (expression,) = layout["basin: layer by layer"]["rank of each layer"][1]
    assert re.match(expression, "fold_1-basin_layer_gradient_rank/fc1")
    assert re.match(expression, "basin_block_gradient_rank/layers.0-1")
    assert not re.match(expression, "basin_layer_gradient_rank_deficit/fc1")


def test_a_band_has_the_tags_of_a_logger_with_a_prefix_as_they_are():
    tags = [f"fold_1-basin_stats/gradient_rank_deficit_{quantile}" for quantile in ("p10", "median", "p90")]
    (chart,) = layout_of("basin", tags, logger_prefix="fold_1-")["basin: layer by layer"].values()
    assert chart == ["Margin", [tags[1], tags[0], tags[2]]]


def test_charts_without_curves_are_left_out():
    assert layout_of("basin", ["basin/hessian_nullity_lower"]) == {}


@pytest.mark.parametrize("arguments", [{"figures": False}, {}])
def test_nothing_is_added_where_no_figures_are_asked_for_or_nobody_looks(tmp_path, arguments):
    logger_class = TensorBoardLogger if arguments else CSVLogger
    logger = fit(tmp_path, BasinMonitor(probe=20, **arguments), logger_class(tmp_path, name="runs"))
    if arguments:
        tags = events_of(logger).Tags()
        assert tags["images"] == tags["tensors"] == []
    assert np.all([path.suffix != ".0" or arguments for path in (tmp_path / "runs").rglob("events*")])
