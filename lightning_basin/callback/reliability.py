"""Measurements by which no run is stopped: they say nothing of the end of training, or more of the probe."""

from collections.abc import Sequence

from lightning_basin.callback.session import Session
from lightning_basin.keys import Key
from lightning_basin.record import ILL_DEFINED_GAP, BasinRecord, LayerRecord


def passed_over_because(monitored: str, record: BasinRecord, session: Session, *, after_zero_loss: bool) -> str | None:
    """Say why a measurement is no reason to stop, as the rest of a sentence; ``None`` where it counts.

    The reason is empty where nobody needs to know it.
    """
    if after_zero_loss and session.results.zero_loss_step is None:
        return (
            "waits for zero loss, and none is measured: it will not stop this run. HINT: pass "
            "RankEarlyStopping(after_zero_loss=False), or BasinMonitor(loss_fn=...)"
            if record.loss is None
            else ""
        )
    key = Key.of(monitored, session.arguments.prefix)
    assert key is not None, "the key of a value that the monitor logs"
    reason = unreliable_because(key.quantity, key.records_in(record), projected=record.projected)
    if reason is not None:
        return f"passes over ranks that are {reason}"
    is_measured_rarely = any(monitored in session.log_values(earlier) for earlier in session.results.records)
    # Not every measurement has a spectrum, say: such a one says nothing of the quantity.
    return "" if is_measured_rarely and monitored not in session.callback_values(record) else None


def unreliable_because(quantity: str, records: Sequence[LayerRecord], *, projected: bool) -> str | None:
    """Say why a rank, or what follows from it, tells more of the measurement than of the network, and what helps."""
    if quantity.startswith(("gradient_rank_gap", "gradient_rank_bound")) or not quantity.startswith(_RANKS):
        return None
    if projected:
        return "lower bounds, those of random combinations of outputs. HINT: pass a smaller BasinMonitor(probe=...)"
    if any(_looks_saturated(record, quantity) for record in records):
        return "saturated, those of the probe and not of the network. HINT: pass a larger BasinMonitor(probe=...)"
    if not quantity.startswith(_WITHOUT_TOLERANCE) and any(record.ill_defined for record in records):
        return f"ill-defined, as no gap of {ILL_DEFINED_GAP:g} digits separates what counts from what does not"
    return None


_RANKS = ("gradient_rank", "gradient_nullity", "gradient_effective_rank", "log_det_gram")
_WITHOUT_TOLERANCE = ("gradient_rank_at_", "gradient_effective_rank")
"""Quantities that do not depend on the tolerance of the rank."""


def _looks_saturated(record: LayerRecord, quantity: str) -> bool:
    if quantity.startswith("log_det_gram"):  # All singular values count, and their product moves with the network.
        return False
    if not quantity.startswith("gradient_rank_at_"):
        return record.saturated
    return record.quantities().get(quantity) == record.num_rows < record.num_parameters
