import dataclasses
import json
import math

import pytest
import torch

from lightning_basin import BasinRecord, LayerRecord
from lightning_basin.layer_names import MAX_LAYER_CURVES, layer_blocks, tag

TOLERANCES = (1e-12, 1e-8, 1e-6, 1e-4, 1e-2)


def layer_record(**changes):
    """A layer of which only the gradients were measured."""
    values = {
        "num_parameters": 12,
        "num_rows": 8,
        "gradient_rank": 5,
        "gradient_rank_gap": 7.5,
        "gradient_rank_at": dict(zip(TOLERANCES, (6, 5, 4, 3, 2), strict=True)),
        "gradient_effective_rank": 2.25,
        "gradient_rtol": 1e-14,
        "gradient_method": "svd",
    }
    return LayerRecord(**values | changes)


WHOLE = {
    "hessian_nullity": 7,
    "hessian_nullity_lower": 6,
    "hessian_nullity_upper": 8,
    "hessian_nullity_strict": 3,
    "hessian_negative": 1,
    "hessian_largest": 2.5,
    "residual_curvature": 0.125,
    "smallest_curvature": 0.25,
    "gauss_newton_nullity": 6,
    "duplicated_activations": 4,
    "duplicated_activations_exact": 2,
    "dead_units": 9,
}


ADDED_LATER = ("log_det_gram", "activation_rank", "activation_rank_gap")

HOW = {"hessian_resolving_loss": 3e-4, "hessian_rtol": 1e-14, "hessian_method": "dense"}


def basin_record(layers=None, **changes):
    values = dataclasses.asdict(layer_record()) | {"num_inputs": 8}
    return BasinRecord(**values | {"layers": layers or {}} | changes)


def whole_record():
    layers = {
        "fc1": layer_record(**WHOLE, **HOW),
        "fc2": layer_record(gradient_rank=1),
        "": layer_record(gradient_rank=0),
    }
    return basin_record(
        layers,
        **WHOLE,
        **HOW,
        loss=0.01,
        gradient_rank_bound=10,
        output_duplicated_activations=3,
        output_duplicated_activations_exact=1,
        notes=("a note",),
        measure_seconds=0.5,
        step=40,
    )


# Derived quantities.


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


# Logged keys.


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
    network = whole | {"gradient_rank_bound", "loss", "log10_loss", "measure_seconds"}
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


# Plain form.


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


def test_changing_the_plain_form_leaves_the_record_as_it_was():
    record = whole_record()
    plain = record.to_dict()
    plain["gradient_rank_at"].clear()
    plain["layers"]["fc1"]["gradient_rank_at"].clear()
    plain["layers"].clear()
    assert record == whole_record()


# Readable form.


def test_the_table_shows_every_number_of_every_layer():
    numbers = {
        "num_parameters": 1101,
        "gradient_rank": 1003,
        "num_rows": 1050,
        "hessian_nullity": 213,
        "duplicated_activations": 317,
        "dead_units": 419,
    }
    text = str(basin_record({"fc1": layer_record(**numbers)}))
    (line,) = (line for line in text.splitlines() if line.startswith("fc1"))
    # Deficit 1050 - 1003, nullity 1101 - 1003.
    assert line.split() == ["fc1", "1,101", "1,003", "47", "98", "213", "317", "419"]


def test_the_heading_shows_the_numbers_of_the_network():
    text = str(whole_record())
    for part in (
        "step 40",
        "8 inputs",
        "8 outputs",
        "12 parameters",
        "loss 0.01",
        "rank by svd",
        "1.0e-14",
        "gap 7.5 digits",
        "1e-12: 6, 1e-08: 5, 1e-06: 4, 1e-04: 3, 1e-02: 2",
        "effective 2.2",
        "bound the rank by 10",
        "Hessian by dense: nullity 7, certified between 6 and 8: resolve by training until the loss is below about",
        "zero to rounding 3, negative 1, Gauss-Newton nullity 6, residual curvature 1.2e-01",
        "note: a note",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"hessian_nullity": 6, "hessian_nullity_lower": 6, "hessian_nullity_upper": 6},
            "Hessian by bracket: nullity 6, certified: smallest curvature 2.5e-01 > 2·residual curvature 6.0e-02",
        ),
        (
            {"hessian_nullity": None, "hessian_resolving_loss": 2e-7},
            "between 6 and 8: resolve by training until the loss is below about 2e-07",
        ),
        (
            {"hessian_nullity": None, "hessian_resolving_loss": 0.0},
            "between 6 and 8: resolve by training until the loss is exactly zero",
        ),
        (
            {"hessian_nullity": None, "hessian_resolving_loss": None},
            "between 6 and 8: smallest curvature 2.5e-01 against 2·residual curvature 6.0e-02",
        ),
        (
            {"hessian_nullity_lower": None, "hessian_nullity_upper": None},
            "nothing is proved of the nullity, counted 7",
        ),
    ],
    ids=["certified", "open", "beyond rounding", "open, any loss", "not convex"],
)
def test_one_sentence_says_what_is_known_of_the_nullity(changes, expected):
    known = WHOLE | {"residual_curvature": 0.03, "hessian_method": "bracket"} | changes
    assert expected in str(basin_record(**known))


