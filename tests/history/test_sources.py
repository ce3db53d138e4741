import json
from dataclasses import replace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_basin.callback.history import HistoryFile
from lightning_basin.history.columns import history_of
from lightning_basin.history.sources import read_histories, read_history, run_folders
from lightning_basin.keys import tensorboard_values
from lightning_basin.pages.terminal import summary_of
from tests.runs import RANKS, STEPS, deep_records, records, write_bare_page


def rows(prefix="basin"):
    """What a monitor writes into a table: the step and the keys of a record, and once the step of zero loss."""
    return [
        {
            "step": record.step,
            **record.scalars(prefix),
            **({f"{prefix}/zero_loss_step": 10.0} if record.step == 10 else {}),
        }
        for record in records()
    ]


def write_events(folder, prefix="basin", *, is_grouped=True):
    """Earlier versions wrote all values under their keys."""
    with SummaryWriter(str(folder)) as writer:
        for row in rows(prefix):
            values = tensorboard_values(row, prefix) if is_grouped else row
            for key, value in values.items():
                if key != "step":
                    writer.add_scalar(key, value, row["step"])
            writer.add_scalar("val_loss", row["step"] / 10, row["step"])


def assert_is_the_run(history):
    assert history.steps.tolist() == list(STEPS)
    assert history.column("gradient_rank").tolist() == list(RANKS)
    assert list(history.layers) == ["fc1", "fc2", "head"]
    assert history.column("gradient_rank", "head").tolist() == [3, 3, 2, 1]
    assert history.num_parameters().tolist() == [40] * 4


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_tables_are_read(tmp_path, ending, by_folder):
    table = HistoryFile(tmp_path / f"basin.{ending}")
    table.write(rows())
    history = read_history(tmp_path if by_folder else table.path)
    assert_is_the_run(history)
    assert (history.zero_loss_step, history.name) == (10, tmp_path.name)


@pytest.mark.parametrize("is_grouped", [True, False])
def test_events_of_tensorboard_are_read_with_what_else_was_logged(tmp_path, is_grouped):
    write_events(tmp_path / "version_0", is_grouped=is_grouped)
    history = read_history(tmp_path / "version_0")
    assert_is_the_run(history)
    assert history.zero_loss_step == 10
    assert history.logged["val_loss"].values.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("error")
def test_events_of_a_deep_network_which_say_little_of_each_layer_are_read(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for record in deep_records(32, 9):
            for tag, value in tensorboard_values(record.scalars(), "basin").items():
                writer.add_scalar(tag, value, record.step)
    history = read_history(tmp_path)
    assert history.column("gradient_rank", "layers.15.linear").tolist() == list(range(9))
    assert "▁▂▃▄▅▅▆▇█" in summary_of(history)


def test_report_is_read_with_its_merged_inputs(tmp_path):
    write_bare_page(tmp_path / "report.html", history_of(records(), zero_loss_step=10))
    for source in (tmp_path, tmp_path / "report.html"):
        history = read_history(source)
        assert_is_the_run(history)
        assert history.merged_inputs == history_of(records()).merged_inputs


def test_curves_of_a_run_that_has_gone_on_count_more_than_its_report(tmp_path):
    write_bare_page(tmp_path / "report.html", replace(history_of(records()[:2]), labels=[3, 3, 1, 1, 1]))
    HistoryFile(tmp_path / "basin.csv").write(rows())
    history = read_history(tmp_path)
    assert_is_the_run(history)
    assert history.labels == [3, 3, 1, 1, 1]


def test_a_report_has_what_else_stands_in_the_table_beside_it(tmp_path):
    write_bare_page(tmp_path / "report.html", history_of(records()))
    HistoryFile(tmp_path / "metrics.csv").write([{**row, "val_loss": row["step"] / 10} for row in rows()])
    history = read_history(tmp_path)
    assert history.merged_inputs == history_of(records()).merged_inputs
    assert history.logged["val_loss"].values.tolist() == [0, 1, 2, 3]
    # Another monitor without a report has logged there, too.
    HistoryFile(tmp_path / "held_out.csv").write(rows("held_out"))
    assert read_history(tmp_path).logged["val_loss"].values.tolist() == [0, 1, 2, 3]
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "held_out.csv").write_text("step,val_loss\n0,1\n")
    assert read_history(tmp_path).logged == {}


