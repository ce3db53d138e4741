"""Where the history of a run is read from: records, tables, and the folders that loggers leave."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_basin.history.columns import History, Logged, columns_of, history_of
from lightning_basin.history.details import DETAILS, with_details
from lightning_basin.history.page import PAGE, page_name, read_page
from lightning_basin.keys import Key, key_of_tag
from lightning_basin.record import BasinRecord

Source = History | str | Path | Iterable[BasinRecord]
"""A history, records of one run, or the path of a table or a folder."""

_TABLES = (".csv", ".jsonl")
_EVENTS = "events.out.tfevents.*"
_PATTERNS = (f"*{PAGE}", *(f"*{ending}" for ending in _TABLES), _EVENTS)
_RANK = "/gradient_rank"
"""The end of a key that every measurement has: what is before it is the prefix of a monitor."""

Points = Mapping[str, Mapping[int, Any]]
"""Numbers by key and by step; under a key that ends in `DETAILS`, what `details_of` returned."""


def read_history(source: Source, *, name: str | None = None, prefix: str | None = None) -> History:
    """Read the history of one run.

    Of a folder of tables (``*.csv``, ``*.jsonl``), TensorBoard events and reports, or above the only run, the report is
    read, unless events and tables, of which the newest counts, have more measurements: those of a run that goes on, or
    that was killed. Without ``name`` the run has the name in the report, else that of the folder; without ``prefix``
    there must be one monitor.
    """
    if isinstance(source, History):
        return source
    if not isinstance(source, str | Path):
        records = _items(source)
        for record in records:
            if not isinstance(record, BasinRecord):
                raise _no_source(record)
        return history_of(records, name=name or "run")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source must be a table or a folder, but there is nothing at {path}")
    if path.suffix == ".html":
        history = read_page(path)
        return replace(history, name=name or history.name)
    folder = run_folder(path)
    path = path if path.is_file() else folder
    pages = sorted(folder.glob(f"*{PAGE}")) if path.is_dir() else []
    if not pages:
        name = name or _name_of(folder.resolve())
        return _history_of_points(_points_of(path), name=name, prefix=prefix, source=path)
    if prefix is None and len(pages) > 1:
        names = [page.name for page in pages]
        raise ValueError(f"{path} holds the reports {names} of several monitors: pass the prefix of one, or its report")
    page = pages[0] if prefix is None else folder / page_name(prefix)
    history = read_page(page)
    return _with_curves(replace(history, name=name or history.name), page, prefix)


def _items(source: Any) -> list[Any]:
    if not isinstance(source, Iterable):
        raise _no_source(source)
    return list(source)


def _no_source(item: Any) -> TypeError:
    return TypeError(f"source must be records of a monitor, or the path of a table or folder, got {item!r:.80}")


def _name_of(folder: Path) -> str:
    """The name of a folder; with the one above it, where a logger has numbered it."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def _with_curves(history: History, page: Path, prefix: str | None) -> History:
    """What a report says, with what else was logged; or the curves beside it, where a run has gone on."""
    points = _points_of_folder(page.parent)
    prefixes = _prefixes(points)
    own = prefix or page.name.removesuffix(PAGE).removesuffix("_") or "basin"
    chosen = prefixes[0] if len(prefixes) == 1 else own
    if chosen not in prefixes:
        return history
    curves = _history_of_points(points, name=history.name, prefix=chosen, source=page.parent)
    if len(curves.steps) > len(history.steps):
        return replace(curves, labels=history.labels)
    return replace(history, logged=curves.logged)


def run_folders(folder: str | Path) -> list[Path]:
    """Return all folders below one, and itself, which hold a run, sorted.

    A folder below that of a run is a part of this run: that of the single points at zero loss, for example.
    """
    candidates = {path.parent for pattern in _PATTERNS for path in Path(folder).rglob(pattern)}
    runs: list[Path] = []
    for candidate in sorted(candidates):
        is_part = any(run in candidate.parents for run in runs)
        if not is_part and (any(candidate.glob(f"*{PAGE}")) or _prefixes(_points_of(candidate))):
            runs.append(candidate)
    return runs


def run_folder(path: Path) -> Path:
    """Return the folder of one run: that of a file, or a folder with files of a run, or the only run below it."""
    if path.is_file():
        return path.parent
    if any(next(path.glob(pattern), None) for pattern in _PATTERNS):
        return path
    runs = run_folders(path)
    if len(runs) > 1:
        names = [str(run.relative_to(path)) for run in runs]
        raise ValueError(f"{path} must be the folder of one run, but has {names} below it: pass one of them")
    return runs[0] if runs else path


def _points_of(path: Path) -> Points:
    """All values at a path. What a table says is exact; events hold float32."""
    if path.is_file():
        return _points_of_rows(_rows_of(path))
    points = _points_of_folder(path)
    if not points:
        raise ValueError(f"{path} must hold TensorBoard events or a table ({' or '.join(_TABLES)}), but holds neither")
    return points


