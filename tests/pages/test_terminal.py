import re
from dataclasses import replace

import numpy as np
import pytest

from lightning_basin.history.columns import history_of
from lightning_basin.pages.terminal import spark, summary_of
from tests.runs import records
from tests.whole_records import basin_record, layer_record


def test_table_says_rank_at_the_start_at_zero_loss_and_at_the_end():
    lines = summary_of(history_of(records(), zero_loss_step=10), 200).splitlines()
    assert lines[1].split() == [
        *(
            "layer",
            "parameters",
            "start",
            "zero",
            "loss",
            "rank",
            "trend",
            "Hessian",
            "nullity",
            "duplicates",
            "dead",
            "units",
        )
    ]
    assert lines[-1].split() == ["network", "40", "8", "8", "2", "██▅▃", "38", "2", "–"]
    assert lines[2].split()[:5] == ["fc1", "12", "5", "5", "0"]


def numbers_of(text):
    return re.findall(r"[\d,]*\d", text)


@pytest.mark.parametrize("num_layers", [1, 8, 32, 300])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_digit_is_cropped_at_any_width(width, num_layers):
    size = 24396
    layers = {
        f"encoder.layer.{i}.attention": layer_record(num_parameters=size + i, num_rows=10**6, gradient_rank=size - i)
        for i in range(num_layers)
    }
    history = history_of([basin_record(layers, step=0, num_parameters=10**7, num_rows=10**6, gradient_rank=999_999)])
    text = summary_of(history, width)
    lines = text.splitlines()[1 : 3 + min(num_layers, 32)]
    assert all(f"{size - i:,}" in line for i, line in enumerate(lines[1:-1]))
    assert "999,999" in lines[-1]
    assert max(map(len, lines)) <= width


def test_colors_change_no_character_and_names_are_no_markup(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    names = ("a[red]b", "c\x1b[31md", "[/bold]")
    history = replace(history_of(records()), layers={name: history_of(records()).layers["fc1"] for name in names})
    for width in (20, 60, 200):
        colored, plain = summary_of(history, width, has_colors=True), summary_of(history, width)
        assert colored != plain
        assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain
    assert "a[red]b" in plain
    assert "c%1B[31md" in plain
    assert "[/bold]" in plain


def test_layers_that_are_left_out_are_counted():
    layers = {f"fc{i}": layer_record() for i in range(40)}
    assert summary_of(history_of([basin_record(layers)])).endswith("(the last 8 of 40 layers are left out)")


def test_small_curve_has_a_letter_for_each_of_some_measurements():
    assert spark(np.array([np.nan, 8.0]), 8.0) == " █"
    # Twelve of the hundred, at heights 7 i / 11, of seven steps.
    assert spark(np.arange(100.0), 99.0) == "▁▂▂▃▄▄▅▅▆▇▇█"
