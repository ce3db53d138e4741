"""What a measurement shows of itself on standard error."""

import pytest
from torch import nn

from lightning_basin import measure_basin
from lightning_basin.progress_bar import progress_bar
from tests.networks import drawn


def shown(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_bar_shows_the_stage_and_the_layers_that_are_done(capsys):
    with progress_bar(progress=True) as watch:
        watch("trace", 0, 0)
        watch("gradients", 3, 12)
    text = shown(capsys)
    assert "Measuring, trace: 0layer" in text
    assert "Measuring, gradients:  25%" in text
    assert "3/12" in text
    assert text.endswith("\r")  # The bar has been wiped away.


def test_a_measurement_shows_its_stages_where_it_is_told_to(capsys):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    measure_basin(module, drawn(5, 3), progress=True)
    text = shown(capsys)
    assert all(f"Measuring, {stage}" in text for stage in ("copy", "gradients", "ranks", "duplicates"))
    assert "2/2" in text


@pytest.mark.parametrize("options", [{}, {"progress": None}, {"progress": False}], ids=str)
def test_nothing_is_shown_where_standard_error_is_no_terminal_or_nobody_asks(options, capsys):
    measure_basin(nn.Linear(3, 2), drawn(5, 3), **options)
    assert shown(capsys) == ""


class Terminal:
    """A terminal, that keeps what is written to it."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_short_measurement_leaves_a_terminal_as_it_is(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(progress=None) as watch:
        watch("trace", 0, 0)
    assert terminal.text == ""


def test_an_error_wipes_the_bar_away(capsys):
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        measure_basin(nn.ReLU(), drawn(5, 3), progress=True)
    assert shown(capsys).endswith("\r")
