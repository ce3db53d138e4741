"""What a monitor finds on a module."""

from collections.abc import Callable
from typing import Any

from torch import nn

LOSS_ATTRIBUTES = ("loss_fn", "criterion")
"""Names under which a module's loss is looked for."""


def found_loss(module: nn.Module) -> Callable[..., Any] | None:
    """The loss that a module keeps under one of the usual names.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.criterion = nn.MSELoss()
        >>> found_loss(module)
        MSELoss()
    """
    found = (getattr(module, name, None) for name in LOSS_ATTRIBUTES)
    return next((attribute for attribute in found if callable(attribute)), None)
