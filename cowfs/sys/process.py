"""Identities that outlive a number: of this boot, and of a process."""

from __future__ import annotations

import ctypes
import functools

from cowfs.sys._libc import check, libc

__all__ = ["become_subreaper", "boot_id", "start_time"]


@functools.cache
def boot_id() -> str:
    """This boot's identity, a UUID in text (random(4), /proc/sys/kernel/random/boot_id); "" where it is not to be had."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot (proc(5), stat, field 22), or None: no such process.

    A number and this together name one process: numbers are given again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0))
