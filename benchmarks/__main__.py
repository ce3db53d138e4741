"""Time ranks and null spaces beside what one would use otherwise, all in one run; run it with ``make bench``.

Prints Markdown. Every figure comes from a process of its own; the processes of a network take turns. See README.md.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import goals, tables
from benchmarks.floor import FLOOR
from benchmarks.goals import Results
from benchmarks.hessians import HESSIANS, NULLITIES, PRODUCTS
from benchmarks.networks import FITTED, LAYER_NORM, RANKED, REPEATED, SCALED, Workload
from benchmarks.ours import OURS, SCALING, STEP
from benchmarks.peers import PEERS
from benchmarks.tables import Network
from benchmarks.timing import Way, measured

SECTIONS = ("ranks", "scaling", "products", "layer-norm", "nullities")
LARGE = ("resnet",)  # Only the first turn, and float32 only.
RESULTS = Path(__file__).with_name("RESULTS.md")
HEADING = """# The last run of the benchmarks

What is compared, and how a figure is obtained, is in [README.md](README.md). `python -m benchmarks --write` writes this
file.

"""

_SMALL_ROUNDS = 9  # of networks that take milliseconds
FOOTNOTE = "¹ One turn only: the second one would take too long.\n"

Measure = Callable[[Workload, Sequence[Way]], Network]


def report(options: argparse.Namespace) -> Iterator[str]:
    """Sections of Markdown, as they come."""
    started = time.monotonic()
    results = Results()

    def measure(workload: Workload, ways: Sequence[Way]) -> Network:
        return workload, measured(workload, _shortened(ways, workload, options), **_effort(workload, options))

    yield f"torch {torch.__version__}, {options.threads} threads, {_processor()}; medians of {options.rounds} turns.\n"
    ranked = _chosen(RANKED | REPEATED, options.networks)
    if "ranks" in options.sections and ranked:
        yield "### Ranks\n"
        yield "Seconds, and × how often ours fits into them. " + FOOTNOTE
        for workload in ranked:
            results.ranks.append(measure(workload, (*OURS, STEP, FLOOR, *PEERS)))
            yield _lines(tables.ranks(*results.ranks[-1]))
    if "scaling" in options.sections:
        results.scaling += [measure(workload, SCALING) for workload in SCALED.values()]
        yield "### Cost over the number of parameters, m = 64\n"
        yield _lines(tables.scaling(results.scaling))
    yield from _hessian_sections(options, results, measure)
    yield "### Goals\n"
    yield _lines(goals.table(results))
    yield f"All of this took {(time.monotonic() - started) / 60:.1f} minutes.\n"


def _hessian_sections(options: argparse.Namespace, results: Results, measure: Measure) -> Iterator[str]:
    ranked, fitted = _chosen(RANKED, options.networks), _chosen(FITTED, options.networks)
    if "products" in options.sections and ranked:
        results.products += [measure(workload, PRODUCTS) for workload in ranked]
        yield "### Products with the Hessian\n"
        yield "Mean squared error on the probe; the difference is from ours in float64.\n"
        yield _lines(tables.products(results.products))
    if "layer-norm" in options.sections:
        results.layer_norm += [measure(workload, HESSIANS) for workload in LAYER_NORM.values()]
        yield "### Hessians through LayerNorm, beside finite differences of gradients in float64\n"
        yield _lines(tables.layer_norm(results.layer_norm[0][1]))
    if "nullities" in options.sections and fitted:
        results.nullities += [measure(workload, NULLITIES) for workload in fitted]
        yield "### Flat directions of the Hessian, at a residual of 1e-10\n"
        yield "Eigenvalues below a tolerance relative to the largest one. " + FOOTNOTE
        yield _lines(tables.nullities(results.nullities))


def _shortened(ways: Sequence[Way], workload: Workload, options: argparse.Namespace) -> list[Way]:
    """What of the ways is run on a network."""
    types = (torch.float32,) if workload.name in LARGE else (torch.float32, torch.float64)
    ways = [replace(way, dtypes=tuple(kind for kind in way.dtypes if kind in types)) for way in ways]
    return [way for way in ways if way.is_quick or not options.quick]


def _effort(workload: Workload, options: argparse.Namespace) -> dict[str, int]:
    """Turns after the first one, and threads."""
    rounds = _SMALL_ROUNDS if workload.num_parameters < 1000 else options.rounds
    return {"rounds": 0 if workload.name in LARGE else rounds, "threads": options.threads}


def _chosen(workloads: Mapping[str, Workload], names: Sequence[str]) -> list[Workload]:
    return [workload for workload in workloads.values() if workload.name in names]


def _lines(lines: Sequence[str]) -> str:
    return "\n".join([*lines, ""])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Print the report."""
    networks = RANKED | REPEATED | FITTED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=networks, default=list(networks), metavar="NAME")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="leave out ways that are slower versions of others")
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
