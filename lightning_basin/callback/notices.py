"""What a run is told: warnings that end none, whatever a filter makes of them, and that move no cursor."""

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_basin.naming import printable


def warn(message: str) -> None:
    """Warn; where a filter makes errors of warnings, say it in another way: a measurement must never end a run."""
    try:
        rank_zero_warn(printable(message))
    except Warning:
        inform(message)


def inform(message: str) -> None:
    """Say something that needs nobody to act."""
    rank_zero_info(printable(message))
