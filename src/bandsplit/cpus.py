"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """CPUs that are allotted to this process, which can be far fewer than the machine has; at least 1.

    The smallest of its CPU affinity (taskset, srun, cpusets), the CPU quotas of its control groups (containers,
    systemd) and what Slurm has allotted.  A quota that is no whole number of CPUs is rounded up.

    Args:
        root: where /proc and /sys are read.
        env: where Slurm's variables are read.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_cgroup_quotas(root), *_slurm_cpus(env)]))


def _cgroup_quotas(root: Path) -> Iterator[int]:
    """CPU quotas of the control groups of this process and of all groups above them, version 1 and 2.

    In a container the path may be the host's, while the container's own group is mounted as the topmost one: groups
    that are not there are passed over.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            mounts = {"cpu", controllers}
        elif not controllers:
            mounts = {".", "unified"}  # version 2 alone, or beside version 1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / "sys/fs/cgroup" / mount / level for mount in mounts for level in (group, *group.parents)):
            quota_us = _read(folder / "cpu.max") or (
                f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            )
            match quota_us.split():
                case [quota, period] if quota.isdigit():  # else: "max" or -1, which is no quota
                    yield math.ceil(int(quota) / int(period))


def _slurm_cpus(env: Mapping[str, str]) -> list[int]:
    """What Slurm has allotted, for clusters that do not bind processes to their CPUs.

    In a step (srun) the CPUs of the task; in the batch script those of the job on this node, which its processes share.
    """
    names = ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"]
    if "SLURM_STEP_ID" not in env:
        names.reverse()
    return [int(env[name]) for name in names if env.get(name, "").isdigit()][:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
