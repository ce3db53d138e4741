"""One process leads, the others follow: they call the functions that it sends, until it tells them to stop.

The leader alone decides. It sends a function with its arguments and takes back what that returns or raises, so that no
process waits for one that took another way. Messages go over a group of their own, from the CPU to the CPU, whatever
training uses for its gradients: they cannot get between its collectives, nor wait for its streams.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

MessageGroup = dist.ProcessGroup
"""Of all processes, for messages alone; made by `message_group`."""

_Result = TypeVar("_Result")

_LEADER = 0
_TIMEOUT = timedelta(days=1)  # The others wait while the leader decomposes; of one that died, connections are closed.
_WIDTH = 16  # bytes of the widest number: whatever is part of a message begins at a multiple
_MAX_WAITING = 2  # functions, as each holds what it is called on
_FIRST = 2**14  # bytes that are sent at once, before the length of the rest is known; few messages are longer


def message_group() -> MessageGroup | None:
    """A group for messages between all processes, which must ask for it together; ``None`` where there is no gloo."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_gloo_available() else None


def close_group(group: MessageGroup) -> None:
    """Close the connections of a group."""
    dist.destroy_process_group(group)


@dataclass(frozen=True)
class _Request:
    """A function to call, on the share of the process that is asked or without; ``None`` prepares the share."""

    function: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    on_share: bool = False


