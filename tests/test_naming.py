import csv
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_basin import BasinMonitor, measure_basin
from lightning_basin.keys import key_of_tag
from lightning_basin.naming import escaped, printable
from tests.lightning_packages import (
    CSVLogger,
    EarlyStopping,
    LightningModule,
    MisconfigurationException,
    TensorBoardLogger,
)
from tests.training import loader, make_trainer

pytestmark = [pytest.mark.fits, pytest.mark.filterwarnings("ignore:.*LeafSpec")]

# Names with what a terminal, rich, Markdown, HTML, a spreadsheet or a file system make more of than letters. Some
# differ only in what is escaped, in a slash, or in the escape itself.
NAMES = [
    "plain_1",
    "\x1b[31mred\x1b[0m",
    "%1B[31mred%1B[0m",
    "two\nlines",
    "two lines",
    "two\r\nlines",
    "[bold]text[/bold]",
    "(bold)text",
    "<script>alert(1)</script>",
    "&lt;script&gt;",
    "**strong** `code` |cell|",
    "=1+1",
    "-1+1",
    "@SUM(A1)",
    "back\\slash",
    "a/b",
    "a\x00b",
    "\u202eright to left",
    "\x9b31m",
    "tab\there",
    "größe 大きさ",
    "'quoted'",
    '"double"',
    "\ud800",
]
DANGEROUS = re.compile(r"""[\x00-\x1f\x7f-\x9f\u202e\ud800\[\]<>&`*|\\"]""")


def test_two_names_never_look_the_same():
    twice = [*NAMES, *map(escaped, NAMES)]
    assert len({escaped(name) for name in twice}) == len(set(twice))


@pytest.mark.parametrize("name", NAMES)
def test_an_escaped_name_is_harmless_and_can_be_read_back(name):
    assert not DANGEROUS.search(escaped(name))
    assert not escaped(name).startswith(tuple("=+-@"))
    # By hand, not by the function of the standard library that is used: bytes of UTF-8 in hexadecimal.
    pieces = re.sub(r"%([0-9A-F]{2})", lambda found: f"\0{found[1]}", escaped(name)).split("\0")
    raw = pieces[0].encode() + b"".join(bytes.fromhex(piece[:2]) + piece[2:].encode() for piece in pieces[1:])
    assert raw.decode(errors="surrogatepass") == name


@pytest.mark.parametrize("name", ["fc1", "encoder.layers.0", "a_b-c d", "größe", "0", "conv (1)"])
def test_an_ordinary_name_stays_as_it_is(name):
    assert escaped(name) == name


def test_a_message_keeps_its_lines_and_nothing_else():
    assert printable("one\ntwo\x1b[0m\r") == "one\ntwo%1B[0m%0D"


class Named(LightningModule):
    """A linear layer of each name, on the same three inputs; the outputs are the sum."""

    def __init__(self, names=NAMES):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in names if "." not in name})
        self.loss_fn = nn.MSELoss()

    def forward(self, inputs):
        return sum(part(inputs) for part in self.parts.values())

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def record():
    return measure_basin(Named(), torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))


def test_every_layer_has_a_key_of_its_own(record):
    keys = [key for key in record.scalars() if key.startswith("basin_layer_gradient_rank/")]
    assert len(keys) == len(NAMES) == len(record.layers)
    assert not any(map(DANGEROUS.search, keys))
    for name in NAMES:
        assert record.scalars()[f"basin_layer_gradient_rank/{escaped(f'parts.{name}').replace('/', '.')}"] == 6


def test_a_table_has_one_line_for_each_layer_and_moves_no_cursor(record):
    rows = [line for line in str(record).splitlines() if line.startswith("parts.")]
    assert len(rows) == len(NAMES) == len({row.split("  ")[0] for row in rows})
    assert not any(map(DANGEROUS.search, rows))
    assert all(re.search(r"\s6\s+6\s+0\s+0\b", row) for row in rows)  # parameters, rank, deficit, nullity


def test_a_name_with_a_slash_and_one_with_a_dot_have_lines_of_their_own():
    module = nn.ModuleDict({"a/b": nn.Linear(3, 2), "a": nn.ModuleDict({"b": nn.Linear(3, 2)})})
    record = measure_basin(module, torch.randn(9, 3), behavior=lambda m, x: m["a/b"](x) + m["a"]["b"](x))
    assert [line.split()[0] for line in str(record).splitlines() if line.startswith("a.b")] == ["a.b", "a.b'"]


NOISY = ["\x1b[31mred", "two\nlines", "[bold]", "<b>", "=1+1"]


