"""Where a command in a sandbox finds itself: only its root, a fresh /proc, a few devices, what was bound, and no way out.

Rules, each with what it is against:

1. The root is that of a mount namespace that holds nothing else (pivot_root, not chroot): root can leave a chroot.
2. The tree is a stranger's. All that is mounted upon it is made beforehand, without a place, and gets its place once the tree is the root
   already: a link in it, wherever it points, leads to itself. A /proc, /dev or /sys that is missing, or is a link, stays what it is; links
   of /proc, which lead to descriptors, are followed by nothing here, and /proc comes last.
3. No descriptor of ours is open when the command's working directory is entered: an image may name ``/proc/self/fd/N``.
4. Of root's privilege remains what containers keep, none of it comes back (no_new_privs), and system calls that concern the host are refused
   (:mod:`cowfs.sys.seccomp`). Devices in the tree or in a bind are not opened, and what of /proc and /sys concerns the host is
   read-only or covered: it would write to disks, memory, core_pattern or sysrq.
5. A session of its own, with a terminal of its own if any: kill(0) reaches no process group outside, TIOCSTI types nothing there.
6. Process 1 cannot be looked into, and nothing outside of the root can be opened or started (Landlock, where the kernel has it):
   /proc/self/exe is the host's interpreter until the command has started.

``privileged`` leaves out rules 4 and 6. docs/security.md says what is not isolated at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import termios
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest

from cowfs.errors import InvalidArgument, NotFound, Unsupported
from cowfs.sandbox import users
from cowfs.sandbox.request import Bind, Request
from cowfs.sys import capabilities, files, landlock, mounts, namespaces, seccomp

__all__ = ["enter", "start"]

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
#: Below /proc, as containers have them (runc, "maskedPaths" and "readonlyPaths").
_COVERED = (
    "acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats",
)  # fmt: skip
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_COVERED_IN_SYS = ("firmware", "devices/virtual/powercap")
_SAFE = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
_SAFE_ATTRIBUTES = mounts.ATTR_NOSUID | mounts.ATTR_NODEV | mounts.ATTR_NOEXEC
_SHARED_MEMORY = b"64m"


class _Furniture:
    """The mounts of a sandbox beside its root, made without a place. Owner of descriptors, until it is closed."""

    def __init__(self, request: Request) -> None:
        self._open = ExitStack()
        try:
            attributes = _SAFE_ATTRIBUTES if not request.privileged else mounts.ATTR_NOSUID | mounts.ATTR_NOEXEC
            self.proc = self._keep(mounts.detached_mount(b"proc", (), attributes=_SAFE_ATTRIBUTES))
            self.sys = self._sys(request)
            self.dev = self._keep(
                mounts.detached_mount(b"tmpfs", [(b"mode", b"0755"), (b"size", b"64k")], attributes=attributes)
            )
            self.pts = self._keep(
                mounts.detached_mount(b"devpts", _PTS, attributes=_SAFE_ATTRIBUTES & ~mounts.ATTR_NODEV)
            )
            self.shm = self._keep(
                mounts.detached_mount(
                    b"tmpfs", [(b"mode", b"1777"), (b"size", _SHARED_MEMORY)], attributes=_SAFE_ATTRIBUTES
                )
            )
            self.devices = {
                name: self._keep(mounts.detached_bind(f"/dev/{name}", recursive=False))
                for name in _DEVICES
                if os.path.exists(f"/dev/{name}")
            }
            self.nulls = [
                self._keep(mounts.detached_bind("/dev/null", recursive=False))
                for _ in _COVERED
                if "null" in self.devices
            ]
            self.binds = [(bind, self._bound(bind, request)) for bind in request.binds]
            self.own = self._keep(os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except BaseException:
            self._open.close()
            raise

    def _keep(self, fd: int) -> int:
        self._open.callback(os.close, fd)
        return fd

    def _sys(self, request: Request) -> int | None:
        """A /sys of the network that the command has; None: in a user namespace the host's network has none to give."""
        try:
            return self._keep(mounts.detached_mount(b"sysfs", (), attributes=_SAFE_ATTRIBUTES | mounts.ATTR_RDONLY))
        except PermissionError:
            return None

    def _bound(self, bind: Bind, request: Request) -> int:
        attributes = (mounts.ATTR_RDONLY if bind.readonly else 0) | (0 if request.privileged else mounts.ATTR_NODEV)
        try:
            return self._keep(mounts.detached_bind(bind.source, attributes))
        except FileNotFoundError:
            raise NotFound(f"there is no {bind.source} to bind", remedy="make it first") from None
        except OSError as error:
            remedy = "Linux 5.12 can" if error.errno == errno.ENOSYS else "bind another file or directory"
            raise Unsupported(f"{bind.source} cannot be bound: {error.strerror}", remedy=remedy) from None

    def close(self) -> None:
        """Let go of everything; that which has a place stays."""
        self._open.close()


_PTS = ((b"newinstance", None), (b"ptmxmode", b"0666"), (b"mode", b"0620"))


def enter(target: str, request: Request) -> users.User:
    """Make the tree mounted at ``target`` the world of this process, the first of a new pid namespace.

    Returns:
        The user of the command.

    Raises:
        OSError: of a mount.
        Unsupported: this host or user cannot make a mount that is needed.
        InvalidArgument: a bind or the user cannot be in this tree.
    """
    namespaces.unshare(namespaces.CLONE_NEWNS)
    mounts.make_private()
    os.umask(0o022)
    try:
        furniture = _Furniture(request)
    except OSError as error:
        raise Unsupported(
            f"/proc and /dev cannot be mounted in the sandbox: {error.strerror}",
            remedy="in a container, start that with its own /proc uncovered: docker run --security-opt systempaths=unconfined",
        ) from None
    if not request.privileged:
        mounts.remount_bind(target, mounts.MS_NODEV)
    namespaces.move_root(target)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _furnish(root, furniture, request)
        user = users.find(root, request.user, [])
        if not namespaces.has_ids(user.uid, user.gid, furniture.own):
            namespaces.become(user.uid, user.gid, furniture.own)
        if not namespaces.may_set_groups(furniture.own):
            user = replace(user, groups=tuple(os.getgroups()))
    finally:
        os.close(root)
        furniture.close()
    return user


