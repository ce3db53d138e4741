import dataclasses
import json
import math

import pytest
import torch

from lightning_basin import BasinRecord
from lightning_basin.layer_names import tag
from tests.whole_records import WHOLE, basin_record, layer_record, whole_record

ADDED_LATER = ("log_det_gram", "activation_rank", "activation_rank_gap")


def test_the_deficit_counts_from_the_smaller_side():
    assert layer_record(num_parameters=12, num_rows=8, gradient_rank=5).gradient_rank_deficit == 3
    assert layer_record(num_parameters=6, num_rows=8, gradient_rank=5).gradient_rank_deficit == 1


def test_the_nullity_counts_from_the_parameters():
    assert layer_record(num_parameters=12, gradient_rank=5).gradient_nullity == 7


@pytest.mark.parametrize(("rank", "parameters", "expected"), [(8, 12, True), (7, 12, False), (8, 8, False)])
def test_a_probe_is_saturated_where_the_rank_fills_it_and_parameters_are_left(rank, parameters, expected):
    assert layer_record(num_rows=8, gradient_rank=rank, num_parameters=parameters).saturated is expected


@pytest.mark.parametrize(("gap", "expected"), [(2.99, True), (3.0, False), (None, False)])
def test_a_rank_with_a_gap_below_three_digits_is_ill_defined(gap, expected):
    assert layer_record(gradient_rank_gap=gap).ill_defined is expected


@pytest.mark.parametrize(
    ("loss", "expected"), [(0.01, -2.0), (0.0, -40.0), (1e-300, -40.0), (-1.0, None), (None, None)]
)
def test_the_logarithm_of_the_loss_ends_at_minus_forty(loss, expected):
    assert basin_record(loss=loss).log10_loss == expected


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="gradient_rank"):
        whole_record().gradient_rank = 3


def test_keys_of_a_bare_record_are_the_documented_ones():
    expected = {
        "basin/gradient_rank": 5.0,
        "basin/gradient_rank_deficit": 3.0,
        "basin/gradient_nullity": 7.0,
        "basin/gradient_rank_gap": 7.5,
        "basin/gradient_effective_rank": 2.25,
        "basin/saturated": 0.0,
        "basin/gradient_rank_at_1e-12": 6.0,
        "basin/gradient_rank_at_1e-08": 5.0,
        "basin/gradient_rank_at_1e-06": 4.0,
        "basin/gradient_rank_at_1e-04": 3.0,
        "basin/gradient_rank_at_1e-02": 2.0,
        "basin/projected": 0.0,
        "basin/measure_seconds": 0.0,
    }
    assert basin_record().scalars() == expected


def test_keys_of_a_whole_record_follow_one_scheme():
    scalars = whole_record().scalars()
    gradient = {
        "gradient_rank",
        "gradient_rank_deficit",
        "gradient_nullity",
        "gradient_rank_gap",
        "gradient_effective_rank",
        "saturated",
    }
    whole = gradient | set(WHOLE) | {"hessian_certified"}
    network = whole | {"gradient_rank_bound", "projected", "loss", "log10_loss", "measure_seconds"}
    network |= {f"gradient_rank_at_1e-{digits}" for digits in ("12", "08", "06", "04", "02")}
    expected = {f"basin/{name}" for name in network}
    expected |= {f"basin_layer_{name}/fc1" for name in whole}
    expected |= {f"basin_layer_{name}/{layer}" for name in gradient for layer in ("fc2", "root")}
    expected |= {"basin_layer_duplicated_activations/output", "basin_layer_duplicated_activations_exact/output"}
    statistics = {
        f"{name}_{p}" for name in ("gradient_rank", "gradient_rank_deficit") for p in ("p10", "median", "p90")
    }
    expected |= {f"basin_stats/{name}" for name in statistics}
    assert set(scalars) == expected


def test_logged_numbers_are_those_of_the_record():
    scalars = whole_record().scalars()
    found = [
        scalars[key]
        for key in (
            "basin/hessian_nullity",
            "basin/log10_loss",
            "basin_layer_gradient_rank/fc2",
            "basin_layer_dead_units/fc1",
            "basin_layer_duplicated_activations/output",
            "basin_layer_duplicated_activations_exact/output",
            "basin/gradient_rank_bound",
        )
    ]
    assert found == [7.0, -2.0, 1.0, 9.0, 3.0, 1.0, 10.0]


def test_statistics_are_percentiles_over_the_layers():
    layers = {f"fc{i}": layer_record(gradient_rank=i, num_rows=100, num_parameters=100) for i in range(11)}
    scalars = basin_record(layers).scalars()
    found = [scalars[f"basin_stats/gradient_rank_{p}"] for p in ("p10", "median", "p90")]
    assert found == [1.0, 5.0, 9.0]


def test_a_single_layer_has_no_statistics():
    assert not any("stats" in key for key in basin_record({"fc": layer_record()}).scalars())


def test_the_prefix_starts_every_key():
    assert all(key.startswith("probe") for key in whole_record().scalars("probe"))


@pytest.mark.parametrize("build", [basin_record, whole_record])
def test_every_logged_value_is_a_finite_float(build):
    values = list(build().scalars().values())
    assert {type(value) for value in values} == {float}
    assert all(math.isfinite(value) for value in values)


