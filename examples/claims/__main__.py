"""Run all experiments, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

EXPERIMENTS = (
    "information_loss",
    "rank_and_flatness",
    "tolerances",
    "depth",
    "width",
    "after_zero_loss",
    "dimension",
    "circuits",
    "sweep",
    "real_task",
    "convolution",
    "grokking",
    "plasticity",
    "volume",
    "learning_coefficient",
)
"""In the order of the index."""


def main() -> None:
    """Run them one after the other, and end with the first that fails."""
    for name in EXPERIMENTS:
        print(f"\n=== {name} ===", flush=True)
        command = [sys.executable, "-m", f"examples.claims.{name}", *sys.argv[1:]]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    main()
