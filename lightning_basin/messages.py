"""Messages between processes: any item that can be pickled, with the numbers of its tensors as they are.

They go over a group of their own, from the CPU to the CPU, whatever training uses for its gradients: they cannot get
between its collectives, nor wait for its streams.
"""

import io
import math
import pickle
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

MessageGroup = dist.ProcessGroup
"""Of all processes, for messages alone; made by `message_group`."""

NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
"""The message that is none."""

_TIMEOUT = timedelta(days=1)  # Some wait while another one computes; of one that died, connections are closed.
_WIDTH = 16  # bytes of the widest number: whatever is part of a message begins at a multiple
_FIRST = 2**14  # bytes that are sent at once, before the length of the rest is known; few messages are longer


def message_group() -> MessageGroup | None:
    """A group for messages between all processes, which must ask for it together; ``None`` where there is no gloo."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_gloo_available() else None


def close_group(group: MessageGroup) -> None:
    """Close the connections of a group."""
    dist.destroy_process_group(group)


class _Pickler(pickle.Pickler):
    """Writes what a tensor looks like, and keeps its numbers apart."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.numbers: list[Any] = []

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        self.numbers.append(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return item.dtype, tuple(item.shape), item.device.type


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back, on the device of this process that is of the same type as the sender's."""

    def __init__(self, file: io.BytesIO, numbers: Tensor) -> None:
        super().__init__(file)
        self._numbers = numbers

    def persistent_load(self, description: Any) -> Tensor:
        dtype, shape, device_type = description
        num_bytes = dtype.itemsize * math.prod(shape)
        tensor = self._numbers[:num_bytes].view(dtype).view(shape)
        self._numbers = self._numbers[num_bytes + _padding(num_bytes) :]
        return tensor.to(device_type)


def packed(item: Any) -> Tensor:
    """The message that holds an item, as bytes on the CPU; tensors arrive without their graph."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(item)
    parts: list[Any] = [_as_bytes(file.tell()), file.getvalue(), bytes(_padding(file.tell()))]
    for numbers in pickler.numbers:
        parts += [numbers, bytes(_padding(numbers.nbytes))]
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)


def unpacked(message: Tensor) -> Any:
    """The item that a message holds."""
    length = _as_number(message)
    stop = _WIDTH + length
    pickled = io.BytesIO(message[_WIDTH:stop].numpy().tobytes())
    return _Unpickler(pickled, message[stop + _padding(length) :]).load()


def _padding(num_bytes: int) -> int:
    return -num_bytes % _WIDTH


def _as_bytes(number: int) -> bytes:
    return number.to_bytes(_WIDTH, "little")


def _as_number(message: Tensor) -> int:
    return int.from_bytes(message[:_WIDTH].numpy().tobytes(), "little")


def send(message: Tensor, process: int, group: MessageGroup) -> None:
    """Send a message to a process, which must be receiving, or come to it."""
    begun = message[: _FIRST - _WIDTH]
    first = (_as_bytes(message.numel()) + begun.numpy().tobytes()).ljust(_FIRST, bytes(1))
    dist.send(torch.frombuffer(bytearray(first), dtype=torch.uint8), process, group)
    if message.numel() > begun.numel():
        dist.send(message[begun.numel() :], process, group)


def received(process: int, group: MessageGroup) -> Tensor:
    """Wait for the next message from a process."""
    first = torch.empty(_FIRST, dtype=torch.uint8, device="cpu")
    dist.recv(first, process, group)
    message = torch.empty(_as_number(first), dtype=torch.uint8, device="cpu")
    begun = first[_WIDTH:][: message.numel()]
    message[: begun.numel()] = begun
    if message.numel() > begun.numel():
        dist.recv(message[begun.numel() :], process, group)
    return message