@pytest.mark.fits
@pytest.mark.parametrize("prefix", ["basin", "\x1b[1m[red]", "=cmd|A1", "new\nline"])
def test_numbers_are_found_by_their_key_wherever_they_are_written(tmp_path, prefix):
    monitor = BasinMonitor(20, hessian=False, prefix=prefix, history="csv")
    others = [BasinMonitor(20, hessian=False, prefix="other", history="jsonl")]
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    key = f"{escaped(prefix)}_layer_gradient_rank/parts.{escaped(NOISY[0])}"
    stopping = EarlyStopping(key, patience=99)
    trainer = make_trainer(tmp_path, monitor, *others, stopping, logger=loggers)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Named(NOISY), loader())
    assert not [str(warning.message) for warning in said if "\x1b" in str(warning.message)]
    assert stopping.best_score == monitor.records[-1].layers[f"parts.{NOISY[0]}"].gradient_rank == 6
    keys = set(monitor.records[0].scalars(prefix))
    assert len(keys) == len(monitor.records[0].scalars())
    tags = EventAccumulator(loggers[1].log_dir).Reload().Tags()["scalars"]
    of_network = {name for name in keys if name.startswith(f"{escaped(prefix)}/")}
    assert of_network | {key} <= set(map(key_of_tag, tags))  # TensorBoard gets a part of what layers have.
    with Path(loggers[0].log_dir, "metrics.csv").open(newline="") as file:
        assert keys <= next(csv.DictReader(file)).keys()
    (path,) = tmp_path.rglob(f"{escaped(prefix)}.csv")
    with path.open(newline="") as file:
        (row, *_) = csv.DictReader(file)
    assert float(row[key]) == 6
    (path,) = tmp_path.rglob("other.jsonl")
    assert json.loads(path.read_text().splitlines()[0])[f"other_layer_gradient_rank/parts.{escaped(NOISY[0])}"] == 6
    for text in (*tags, *row):
        assert not DANGEROUS.search(text)
        assert not text.startswith(tuple("=+-@"))


def test_notes_and_refusals_name_a_layer_harmlessly():
    module = nn.ModuleDict({"\x1b[31m[bold]": nn.Linear(3, 2), "other": nn.Linear(3, 2)})

    def without_effect(module, inputs):
        first, other = module.values()
        return other(inputs) + (first(inputs) - 3 * (first(inputs) / 3))

    record = measure_basin(module, torch.randn(5, 3), behavior=without_effect)
    assert [note.split()[1] for note in record.notes] == ["'%1B%5B31m%5Bbold%5D'"]
    assert "\x1b" not in str(record)
    assert "[bold]" not in str(record)
    names = r"\['%1B%5B31m%5Bbold%5D', 'other'\]"
    with pytest.raises(ValueError, match=rf"must be among {names} or hold some of these, got \['%5Bbold%5D'\]"):
        measure_basin(module, torch.randn(5, 3), behavior=without_effect, layers=["[bold]"])


# ---------------------------------------------------------------------------------------------------- names of files


@pytest.mark.parametrize("history", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "prefix",
    ["a" * 300, "ä" * 130, "\x1b" * 90, "a\0b", "a/b", "../basin", "/tmp/basin", "a\\b", "CON", "nul.x", "com1", ""],
)
def test_a_prefix_after_which_no_file_can_be_named_is_refused_in_one_sentence(history, prefix):
    BasinMonitor(prefix=prefix)
    with pytest.raises(MisconfigurationException, match=r"`BasinMonitor\(prefix=\.\.\., history=") as raised:
        BasinMonitor(prefix=prefix, history=history)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 400


@pytest.mark.fits
def test_a_file_of_the_longest_name_is_written(tmp_path):
    longest = "a" * 245
    with pytest.raises(MisconfigurationException, match="of 1 to 245 letters"):
        BasinMonitor(prefix=longest + "a", history="csv")
    for _ in range(2):
        monitor = BasinMonitor(20, hessian=False, prefix=longest, history="csv")
        make_trainer(tmp_path, monitor, max_epochs=1).fit(Named(["a"]), loader())
    assert {path.name for path in tmp_path.glob("*.csv")} == {f"{longest}.csv", f"{longest}-1.csv"}


@pytest.mark.fits
def test_a_folder_whose_name_is_too_long_costs_one_warning(tmp_path):
    monitor = BasinMonitor(20, hessian=False, history="csv")
    trainer = make_trainer(tmp_path / ("a" * 300), monitor, max_epochs=1)
    with pytest.warns(UserWarning, match="could not be written"):
        trainer.fit(Named(["a"]), loader())
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("prefix", [None, 3])
def test_a_prefix_is_a_string(prefix):
    with pytest.raises(MisconfigurationException, match="must be a string"):
        BasinMonitor(prefix=prefix)
