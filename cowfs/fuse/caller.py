"""The thread behind a request, for the few requests whose header does not tell their meaning.

A request has the number of the thread that waits for its answer, so the thread exists, blocked in its system call,
until the answer, and its entries in /proc cannot change meanwhile. A number without an entry (another pid namespace, no
/proc, a thread of the kernel) leaves a question open: each function documents its result for that.

Reading ``/proc/TID/syscall`` takes a lock that execve(2) holds: only since Linux 5.10 is that lock taken after the other
threads of the program have ended, so that none of them can be waiting for this server. On older kernels the file is not read.

Source: proc_pid_syscall(5), proc_pid_status(5), capabilities(7) (CAP_FSETID), inode(7) (S_ISUID, S_ISGID).
"""

from __future__ import annotations

import os

from cowfs._typed import Final
from cowfs.sys.host import CAP_FSETID

#: Inode number of the initial user namespace (include/linux/proc_ns.h, PROC_USER_INIT_INO): privilege counts only there.
_INIT_USERNS: Final = 0xEFFFFFFD

#: Numbers of chown(2) and its kin: on x86-64 (chown, fchown, lchown, fchownat), in 32-bit programs there (lchown, fchown,
#: chown, the same with 32-bit ids, fchownat), and on the machines with the common table (fchownat, fchown). In none of the
#: tables do these numbers stand for a call that changes a file's data without setting its size.
_X86: Final = frozenset((92, 93, 94, 260, 16, 95, 182, 198, 207, 212, 298))
_COMMON: Final = frozenset((54, 55))
_MACHINES: Final = {
    "x86_64": _X86,
    "aarch64": _COMMON | {16, 95, 182, 198, 207, 212, 325},  # and 32-bit programs on it
    "riscv64": _COMMON,
    "loongarch64": _COMMON,
}


def _chowns() -> frozenset[int]:
    system = os.uname()
    try:
        version = tuple(map(int, system.release.split(".")[:2]))
    except ValueError:
        return frozenset()
    return _MACHINES.get(system.machine, frozenset()) if version >= (5, 10) else frozenset()


_CHOWNS: Final = _chowns()


def in_chown(pid: int) -> bool | None:
    """Whether a thread is in chown(2) or its kin; ``None`` if unknown."""
    if not pid or not _CHOWNS:
        return None
    try:
        with open(f"/proc/{pid}/syscall", "rb") as file:
            first = file.read(64).split()[0]
        return int(first) in _CHOWNS
    except (OSError, IndexError, ValueError):  # ValueError: "running", which a waiting thread is not
        return None


def _status(pid: int) -> dict[bytes, list[bytes]]:
    """The fields of ``/proc/PID/status``; empty if there is no such entry."""
    if not pid:
        return {}
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return {name: rest.split() for name, _, rest in (line.partition(b":") for line in file)}
    except OSError:
        return {}


def groups(pid: int) -> frozenset[int]:
    """Supplementary groups of a thread; none if there is no such entry."""
    return frozenset(map(int, _status(pid).get(b"Groups", ())))


def keeps_set_id(uid: int, pid: int) -> bool:
    """Whether writes of a thread leave set-id bits alone, by CAP_FSETID in the initial user namespace.

    Without an entry in /proc, only root (``uid`` 0) counts as having it.
    """
    held = _status(pid).get(b"CapEff")
    if not held:
        return not uid
    if not int(held[0], 16) >> CAP_FSETID & 1:
        return False
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino == _INIT_USERNS
    except OSError:
        return not uid
