"""What is known of a value: whether it is proved, bracketed, a bound from below, or depends on a tolerance."""

from typing import Literal

import numpy as np

from lightning_basin.history.columns import Column, History
from lightning_basin.record import ILL_DEFINED_GAP

Knowledge = Literal["proved", "bracketed", "lower bound", "ill-defined"]


def rank_knowledge(history: History, layer: str | None = None) -> list[Knowledge]:
    """Say what is known of the rank at each measurement."""
    if history.is_projected:
        return ["lower bound"] * len(history.steps)
    gaps = history.column("gradient_rank_gap", layer)
    return ["ill-defined" if gap < ILL_DEFINED_GAP else "proved" for gap in gaps.tolist()]


def counted_nullity(history: History, layer: str | None = None) -> Column:
    """Return the nullity of the Hessian at each measurement: where its bracket meets, else as its eigenvalues say."""
    lower, upper = (history.column(f"hessian_nullity_{end}", layer) for end in ("lower", "upper"))
    return np.where(lower == upper, lower, history.column("hessian_nullity", layer))


def nullity_knowledge(history: History, layer: str | None = None) -> list[Knowledge]:
    """Say what is known of `counted_nullity` at each measurement.

    Eigenvalues that are counted without a bracket are compared with the residual: their number is ill-defined as long
    as there is one.
    """
    lower, upper = (history.column(f"hessian_nullity_{end}", layer) for end in ("lower", "upper"))
    is_proved = (lower == upper) | (history.column("residual_curvature", layer) == 0)
    kinds: list[Knowledge] = ["ill-defined" if end else "bracketed" for end in np.isnan(lower).tolist()]
    return ["proved" if proved else kind for proved, kind in zip(is_proved.tolist(), kinds, strict=True)]


def is_nullity_known(history: History) -> bool:
    """Whether there is a nullity of the Hessian of the network, or a bracket of one, at some measurement."""
    return not (np.isnan(counted_nullity(history)) & np.isnan(history.column("hessian_nullity_lower"))).all()
