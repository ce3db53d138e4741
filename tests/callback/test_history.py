import json

import pytest

from lightning_basin.callback.history import HistoryFile


def lines(history):
    return history.path.read_text().splitlines()


def test_every_row_is_on_disk_as_soon_as_it_is_added(tmp_path):
    history = HistoryFile(tmp_path / "new" / "basin.jsonl")
    history.write([])
    assert lines(history) == []
    for count in range(1, 4):
        history.append({"step": count, "basin/gradient_rank": 6.5})
        assert json.loads(lines(history)[-1]) == {"step": count, "basin/gradient_rank": 6.5}
        assert len(lines(history)) == count


def test_a_column_that_comes_later_is_empty_in_earlier_rows(tmp_path):
    history = HistoryFile(tmp_path / "basin.csv")
    history.write([])
    history.append({"step": 0, "a": 1.5})
    history.append({"step": 1, "a": 2.5, "b": 1.0})
    history.append({"step": 2, "a": 3.5})
    assert lines(history) == ["step,a,b", "0,1.5,", "1,2.5,1.0", "2,3.5,"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_that_was_cut_off_is_written_anew(tmp_path, ending):
    path = tmp_path / f"basin.{ending}"
    path.write_text('{"step": 0, "a"')
    history = HistoryFile(path)
    history.write([{"step": 0, "a": 1.0}])
    history.append({"step": 1, "a": 2.0})
    expected = {"csv": ["step,a", "0,1.0", "1,2.0"], "jsonl": ['{"step": 0, "a": 1.0}', '{"step": 1, "a": 2.0}']}
    assert lines(history) == expected[ending]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .csv or .jsonl, got basin.txt"):
        HistoryFile(tmp_path / "basin.txt")
