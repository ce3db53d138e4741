"""Labels of the inputs of a probe, by which figures sort and colour them."""

from collections.abc import Sequence

from torch import Tensor

from lightning_basin.probe import Probe

MAX_LABELS = 12
"""The largest number of different targets that are labels of inputs: more cannot be told apart by colour."""


def labels_of(probe: Probe | None) -> Sequence[float | str] | None:
    """Return the target of each input as a label, where targets are few numbers; ``None`` elsewhere.

    Args:
        probe: The inputs and targets; ``None`` where there is no probe yet.

    Example:
        >>> import torch
        >>> labels_of(Probe(torch.eye(3), torch.tensor([[1.0], [0.0], [1.0]])))
        [1, 0, 1]
        >>> labels_of(Probe(torch.eye(3), torch.eye(3)))
    """
    targets = None if probe is None else probe.targets
    if not isinstance(targets, Tensor) or targets.numel() != targets.shape[0] or targets.is_complex():
        return None
    values = targets.detach().flatten().tolist()
    if len(set(values)) > MAX_LABELS:
        return None
    return [int(value) if float(value).is_integer() else value for value in values]
