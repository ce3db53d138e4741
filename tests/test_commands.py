import json
import os

import pytest

from lightning_basin.__main__ import main
from lightning_basin.callback.history import HistoryFile
from lightning_basin.history.columns import History
from tests.runs import records


@pytest.fixture
def folder(tmp_path):
    HistoryFile(tmp_path / "run" / "basin.csv").write([{"step": r.step, **r.scalars()} for r in records()])
    return tmp_path / "run"


def test_report_is_written_into_the_log_directory(folder, capsys):
    main(["report", str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "The rank went from 8 to 2" in (folder / "report.html").read_text(encoding="utf-8")


def test_report_of_a_table_goes_where_it_is_told_to(folder, tmp_path):
    main(["report", str(folder / "basin.csv"), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()


def test_report_of_one_of_several_monitors_leaves_that_of_the_other(folder, capsys):
    HistoryFile(folder / "held_out.csv").write([{"step": r.step, **r.scalars("held_out")} for r in records()])
    (folder / "report.html").write_text("mine")
    main(["report", str(folder / "held_out.csv"), "--prefix", "held_out"])
    assert capsys.readouterr().out.strip() == str(folder / "held_out_report.html")
    assert (folder / "report.html").read_text() == "mine"


def test_run_is_printed_as_a_sentence_and_a_table(folder, capsys):
    main(["show", str(folder)])
    name, said, head, *layers = capsys.readouterr().out.strip().splitlines()
    assert name == "run"
    assert said.startswith("The rank went from 8 to 2 of 8 directions.")
    assert head.split()[:5] == ["layer", "parameters", "start", "zero", "loss"] or head.split()[:2] == [
        "layer",
        "parameters",
    ]
    assert [line.split()[:4] for line in layers] == [
        ["fc1", "12", "5", "0"],
        ["fc2", "12", "4", "1"],
        ["head", "12", "3", "1"],
        ["network", "40", "8", "2"],
    ]


def test_run_is_printed_for_programs(folder, capsys):
    main(["show", str(folder), "--json"])
    history = History.from_dict(json.loads(capsys.readouterr().out))
    assert history.column("gradient_rank").tolist() == [8, 8, 5, 2]


def test_output_that_nobody_reads_ends_the_command_without_words(folder, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)  # As `head` does.
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with pytest.raises(SystemExit) as exited:
            main(["show", str(folder), "--json"])
    assert exited.value.code == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["report", "show"])
def test_mistakes_are_one_sentence(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([command, str(tmp_path / "missing")])
    assert "there is nothing at" in capsys.readouterr().err


def test_runs_are_compared_in_a_table_a_file_and_a_figure(folder, tmp_path, capsys):
    other = tmp_path / "other"
    HistoryFile(other / "basin.csv").write(
        [{"step": r.step, **r.scalars(), "val_loss": r.step / 10} for r in records()[:3]]
    )
    HistoryFile(folder / "basin.csv").write([{"step": r.step, **r.scalars(), "val_loss": 7} for r in records()])
    files = ["--csv", str(tmp_path / "runs.csv"), "--figure", str(tmp_path / "runs.svg")]
    main(["compare", str(folder), str(other), "--against", "val_loss", *files])
    head, first, second = capsys.readouterr().out.strip().splitlines()
    assert head.split()[:5] == ["run", "zero", "loss", "rank", "lost"]
    assert (first.split()[:3], first.split()[-1]) == (["run", "never", "2"], "7")
    assert (second.split()[:3], second.split()[-1]) == (["other", "never", "5"], "2")
    assert (tmp_path / "runs.csv").read_text().splitlines()[1].startswith("run,,2.0,")
    assert "<svg" in (tmp_path / "runs.svg").read_text()


def test_a_value_that_no_run_has_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(folder), "--against", "val_loss"])
    assert "has no values of 'val_loss'" in capsys.readouterr().err
