"""The number of CPUs that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """Number of CPUs allocated to this process, at least 1; often far fewer than the machine has.

    The minimum of the CPU affinity (taskset, srun, cpusets), the CPU quotas of its cgroups (containers, systemd) and
    the Slurm allocation. A fractional quota is rounded up.

    Args:
        root: folder that holds proc and sys.
        env: environment with Slurm's variables.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_cgroup_quotas(root), *_slurm_cpus(env)]))


def _cgroup_quotas(root: Path) -> Iterator[int]:
    """CPU quotas, in CPUs, of this process's cgroups and all their ancestors (cgroup v1 and v2).

    In a container, /proc/self/cgroup may give a path on the host, although the container's cgroup is mounted as the
    root. Folders that do not exist are therefore skipped.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            mounts = {"cpu", controllers}
        elif not controllers:
            mounts = {".", "unified"}  # v2 only, or v2 mounted next to v1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / "sys/fs/cgroup" / mount / level for mount in mounts for level in (group, *group.parents)):
            quota_us = _read(folder / "cpu.max") or (
                f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            )
            match quota_us.split():
                case [quota, period] if quota.isdigit():  # "max" and -1 mean no quota
                    yield math.ceil(int(quota) / int(period))


def _slurm_cpus(env: Mapping[str, str]) -> list[int]:
    """The Slurm allocation, at most one entry; matters on clusters that do not bind processes to their CPUs.

    In a step (srun), the CPUs of the task; in the batch script, the CPUs of the job on this node.
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
