"""What is free is what the machine, the container and the job leave, each read as the system writes it."""

import os

import pytest
import torch

from lightning_basin.free_memory import UNKNOWN_MEMORY, available_memory

CPU = torch.device("cpu")


MEBIBYTE = 2**20


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def machine(root, mebibytes):
    # Of the free pages alone a machine that has read many files would have next to none.
    return write(
        root, {"proc/meminfo": f"MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable:   {mebibytes * 1024} kB\n"}
    )


def second(limit, used, cached=0):
    """Files of a control group of version 2, in mebibytes."""
    return {
        "memory.max": f"{limit if isinstance(limit, str) else limit * MEBIBYTE}\n",
        "memory.current": f"{used * MEBIBYTE}\n",
        "memory.stat": f"anon 5\nfile 7\ninactive_file {cached * MEBIBYTE}\nactive_file 3\n",
    }


def first(limit, used, cached=0):
    """The same of version 1."""
    return {
        "memory.limit_in_bytes": f"{limit * MEBIBYTE}\n",
        "memory.usage_in_bytes": f"{used * MEBIBYTE}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {cached * MEBIBYTE}\n",
    }


def under(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


def free(root):
    return available_memory(CPU, root) / MEBIBYTE


def test_a_machine_tells_what_is_available():
    free_here = available_memory(CPU)
    assert 0 < free_here <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_is_cached_from_files_counts_as_free(tmp_path):
    assert free(machine(tmp_path, 800)) == 800


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("0::/\n", under("sys/fs/cgroup", second(500, 200)), 300, id="container"),
        pytest.param("0::/\n", under("sys/fs/cgroup", second(500, 450, 400)), 450, id="with files in its cache"),
        pytest.param("0::/\n", under("sys/fs/cgroup", second("max", 200)), 800, id="without a limit"),
        pytest.param("0::/\n", under("sys/fs/cgroup", second(5000, 200)), 800, id="with more than the machine"),
        pytest.param("0::/\n", under("sys/fs/cgroup", second(500, 501)), 0, id="full"),
        pytest.param(
            "0::/slurm/job_7/step_0\n",
            under("sys/fs/cgroup/slurm/job_7", second(600, 100))
            | under("sys/fs/cgroup/slurm/job_7/step_0", second("max", 100))
            | under("sys/fs/cgroup/slurm/job_8", second(10, 10)),
            500,
            id="a job above the step",
        ),
        pytest.param(
            "9:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/docker/abc\n",
            under("sys/fs/cgroup/memory", first(400, 300, 50)),
            150,
            id="version 1, the own group on top",
        ),
        pytest.param(
            "4:memory:/job/7\n",
            under("sys/fs/cgroup/memory", first(2**43, 300)) | under("sys/fs/cgroup/memory/job/7", first(400, 300)),
            100,
            id="version 1, a job",
        ),
        pytest.param("4:memory:/gone\n0::/gone\n", {}, 800, id="groups that cannot be seen"),
    ],
)
def test_a_container_or_a_job_has_no_more_than_its_limit_leaves(tmp_path, groups, files, expected):
    assert free(write(machine(tmp_path, 800), files | {"proc/self/cgroup": groups})) == expected


def test_a_system_without_such_files_tells_what_is_built_in(tmp_path):
    assert available_memory(CPU, tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_system_that_tells_nothing_has_a_stated_amount(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sysconf")  # As on Windows.
    assert available_memory(CPU, tmp_path) == UNKNOWN_MEMORY == 4 * 2**30
