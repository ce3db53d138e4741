"""A probe in a checkpoint, and its fingerprint."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_basin.probe import Probe
from lightning_basin.tensors import map_tensors, tensors_of


def probe_state(probe: Probe) -> dict[str, Any] | None:
    """Return a probe in the form that ``torch.load(weights_only=True)`` reads, on the CPU.

    Returns:
        The arguments of `Probe`; ``None`` where its inputs or targets hold other objects than tensors, numbers and
        words in tuples, lists and dicts.

    Example:
        >>> probe_state(Probe(torch.zeros(2)))
        {'inputs': tensor([0., 0.]), 'targets': None}
    """
    state = {"inputs": probe.inputs, "targets": probe.targets}
    if not _is_plain(state):
        return None
    copied: dict[str, Any] = map_tensors(_plain, state)
    return copied


def fingerprint(probe: Probe) -> str:
    """Return a string that is the same for two probes if, and almost surely only if, they hold the same tensors.

    Example:
        >>> fingerprint(Probe(torch.zeros(2, 1))) == fingerprint(Probe(torch.zeros(2, 1)))
        True
        >>> fingerprint(Probe(torch.zeros(2, 1))) == fingerprint(Probe(torch.zeros(1, 2)))
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors_of((probe.inputs, probe.targets)):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone().as_subclass(Tensor)


def _is_plain(collection: Any) -> bool:
    if type(collection) is dict:  # By exact types, here and below: a checkpoint cannot hold a subclass.
        return all(type(key) in (str, int) and _is_plain(item) for key, item in collection.items())
    if type(collection) in (tuple, list):
        return all(_is_plain(item) for item in collection)
    return isinstance(collection, Tensor) or type(collection) in (type(None), str, int, float, bool)
