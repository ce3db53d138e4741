"""The measurements of a run as a table on disk: CSV or JSON lines, one row a measurement."""

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any


def find_unused(path: Path) -> Path:
    """Return the path or, where a file is there already, one with the first number behind its name that is free."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(candidate for candidate in chain([path], numbered) if not candidate.is_file())


class HistoryFile:
    """A table that grows row by row, and is complete after every one; a value is a number, or an object of JSON.

    The path ends in ``.csv``, or in ``.jsonl`` with one JSON object a line; `write` begins the file anew.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path must end in .csv or .jsonl, got {path.name}")
        self.path = path
        self._columns: list[str] = []

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file, also one that an earlier run left half-written."""
        rows = list(rows)
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            if self.path.suffix == ".csv" and rows:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(map(_cells, rows))
            elif rows:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
        unfinished.replace(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; a CSV file is written anew where the row has a column that was not there."""
        if self.path.suffix == ".jsonl":
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")
        elif row.keys() <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(_cells(row))
        else:
            with self.path.open(newline="", encoding="utf-8") as file:
                earlier = list(csv.DictReader(file))
            self.write([*earlier, row])


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV file: a cell takes no object, but its JSON."""
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()}
