"""The history that a report holds: a page is what people look at, and what programs read."""

import json
import re
from pathlib import Path

from lightning_basin.history.columns import History
from lightning_basin.layer_names import tag

PAGE = "report.html"
"""The end of the name of every report."""

DATA_ID = "lightning-basin-history"
"""The id of the element of a page that holds its history as JSON."""

_DATA = re.compile(rf'<script type="application/json" id="{DATA_ID}">(.*?)</script>', re.DOTALL)


_LARGE = 2**20
"""The number of characters above which a history's layers keep only `_SHOWN`: a page has less than two mebibytes."""

_SHOWN = (
    *("gradient_rank", "gradient_rank_deficit", "gradient_nullity", "hessian_nullity", "hessian_nullity_lower"),
    *("hessian_nullity_upper", "duplicated_activations", "dead_units"),
)
"""Quantities of layers that a page shows."""


def page_name(prefix: str) -> str:
    """Return the name of a monitor's report: ``report.html``, or ``<prefix>_report.html`` for a prefix of its own."""
    return PAGE if prefix == "basin" else f"{tag(prefix)}_{PAGE}"


def write_data(history: History) -> str:
    """Write a history as JSON that may stand inside of a page; of a long run of many layers, what the page shows."""
    data = history.to_dict()
    text = json.dumps(data, separators=(",", ":"))
    if len(text) > _LARGE:
        data["layers"] = {
            layer: {name: columns[name] for name in _SHOWN if name in columns}
            for layer, columns in data["layers"].items()
        }
        text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # No element of a page can end inside of the data.


def read_page(path: Path) -> History:
    """Read the history that a report holds."""
    if not path.is_file():
        raise FileNotFoundError(f"source must be a report, but there is none at {path}")
    found = _DATA.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} must be a report of lightning_basin, but holds no history")
    return History.from_dict(json.loads(found[1]))
