"""What the host grants this process: memory and processors, inside a container too."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

ASSUMED_MEMORY = 4 << 30  # where the system does not tell


def free_host_memory() -> tuple[int, int]:
    """Bytes that this process can still take without swapping, and bytes in all, within the container's limits."""
    free, total = _system_memory()
    for limit, used in _memory_limits():
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def limit_threads() -> int:
    """Use no more threads than the container's processor quota; returns how many are used.

    Without a quota torch's own choice stands (the processors this process may run on, or ``OMP_NUM_THREADS``).
    """
    threads = torch.get_num_threads()
    quota = _cpu_quota()
    if quota is not None and quota < threads:
        threads = quota
        torch.set_num_threads(threads)
    return threads


def divide_threads(ranks: int) -> None:
    """Leave the other ranks of this machine their part of the processors."""
    torch.set_num_threads(max(1, limit_threads() // ranks))


def return_freed_memory() -> None:
    """Give heap memory that was freed back to the system, where the C library would rather keep it."""
    if sys.platform == 'linux':
        import ctypes

        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def processor_name() -> str:
    """What the processor calls itself."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def _system_memory() -> tuple[int, int]:
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        fields = dict(line.split(':', 1) for line in meminfo.read_text().splitlines() if ':' in line)
        total = int(fields['MemTotal'].split()[0]) * 1024
        available = fields.get('MemAvailable', fields['MemFree'])
        return int(available.split()[0]) * 1024, total
    if sys.platform == 'win32':
        return _windows_memory()
    names = os.sysconf_names if hasattr(os, 'sysconf_names') else {}
    if 'SC_PHYS_PAGES' in names and 'SC_PAGE_SIZE' in names:  # macOS: total only; half of it is a fair guess of free
        total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        return total // 2, total
    return ASSUMED_MEMORY, ASSUMED_MEMORY


def _windows_memory() -> tuple[int, int]:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            [('length', ctypes.c_uint32), ('load', ctypes.c_uint32)]
            + [(name, ctypes.c_uint64) for name in ('total', 'free', 'd', 'e', 'f', 'g', 'h')]
        )  # fmt: skip

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.free), int(status.total)


def _own_groups(root: Path) -> list[Path]:
    """The cgroup v2 folders whose limits bind this process, the innermost first."""
    own = Path('/proc/self/cgroup')
    path = ''
    if own.exists():
        for line in own.read_text().splitlines():
            if line.startswith('0::'):
                path = line[3:].strip('/')
    folder = root / path
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().split()[0]
    except (OSError, IndexError):
        return None
    return int(text) if text.isdigit() else None


def _memory_limits(root: Path = Path('/sys/fs/cgroup')) -> list[tuple[int, int]]:
    """(limit, memory in use that cannot be reclaimed) of every group that has a limit."""
    found = []
    for folder in dict.fromkeys([*_own_groups(root), root]):
        limit, used = _number(folder / 'memory.max'), _number(folder / 'memory.current')
        if limit is not None and used is not None:
            found.append((limit, used - _reclaimable(folder / 'memory.stat', 'inactive_file')))
    limit, used = _number(root / 'memory/memory.limit_in_bytes'), _number(root / 'memory/memory.usage_in_bytes')
    if limit is not None and used is not None:  # cgroup v1
        found.append((limit, used - _reclaimable(root / 'memory/memory.stat', 'total_inactive_file')))
    return found


def _reclaimable(stat: Path, field: str) -> int:
    try:
        pairs = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get(field, '0'))


def _cpu_quota(root: Path = Path('/sys/fs/cgroup')) -> int | None:
    """Whole processors that the container's quota amounts to, at least 1; None: no quota."""
    quotas = []
    for folder in dict.fromkeys([*_own_groups(root), root]):
        try:
            quota, period = (folder / 'cpu.max').read_text().split()
        except (OSError, ValueError):
            continue
        if quota.isdigit():
            quotas.append((int(quota), int(period)))
    quota_us, period_us = _number(root / 'cpu/cpu.cfs_quota_us'), _number(root / 'cpu/cpu.cfs_period_us')
    if quota_us is not None and period_us:  # cgroup v1; -1 (no quota) is not a digit string
        quotas.append((quota_us, period_us))
    return min((max(1, -(-quota // period)) for quota, period in quotas), default=None)