def test_records_and_histories_are_sources(tmp_path):
    history = read_history(records(), name="a run")
    assert_is_the_run(history)
    assert read_history(history) is history


def test_one_of_several_monitors_must_be_chosen(tmp_path):
    HistoryFile(tmp_path / "basin.jsonl").write(rows())
    HistoryFile(tmp_path / "held_out.jsonl").write(rows("held_out"))
    with pytest.raises(ValueError, match=r"several monitors, with the prefixes \['basin', 'held_out'\]"):
        read_history(tmp_path)
    assert_is_the_run(read_history(tmp_path, prefix="held_out"))
    with pytest.raises(ValueError, match="prefix must be among"):
        read_history(tmp_path, prefix="other")


def test_one_of_several_reports_must_be_chosen(tmp_path):
    write_bare_page(tmp_path / "report.html", history_of(records()))
    write_bare_page(tmp_path / "held_out_report.html", history_of(records()[:1]))
    with pytest.raises(ValueError, match=r"reports \['held_out_report.html', 'report.html'\] of several monitors"):
        read_history(tmp_path)
    assert read_history(tmp_path, prefix="held_out").steps.tolist() == [0]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at"):
        read_history(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds neither"):
        read_history(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    with pytest.raises(ValueError, match="no key ends in '/gradient_rank'"):
        read_history(tmp_path)
    (tmp_path / "page.html").write_text("<p>hello</p>")
    with pytest.raises(ValueError, match="holds no history"):
        read_history(tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.jsonl"):
        read_history(__file__)


@pytest.mark.parametrize("source", [None, 3.5, [1], ["basin", None]])
@pytest.mark.parametrize("read", [read_history, read_histories])
def test_what_is_no_source_is_refused(read, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, FileNotFoundError), match="source must be"):
        read(source)


def test_text_and_empty_cells_of_other_loggers_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,basin/gradient_rank,basin/gradient_nullity,note\n0,3,,hello\n,4,2,\n")
    history = read_history(tmp_path)
    assert history.steps.tolist() == [0, 1]
    assert np.isnan(history.column("gradient_nullity")).tolist() == [True, False]


def test_several_runs_are_read_from_a_folder_above_them(tmp_path):
    for seed in range(3):
        HistoryFile(tmp_path / f"seed_{seed}" / "basin.csv").write(rows())
    write_events(tmp_path / "other" / "version_0")
    histories = read_histories(tmp_path)
    assert [history.name for history in histories] == ["other/version_0", "seed_0", "seed_1", "seed_2"]
    assert run_folders(tmp_path)[0] == tmp_path / "other" / "version_0"


def test_the_only_run_below_a_folder_is_read_and_of_several_one_must_be_chosen(tmp_path):
    write_events(tmp_path / "seed_0" / "version_0")
    for above in (tmp_path, tmp_path / "seed_0"):
        assert_is_the_run(read_history(above))
    HistoryFile(tmp_path / "seed_1" / "basin.csv").write(rows())
    with pytest.raises(ValueError, match=r"has \['seed_0/version_0', 'seed_1'\] below it: pass one of them"):
        read_history(tmp_path)


def test_points_at_zero_loss_and_folders_of_other_tools_are_no_runs(tmp_path):
    write_events(tmp_path / "version_0")
    write_events(tmp_path / "version_0" / "zero_loss")
    write_bare_page(tmp_path / "report.html", history_of(records(), name="shared"))
    other = tmp_path / "elsewhere" / "metrics.csv"
    other.parent.mkdir()
    other.write_text("step,loss\n0,1\n")
    assert run_folders(tmp_path / "version_0") == [tmp_path / "version_0"]
    assert run_folders(other.parent) == []
    # The report makes the folder above a run, of which all below are parts.
    assert [history.name for history in read_histories(tmp_path)] == ["shared"]


def test_a_report_can_be_given_another_name(tmp_path):
    write_bare_page(tmp_path / "report.html", history_of(records(), name="a run"))
    assert read_history(tmp_path / "report.html").name == read_history(tmp_path).name == "a run"
    assert read_history(tmp_path / "report.html", name="b").name == read_history(tmp_path, name="b").name == "b"


def test_runs_of_one_name_are_numbered():
    assert [history.name for history in read_histories([records(), records()])] == ["run", "run (2)"]
    assert [history.name for history in read_histories(records())] == ["run"]
    with pytest.raises(ValueError, match="got none"):
        read_histories([])
