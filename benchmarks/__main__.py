"""Time ranks, Hessians and duplicates beside what one would use otherwise, all in one run; run it with ``make bench``.

Prints Markdown. Every way has a process of its own, and the processes of a network take turns. See README.md.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.duplicates import DUPLICATES
from benchmarks.hessians import NULLITIES, NUM_PRODUCTS, PRODUCTS
from benchmarks.networks import FITTED, PAIRS, RANKED, REPEATED, SCALED, Workload
from benchmarks.ours import OURS, RANKS, STEP
from benchmarks.peers import PEERS
from benchmarks.timing import Way, measure

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADING = """# The last run of the benchmarks

What is compared, and how a figure is obtained, is in [README.md](README.md). `python -m benchmarks --write` writes this
file.

"""


@dataclass(frozen=True)
class Section:
    """A comparison.

    Attributes:
        title: The heading of its tables.
        workloads: The networks by name.
        ways: The ways that are compared.
        stages: The stages that are columns of the tables.
        describe: Makes the last column of a result.
    """

    title: str
    workloads: dict[str, Workload]
    ways: tuple[Way, ...]
    stages: tuple[str, ...]
    describe: tables.Describe = tables.text


SECTIONS = {
    "ranks": Section("Ranks", RANKED | REPEATED, (*OURS, STEP, *PEERS), ("gram", "rank", "layers"), tables.ranks),
    "scaling": Section("More parameters", SCALED, (*RANKS, STEP), ("rank", "layers"), tables.ranks),
    "products": Section(f"{NUM_PRODUCTS} products with the Hessian", RANKED, PRODUCTS, ("products",), tables.distance),
    "nullities": Section("Eigenvalues of the Hessian below a tolerance", FITTED, NULLITIES, ("counts",)),
    "duplicates": Section("Duplicated activations", PAIRS, DUPLICATES, ("duplicates",)),
}


def report(options: argparse.Namespace) -> Iterator[str]:
    """Sections of Markdown, as they come."""
    started = time.monotonic()
    yield f"torch {torch.__version__}, {options.threads} threads, {_processor()}; medians of {options.rounds} turns.\n"
    yield "Times in seconds; × is how often ours fits into them. ¹ One turn only: the next one would take too long.\n"
    for name in options.sections:
        section = SECTIONS[name]
        yield f"### {section.title}\n"
        for workload in section.workloads.values():
            if workload.name in options.networks:
                yield f"#### {workload.heading}\n"
                ways, rounds = _effort(workload, section.ways, options.rounds)
                candidates = measure(workload, ways, rounds=rounds, threads=options.threads)
                yield tables.table(candidates, section.stages, section.describe)
    yield f"All of this took {(time.monotonic() - started) / 60:.1f} minutes.\n"


def _effort(workload: Workload, ways: tuple[Way, ...], rounds: int) -> tuple[list[Way], int]:
    """The ways that are run on a network, and the turns of each: one of the ResNet, which takes minutes."""
    if workload.name != "resnet":
        return list(ways), rounds if workload.num_parameters > 1000 else 2 * rounds
    return [replace(way, dtypes=(torch.float32,)) for way in ways if torch.float32 in way.dtypes], 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Print the report."""
    networks = [name for section in SECTIONS.values() for name in section.workloads]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks, metavar="NAME")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way after the first one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help=f"put the report into {RESULTS.name} beside this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["PYTHONWARNINGS"] = "ignore"  # Of the peers, about their own dependencies.
    sections = []
    for section in report(options):
        print(section, flush=True)
        sections.append(section)
    if options.write:
        RESULTS.write_text(HEADING + "\n".join(sections))


if __name__ == "__main__":
    main()
