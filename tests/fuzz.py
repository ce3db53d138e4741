"""Random cases against exact ones, for as long as one likes: ``python -m tests.fuzz --seconds 60 --seed 0``."""

import argparse
import itertools
import time
import traceback
from collections import Counter

import torch

from tests.fuzz_brackets import check_bracket
from tests.fuzz_ranks import check_ranks

CHECKS = (check_ranks, check_bracket)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long; forever unless told")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; that of the clock unless told")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    print(f"first seed: {first}", flush=True)
    end, compared, failed = time.monotonic() + arguments.seconds, Counter(), []
    for seed in itertools.count(first):
        if time.monotonic() > end:
            break
        for check in CHECKS:
            try:
                compared[check.__name__] += check(seed) is not False
            except Exception:
                failed.append(f"{check.__name__}({seed})")
                print(f"{failed[-1]} failed:\n{traceback.format_exc()}", flush=True)
    print(f"compared: {dict(compared)}, failed: {failed}", flush=True)
    if failed or not all(compared[check.__name__] for check in CHECKS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
