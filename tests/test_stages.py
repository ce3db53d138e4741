"""Which stage a moment is counted to, on clocks that stand still unless they are told to go on."""

import pytest
import torch
from torch import Tensor, nn

from lightning_basin import measure_basin
from lightning_basin.evaluation import open_evaluation
from lightning_basin.probe import Probe
from lightning_basin.quantities.ranks import measure_ranks
from lightning_basin.quantities.scopes import select_scopes
from lightning_basin.settings import Settings
from lightning_basin.stages import StageClock, progress_bar
from lightning_basin.structure import StructureCache
from tests.networks import drawn


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float = 1.0) -> float:
        self.now += seconds
        return seconds


def test_an_outer_stage_stands_still_while_an_inner_one_runs():
    time = Time()
    time.passes(100.0)
    clock = StageClock(now=time)
    time.passes(1.0)
    with clock("ranks"):
        time.passes(2.0)
        with clock("hessian"):
            time.passes(4.0)
        time.passes(8.0)
        with clock("hessian"), clock("ranks"):
            time.passes(16.0)
    time.passes(32.0)
    assert clock.seconds() == {"trace": 33.0, "ranks": 26.0, "hessian": 4.0}
    time.passes(64.0)
    assert sum(clock.seconds().values()) == time.now - 100.0


def test_a_stage_ends_with_an_error():
    time = Time()
    clock = StageClock(now=time)
    with pytest.raises(ZeroDivisionError), clock("ranks"), clock("gradients"):
        time.passes(2.0) / 0.0
    time.passes(1.0)
    assert clock.seconds() == {"trace": 1.0, "ranks": 0.0, "gradients": 2.0}


def test_items_are_made_in_one_stage_and_used_in_another():
    time = Time()
    clock = StageClock(now=time)
    with clock("ranks"):
        for _ in clock.each("gradients", (time.passes(1.0) for _ in range(3))):
            time.passes(10.0)
    assert clock.seconds() == {"trace": 0.0, "ranks": 30.0, "gradients": 3.0}


def test_items_that_nobody_asks_for_any_more_leave_no_stage_open():
    time = Time()
    clock = StageClock(now=time)
    for _ in clock.each("gradients", (time.passes(1.0) for _ in range(3))):
        break
    time.passes(5.0)
    assert clock.seconds() == {"trace": 5.0, "gradients": 1.0}


def test_who_watches_is_told_of_each_change_of_the_stage_and_of_the_items_that_are_done():
    told = []
    clock = StageClock(watch=lambda *what: told.append(what))
    with clock("ranks"):
        for _ in clock.each("gradients", range(2), num_items=3):
            with clock("ranks"):  # The same stage: nothing new.
                pass
    assert told == [
        ("ranks", 0, 0),
        *(("gradients", 0, 3), ("ranks", 0, 3)),
        *(("gradients", 1, 3), ("ranks", 1, 3)),
        *(("gradients", 2, 3), ("ranks", 2, 3)),
        ("trace", 0, 0),
    ]


TIME = Time()


class Backward(torch.autograd.Function):
    """The identity, of which each backward pass takes a second."""

    @staticmethod
    def forward(context, inputs):
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        TIME.passes()
        return gradient


class Slow(nn.Module):
    """A linear layer; a copy takes a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return Backward.apply(self.linear(inputs))

    def __deepcopy__(self, _):
        TIME.passes(60.0)
        duplicate = Slow()
        duplicate.load_state_dict(self.state_dict())
        return duplicate


def test_the_copy_of_a_later_measurement_is_a_copy():
    settings, cache = Settings(hessian=False), StructureCache()
    copies = []
    for _ in range(2):
        clock = StageClock(now=TIME)
        with open_evaluation(Slow(), Probe(drawn(4, 3)), settings, cache=cache, clock=clock):
            copies.append(clock.seconds())
    assert copies[0]["copy"] == 60.0
    assert copies[1] == {"trace": 0.0, "copy": 60.0}


@pytest.mark.parametrize("spectrum", [True, False])
def test_backward_passes_are_no_time_of_the_ranks(spectrum):
    settings, generator, clock = Settings(hessian=False, spectrum=spectrum), torch.Generator(), StageClock(now=TIME)
    with open_evaluation(Slow(), Probe(drawn(4, 3)), settings, clock=clock) as evaluation:
        scopes = select_scopes(evaluation.network.layers, "all")
        assert clock.seconds()["copy"] == 60.0
        before = clock.seconds()["trace"]
        with clock("ranks"):
            measure_ranks(evaluation, scopes, None, generator)
    seconds = clock.seconds()
    assert seconds["gradients"] > 0.0
    assert (seconds["copy"], seconds["trace"], seconds["ranks"]) == (60.0, before, 0.0)


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