@dataclass(frozen=True)
class _Reply(Generic[_Result]):
    """What a function returned, or raised."""

    value: _Result | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, function: Callable[..., _Result], *args: Any) -> "_Reply[_Result]":
        try:
            return cls(value=function(*args))
        except Exception as error:  # Whatever it is: the process that asked must know.
            return cls(error=error)

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class _Task:
    """A function that some process will call.

    Args:
        function: Of no arguments.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.reply: Callable[[], _Reply[Any]] | None = None

    def call(self) -> None:
        """Call it here."""
        reply = _Reply.of(self.function)
        self.reply = lambda: reply


class Team:
    """All processes, as the leader sees them; made by `leading`.

    Args:
        group: See `message_group`.
        receivers: Wait for what is computed beside the leader, which can then see who is idle.
    """

    def __init__(self, group: MessageGroup, receivers: Executor) -> None:
        self._group, self._receivers = group, receivers
        self._followers = range(1, group.size())
        self._share: Any = None
        self._sharing: Sequence[int] = ()
        self._waiting: list[_Task] = []
        self._busy: dict[int, Future[Tensor]] = {}

    @property
    def size(self) -> int:
        """Number of processes, with the leader."""
        return self._group.size()

    def share(self, own: Any, others: Sequence[tuple[Any, ...]]) -> None:
        """Give the leader, and the first of the followers, something to call functions on.

        Args:
            own: The share of the leader.
            others: For each of these followers from what it prepares its own.
        """
        self._share, self._sharing = own, self._followers[: len(others)]
        for process, args in zip(self._sharing, others, strict=True):
            self._ask(process, _Request(None, args))
            self._receive_later(process)

    def each(self, function: Callable[..., _Result], *args: Any) -> list[_Result]:
        """What ``function(share, *args)`` returns of every share, that of the leader first."""
        for process in self._sharing:
            self._ask(process, _Request(function, args, on_share=True))
        try:
            own = _Reply.of(function, self._share, *args)
        finally:  # Of all, whatever has raised or interrupted here.
            messages = [_received(process, self._group) for process in self._sharing]
        return [reply.result() for reply in (own, *map(_reply_in, messages))]

    def spread(self, function: Callable[[], _Result]) -> Callable[[], _Result]:
        """Let an idle process call a function that can be sent; the leader itself, where too many wait for one.

        Returns:
            Waits for what the function returns, or raises what it raises.
        """
        task = _Task(function)
        self._waiting.append(task)
        self._hand_out()
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.pop(0).call()
        return partial(self._result, task)

    def stop(self) -> None:
        """Let the followers go on with what they did before."""
        for process in self._followers:
            self._settle(process)
            _send(_NOTHING, process, self._group)

    def _result(self, task: _Task) -> Any:
        while task.reply is None:
            self._hand_out()
            if self._waiting:
                self._waiting.pop(0).call()
        return task.reply().result()

    def _hand_out(self) -> None:
        for process in self._followers:
            is_idle = process not in self._busy or self._busy[process].done()
            if self._waiting and is_idle:
                task = self._waiting.pop(0)
                self._ask(process, _Request(task.function))
                task.reply = partial(_reply_from, self._receive_later(process))

    def _ask(self, process: int, request: _Request) -> None:
        message = _packed(request)
        self._settle(process)
        _send(message, process, self._group)

    def _settle(self, process: int) -> None:
        """Wait for the reply that is on the way: if both sides sent, neither would receive."""
        if process in self._busy:
            wait([self._busy.pop(process)])

    def _receive_later(self, process: int) -> Future[Tensor]:
        message = self._busy[process] = self._receivers.submit(_received, process, self._group)
        return message


@contextmanager
def leading(group: MessageGroup) -> Iterator[Team]:
    """Lead all other processes, which `follow` meanwhile, and let them go in any case.

    Args:
        group: See `message_group`.
    """
    with ThreadPoolExecutor(group.size()) as receivers:
        team = Team(group, receivers)
        try:
            yield team
        finally:
            team.stop()


def _reply_from(message: Future[Tensor]) -> _Reply[Any]:
    return _reply_in(message.result())


def _reply_in(message: Tensor) -> _Reply[Any]:
    unpacked: _Reply[_Reply[Any]] = _Reply.of(_unpacked, message)
    return _Reply(error=unpacked.error) if unpacked.error is not None else unpacked.result()


def follow(group: MessageGroup, prepare: Callable[..., Any]) -> None:
    """Call what the leader sends, until it says that this was all.

    Args:
        group: See `message_group`.
        prepare: Makes the share of this process from what the leader sends for it.
    """
    share: _Reply[Any] = _Reply()
    while True:
        message = _received(_LEADER, group)
        if not message.numel():
            return
        request: _Reply[_Request] = _Reply.of(_unpacked, message)
        if request.error is None and request.result().function is None:
            share = _Reply.of(prepare, *request.result().args)
            reply: _Reply[Any] = _Reply(error=share.error)
        else:
            reply = _Reply.of(_answer, request, share)
        _send(_packed_reply(reply), _LEADER, group)


def _answer(request: _Reply[_Request], share: _Reply[Any]) -> Any:
    asked: _Request = request.result()
    assert asked.function is not None
    return asked.function(share.result(), *asked.args) if asked.on_share else asked.function(*asked.args)


def _packed_reply(reply: _Reply[Any]) -> Tensor:
    """The reply, or, where it cannot be sent as it is, an error that says so."""
    try:
        if reply.error is not None:
            pickle.loads(pickle.dumps(reply.error))  # Some can be written and not be read.
        return _packed(reply)
    except Exception as error:  # Whatever pickling an object of the user's raises.
        error = reply.error or error
        return _packed(_Reply(error=RuntimeError(f"{type(error).__name__}: {error}")))


# Messages: the length of what pickle makes of an item, that, and the numbers of its tensors as they are.

_NOTHING = torch.empty(0, dtype=torch.uint8)


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


def _packed(item: Any) -> Tensor:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(item)
    parts: list[Any] = [_as_bytes(file.tell()), file.getvalue(), bytes(_padding(file.tell()))]
    for numbers in pickler.numbers:
        parts += [numbers, bytes(_padding(numbers.nbytes))]
    return torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)


def _unpacked(message: Tensor) -> Any:
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


def _send(message: Tensor, process: int, group: MessageGroup) -> None:
    begun = message[: _FIRST - _WIDTH]
    first = (_as_bytes(message.numel()) + begun.numpy().tobytes()).ljust(_FIRST, bytes(1))
    dist.send(torch.frombuffer(bytearray(first), dtype=torch.uint8), process, group)
    if message.numel() > begun.numel():
        dist.send(message[begun.numel() :], process, group)


def _received(process: int, group: MessageGroup) -> Tensor:
    first = torch.empty(_FIRST, dtype=torch.uint8, device="cpu")
    dist.recv(first, process, group)
    message = torch.empty(_as_number(first), dtype=torch.uint8, device="cpu")
    begun = first[_WIDTH:][: message.numel()]
    message[: begun.numel()] = begun
    if message.numel() > begun.numel():
        dist.recv(message[begun.numel() :], process, group)
    return message