def undumpable() -> None:
    """From now on nobody in the sandbox can look into this process."""
    capabilities.undumpable()


def _furnish(root: int, furniture: _Furniture, request: Request) -> None:
    with _directory("dev") as place:
        if place is not None:
            mounts.attach(furniture.dev, place)
            _fill_dev(furniture)
    if furniture.sys is not None:
        with _directory("sys") as place:
            if place is not None:
                mounts.attach(furniture.sys, place)
                if not request.privileged:
                    for name in _COVERED_IN_SYS:
                        _cover(f"/sys/{name}", None)
    for bind, fd in furniture.binds:
        _place(root, bind, fd)
    with _directory("proc") as place:
        if place is not None:
            mounts.attach(furniture.proc, place)
            if not request.privileged:
                _protect(furniture.nulls)


@contextmanager
def _directory(name: str) -> Iterator[int | None]:
    """A directory of the root itself; None where there is none, or it is a link."""
    try:
        fd = os.open(f"/{name}", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _fill_dev(furniture: _Furniture) -> None:
    for name, fd in furniture.devices.items():
        place = os.open(f"/dev/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            mounts.attach(fd, place)
        finally:
            os.close(place)
    for name, end in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                      ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx")):  # fmt: skip
        os.symlink(end, f"/dev/{name}")
    for name, fd in (("pts", furniture.pts), ("shm", furniture.shm)):
        os.mkdir(f"/dev/{name}", 0o755)
        place = os.open(f"/dev/{name}", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mounts.attach(fd, place)
        finally:
            os.close(place)


def _protect(nulls: Iterable[int]) -> None:
    for name, null in zip_longest(_COVERED, nulls):
        _cover(f"/proc/{name}", null)
    for name in _READ_ONLY:
        path = f"/proc/{name}"
        if os.path.exists(path):
            mounts.mount(path, path, "", mounts.MS_BIND)
            mounts.remount_bind(path, _SAFE | mounts.MS_RDONLY)


def _cover(path: str, null: int | None) -> None:
    """Hide a directory, or a file by /dev/null, of a mount of ours."""
    try:
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if stat.S_ISDIR(os.fstat(place).st_mode):
            cover = mounts.detached_mount(b"tmpfs", (), readonly=True, attributes=_SAFE_ATTRIBUTES)
            try:
                mounts.attach(cover, place)
            finally:
                os.close(cover)
        elif null is not None:
            mounts.attach(null, place)
    finally:
        os.close(place)


def _place(root: int, bind: Bind, fd: int) -> None:
    """Put a bind where it belongs; what is missing of the way there is made."""
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    try:
        place = _target(root, bind.target, directory=is_directory)
    except FileExistsError:
        raise InvalidArgument(
            f"nothing can be bound upon {bind.target}: a link on the way leads nowhere", remedy="another target"
        ) from None
    except OSError as error:
        raise InvalidArgument(
            f"nothing can be bound upon {bind.target}: {error.strerror}",
            remedy="another target, or make it in the snapshot first",
        ) from None
    try:
        if stat.S_ISDIR(os.fstat(place).st_mode) != is_directory:
            one, other = ("a directory", "none") if is_directory else ("no directory", "one")
            raise InvalidArgument(
                f"{bind.source} cannot be bound upon {bind.target}: it is {one}, and that is {other}",
                remedy="bind a directory upon a directory, a file upon a file",
            )
        mounts.attach(fd, place)
    finally:
        os.close(place)


def _target(root: int, path: str, *, directory: bool) -> int:
    """A descriptor of a path in the tree, in which links lead nowhere else; made where there is nothing."""
    parts = path.strip("/").split("/")
    at = os.dup(root)
    for number, part in enumerate(parts, 1):
        try:
            after = files.open_in_root(root, os.fsencode("/" + "/".join(parts[:number])), os.O_PATH)
        except FileNotFoundError:
            if number < len(parts) or directory:
                os.mkdir(part, 0o755, dir_fd=at)
            else:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=at))
            after = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        except BaseException:
            os.close(at)
            raise
        os.close(at)
        at = after
    return at


def start(terminal: int | None, request: Request, user: users.User) -> None:
    """The last of this process before it becomes the command.

    Args:
        terminal: a pseudo-terminal that takes the place of those standard streams that are a terminal, of all where one was asked for.
        request: what the command may do.
        user: who it runs as.

    Raises:
        OSError: EPERM, privilege cannot be dropped.
    """
    os.setsid()
    if terminal is not None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            if request.terminal or _is_terminal(fd):
                os.dup2(terminal, fd)
    filters = None if request.privileged else seccomp.Filter()
    os.closerange(3, 1 << 20)
    if not request.privileged:
        kept = capabilities.CONTAINER - {capabilities.NET_RAW} if request.network == "host" else capabilities.CONTAINER
        capabilities.drop_all_but(kept)
    _become(user)
    if filters is not None:
        capabilities.no_new_privileges()
        landlock.restrict("/", (0, 1, 2), sockets=request.network == "host")
        filters.load()


def _become(user: users.User) -> None:
    if (user.uid, user.gid, user.groups) == (os.getuid(), os.getgid(), tuple(os.getgroups())):
        return
    if user.groups != tuple(os.getgroups()):
        os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def _is_terminal(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(fd)
    return False
