"""Time and memory of several ways on one network, each way in a process of its own, all in interleaved rounds.

A way is a generator: it yields the name of each stage that it has reached, with what it found. Every way lives in its
own process, so that its libraries, hooks and memory are its own; the processes take turns, so that all see the same
machine. The first turn loads and warms up, and is the one whose peak memory counts; a figure is the median of the
turns after it. A way gets no further turn when it has used ``ENOUGH_SECONDS``.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import WORKLOADS, Workload

ENOUGH_SECONDS = 10.0

Stages = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Way:
    """One way of finding ranks or products.

    Attributes:
        name: For people.
        run: From a module and inputs to stages and what was found at each.
        dtypes: Of the module; each is a candidate of its own.
        package: The distribution that it needs; ``None`` for what is always there.
        is_cumulative: Whether a stage builds on those before it, so that its time includes theirs.
        num_matrices: How many matrices of m rows and N columns it holds at once, to know whether it fits.
        only: The networks it is meant for; ``None`` means all.
        is_quick: Whether ``--quick`` runs it too.
    """

    name: str
    run: Callable[[nn.Module, Tensor], Stages]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    package: str | None = None
    is_cumulative: bool = True
    num_matrices: float = 0.0
    only: tuple[str, ...] | None = None
    is_quick: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        try:
            return self.package is None or version(self.package) is not None
        except PackageNotFoundError:
            return False


@dataclass(frozen=True)
class Turn:
    """What one run of a way took, by stage: seconds, what was found, MiB at the peak beside what was held before."""

    seconds: dict[str, float]
    found: dict[str, Any]
    mebibytes: dict[str, float]


@dataclass
class Candidate:
    """A way with a type of numbers, and what is known of it.

    Attributes:
        way: What is run.
        dtype: Of the module and its inputs.
        turns: In order; the first one is the warm-up.
        note: Why there are none, or no more.
    """

    way: Way
    dtype: torch.dtype
    turns: list[Turn] = field(default_factory=list)
    note: str | None = None

    @property
    def found(self) -> dict[str, Any]:
        """By stage."""
        return self.turns[0].found if self.turns else {}

    @property
    def is_once(self) -> bool:
        """Whether the only turn is the warm-up."""
        return len(self.turns) == 1

    def seconds(self, stage: str) -> float | None:
        """Median over the turns after the first one."""
        times = [turn.seconds[stage] for turn in self.turns[1:] or self.turns if stage in turn.seconds]
        return statistics.median(times) if times else None

    def mebibytes(self, *stages: str) -> float | None:
        """The largest growth at some stages of the first turn."""
        return max((self.turns[0].mebibytes[stage] for stage in stages if stage in self.found), default=None)


def measured(
    workload: Workload, ways: Sequence[Way], *, rounds: int, threads: int, seconds_limit: float, is_repeated: bool
) -> list[Candidate]:
    """All candidates on one network.

    Args:
        workload: The network and its probe.
        ways: To compare.
        rounds: Turns that count.
        threads: Of each process.
        seconds_limit: After which a turn is given up.
        is_repeated: See `Workload.probe`.
    """
    candidates = [Candidate(way, dtype) for way in ways for dtype in way.dtypes]
    runs: list[_Run] = []
    for candidate in candidates:
        candidate.note = _obstacle(candidate, workload)
        if candidate.note is None:
            runs.append(_Run(candidate, workload.name, threads, is_repeated))
    for _ in range(rounds + 1):
        for run in runs:
            run.take_turn(seconds_limit)
        runs = [run for run in runs if run.is_alive]
    for run in runs:
        run.stop()
    return candidates


def _obstacle(candidate: Candidate, workload: Workload) -> str | None:
    if not candidate.way.is_installed:
        return f"{candidate.way.package} is not installed"
    entries = candidate.way.num_matrices * workload.num_rows * workload.num_parameters
    needed = entries * candidate.dtype.itemsize
    return f"not run: needs {needed / 2**30:.0f} GiB" if needed > 0.9 * available_memory() else None


class _Run:
    """A process that runs one candidate when told to."""

    def __init__(self, candidate: Candidate, network: str, threads: int, is_repeated: bool) -> None:  # noqa: FBT001
        spawning = multiprocessing.get_context("spawn")
        self._candidate = candidate
        self._connection, theirs = spawning.Pipe()
        arguments = (theirs, candidate.way, candidate.dtype, network, threads, is_repeated)
        self._process = spawning.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.is_alive = True

    def take_turn(self, seconds_limit: float) -> None:
        answer = self._answer(seconds_limit)
        if isinstance(answer, Turn):
            self._candidate.turns.append(answer)
        else:
            self._candidate.note = answer
        spent = sum(sum(turn.seconds.values()) for turn in self._candidate.turns)
        if spent > ENOUGH_SECONDS or not isinstance(answer, Turn):
            self.stop()

    def _answer(self, seconds_limit: float) -> Turn | str:
        try:
            self._connection.send(True)
            if not self._connection.poll(seconds_limit):
                return f"given up after {seconds_limit:.0f} s"
            return self._connection.recv()
        except (EOFError, OSError):
            return "its process died: out of memory?"

    def stop(self) -> None:
        self.is_alive = False
        self._process.terminate()
        self._process.join()


def _serve(
    connection: Connection, way: Way, dtype: torch.dtype, network: str, threads: int, is_repeated: bool  # noqa: FBT001
) -> None:
    torch.set_num_threads(threads)
    tiny, workload = WORKLOADS["seed"], WORKLOADS[network]
    try:  # Libraries are loaded now, so that the memory of the first turn is that of the way.
        list(way.run(tiny.module(dtype), tiny.probe(dtype)))
    except Exception as error:
        print(f"{way.name} fails on the smallest network: {error}", file=sys.stderr)
    module, inputs = workload.module(dtype), workload.probe(dtype, is_repeated=is_repeated)
    while connection.recv():
        try:
            answer: Turn | str = turn(way, module, inputs)
        except Exception as error:
            message = str(error).strip().splitlines()
            answer = f"{type(error).__name__}: {message[0][:70] if message else ''}"
        connection.send(answer)


def turn(way: Way, module: nn.Module, inputs: Tensor) -> Turn:
    """Run a way once."""
    taken = Turn({}, {}, {})
    stages = way.run(module, inputs)
    total = 0.0
    _forget_peak()
    held = _memory("VmRSS")
    while True:
        started = time.perf_counter()
        try:
            stage, found = next(stages)
        except StopIteration:
            return taken
        passed = time.perf_counter() - started
        total = total + passed if way.is_cumulative else passed
        taken.seconds[stage], taken.found[stage] = total, found
        taken.mebibytes[stage] = (_memory("VmHWM") - held) / 2**20
        if not way.is_cumulative:
            _forget_peak()


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _forget_peak() -> None:
    """Let the peak of the resident memory start anew, where the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _memory(entry: str) -> int:
    """Bytes; without Linux's files the peak of the process so far stands in for both entries."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
