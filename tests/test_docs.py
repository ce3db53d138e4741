"""The pages say what is there: links lead somewhere, examples run, and every quantity is in the README and defined."""

import doctest
import re
from pathlib import Path

import pytest

from lightning_basin.record import LAYER_QUANTITIES, NETWORK_QUANTITIES

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
OF_A_RUN = {"zero_loss_step"}
IN_THE_RECORD = {
    *("merged_inputs", "train_merged_inputs", "gradient_rank_at_<rtol>", "gradient_spectrum", "gradient_largest"),
    "seconds",
}
LOGGED = {re.sub(r"_\d.*", "_<rtol>", name) for name in (*NETWORK_QUANTITIES, *LAYER_QUANTITIES)}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def names_of(cell):
    """The quantities that the first cell of a row, or a heading, names; ``_upper`` continues the name before."""
    first, *others = re.findall(r"`([^`]*)`", cell)
    stem = first.rpartition("_")[0]
    return {first, *(stem + name if name.startswith("_") else name for name in others)}


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            found = page if target == "" else (page.parent / target).resolve()
            assert found.exists(), link
            assert not anchor or anchor in anchors(found), link


@every_page
def test_examples_of_a_page_give_what_they_say(page):
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def test_the_site_has_every_page():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if f" {page}\n" not in site] == []


def test_the_table_of_the_readme_has_every_quantity():
    rows = re.findall(r"^\| (`.*?) \| .* \| *(✓|record|) *\|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    marks = {name: mark for cell, mark in rows for name in names_of(cell)}
    assert set(marks) == LOGGED | IN_THE_RECORD | OF_A_RUN
    assert {name for name, mark in marks.items() if mark == "✓"} == set(LAYER_QUANTITIES)
    assert {name for name, mark in marks.items() if mark == "record"} == IN_THE_RECORD


def test_every_quantity_is_defined():
    headings = re.findall(r"^### (.*)$", (ROOT / "docs/definitions.md").read_text("utf-8"), re.MULTILINE)
    assert {name for heading in headings for name in names_of(heading)} == LOGGED | IN_THE_RECORD | OF_A_RUN
