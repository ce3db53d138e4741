"""What is known of a value: whether it is proved, bracketed, a bound from below, or depends on a tolerance."""

from typing import Literal

from lightning_basin.history.columns import History
from lightning_basin.record import ILL_DEFINED_GAP

Knowledge = Literal["proved", "bracketed", "lower bound", "ill-defined"]


def rank_knowledge(history: History, layer: str | None = None) -> list[Knowledge]:
    """Say what is known of the rank at each measurement.

    Args:
        history: The run.
        layer: The layer's name in logged keys; ``None`` for the network.
    """
    if history.is_projected:
        return ["lower bound"] * len(history.steps)
    gaps = history.column("gradient_rank_gap", layer)
    return ["ill-defined" if gap < ILL_DEFINED_GAP else "proved" for gap in gaps.tolist()]
