"""CPUs that are allotted to a process; the machine may have many more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bandsplit.cpus import available_cpus

AFFINITY = 128


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file tree without limits, on a machine whose 128 CPUs this process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(AFFINITY)))
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_affinity_counts_not_the_machine() -> None:
    (one,) = list(os.sched_getaffinity(0))[:1]
    code = "from bandsplit.cpus import available_cpus; print(available_cpus(env={}))"
    bound = f"import os; os.sched_setaffinity(0, [{one}]); {code}"
    done = subprocess.run([sys.executable, "-c", bound], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_without_limits_the_affinity_remains(root: Path) -> None:
    assert available_cpus(root, env={}) == AFFINITY


# Contents of /proc/self/cgroup, the groups' files in /sys/fs/cgroup, and the number of CPUs that they allow.
GROUPS = {
    "version 2": ("0::/job/step\n", {"job/step/cpu.max": "1600000 100000\n"}, 16),
    "version 2, a group above": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
    "version 2, the least counts": ("0::/a/b\n", {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
    "version 2, no quota": ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
    "version 2, a container": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "version 2, a part of a CPU": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "version 2, CPUs and a part": ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
    "version 2 beside version 1": ("0::/a\n4:memory:/a\n", {"unified/a/cpu.max": "500000 100000\n"}, 5),
    "version 1": (
        "5:cpuset:/job\n4:cpu,cpuacct:/job\n0::/\n",
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "700000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
        7,
    ),
    "version 1, a container that sees the host's path": (
        "4:cpu,cpuacct:/docker/0123\n",
        {"cpu/cpu.cfs_quota_us": "600000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "version 1, no quota": (
        "4:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        AFFINITY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_quotas_of_control_groups(root: Path, case: str) -> None:
    said, files, cpus = GROUPS[case]
    write(root / "proc/self", {"cgroup": said})
    write(root / "sys/fs/cgroup", files)
    assert available_cpus(root, env={}) == cpus


@pytest.mark.parametrize(
    ("env", "cpus"),
    [
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        # The batch script starts torchrun itself, so its ranks share the job's CPUs on this node.
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "8"}, 64),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "8"}, 8),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "64"}, 64),
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),
        ({"SLURM_CPUS_ON_NODE": "256"}, AFFINITY),
        ({"SLURM_CPUS_ON_NODE": ""}, AFFINITY),
    ],
)
def test_cpus_that_slurm_allots_without_binding(root: Path, env: dict[str, str], cpus: int) -> None:
    assert available_cpus(root, env) == cpus


def test_the_smallest_limit_counts(root: Path) -> None:
    write(root / "proc/self", {"cgroup": "0::/\n"})
    write(root / "sys/fs/cgroup", {"cpu.max": "1200000 100000\n"})
    assert available_cpus(root, {"SLURM_CPUS_ON_NODE": "16"}) == 12
    assert available_cpus(root, {"SLURM_CPUS_ON_NODE": "10"}) == 10
