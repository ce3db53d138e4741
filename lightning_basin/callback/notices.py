"""Messages to the user, which never end a run, whatever a filter makes of warnings."""

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_basin.naming import printable
from lightning_basin.network.remedies import is_out_of_memory


def warn(message: str) -> None:
    """Warn; where a filter makes errors of warnings, say it in another way: a measurement must never end a run."""
    try:
        rank_zero_warn(printable(message))
    except Warning:
        inform(message)


def inform(message: str) -> None:
    """Say something that needs nobody to act."""
    show(printable(message))


def show(text: str) -> None:
    """Say the same with colours, in a text whose names are printable already."""
    rank_zero_info(text)


def memory_hint(error: Exception) -> str:
    """Return what else to say of an error: a remedy where memory was short, else nothing."""
    return ". HINT: pass a smaller BasinMonitor(probe=...)" if is_out_of_memory(error) else ""


class Notices:
    """Says each message once, however often its cause comes back."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def inform(self, message: str) -> None:
        """Say something that needs nobody to act, unless it was said before."""
        if self._is_new(message):
            inform(message)

    def warn(self, message: str) -> None:
        """Warn of something, unless it was said before."""
        if self._is_new(message):
            warn(message)

    def _is_new(self, message: str) -> bool:
        is_new = message not in self._said
        self._said.add(message)
        return is_new
