from dataclasses import replace

import numpy as np
import pytest

from lightning_basin import MergedInput
from lightning_basin.callback.event_files import write_details, write_scalars
from lightning_basin.callback.history import HistoryFile
from lightning_basin.history.columns import history_of
from lightning_basin.history.details import DETAILS, details_of
from lightning_basin.history.sources import read_history
from lightning_basin.keys import tensorboard_values
from tests.lightning_packages import TensorBoardLogger
from tests.runs import MERGED, SPECTRA, deep_records, records
from tests.whole_records import basin_record, layer_record


def read_again(folder, made, kind, *, steps_with_details=None):
    """Write records as a monitor does, and read the file alone."""
    if kind != "events":
        table = HistoryFile(folder / f"basin.{kind}")
        table.write([])
        for record in made:
            table.append({"step": record.step, **record.scalars(), f"basin/{DETAILS}": details_of(record)})
        return read_history(table.path)
    logger = TensorBoardLogger(folder)
    for record in made:
        write_scalars(logger, tensorboard_values(record.scalars(), "basin"), step=record.step)
        if steps_with_details is None or record.step in steps_with_details:
            write_details(logger, record, "basin", step=record.step)
    logger.finalize("success")
    return read_history(logger.log_dir)


every_kind = pytest.mark.parametrize("kind", ["csv", "jsonl", "events"])


@every_kind
def test_files_say_of_a_run_what_its_records_say(tmp_path, kind):
    expected, history = history_of(records()), read_again(tmp_path, records(), kind)
    assert history.num_inputs == 5
    assert history.merged_inputs == expected.merged_inputs == MERGED
    assert tuple(history.spectra[None].counts) == SPECTRA
    assert history.spectra[None].cuts == [-12.921, None, -12.824, -12.699]  # log10 of 1e-14 times 12, 15 and 20.
    assert history.spectra.keys() == expected.spectra.keys()
    for layer in expected.layers:
        assert np.array_equal(history.lost_share(layer), expected.lost_share(layer))
        assert np.array_equal(history.num_parameters(layer), expected.num_parameters(layer))


@every_kind
@pytest.mark.parametrize("is_projected", [False, True])
def test_files_say_whether_ranks_are_lower_bounds(tmp_path, kind, is_projected):
    made = [replace(record, projected=is_projected) for record in records()]
    assert read_again(tmp_path, made, kind).is_projected is is_projected


@every_kind
@pytest.mark.parametrize("num_layers", [32, 40])
def test_files_of_a_deep_network_say_what_each_layer_or_block_has_lost_and_merged(tmp_path, kind, num_layers):
    merged = (MergedInput(3, 1, "layers.7.linear"), MergedInput(4, 1, None))
    made = [replace(record, merged_inputs=merged) for record in deep_records(num_layers, 3)]
    history = read_again(tmp_path, made, kind)
    scope = "layers.7.linear" if num_layers == 32 else "layers.7"
    # Blocks and layers of these records have 12 parameters and 8 outputs, and the ranks 0, 1 and 2.
    assert history.lost_share(scope).tolist() == [1, 7 / 8, 6 / 8]
    assert history.num_parameters(scope).tolist() == [12, 12, 12]
    assert history.merged_inputs[-1] == (MergedInput(3, 1, scope), MergedInput(4, 1, None))
    assert set(history.spectra) == {None, *history.layers}


def test_of_more_layers_than_have_curves_the_network_alone_has_singular_values():
    layers = {f"fc{i}": layer_record(gradient_spectrum={0: 1}) for i in range(33)}
    assert list(details_of(basin_record(layers, gradient_spectrum={0: 1}))["spectra"]) == [""]


def test_details_may_be_of_some_measurements_only(tmp_path):
    history = read_again(tmp_path, records(), "events", steps_with_details={0, 30})
    assert history.spectra[None].measured == [0, 3]
    assert history.merged_inputs == ((), None, None, MERGED[-1])
