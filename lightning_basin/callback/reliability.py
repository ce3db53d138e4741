"""Ranks that say more of the measurement than of the network."""

from collections.abc import Sequence

from lightning_basin.record import ILL_DEFINED_GAP, LayerRecord


def rank_in_doubt(quantity: str, parts: Sequence[LayerRecord], *, projected: bool) -> str | None:
    """Why a rank, or what is computed from it, says more of the measurement than of the network.

    Args:
        quantity: Its name; of statistics over layers, with the quantile behind it.
        parts: The network, the layer, or the layers that the statistics are over.
        projected: Whether ranks are lower bounds.

    Returns:
        What such a rank is, with what helps; ``None`` for a rank that is the network's own, or no rank at all.
    """
    if quantity.startswith(("gradient_rank_gap", "gradient_rank_bound")) or not quantity.startswith(_RANKS):
        return None
    if projected:
        return "lower bounds, those of random combinations of outputs. HINT: pass a smaller BasinMonitor(probe=...)"
    if any(_looks_saturated(part, quantity) for part in parts):
        return "saturated, those of the probe and not of the network. HINT: pass a larger BasinMonitor(probe=...)"
    if quantity.startswith(_AT_OWN_TOLERANCE):
        return None
    if any(part.ill_defined for part in parts):
        return f"ill-defined, as no gap of {ILL_DEFINED_GAP:g} digits separates what counts from what does not"
    return None


_RANKS = ("gradient_rank", "gradient_nullity", "gradient_effective_rank")
_AT_OWN_TOLERANCE = ("gradient_rank_at_", "gradient_effective_rank")


def _looks_saturated(part: LayerRecord, quantity: str) -> bool:
    if not quantity.startswith("gradient_rank_at_"):
        return part.saturated
    return part.quantities().get(quantity) == part.num_rows < part.num_parameters