def test_a_bracket_stands_in_the_table_where_its_ends_do_not_meet():
    text = str(basin_record(**WHOLE | {"hessian_nullity": None, "hessian_method": "bracket"}))
    assert "6 to 8" in text.splitlines()[-1]


def test_the_table_has_lines_for_output_and_network():
    lines = str(whole_record()).splitlines()
    (output,) = (line.split() for line in lines if line.startswith("output"))
    (network,) = (line.split() for line in lines if line.startswith("network"))
    assert output == ["output", "3"]
    assert network == ["network", "12", "5", "3", "7", "7", "4", "9"]


def test_the_table_fits_into_a_terminal():
    assert max(len(line) for line in str(whole_record()).splitlines() if "note" not in line) <= 120


def test_the_root_is_called_root_in_the_table():
    assert any(line.startswith("root ") for line in str(whole_record()).splitlines())


@pytest.mark.parametrize(
    ("changes", "flag"), [({"gradient_rank": 8}, "saturated"), ({"gradient_rank_gap": 1.0}, "ill")]
)
def test_flags_stand_in_the_heading_where_they_are_raised(changes, flag):
    assert f"[{flag}" in str(basin_record(**changes))
    assert f"[{flag}" not in str(basin_record())


def test_a_bare_record_is_readable_too():
    text = str(basin_record(gradient_rank=0, gradient_rank_gap=None))
    assert "gap none" in text
    assert "None" not in text
    assert "nan" not in text


# Blocks.

NAMINGS = {
    "transformer": lambda n: [f"layers.{i // 2}.{('norm', 'linear')[i % 2]}" for i in range(n)],
    "flat": lambda n: [f"fc_{i}" for i in range(n)],
    "sequential": lambda n: [str(i) for i in range(n)],
    "two towers": lambda n: [f"{('left', 'right')[2 * i >= n]}.{i}.linear" for i in range(n)],
    "root and stem first": lambda n: ["", "stem", *(f"blocks.{i}.fc" for i in range(n - 3)), "head"],
    "root and names without numbers": lambda n: ["", *(f"encoder.layer_{i}.fc" for i in range(n - 1))],
    "nested numbers": lambda n: [f"stages.{i // 8}.blocks.{i % 8}.conv" for i in range(n)],
}


@pytest.mark.parametrize("size", [0, 1, 32])
@pytest.mark.parametrize("naming", ["flat", "sequential", "transformer"])
def test_few_layers_are_not_grouped(naming, size):
    assert layer_blocks(NAMINGS[naming](size)) == {}


@pytest.mark.parametrize("size", [33, 34, 63, 64, 65, 66, 96, 97, 128, 199, 200])
@pytest.mark.parametrize("naming", NAMINGS)
def test_blocks_hold_every_layer_once_and_in_order(naming, size):
    names = NAMINGS[naming](size)
    blocks = layer_blocks(names)
    assert 1 <= len(blocks) <= MAX_LAYER_CURVES
    assert [name for members in blocks.values() for name in members] == names


@pytest.mark.parametrize("size", [33, 64, 200])
@pytest.mark.parametrize("naming", NAMINGS)
def test_tags_of_blocks_are_names(naming, size):
    tags = [tag(block) for block in layer_blocks(NAMINGS[naming](size))]
    assert len(set(tags)) == len(tags)
    assert not [name for name in tags if name.startswith(("-", ".")) or name.endswith(("-", "."))]


def test_layers_that_share_a_number_are_one_block():
    blocks = layer_blocks(NAMINGS["transformer"](40))
    assert blocks["layers.3"] == ["layers.3.norm", "layers.3.linear"]


def test_neighbours_are_joined_where_numbers_leave_too_many():
    assert list(layer_blocks(NAMINGS["sequential"](64)))[:2] == ["0-1", "2-3"]


def test_ranges_of_one_stem_name_the_last_number_only():
    blocks = layer_blocks([f"layers.{i}.fc" for i in range(64)])
    assert next(iter(blocks)) == "layers.0-1"


def test_a_range_that_starts_at_the_root_says_so():
    assert next(iter(layer_blocks(NAMINGS["root and names without numbers"](64)))) == "root-encoder.layer_0.fc"
