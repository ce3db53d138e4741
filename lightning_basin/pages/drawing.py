"""Figures as parts of a page: SVG whose colours follow the page, in the light and in the dark."""

import io
import re
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_basin.figures.style import (
    BOUND,
    INFORMATION,
    INK,
    NULLITY,
    PALE,
    QUIET,
    RANK,
    TOLERANCE_COLORS,
    ZERO_LOSS,
)

VARIABLES = {
    **{color: f"--tolerance-{number}" for number, color in enumerate(TOLERANCE_COLORS, start=1)},
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

WIDTH, NARROW_WIDTH = 9.2, 5.2
"""The widths of a figure, in inches, on a page and on a phone; the page scales it."""

_RIGHT, _BOTTOM, _TOP = 1.9, 0.5, 0.1
"""Inches around axes over steps: for names of curves, for the steps, and for nothing."""

_REM_PER_INCH = 4.1
"""How small a figure becomes before its box scrolls: letters have then two thirds of their size in the text."""

_HEADER = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"')
_IDENTIFIER = re.compile(r' id="([^"]*)"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def svg_of(
    draw: Callable[[Axes], Axes],
    *,
    name: str,
    height: float,
    description: str,
    left: float | None = None,
    narrow: float = NARROW_WIDTH,
) -> str:
    """Draw a figure as SVG that can stand inside of a page: a wide one, and a narrow one for phones, in inches.

    ``left`` is what stands left of the axes, so that those over steps begin and end at the same places; ``None`` takes
    what the figure needs. The name is no other figure's; the description is for those who cannot see it.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained" if left is None else None)
    with mpl.rc_context({"font.size": 10, "font.family": "sans-serif"}):
        draw(figure.add_subplot()).set_title("")  # The page has titles of its own.
        svgs = []
        for kind, width in (("wide", WIDTH), ("narrow", narrow)):
            figure.set_size_inches(width, height)
            if left is not None:
                margins = {"left": left / width, "right": 1 - _RIGHT / width}
                figure.subplots_adjust(**margins, bottom=_BOTTOM / height, top=1 - _TOP / height)
            attributes = f'class="{kind}" style="min-width: {_REM_PER_INCH * width:.1f}rem" role="img"'
            svgs.append(_saved(figure, f"{name}_{kind}", f'{attributes} aria-label="{description}"'))
    return "\n".join(svgs)


def _saved(figure: Figure, name: str, attributes: str) -> str:
    file = io.StringIO()
    # Text stays text, and ids of clip paths differ from figure to figure.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = _METADATA.sub("", _HEADER.sub("", file.getvalue(), count=1))
    svg = _SIZE.sub(rf"\1 {attributes}", svg, count=1)
    # Groups are named the same in every figure; what is referred to is not.
    svg = _IDENTIFIER.sub(lambda found: found[0] if f"#{found[1]}" in svg else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(f": {color}", f": var({variable})")
    return svg
