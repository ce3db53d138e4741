import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lightning_basin import report
from lightning_basin.history.columns import history_of
from lightning_basin.history.page import read_page
from lightning_basin.pages.report import page_of
from tests.runs import records, write_bare_page
from tests.whole_records import basin_record, layer_record


class Page(HTMLParser):
    """The texts of a page, its elements, and the addresses that it would load."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self.ids, self.addresses, self.open = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.addresses += [named[name] for name in ("src", "href", "xlink:href") if name in named]

    def handle_data(self, data):
        self.texts += [" ".join(data.split())] if data.strip() else []


@pytest.fixture(scope="module")
def page():
    return page_of(replace(history_of(records(), name="a run", zero_loss_step=10), stopped="rank 5 < 8"))


def test_page_says_what_happened_in_words_and_integers(page):
    page = Page(page)
    text = " ".join(page.texts)
    assert "The rank went from 8 to 2 of 8 directions. The loss reached zero at step 10, at rank 8." in text
    assert "no longer distinguishes all inputs is 'fc2' (duplicates: 1, at 'head': 2)." in text
    assert page.tags.count("svg") == 2 * 8  # A wide and a narrow one.
    headlines = text[text.index("rank of the behavioral gradients") :]
    assert headlines.startswith("rank of the behavioral gradients 2 proved; start 8, zero loss 8")
    assert "flat directions of the loss 38 proved; of 40 parameters" in headlines


def test_page_loads_nothing_and_no_id_is_there_twice(page):
    page = Page(page)
    assert [address for address in page.addresses if not address.startswith(("#", "data:"))] == []
    assert len(page.ids) == len(set(page.ids))


def test_figures_are_valid_and_follow_the_colours_of_the_page(page):
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for figure in figures:
        ET.fromstring(figure)
    assert "var(--rank)" in page
    assert not re.search(r"(?:stroke|fill): #222222", page)


@pytest.mark.parametrize("num_layers", [1, 8, 50, 300])
def test_pages_of_deep_networks_stay_below_two_mebibytes(num_layers):
    spectrum = {"gradient_spectrum": {b: 100 + b for b in range(-56, 8)}, "gradient_largest": 10.0}
    layers = {
        f"encoder.{i}.attention": layer_record(duplicated_activations=i % 5, **spectrum) for i in range(num_layers)
    }
    page = page_of(history_of([basin_record(layers, step=100 * i, **spectrum) for i in range(60)]))
    assert len(page.encode()) < 2 * 2**20


def test_names_with_markup_stay_names():
    name = "<script>alert(1)</script>"
    layers = {name: layer_record(duplicated_activations=1), "a\x1b[31m": layer_record(), "Ü ber/x": layer_record()}
    page = page_of(history_of([basin_record(layers, step=0)], name=name))
    assert Page(page).tags.count("script") == 1
    assert "\x1b" not in page


def test_runs_that_measured_little_have_a_page():
    page = Page(page_of(history_of([basin_record()])))
    assert "The loss" not in " ".join(page.texts)  # None was measured.
    assert "This run has no singular values" in " ".join(page.texts)
    page = Page(page_of(history_of([basin_record(loss=0.5, step=7)])))
    assert "The loss did not reach zero in 7 steps." in " ".join(page.texts)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Measures the page in a frame as wide as a small phone: a window cannot be so narrow.
PHONE = """<iframe id="frame" src="report.html" width="360" height="800"></iframe><p id="overflow"></p><script>
onload = () => {
  const page = frame.contentDocument.documentElement;
  overflow.textContent = page.scrollWidth - page.clientWidth;
}
</script>"""


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_page_opens_in_a_browser_without_an_error_and_fits_a_phone(tmp_path, page):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    (tmp_path / "phone.html").write_text(PHONE, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    ran = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path / 'phone.html'}"], capture_output=True, text=True, timeout=120
    )
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    assert re.findall(r'<p id="overflow">(\d+)', ran.stdout) == ["0"]


@pytest.mark.parametrize(("residual", "known"), [(0.25, "ill-defined"), (0.0, "proved")])
def test_a_nullity_that_was_counted_without_a_bracket_is_shown_as_what_it_is(residual, known):
    record = basin_record(hessian_nullity=7, residual_curvature=residual)
    text = " ".join(Page(page_of(history_of([record]))).texts)
    assert f"flat directions of the loss 7 {known}; of 12 parameters" in text
    assert "counted without a bracket" in text


def test_page_says_why_training_stopped(page):
    assert "Training was stopped: rank 5 &lt; 8" in page


def test_page_goes_to_the_log_directory(tmp_path):
    told = replace(history_of(records()), labels=["a", "b", "a", "b", 5], stopped="rank 5 < 8")
    write_bare_page(tmp_path / "report.html", told)
    assert report(tmp_path) == tmp_path / "report.html"
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    again = read_page(tmp_path / "report.html")
    assert (again.labels, again.stopped) == (told.labels, told.stopped)
