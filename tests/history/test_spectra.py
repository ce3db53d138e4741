import json
import math

from lightning_basin.history.columns import History, history_of
from lightning_basin.history.spectra import SpectrumHistory, spectrum_history
from tests.runs import SPECTRA, records
from tests.whole_records import basin_record, layer_record


def test_counts_and_the_tolerance_are_those_of_the_records():
    spectrum = history_of(records()).spectra[None]
    assert tuple(spectrum.counts) == SPECTRA
    assert spectrum.measured == [0, 2, 3]
    # gradient_rtol is 1e-14.
    assert spectrum.cuts == [math.log10(1e-14 * 12), None, math.log10(1e-14 * 15), math.log10(1e-14 * 20)]


def test_a_table_has_a_row_for_each_quarter_of_a_decade_between_the_smallest_and_the_largest_value():
    spectrum = SpectrumHistory([{3: 2, 0: 1}, None, {}, {1: 5}], [-14.0, None, None, -14.0])
    counts, first = spectrum.table()
    assert first == 0
    assert counts.tolist() == [[1, 0], [0, 5], [0, 0], [2, 0]]


def test_scopes_without_singular_values_have_no_spectrum():
    assert spectrum_history([layer_record(), None]) is None
    assert spectrum_history([layer_record(gradient_rank=0, gradient_spectrum={}, gradient_largest=0.0)]) is None
    assert history_of([basin_record({"fc1": layer_record()})]).spectra == {}


def test_spectra_come_back_from_json():
    history = history_of(records())
    again = History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False)))
    assert again.spectra.keys() == {None, "fc1", "fc2", "head"}
    for scope, spectrum in history.spectra.items():
        assert again.spectra[scope].counts == spectrum.counts
    assert again.spectra[None].cuts == [-12.921, None, -12.824, -12.699]


def test_a_history_of_an_earlier_version_has_no_spectra():
    plain = history_of(records()).to_dict()
    del plain["spectra"]
    assert History.from_dict(plain).spectra == {}


def test_of_many_layers_those_that_have_lost_most_are_written():
    layers = {
        f"fc{i}": layer_record(gradient_rank=8 - i % 9, gradient_spectrum={0: 1}, gradient_largest=1.0)
        for i in range(20)
    }
    history = history_of([basin_record(layers)])
    assert len(history.spectra) == 20
    assert history.lossiest_layers(4) == ["fc7", "fc8", "fc16", "fc17"]
    assert list(history.to_dict()["spectra"]) == ["fc5", "fc6", "fc7", "fc8", "fc14", "fc15", "fc16", "fc17"]
