"""Time and memory of several ways on one network, each way in a process of its own, all in interleaved rounds.

A way is a generator: it yields the name of each stage that it has reached, with what it found. Every way lives in its
own process, so that its hooks and memory are its own; the processes take turns, so that all see the same machine. The
first turn warms up, and is the one whose peak memory counts; a figure is the median of the turns after it. A way gets
no further turn when it has used ``ENOUGH_SECONDS``.
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

ENOUGH_SECONDS = 6.0

_PEERS = ("backpack", "curvlinops", "hessian_eigenthings", "laplace", "nngeometry", "pyhessian", "vivit")
_PROJECTIONS = 4  # of a tensor: the norm of their difference is that of the tensors within a factor of two or so

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
        max_work: Of m * m * N operations; where there are more, another way that forms the gradients stands for it.
        only: The networks it is meant for; ``None`` means all.
        patience: Seconds after which a turn is given up.
        is_quick: Whether ``--quick`` runs it too.
    """

    name: str
    run: Callable[[nn.Module, Tensor], Stages]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    package: str | None = None
    is_cumulative: bool = True
    num_matrices: float = 0.0
    max_work: float = float("inf")
    only: tuple[str, ...] | None = None
    patience: float = 90.0
    is_quick: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        try:
            return self.package is None or version(self.package) is not None
        except PackageNotFoundError:
            return False


@dataclass(frozen=True)
class Reached:
    """A stage of a turn: its seconds, what was found, and MiB at the peak beside what was held before the turn."""

    stage: str
    seconds: float
    found: Any
    mebibytes: float


@dataclass(frozen=True)
class Fingerprint:
    """Random projections of a tensor that stays in its process."""

    projections: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        """The projections on the same directions for all tensors of a size."""
        generator = torch.Generator().manual_seed(0)
        flat = tensor.detach().flatten()
        drawn = (torch.randn(flat.numel(), generator=generator, dtype=torch.float32) for _ in range(_PROJECTIONS))
        return cls(tuple(float(flat @ directions.to(flat)) for directions in drawn))

    def difference(self, other: "Fingerprint") -> float:
        """Estimate of the norm of the difference relative to that of the other tensor."""
        mine, theirs = torch.tensor(self.projections).double(), torch.tensor(other.projections).double()
        return float((mine - theirs).norm() / theirs.norm())


