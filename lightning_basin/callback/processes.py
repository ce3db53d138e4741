"""One process measures, the others wait for its record."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

_Item = TypeVar("_Item")

_TIMEOUT = timedelta(days=1)  # A large measurement takes longer than a process group lets its members wait.


class PatientBroadcast:
    """Sends what the first process has to all others, which wait for it longer than training lets them.

    The message goes over a process group of its own, from CPU to CPU: it cannot get between the collectives of
    training, nor wait for its streams. All processes must make, call and close it together. Without a process group of
    `torch.distributed`, ``broadcast`` of the training strategy is used.
    """

    def __init__(self, broadcast: Callable[[Any, int], Any]) -> None:
        has_processes = dist.is_available() and dist.is_initialized() and dist.is_gloo_available()
        self._broadcast = broadcast
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if has_processes else None

    def __call__(self, item: _Item) -> _Item:
        """Return the first process's item on every process."""
        if self._group is None:
            sent: _Item = self._broadcast(item, 0)
            return sent
        items = [item]
        dist.broadcast_object_list(items, 0, group=self._group)
        return items[0]

    def close(self) -> None:
        """Close the connections."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
