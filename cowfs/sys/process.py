"""Identities of this boot and of a process, which never repeat as process numbers do."""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal

from cowfs.sys._libc import check, libc

__all__ = [
    "become_subreaper",
    "boot_id",
    "end_with_parent",
    "go_on_without_parent",
    "is_ending",
    "make_dumpable",
    "start_time",
    "wait",
]


@functools.cache
def boot_id() -> str:
    """This boot's identity, a UUID in text (random(4), /proc/sys/kernel/random/boot_id); "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def start_time(pid: int) -> int | None:
    """The start time of a process, in clock ticks since boot (proc(5), stat, field 22); None if there is no such process.

    The process number and this time together identify one process, since numbers are used again.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


_PF_EXITING = 0x4  # linux/sched.h


def is_ending(pid: int) -> bool:
    """Whether a process is gone, or is about to end and runs no line of its program any more. After SIGKILL a process
    keeps its descriptors until its last thread has stopped.

    Source: proc(5): stat, fields 3 and 9; status, SigPnd.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X") or int(fields[6]) & _PF_EXITING:
            return True
        with open(f"/proc/{pid}/status", "rb") as file:
            waiting = next((line.split()[1] for line in file if line.startswith(b"SigPnd:")), b"0")
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, IndexError, ValueError):
        return False
    return bool(int(waiting, 16) >> (signal.SIGKILL - 1) & 1)


def wait(pid: int, timeout: float) -> None:
    """Wait until a process, child or not, has ended, for some seconds at most."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(timeout * 1000)
    finally:
        os.close(fd)


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # linux/prctl.h


def end_with_parent(parent: int, number: int) -> None:
    """Get a signal when the parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG); its own children do not.

    Args:
        parent: its process id as seen from here, 0 if it is in another namespace; if it has ended already, the signal comes now.
    """
    check(libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def go_on_without_parent() -> None:
    """Take :func:`end_with_parent` back."""
    check(libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(0), 0, 0, 0))


def become_subreaper() -> None:
    """Become the parent of descendants whose own parent ends (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0))


def make_dumpable() -> None:
    """Have this process's /proc entries belong to its user, as they do unless it changed its credentials (prctl(2), PR_SET_DUMPABLE)."""
    check(libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0))
