"""What an error of a module means, and what to do about it."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_BEHAVIOR = "pass behavior=lambda module, inputs: ... that returns one row of outputs per input"

_BY_MESSAGE = {
    r"is missing the required \"forward\" function": (
        "it has no forward: pass behavior=lambda module, inputs: ... that calls its submodules, as training_step does"
    ),
    r"missing \d+ required (?:positional|keyword-only) arguments?": (
        "pass all that forward takes as inputs=(first, second), in a run by batch_fn=, or a behavior"
    ),
    r"takes (?:from )?\d+ .*positional arguments? but \d+ (?:was|were) given|unexpected keyword": (
        "pass only what forward takes as inputs, or a behavior that takes out of them what it needs"
    ),
    r"on the same device": "register tensors that the module keeps as buffers, so that they move with it",
}
"""Remedies by a pattern in the message of torch 2.13 or of Python."""

_BY_MESSAGE_ABOUT_INPUTS = {
    r"must have the same dtype|scalar types?: Long|used as indices must be|found (?:Long|Byte|Int)": (
        "convert the inputs to the type that the module expects, in a run by batch_fn, or in a behavior"
    ),
    r"shapes cannot be multiplied|size mismatch|to have \d+ channels|must match the size|Expected \d+D": (
        "bring the inputs into the shape that the module expects, in a run by batch_fn, or in a behavior"
    ),
}
"""Remedies by a pattern in the message, for errors that are said with types and shapes of the inputs."""


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
"""Messages of torch on the CPU, where it raises a RuntimeError (torch 2.13)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def cause(error: Exception) -> str:
    r"""Return an error in one line: torch adds backtraces, lists of kernels and advice to some messages.

    Example:
        >>> cause(RuntimeError("no such kernel. This could be because\nCPU: registered at ..."))
        'RuntimeError: no such kernel'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].partition('. ')[0].rstrip('.')}"


def remedy(error: BaseException, inputs: Sequence[Tensor]) -> str:
    """Return what helps against an error; to pass a behavior, where the cause is not known."""
    for pattern, text in _BY_MESSAGE.items():
        if re.search(pattern, str(error)):
            return text
    for pattern, text in _BY_MESSAGE_ABOUT_INPUTS.items():
        if re.search(pattern, str(error)):
            kinds = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in inputs)
            return f"got {kinds}: {text}"
    return _BEHAVIOR