def test_a_rank_of_zero_has_no_gap_among_the_keys():
    scalars = basin_record(gradient_rank=0, gradient_rank_gap=None).scalars()
    assert "basin/gradient_rank_gap" not in scalars


def test_measured_zeros_are_logged():
    scalars = basin_record(**dict.fromkeys(WHOLE, 0), loss=0.0, gradient_rank_bound=0).scalars()
    assert [scalars[f"basin/{name}"] for name in (*WHOLE, "loss", "gradient_rank_bound")] == [0.0] * (len(WHOLE) + 2)


def test_blocks_take_the_place_of_layers():
    layers = {f"layers.{i}": layer_record() for i in range(3)}
    scalars = basin_record(layers, blocks={"layers.0-2": layer_record()}).scalars()
    assert "basin_block_gradient_rank/layers.0-2" in scalars
    assert not any(key.startswith("basin_layer") for key in scalars)
    assert "basin_stats/gradient_rank_median" in scalars


@pytest.mark.parametrize("names", [["", "root"], ["a.b", "a/b"]], ids=str)
def test_layers_whose_names_look_alike_keep_their_own_keys(names):
    layers = {name: layer_record(gradient_rank=i) for i, name in enumerate(names)}
    scalars = basin_record(layers).scalars()
    ranks = [value for key, value in scalars.items() if key.startswith("basin_layer_gradient_rank/")]
    assert sorted(ranks) == [0.0, 1.0]


def test_the_layer_called_output_keeps_its_own_duplicates():
    layers = {"output": layer_record(duplicated_activations=7)}
    scalars = basin_record(layers, output_duplicated_activations=2).scalars()
    assert scalars["basin_layer_duplicated_activations/output"] == 7.0


@pytest.mark.parametrize(("layer", "expected"), [("", "root"), ("fc1", "fc1"), ("a.b", "a.b"), ("a/b", "a.b")])
def test_tags_have_no_slash_and_name_the_root(layer, expected):
    assert tag(layer) == expected


HOSTILE = ("\x1b[31mred\x1b[0m", "two\nlines", "[bold]", "<b>", "a|b", "`c`", "*d*", "\u202ereversed", "\\x1b", "\x07")


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_name_is_obeyed_by_a_display(name):
    record = basin_record({name: layer_record(gradient_rank=3)})
    (key,) = (key for key in record.scalars() if key.startswith("basin_layer_gradient_rank/"))
    for shown in (key, *str(record).splitlines()):
        assert shown.isprintable()
        assert not set(shown) & set("[]<>|`*") - set("[]" if "[saturated]" in shown or "ill_defined" in shown else "")
    assert str(record).count("\n") == str(basin_record({"plain": layer_record(gradient_rank=3)})).count("\n")


def test_names_that_are_escaped_do_not_collide():
    tags = {tag(name) for name in (*HOSTILE, *map(tag, HOSTILE))}
    assert len(tags) == 2 * len(HOSTILE)


@pytest.mark.parametrize("build", [basin_record, whole_record])
def test_a_record_survives_a_file_that_holds_builtins_only(build, tmp_path):
    record = build()
    torch.save(record.to_dict(), tmp_path / "record.pt")
    read = BasinRecord.from_dict(torch.load(tmp_path / "record.pt", weights_only=True))
    assert read == record
    assert read.scalars() == record.scalars()


def test_blocks_survive_too():
    record = basin_record({"a": layer_record()}, blocks={"a-b": layer_record(**WHOLE)})
    assert BasinRecord.from_dict(record.to_dict()) == record


def test_the_plain_form_can_be_written_as_json():
    plain = whole_record().to_dict()
    read = json.loads(json.dumps(plain))
    assert read["layers"]["fc1"]["gradient_rank"] == 5


def test_a_record_of_an_earlier_version_is_read_without_the_quantities_that_it_did_not_know():
    plain = whole_record().to_dict()
    for part in (plain, *plain["layers"].values()):
        for name in ADDED_LATER:
            del part[name]
    assert BasinRecord.from_dict(plain) == whole_record()


def test_a_record_of_a_version_without_spectra_is_read_without_them():
    plain = whole_record().to_dict()
    for part in (plain, *plain["layers"].values()):
        del part["gradient_spectrum"], part["gradient_largest"]
    record = BasinRecord.from_dict(plain)
    assert record.gradient_spectrum is record.layers["fc1"].gradient_spectrum is None
    assert record.scalars() == whole_record().scalars()


def test_a_record_of_a_version_without_stages_has_the_whole_time_only():
    plain = whole_record().to_dict()
    del plain["seconds"]
    record = BasinRecord.from_dict(plain)
    assert (record.measure_seconds, record.seconds) == (0.5, {})
    assert "took" not in str(record)


def test_changing_the_plain_form_leaves_the_record_as_it_was():
    record = whole_record()
    plain = record.to_dict()
    plain["gradient_rank_at"].clear()
    plain["seconds"].clear()
    plain["gradient_spectrum"].clear()
    plain["layers"]["fc1"]["gradient_rank_at"].clear()
    plain["layers"].clear()
    assert record == whole_record()
