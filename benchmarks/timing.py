"""Time and memory of several ways on one network: each way has a process of its own, and the processes take turns."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import WORKLOADS, Workload
from lightning_basin.free_memory import available_memory

ENOUGH_SECONDS = 6.0
"""A way that has computed for so long gets no further turn."""

PATIENCE = 90.0
"""Seconds after which a turn is given up."""

BOTH = (torch.float32, torch.float64)
_PEERS = ("curvlinops", "hessian_eigenthings", "nngeometry", "pyhessian", "vivit", "sklearn.cluster")

Stages = Iterator[tuple[str, Any]]
"""The name of each stage, with its result."""


@dataclass(frozen=True)
class Way:
    """One way to compute something.

    Attributes:
        name: The name in the tables.
        run: A generator of stages; it takes the module and its inputs.
        package: The distribution that the way needs; ``None`` for none.
        dtypes: The floating point types of module and inputs; each one makes a candidate.
        num_matrices: How many matrices of m rows and N columns the way holds at once.
        only: Names of the networks on which the way is run; empty for all.
    """

    name: str
    run: Callable[[nn.Module, Tensor], Stages]
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = BOTH
    num_matrices: int = 0
    only: tuple[str, ...] = ()

    def obstacle(self, workload: Workload, dtype: torch.dtype) -> str | None:
        """Why the way cannot be run; ``None`` where it can."""
        try:
            version(self.package or "torch")
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        needed = self.num_matrices * workload.num_rows * workload.num_parameters * dtype.itemsize
        if needed > 0.9 * available_memory(torch.device("cpu")):
            return f"not run: needs {needed / 2**30:.0f} GiB"
        return None


@dataclass(frozen=True)
class Stage:
    """A stage of a turn.

    Attributes:
        seconds: The time since the turn began.
        mebibytes: The peak of resident memory since the turn began, beside what the process held before.
        result: What the way yielded; a tensor is replaced by its `fingerprint`.
    """

    seconds: float
    mebibytes: float
    result: Any


@dataclass(eq=False)
class Candidate:
    """A way in one floating point type, and what is known of it.

    Attributes:
        way: The way.
        dtype: The type of module and inputs.
        turns: The stages of each turn by name; the first turn warms up, and is the one whose memory counts.
        note: Why there are no turns, or no more.
    """

    way: Way
    dtype: torch.dtype
    turns: list[dict[str, Stage]] = field(default_factory=list)
    note: str | None = None

    @property
    def name(self) -> str:
        """The way's name, marked where the only turn is the first one."""
        return f"{self.way.name} ¹" if len(self.turns) == 1 else self.way.name

    @property
    def type_name(self) -> str:
        """``"float32"`` or ``"float64"``."""
        return str(self.dtype).removeprefix("torch.")

    def seconds(self, stage: str) -> float | None:
        """The median over the turns after the first one."""
        times = [turn[stage].seconds for turn in self.turns[1:] or self.turns if stage in turn]
        return statistics.median(times) if times else None

    def result(self, stage: str) -> Any:
        """The result of a stage; ``None`` where it was not reached."""
        return self.turns[0][stage].result if self.turns and stage in self.turns[0] else None

    def mebibytes(self) -> float | None:
        """The peak of memory in the first turn."""
        return max(stage.mebibytes for stage in self.turns[0].values()) if self.turns else None


def measure(workload: Workload, ways: Sequence[Way], *, rounds: int, threads: int) -> list[Candidate]:
    """Run all ways on one network.

    Args:
        workload: The network and its inputs.
        ways: The ways to compare; those that are meant for other networks are left out.
        rounds: The number of turns after the first one.
        threads: The number of threads of each process.
    """
    chosen = [way for way in ways if not way.only or workload.name in way.only]
    candidates = [Candidate(way, dtype) for way in chosen for dtype in way.dtypes]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_basin", *_PEERS])  # Loading them anew takes seconds for each process.
    pools = {}
    for candidate in candidates:
        candidate.note = candidate.way.obstacle(workload, candidate.dtype)
        if candidate.note is None:
            pools[candidate] = context.Pool(1)
            # What is loaded at the first use is loaded now, so that the first turn has the memory of the way alone.
            _ask(pools[candidate], candidate, "seed", threads)
    for _ in range(rounds + 1):
        for candidate, pool in list(pools.items()):
            turn = _ask(pool, candidate, workload.name, threads)
            if isinstance(turn, str):
                candidate.note = turn
            else:
                candidate.turns.append(turn)
            spent = sum(max((stage.seconds for stage in turn.values()), default=0.0) for turn in candidate.turns)
            if candidate.note is not None or spent > ENOUGH_SECONDS:
                pools.pop(candidate).terminate()
    for pool in pools.values():
        pool.terminate()
    return candidates


def _ask(pool: Any, candidate: Candidate, network: str, threads: int) -> dict[str, Stage] | str:
    """A turn in the process of a candidate, or why there is none."""
    try:
        return pool.apply_async(_turn, (candidate.way, candidate.dtype, network, threads)).get(PATIENCE)
    except multiprocessing.TimeoutError:
        return f"given up after {PATIENCE:.0f} s"


def _turn(way: Way, dtype: torch.dtype, network: str, threads: int) -> dict[str, Stage] | str:
    torch.set_num_threads(threads)
    try:
        return run(way, *_built(network, dtype))
    except Exception as error:  # What a peer cannot do is a row of the table.
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:70] if lines else ''}"


@cache
def _built(network: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    return WORKLOADS[network].module(dtype), WORKLOADS[network].probe(dtype)


def run(way: Way, module: nn.Module, inputs: Tensor) -> dict[str, Stage]:
    """Run a way once, in this process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak of the resident memory.
    held, spent, stages = _resident("VmRSS"), 0.0, {}
    started = time.perf_counter()
    for name, result in way.run(module, inputs):
        spent += time.perf_counter() - started
        kept = fingerprint(result) if isinstance(result, Tensor) else result
        stages[name] = Stage(spent, _resident("VmHWM") - held, kept)
        started = time.perf_counter()
    return stages


def _resident(entry: str) -> float:
    """MiB by Linux's count; 0 on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024


def fingerprint(tensor: Tensor) -> list[float]:
    """Four random projections, by which tensors of two processes can be compared."""
    generator = torch.Generator().manual_seed(0)
    flat = tensor.detach().flatten()
    return [float(flat @ torch.randn(flat.numel(), generator=generator).to(flat)) for _ in range(4)]


def difference(first: list[float], second: list[float]) -> float:
    """The norm of the difference of two tensors relative to the second one, estimated from their fingerprints."""
    one, other = torch.tensor(first).double(), torch.tensor(second).double()
    return float((one - other).norm() / other.norm())
