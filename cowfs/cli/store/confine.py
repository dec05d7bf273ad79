"""The confinement of the command of `cowfs run`: only its snapshot, a fresh /proc, a few devices, and no way out.

Rules, each with its reason:

1. The snapshot is the root of a mount namespace that holds nothing else (pivot_root, not chroot): root can leave a chroot.
2. No descriptor of cowfs is open when the command's working directory is entered: an image may name ``/proc/self/fd/N``.
3. Root keeps the capabilities that containers keep; devices in the snapshot cannot be opened, and the host's part of
/proc is read-only or covered; otherwise it would write to disks, memory, core_pattern or sysrq. 4. A session of its
own, with a terminal of its own if any: kill(0) reaches no process group outside, TIOCSTI types nothing there. 5.
Process 1 cannot be looked into: /proc/1/exe is the host's interpreter.

``--privileged`` leaves out rule 3. docs/security.md says what is not isolated at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import termios

from cowfs.sys import capabilities, mounts, namespaces

__all__ = ["enter", "start"]

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
#: Below /proc, as containers have them (runc, "maskedPaths" and "readonlyPaths").
_COVERED = (
    "acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats",
)  # fmt: skip
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_SAFE = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC


def enter(target: str, *, privileged: bool) -> None:
    """Confine this process, the first of a new pid namespace, to the tree mounted at ``target``.

    Raises:
        OSError: of a mount.
    """
    namespaces.unshare(namespaces.CLONE_NEWNS)
    mounts.make_private()
    if not privileged:
        mounts.remount_bind(target, mounts.MS_NODEV)
    _furnish(target, privileged=privileged)
    namespaces.move_root(target)
    capabilities.undumpable()


def _furnish(target: str, *, privileged: bool) -> None:
    """/proc and a few devices, where the tree has directories for them."""
    proc, dev = f"{target}/proc", f"{target}/dev"
    if os.path.isdir(proc) and not os.path.islink(proc):
        mounts.mount("proc", proc, "proc", _SAFE)
        if not privileged:
            _protect(proc)
    if not os.path.isdir(dev) or os.path.islink(dev):
        return
    mounts.mount("tmpfs", dev, "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, "mode=755,size=64k")
    for name in _DEVICES:
        if os.path.exists(f"/dev/{name}"):
            os.close(os.open(f"{dev}/{name}", os.O_WRONLY | os.O_CREAT, 0o644))
            mounts.mount(f"/dev/{name}", f"{dev}/{name}", "", mounts.MS_BIND)
    for name, end in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                      ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx")):  # fmt: skip
        os.symlink(end, f"{dev}/{name}")
    for name, mode in (("pts", 0o755), ("shm", 0o1777)):
        os.mkdir(f"{dev}/{name}")
        os.chmod(f"{dev}/{name}", mode)
    mounts.mount(
        "devpts", f"{dev}/pts", "devpts", mounts.MS_NOSUID | mounts.MS_NOEXEC, "newinstance,ptmxmode=666,mode=620"
    )
    if not privileged:
        mounts.remount_bind(dev, _SAFE)  # a node made here cannot be opened; those above are separate mounts


def _protect(proc: str) -> None:
    for name in _COVERED:
        path = f"{proc}/{name}"
        if os.path.isdir(path):
            mounts.mount("tmpfs", path, "tmpfs", _SAFE | mounts.MS_RDONLY)
        elif os.path.exists(path):
            mounts.mount("/dev/null", path, "", mounts.MS_BIND)
    for name in _READ_ONLY:
        path = f"{proc}/{name}"
        if os.path.exists(path):
            mounts.mount(path, path, "", mounts.MS_BIND)
            mounts.remount_bind(path, _SAFE | mounts.MS_RDONLY)


def start(terminal: int | None, *, privileged: bool, network: bool) -> None:
    """Drop privilege and set up the terminal, just before this process becomes the command.

    Args:
        terminal: a pseudo-terminal that takes the place of those standard streams that are a terminal.
        network: whether the command has the host's network.

    Raises:
        OSError: EPERM, privilege cannot be dropped.
    """
    os.setsid()
    if terminal is not None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            if _is_terminal(fd):
                os.dup2(terminal, fd)
    if not privileged:
        capabilities.drop_all_but(
            capabilities.CONTAINER - {capabilities.NET_RAW} if network else capabilities.CONTAINER
        )
    os.closerange(3, 1 << 20)


def _is_terminal(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(fd)
    return False
