"""What this machine is: its instruction sets and its memory, from what the operating system says."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from moec.runtime.errors import MoecError

_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def cpu_info() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; nothing where there is no such file."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_features() -> frozenset[str]:
    """The names of instruction sets as /proc/cpuinfo has them (`avx2`, `avx512_vnni`, `asimddp`); none where it is not known."""
    info = cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def cpu_name() -> str:
    """The processor's name."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory, or None where it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores that this process may use, counting threads of one core once: they share the units that do arithmetic."""
    if not hasattr(os, "sched_getaffinity"):
        return available_cores()
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def check_features(required: Collection[str], what: str) -> None:
    """Refuse code for instructions that this machine lacks, which would end the process.

    Raises:
        MoecError: some are missing.
    """
    have = cpu_features()
    if have and (missing := sorted(set(required) - have)):
        raise MoecError(
            f"{what}: its code needs {', '.join(missing)}, which this processor ({cpu_name()}) lacks: compile it for this machine"
        )
