"""Time the rank engine against what one would write with ``torch.func``; run it with ``make bench``.

Every figure comes from a process of its own, so that its peak memory is its own; a figure is the median of the runs
after a first one that is not counted. What would not fit into memory is not run, and says what it needs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.networks import WORKLOADS, Workload
from lightning_basin import measure_basin
from lightning_basin.gradients import layer_gradients
from lightning_basin.measurement import evaluated
from lightning_basin.probe import Probe

LARGEST_MATRIX = 6 * 2**30  # bytes of a dense matrix of gradients that is still formed


def gram_of_factors(module: nn.Module, inputs: Tensor) -> None:
    """The Gram matrix of all gradients from factors, checked against autograd as in every measurement."""
    with evaluated(module, Probe(inputs), None, None) as evaluation:
        found = layer_gradients(evaluation.traced, generator=torch.Generator().manual_seed(0))
        sum(measured.gradients.gram for measured in found)


def total_rank(module: nn.Module, inputs: Tensor) -> int:
    """A whole measurement of the network, without layers and singular values; with duplicates and dead units."""
    return measure_basin(module, inputs, layers=[], spectrum=False).gradient_rank


def all_ranks(module: nn.Module, inputs: Tensor) -> int:
    """A whole measurement of the network and each layer, without singular values."""
    return measure_basin(module, inputs, spectrum=False).gradient_rank


def dense_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """The matrix of gradients as ``torch.func`` gives it."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(module, values, (one.unsqueeze(0),)).flatten()

    blocks = vmap(jacrev(outputs), in_dims=(None, 0))(parameters, inputs)
    return torch.cat([block.flatten(2) for block in blocks.values()], dim=2).flatten(0, 1)


def gram_of_rows(module: nn.Module, inputs: Tensor) -> None:
    """The Gram matrix by forming the rows."""
    rows = dense_rows(module, inputs)
    torch.mm(rows, rows.mT)


def rank_of_rows(module: nn.Module, inputs: Tensor) -> int:
    """The rank by singular values of the rows, as ``torch.linalg.matrix_rank`` counts it."""
    rows = dense_rows(module, inputs)
    sigmas = torch.linalg.svdvals(rows)
    return int((sigmas > max(rows.shape) * torch.finfo(rows.dtype).eps * sigmas[0]).sum())


def training_step(module: nn.Module, inputs: Tensor) -> None:
    """One step of gradient descent on the probe."""
    module.zero_grad()
    module(inputs).square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.0 * parameter.grad


WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], int | None], torch.dtype]] = {
    "training step, float32": (training_step, torch.float32),
    "Gram, factors": (gram_of_factors, torch.float32),
    "Gram, vmap(jacrev)": (gram_of_rows, torch.float64),
    "rank, lightning_basin": (total_rank, torch.float32),
    "rank and each layer's, lightning_basin": (all_ranks, torch.float32),
    "rank, vmap(jacrev) + svdvals": (rank_of_rows, torch.float64),
}
REFERENCE = {"Gram, vmap(jacrev)": "Gram, factors", "rank, vmap(jacrev) + svdvals": "rank, lightning_basin"}


def measured_here(workload: Workload, way: str, repeats: int) -> dict[str, float | int | None]:
    function, dtype = WAYS[way]
    module, inputs = workload.module(dtype), workload.probe(dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, result = [], None
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = function(module, inputs)
        seconds.append(time.perf_counter() - started)
        if seconds[0] > 10:  # Heavy ones are run once.
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds[1:] or seconds), "rank": result, "mebibytes": peak / 1024}


def measured(workload: Workload, way: str, options: argparse.Namespace) -> dict[str, float | int | None]:
    command = [sys.executable, "-m", "benchmarks", "--child", workload.name, way, "--repeats", str(options.repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(printed.splitlines()[-1])


def table(workload: Workload, options: argparse.Namespace) -> list[str]:
    num_parameters = sum(parameter.numel() for parameter in workload.module(torch.float32).parameters())
    lines = [
        f"\n### {workload.title}: N = {num_parameters:,}, k = {workload.num_inputs}, m = {workload.num_rows}\n",
        "| way | seconds | times ours | MiB | rank |",
        "|---|--:|--:|--:|--:|",
    ]
    found: dict[str, dict[str, float | int | None]] = {}
    needed = 8 * num_parameters * workload.num_rows
    for way, (_, dtype) in WAYS.items():
        if dtype == torch.float64 and needed > LARGEST_MATRIX:
            lines.append(f"| {way} | not run: needs {2 * needed / 2**30:.0f} GiB | | | |")
            continue
        found[way] = result = measured(workload, way, options)
        ours = found.get(REFERENCE.get(way, ""), {}).get("seconds")
        ratio = "" if not ours else f"{result['seconds'] / ours:.1f}"
        rank = "" if result["rank"] is None else str(result["rank"])
        lines.append(f"| {way} | {result['seconds']:.4f} | {ratio} | {result['mebibytes']:.0f} | {rank} |")
    return lines


def scaling(options: argparse.Namespace) -> list[str]:
    """Seconds of the Gram matrix over the number of parameters, at 64 rows."""
    lines = ["\n### Cost over N: MLP 64-w-w-1, k = m = 64\n", "| N | seconds of a whole measurement |", "|--:|--:|"]
    for width in (64, 256, 1024, 3072):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        inputs = torch.randn(64, 64)
        total_rank(module, inputs)
        started = time.perf_counter()
        total_rank(module, inputs)
        seconds = time.perf_counter() - started
        lines.append(f"| {sum(p.numel() for p in module.parameters()):,} | {seconds:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured_here(WORKLOADS[options.child[0]], options.child[1], options.repeats)))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.repeats} runs", flush=True)
    for name in options.networks:
        print("\n".join(table(WORKLOADS[name], options)), flush=True)
    print("\n".join(scaling(options)))


if __name__ == "__main__":
    main()
