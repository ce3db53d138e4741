"""One process leads, the others follow: they call the functions that it sends, until it tells them to stop.

The leader alone decides. It sends a function with its arguments and takes back what that returns or raises, so that no
process waits for one that took another way.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor

from lightning_basin.messages import NOTHING, MessageGroup, packed, received, send, unpacked

_Result = TypeVar("_Result")

_LEADER = 0
_MAX_WAITING = 2  # functions, as each holds what it is called on


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
            messages = [received(process, self._group) for process in self._sharing]
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
            send(NOTHING, process, self._group)

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
        message = packed(request)
        self._settle(process)
        send(message, process, self._group)

    def _settle(self, process: int) -> None:
        """Wait for the reply that is on the way: if both sides sent, neither would receive."""
        if process in self._busy:
            wait([self._busy.pop(process)])

    def _receive_later(self, process: int) -> Future[Tensor]:
        message = self._busy[process] = self._receivers.submit(received, process, self._group)
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
    reply: _Reply[_Reply[Any]] = _Reply.of(unpacked, message)
    return _Reply(error=reply.error) if reply.error is not None else reply.result()


def follow(group: MessageGroup, prepare: Callable[..., Any]) -> None:
    """Call what the leader sends, until it says that this was all.

    Args:
        group: See `message_group`.
        prepare: Makes the share of this process from what the leader sends for it.
    """
    share: _Reply[Any] = _Reply()
    while True:
        message = received(_LEADER, group)
        if not message.numel():
            return
        request: _Reply[_Request] = _Reply.of(unpacked, message)
        if request.error is None and request.result().function is None:
            share = _Reply.of(prepare, *request.result().args)
            reply: _Reply[Any] = _Reply(error=share.error)
        else:
            reply = _Reply.of(_answer, request, share)
        send(_packed_reply(reply), _LEADER, group)


def _answer(request: _Reply[_Request], share: _Reply[Any]) -> Any:
    asked: _Request = request.result()
    assert asked.function is not None
    return asked.function(share.result(), *asked.args) if asked.on_share else asked.function(*asked.args)


def _packed_reply(reply: _Reply[Any]) -> Tensor:
    """The reply, or, where it cannot be sent as it is, an error that says so."""
    try:
        if reply.error is not None:
            pickle.loads(pickle.dumps(reply.error))  # Some can be written and not be read.
        return packed(reply)
    except Exception as error:  # Whatever pickling an object of the user's raises.
        error = reply.error or error
        return packed(_Reply(error=RuntimeError(f"{type(error).__name__}: {error}")))
