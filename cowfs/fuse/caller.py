"""The thread behind a request: what the few requests mean whose header does not say it.

A request names the thread that waits for its answer by number, so the thread is there, blocked in its system call, for as
long as the request is not answered; what /proc says of it meanwhile cannot change. A number that cannot be seen from
here (another pid namespace, no /proc, a thread of the kernel) leaves a question open: each function says what it returns
then.

Reading ``/proc/TID/syscall`` takes a lock that execve(2) holds: only since Linux 5.10 is that lock taken after the other
threads of the program have ended, so that none of them can be waiting for us. Before, it is not read.

Source: proc_pid_syscall(5), proc_pid_status(5), capabilities(7) (CAP_FSETID), inode(7) (S_ISUID, S_ISGID).
"""

from __future__ import annotations

import os
from typing import Final

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
    """Whether a thread is in chown(2) or its kin; ``None`` when that cannot be seen."""
    if not pid or not _CHOWNS:
        return None
    try:
        with open(f"/proc/{pid}/syscall", "rb") as file:
            first = file.read(64).split()[0]
        return int(first) in _CHOWNS
    except (OSError, IndexError, ValueError):  # ValueError: "running", which a thread that waits for us is not
        return None


def _status(pid: int) -> dict[bytes, list[bytes]]:
    """The fields of ``/proc/PID/status``; empty when it cannot be seen."""
    if not pid:
        return {}
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return {name: rest.split() for name, _, rest in (line.partition(b":") for line in file)}
    except OSError:
        return {}


def groups(pid: int) -> frozenset[int]:
    """Supplementary groups of a thread; none when it cannot be seen."""
    return frozenset(map(int, _status(pid).get(b"Groups", ())))


def keeps_set_id(uid: int, pid: int) -> bool:
    """Whether what a thread writes leaves set-id bits alone: it has CAP_FSETID in the initial user namespace.

    Where it cannot be seen, root (``uid`` 0) is taken to have it, and nobody else.
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
