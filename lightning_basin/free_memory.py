"""How much memory is free: of a device, of a machine, and of the container or job that a process runs in."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

UNKNOWN_MEMORY = 4 * 2**30
"""Bytes that count as free where the system does not tell: on Windows."""

# For each version of control groups: their folder, the files of the limit and the use, and what can be dropped of it.
_CONTROL_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes that are free on a device.

    Args:
        device: The device. On the CPU the memory counts that this process may take without swapping or being killed.
        root: The folder in which the files of the system begin.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_free_on_machine(root), *_free_in_control_groups(root)])


def _free_on_machine(root: Path) -> int:
    try:  # What is cached from files is given up on demand, and not among the free pages.
        return 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY


def _free_in_control_groups(root: Path) -> Iterator[int]:
    """The memory that remains of each group of this process: groups are made by Linux containers and cluster jobs."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _CONTROL_GROUPS:
                continue
            mount, limit, usage, droppable = _CONTROL_GROUPS[controller]
            # Inside of a container its group stands at the top, whatever the path is outside.
            groups = Path(path.lstrip("/"))
            for group in [groups, *groups.parents]:
                try:
                    most, used = (int((root / mount / group / name).read_text()) for name in (limit, usage))
                    cached = _numbers(root / mount / group / "memory.stat")[droppable]
                except (OSError, ValueError, KeyError):  # There is no limit, or no such group here.
                    continue
                yield max(0, most - used + cached)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers behind the first word of each line of a file."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
