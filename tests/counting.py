"""Counts what a measurement asks of a device."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "is_nonzero", "equal", "masked_select")


class Dispatched(TorchDispatchMode):
    """Counts all operations, those for which an accelerator must finish all others, and, by name, those with results.

    A view has no result of its own. What is transferred together is put together by one ``cat``.
    """

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0
        self.results = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.count += 1
        self.waits += name in _WAITING
        self.results[name] += not function.is_view
        return function(*args, **(kwargs or {}))