@dataclass
class Candidate:
    """A way with a type of numbers, and what is known of it.

    Attributes:
        way: What is run.
        dtype: Of the module and its inputs.
        turns: In order, by stage; the first one is the warm-up.
        note: Why there are none, or no more.
    """

    way: Way
    dtype: torch.dtype
    turns: list[dict[str, Reached]] = field(default_factory=list)
    note: str | None = None

    @property
    def name(self) -> str:
        """Of the way."""
        return self.way.name

    @property
    def type_name(self) -> str:
        """Of the numbers: float32 or float64."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def found(self) -> dict[str, Any]:
        """By stage."""
        return {stage: reached.found for stage, reached in self.turns[0].items()} if self.turns else {}

    @property
    def is_once(self) -> bool:
        """Whether the only turn is the warm-up."""
        return len(self.turns) == 1

    def seconds(self, *stages: str) -> float | None:
        """Median over the turns after the first one, of the sum over some stages."""
        turns = [turn for turn in self.turns[1:] or self.turns if all(stage in turn for stage in stages)]
        return statistics.median(sum(turn[stage].seconds for stage in stages) for turn in turns) if turns else None

    def median_found(self, stage: str, key: str) -> float | None:
        """The same of a number among what was found."""
        values = [turn[stage].found[key] for turn in self.turns[1:] or self.turns if stage in turn]
        return statistics.median(values) if values else None

    def mebibytes(self, *stages: str) -> float | None:
        """The largest growth at some stages of the first turn."""
        return max((self.turns[0][stage].mebibytes for stage in stages if stage in self.found), default=None)


def measured(workload: Workload, ways: Sequence[Way], *, rounds: int, threads: int) -> list[Candidate]:
    """All candidates on one network.

    Args:
        workload: The network and its probe.
        ways: To compare; those that are meant for other networks are left out.
        rounds: Turns that count.
        threads: Of each process.
    """
    chosen = [way for way in ways if way.only is None or workload.name in way.only]
    candidates = [Candidate(way, dtype) for way in chosen for dtype in way.dtypes]
    runs: list[_Run] = []
    for candidate in candidates:
        candidate.note = _obstacle(candidate, workload)
        if candidate.note is None:
            runs.append(_Run(candidate, workload.name, threads))
    for run in runs:
        run.wait()
    runs = [run for run in runs if run.is_alive]
    for _ in range(rounds + 1):
        for run in runs:
            run.take_turn()
        runs = [run for run in runs if run.is_alive]
    for run in runs:
        run.stop()
    return candidates


def _obstacle(candidate: Candidate, workload: Workload) -> str | None:
    way = candidate.way
    if not way.is_installed:
        return f"{way.package} is not installed"
    work = workload.num_rows**2 * workload.num_parameters
    if work > way.max_work:
        return f"not run: {work:.0e} operations or more"
    needed = way.num_matrices * workload.num_rows * workload.num_parameters * candidate.dtype.itemsize
    return f"not run: needs {needed / 2**30:.0f} GiB" if needed > 0.9 * available_memory() else None


class _Run:
    """A process that runs one candidate when told to."""

    def __init__(self, candidate: Candidate, network: str, threads: int) -> None:
        # A server that has loaded every library forks the processes: loading them anew takes seconds for each.
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["lightning_basin", *_PEERS])
        self._candidate = candidate
        self._connection, theirs = forking.Pipe()
        arguments = (theirs, candidate.way, candidate.dtype, network, threads)
        self._process = forking.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.is_alive = True

    def wait(self) -> None:
        """Until it has loaded everything, so that it disturbs no other; one that does not is given up."""
        patience = self._candidate.way.patience
        try:
            if self._connection.poll(patience):
                self._connection.recv()
                return
            self._candidate.note = f"not loaded after {patience:.0f} s"
        except (EOFError, OSError):
            self._candidate.note = "its process died while it was loading"
        self.stop()

    def take_turn(self) -> None:
        turn: dict[str, Reached] = {}
        self._candidate.note = self._filled(turn, time.monotonic() + self._candidate.way.patience)
        if turn:
            self._candidate.turns.append(turn)
        stages = [reached for turn in self._candidate.turns for reached in turn.values()]
        times = [reached.seconds for reached in stages]
        if self._candidate.note is not None or sum(times) > ENOUGH_SECONDS:
            self.stop()

    def _filled(self, turn: dict[str, Reached], deadline: float) -> str | None:
        """What ended the turn early."""
        try:
            self._connection.send("turn")
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                answer = self._connection.recv()
                if not isinstance(answer, Reached):
                    return answer
                turn[answer.stage] = answer
        except (EOFError, OSError):
            return "its process died: out of memory?"
        return f"given up after {self._candidate.way.patience:.0f} s"

    def stop(self) -> None:
        self.is_alive = False
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, way: Way, dtype: torch.dtype, network: str, threads: int) -> None:
    torch.set_num_threads(threads)
    tiny, workload = WORKLOADS["seed"], WORKLOADS[network]
    try:  # What is loaded at the first use is loaded now, so that the memory of the first turn is that of the way.
        list(way.run(tiny.module(dtype), tiny.probe(dtype)))
    except Exception as error:
        print(f"{way.name} fails on the smallest network: {_described(error)}", file=sys.stderr)
    module, inputs = workload.module(dtype), workload.probe(dtype)
    connection.send("ready")
    while connection.recv():
        answer: str | None = None
        try:
            for reached in turn(way, module, inputs):
                connection.send(reached)
        except Exception as error:
            answer = _described(error)
        connection.send(answer)


def _described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:70] if lines else ''}"


def turn(way: Way, module: nn.Module, inputs: Tensor) -> Iterator[Reached]:
    """Run a way once, in this process."""
    stages = way.run(module, inputs)
    total = 0.0
    _forget_peak()
    held = _memory("VmRSS")
    while True:
        started = time.perf_counter()
        try:
            stage, found = next(stages)
        except StopIteration:
            return
        passed = time.perf_counter() - started
        total = total + passed if way.is_cumulative else passed
        peak = (_memory("VmHWM") - held) / 2**20
        yield Reached(stage, total, Fingerprint.of(found) if isinstance(found, Tensor) else found, peak)
        if not way.is_cumulative:
            found = None
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
