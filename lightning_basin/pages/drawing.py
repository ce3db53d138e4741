"""Figures as parts of a page: SVG whose colours follow the page, in the light and in the dark."""

import io
import re
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_basin.figures.style import BOUND, INFORMATION, INK, NULLITY, PALE, QUIET, RANK, ZERO_LOSS

VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    PALE: "--pale",
    RANK: "--rank",
    NULLITY: "--nullity",
    INFORMATION: "--information",
    BOUND: "--bound",
    ZERO_LOSS: "--zero-loss",
}
"""Variables of the page's style sheet by the colours of the figures."""

WIDTH = 9.2
"""The width of a figure, in inches; the page scales it."""

_RIGHT, _BOTTOM, _TOP = 2.2, 0.5, 0.1
"""Inches around axes over steps: for names of curves, for the steps, and for nothing."""

_HEADER = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"')
_IDENTIFIER = re.compile(r' id="([^"]*)"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def svg_of(
    draw: Callable[[Axes], Axes], *, name: str, height: float, description: str, left: float | None = None
) -> str:
    """Draw a figure as SVG that can stand inside of a page.

    Args:
        draw: A function that draws on axes.
        name: A name of the figure that no other figure of the page has.
        height: The height of the figure, in inches.
        description: What the figure shows, for those who cannot see it.
        left: The inches left of the axes, so that those over steps begin and end at the same places; ``None`` takes
            what the figure needs.
    """
    # Text stays text, and ids of clip paths differ from figure to figure.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained" if left is None else None)
        if left is not None:
            margins = {"left": left / WIDTH, "right": 1 - _RIGHT / WIDTH}
            figure.subplots_adjust(**margins, bottom=_BOTTOM / height, top=1 - _TOP / height)
        draw(figure.add_subplot()).set_title("")  # The page has titles of its own.
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = _METADATA.sub("", _HEADER.sub("", file.getvalue(), count=1))
    svg = _SIZE.sub(rf'\1 role="img" aria-label="{description}"', svg, count=1)
    # Groups are named the same in every figure; what is referred to is not.
    svg = _IDENTIFIER.sub(lambda found: found[0] if f"#{found[1]}" in svg else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(f": {color}", f": var({variable})")
    return svg
