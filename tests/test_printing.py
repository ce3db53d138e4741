import pytest

from tests.whole_records import WHOLE, basin_record, layer_record, whole_record


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
        "took 0.50 s: hessian 75%, trace 25%",
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
        ({"hessian_nullity_lower": None, "hessian_nullity_upper": None}, "nothing is proved of the nullity, counted 7"),
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
    ("changes", "sentence"),
    [
        (
            {},
            (
                "The outputs respond to 5 of 8 directions (3 lost); 7 of 12 leave the loss flat; "
                "a layer merges 4 of 8 inputs"
            ),
        ),
        ({"gradient_rank": 7}, "7 of 8 directions (1 lost);"),
        ({"gradient_rank": 8}, "8 of 8 directions (all that the probe can show);"),
        ({"gradient_rank_gap": 1.0}, "5 of 8 directions (it depends on the tolerance);"),
        ({"projected": True}, "at least 5 of 8 directions"),
        ({"duplicated_activations": 0}, "; no layer merges inputs"),
        ({"hessian_nullity": None}, "; 6 to 8 of 12 leave the loss flat;"),
    ],
    ids=["plain", "one", "saturated", "ill-defined", "projected", "distinct", "bracket"],
)
def test_the_first_line_says_in_words_what_was_found(changes, sentence):
    assert sentence in str(basin_record(**WHOLE | changes)).splitlines()[0]


def test_the_first_line_of_a_record_without_a_hessian_counts_the_directions_that_change_no_output():
    assert "; 7 of 12 change no output" in str(basin_record(gradient_rank=5)).splitlines()[0]


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
