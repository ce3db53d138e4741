"""The loss that a module keeps."""

from collections.abc import Callable
from typing import Any

from torch import nn

LOSS_ATTRIBUTES = ("loss_fn", "criterion")
"""The names under which a module's loss is looked for."""


def loss_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the loss that a module keeps under one of the usual names.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.criterion = nn.MSELoss()
        >>> loss_of(module)
        MSELoss()
    """
    attributes = (getattr(module, name, None) for name in LOSS_ATTRIBUTES)
    return next((attribute for attribute in attributes if callable(attribute)), None)