def _points_of_folder(folder: Path) -> Points:
    tables = [table for ending in _TABLES for table in folder.glob(f"*{ending}")]
    points: dict[str, Mapping[int, Any]] = dict(_points_of_events(folder)) if any(folder.glob(_EVENTS)) else {}
    for table in sorted(tables, key=lambda path: path.stat().st_mtime):
        points |= _points_of_rows(_rows_of(table))
    return points


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix not in _TABLES:
        raise ValueError(f"a table must end in {' or '.join(_TABLES)}, got {path.name}")
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def _points_of_rows(rows: Iterable[Mapping[str, Any]]) -> Points:
    points: dict[str, dict[int, Any]] = {}
    for index, row in enumerate(rows):
        step = int(float(row.get("step") or index))
        for key, cell in row.items():
            value = _details(cell) if key.endswith(f"/{DETAILS}") else _number(cell)
            if key != "step" and value is not None:
                points.setdefault(key, {})[step] = value
    return points


def _details(cell: Any) -> Mapping[str, Any] | None:
    """An object of JSON lines, or its text in a cell of a CSV file, which may be empty."""
    return json.loads(cell) if isinstance(cell, str) and cell else cell or None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):  # An empty cell, or text of another logger.
        return None


def _points_of_events(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # Loading it takes a second.

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    tags = events.Reload().Tags()
    # In the order of their first values, which is that of the layers.
    points: dict[str, Mapping[int, Any]] = {
        key_of_tag(tag): {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]
    }
    texts = {tag: events.Tensors(tag) for tag in tags["tensors"] if tag.endswith(f"/{DETAILS}")}
    return points | {
        tag: {event.step: json.loads(event.tensor_proto.string_val[0]) for event in found}
        for tag, found in texts.items()
    }


def _history_of_points(points: Points, *, name: str, prefix: str | None, source: Path) -> History:
    prefixes = _prefixes(points)
    if not prefixes:
        raise ValueError(f"{source} must hold values of a BasinMonitor, but no key ends in {_RANK!r}")
    if prefix is None and len(prefixes) > 1:
        raise ValueError(f"{source} holds values of several monitors, with the prefixes {prefixes}: pass one as prefix")
    chosen = prefixes[0] if prefix is None else prefix
    if chosen not in prefixes:
        raise ValueError(f"prefix must be among {prefixes}, got {chosen!r}")
    steps = sorted(points[f"{chosen}{_RANK}"])
    network: dict[str, Mapping[int, Any]] = {}
    layers: dict[str, dict[str, Mapping[int, float]]] = {}
    logged: dict[str, Logged] = {}
    for key_name, values in points.items():
        key = Key.of(key_name, chosen)
        if key is None:
            logged[key_name] = _logged(values)
        elif key.group == "network":
            network[key.quantity] = values
        elif key.scope:
            layers.setdefault(key.scope, {})[key.quantity] = values
    zero_loss, details = network.pop("zero_loss_step", {}), network.pop(DETAILS, {})
    history = History(
        name=name,
        steps=np.array(steps),
        network=_aligned(network, steps),
        # Of the outputs only duplicates are counted: they are no layer.
        layers={layer: _aligned(columns, steps) for layer, columns in layers.items() if "gradient_rank" in columns},
        zero_loss_step=next((int(value) for value in zero_loss.values()), None),
        is_projected=any(network.get("projected", {}).values()),
        logged=logged,
    )
    return with_details(history, details)


def _prefixes(points: Points) -> list[str]:
    """The prefixes of the monitors whose values these are, sorted."""
    return sorted(key.removesuffix(_RANK) for key in points if key.endswith(_RANK))


def _aligned(columns: Mapping[str, Mapping[int, float]], steps: Sequence[int]) -> Mapping[str, Any]:
    return columns_of([{name: values[step] for name, values in columns.items() if step in values} for step in steps])


def _logged(values: Mapping[int, float]) -> Logged:
    steps = sorted(values)
    return Logged(np.array(steps), np.array([values[step] for step in steps]))


def read_histories(sources: Source | Iterable[Source], *, prefix: str | None = None) -> list[History]:
    """Read the histories of one run or of several, each as `read_history` does; runs of the same name are numbered.

    Of a folder without values of its own, all runs below are read.
    """
    if isinstance(sources, History | str | Path):
        sources = [sources]
    items = _items(sources)
    if items and all(isinstance(item, BasinRecord) for item in items):
        items = [items]
    histories = [history for item in items for history in _histories_of(item, prefix)]
    if not histories:
        raise ValueError("sources must be records, tables or folders of runs, got none")
    seen: dict[str, int] = {}
    named = []
    for history in histories:
        seen[history.name] = seen.get(history.name, 0) + 1
        number = seen[history.name]
        named.append(history if number == 1 else replace(history, name=f"{history.name} ({number})"))
    return named


def _histories_of(source: Source, prefix: str | None) -> Iterator[History]:
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    runs: list[Source] = [*run_folders(str(source))] if is_folder else []
    for run in runs or [source]:
        yield read_history(run, prefix=prefix)
