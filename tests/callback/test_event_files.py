from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_basin.callback.event_files import write_end_values, write_scalars, write_spectra
from lightning_basin.keys import tensorboard_values
from tests.callback.monitor.modules import events_of
from tests.lightning_packages import TensorBoardLogger
from tests.runs import deep_records
from tests.whole_records import basin_record, layer_record

END_VALUES = {
    "basin/gradient_rank": 6.0,
    "basin/log10_loss": -9.0,
    "basin_more/saturated": 0.0,
    "basin_layer_x/fc": 1.0,
}


def closed(logger):
    logger.finalize("success")
    return events_of(logger)


def num_events(logger):
    (path,) = Path(logger.log_dir).glob("events*")
    return len(list(EventFileLoader(str(path)).Load()))


@pytest.mark.parametrize("prefix", ["", "fold_1"])
def test_all_values_of_a_measurement_are_one_event(tmp_path, prefix):
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    values = tensorboard_values(deep_records(8, 1)[0].scalars(), "basin")
    write_scalars(logger, values, step=3)
    events = closed(logger)
    start = f"{prefix}-" if prefix else ""
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {f"{start}{tag}": [(3, pytest.approx(value))] for tag, value in values.items()}
    assert num_events(logger) == 2  # The first one is the version of the file.


def test_a_logger_of_the_user_logs_the_values_itself(tmp_path):
    class Own(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics({f"own/{name}": value for name, value in metrics.items()}, step)

    logger = Own(tmp_path)
    write_scalars(logger, {"basin/gradient_rank": 6.0}, step=3)
    assert closed(logger).Tags()["scalars"] == ["own/basin/gradient_rank"]


def test_singular_values_are_histograms_whose_edges_are_quarters_of_a_decade(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    layers = {"a/b": layer_record(gradient_spectrum={0: 3}), "head": layer_record()}
    write_spectra(logger, basin_record(layers, gradient_spectrum={3: 2, 0: 1}), "basin", step=7)
    write_spectra(logger, basin_record(gradient_spectrum={}), "basin", step=8)
    write_spectra(logger, basin_record(), "basin", step=9)
    events = closed(logger)
    assert events.Tags()["histograms"] == ["basin_spectrum/network", "basin_layer_spectrum/a.b"]
    (network,), (layer,) = (events.Histograms(tag) for tag in events.Tags()["histograms"])
    found = network.histogram_value
    assert (network.step, found.min, found.max, found.num) == (7, 0.0, 1.0, 3)
    assert (found.bucket_limit, found.bucket) == ([0.25, 0.5, 0.75, 1.0], [1, 0, 0, 2])
    assert (layer.histogram_value.min, layer.histogram_value.bucket) == (0.0, [3])


@pytest.mark.parametrize(("num_layers", "expected"), [(32, 33), (200, 26)])
def test_blocks_take_the_place_of_layers_in_histograms_too(tmp_path, num_layers, expected):
    logger = TensorBoardLogger(tmp_path)
    (record,) = deep_records(num_layers, 1)
    write_spectra(logger, record, "basin", step=0)
    assert len(closed(logger).Tags()["histograms"]) == expected


def test_of_more_layers_than_have_curves_the_network_alone_has_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    layers = {f"fc{i}": layer_record(gradient_spectrum={0: 1}) for i in range(33)}
    write_spectra(logger, basin_record(layers, gradient_spectrum={0: 1}), "basin", step=0)
    assert closed(logger).Tags()["histograms"] == ["basin_spectrum/network"]


def metrics_of(logger):
    """The tags whose last values TensorBoard compares beside hyperparameters, and the names of these."""
    found = closed(logger).PluginTagToContent("hparams")["_hparams_/experiment"]
    experiment = HParamsPluginData.FromString(found).experiment
    return [info.name.tag for info in experiment.metric_infos], [info.name for info in experiment.hparam_infos]


@pytest.mark.parametrize("prefix", ["", "fold_1"])
def test_runs_are_compared_by_hyperparameters_and_by_the_first_values_that_they_ended_with(tmp_path, prefix):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False, prefix=prefix)
    logger.log_hyperparams({"rate": 0.1, "widths": [8, 4], "name": "a", "is_deep": True})
    write_end_values(logger, END_VALUES, "basin", step=9)
    start = f"{prefix}-" if prefix else ""
    metrics, names = metrics_of(logger)
    assert metrics == [f"{start}basin/gradient_rank", f"{start}basin/log10_loss"]
    assert sorted(names) == ["is_deep", "name", "rate", "widths"]
    assert closed(logger).Tags()["scalars"] == []  # The curves are there already.


def test_what_others_compare_runs_by_stays(tmp_path):
    by_lightning = TensorBoardLogger(tmp_path, version="a")
    by_lightning.log_hyperparams({"rate": 0.1})
    of_the_user = TensorBoardLogger(tmp_path, version="b", default_hp_metric=False)
    of_the_user.log_hyperparams({"rate": 0.1}, {"error": 0.0})
    for logger, expected in ((by_lightning, "hp_metric"), (of_the_user, "error")):
        logger.experiment.flush()
        num_before = num_events(logger)
        write_end_values(logger, END_VALUES, "basin", step=9)
        assert metrics_of(logger) == ([expected], ["rate"])
        assert num_events(logger) == num_before
