"""Getting a connection: open ``/dev/fuse`` and mount it, or have ``fusermount3`` do both.

Strategy: as root (also of a user namespace) mount(2) is tried first, since it needs no helper and takes any option;
where the kernel says EPERM, and for ordinary users, the set-uid helper ``fusermount3`` mounts and hands the
descriptor over a socket (``_FUSE_COMMFD``, as libfuse's mount does). ``default_permissions`` is always on: without
opens only the kernel can check a reader.

Every fault of the host is found here, before a server exists, and raised as a CowfsError with a message (what and
where) and a remedy.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence

from cowfs._typed import Final
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.sys import mounts

DEVICE: Final = "/dev/fuse"
#: mount(8) words for user space only, and words that are always on here; accepted and dropped.
IGNORED: Final = frozenset(("defaults", "default_permissions", "auto", "noauto", "user", "nouser", "_netdev", "nofail"))
#: Words that fusermount3 takes (it refuses unknown ones).
_HELPER_WORDS: Final = frozenset(("ro", "rw", "nodev", "dev", "nosuid", "suid", "noexec", "exec", "sync", "async",
                                  "dirsync", "noatime", "atime"))  # fmt: skip


def mount_fuse(
    mountpoint: str | bytes | os.PathLike[str],
    options: Iterable[str] = (),
    allow_other: bool | None = None,
    source: str = "cowfs",
    subtype: str = "cowfs",
) -> int:
    """Mount an empty FUSE file system and return its connection's descriptor.

    Args:
        mountpoint: an existing directory that cowfs does not serve from. A dead FUSE mount found there
            (its server was killed: ENOTCONN) is taken off first.
        options: words of mount(8): ``ro``, ``nodev``, ``nosuid``, ``noexec``, ``noatime``...; unknown ones are
            an error.
        allow_other: let other users in. None: yes as root (also in a user namespace), no otherwise.
        source: shown as the mount's source.
        subtype: the mount shows as type ``fuse.SUBTYPE``.

    Raises:
        NotFound: no such mount point.
        InvalidArgument: it is no directory, or an option is unknown.
        FailedPrecondition: the kernel refuses (busy, not permitted).
        Unsupported: no ``/dev/fuse``, or neither the right to mount nor ``fusermount3``.
    """
    target = os.fsdecode(mountpoint)
    words = [word for word in options if word and word not in IGNORED]
    for word in words:
        if word not in mounts.OPTION_FLAGS:
            raise InvalidArgument(
                f"mount option {word!r} is not known", remedy="use " + ", ".join(sorted(mounts.OPTION_FLAGS))
            )
    check_target(target)
    root = os.geteuid() == 0
    if allow_other is None:
        allow_other = root
    if root:
        try:
            return _mount_directly(target, words, allow_other, source, subtype)
        except PermissionError as error:
            if _which("fusermount3") is None:
                raise Unsupported(
                    f"{target}: mounting is not permitted: {error.strerror}",
                    remedy="needs CAP_SYS_ADMIN in the namespace that owns the mount, or fusermount3 (package fuse3)",
                ) from None
    return _mount_by_helper(target, words, allow_other, source, subtype)


def open_device(path: str = DEVICE) -> int:
    """Open the FUSE device.

    Raises:
        Unsupported: it is missing or closed to this user.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Unsupported(
                f"{path}: not permitted", remedy="the device must be mode 0666: chmod 0666 /dev/fuse as root"
            ) from None
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR):
            raise Unsupported(
                f"{path}: {(error.strerror or '').lower()}",
                remedy="load the module (modprobe fuse), and give a container --device /dev/fuse",
            ) from None
        raise Unsupported(f"{path}: {error.strerror}") from None


def widen_read_ahead(fd: int, size: int) -> None:
    """Let the kernel read ``size`` bytes ahead on the mount behind the connection ``fd``, instead of 128 KiB.

    A sequential reader then asks a quarter as often. Needs root, sysfs, and a kernel that names the connection in
    fdinfo (Linux 6.17); elsewhere nothing is changed. Does not touch the mount, so the server itself may call it.
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as file:
            minor = next((line.split()[1] for line in file if line.startswith("fuse_connection:")), None)
        if minor is not None:
            with open(f"/sys/class/bdi/0:{minor}/read_ahead_kb", "w", encoding="utf-8") as file:
                file.write(str(size >> 10))
    except OSError:
        pass


def check_target(target: str) -> None:
    """Check that ``target`` can be mounted on; unmount dead mounts. Raises as :func:`mount_fuse`."""
    for _ in range(16):
        try:
            found = os.stat(target)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                clear_dead(target)
                continue
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NotFound(f"{target}: no such mount point", remedy=f"mkdir -p {target}") from None
            raise FailedPrecondition(f"{target}: {error.strerror}") from None
        if not stat.S_ISDIR(found.st_mode):
            raise InvalidArgument(f"{target}: the mount point is not a directory")
        return
    raise FailedPrecondition(f"{target}: dead mounts cannot be taken off")


def clear_dead(target: str) -> None:
    """Unmount the dead FUSE mount at ``target``.

    Raises:
        FailedPrecondition: not permitted.
    """
    try:
        mounts.umount(target, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
        return
    except OSError as error:
        reason = error.strerror
    helper = _which("fusermount3")
    if helper is not None:
        import subprocess

        done = subprocess.run([helper, "-u", "-z", "--", target], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = done.stderr.strip() or reason
    raise FailedPrecondition(f"{target}: the dead mount there cannot be taken off: {reason}")


def _which(program: str) -> str | None:
    import shutil

    return shutil.which(program)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _mount_directly(target: str, words: Sequence[str], allow_other: bool, source: str, subtype: str) -> int:
    flags = 0
    for word in words:
        flag, on = mounts.OPTION_FLAGS[word]
        flags = flags | flag if on else flags & ~flag
    fd = open_device()
    try:
        mode = os.stat(target).st_mode
        data = (
            f"fd={fd},rootmode={mode & 0o170000:o},user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        )
        if allow_other:
            data += ",allow_other"
        mounts.mount(source, target, f"fuse.{subtype}", flags, data)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EPERM:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), target) from None
        if error.errno == errno.ENODEV:
            raise Unsupported("the kernel has no FUSE file system", remedy="load the module: modprobe fuse") from None
        if error.errno == errno.EBUSY:
            raise FailedPrecondition(f"{target}: the mount point is busy") from None
        raise FailedPrecondition(f"{target}: mount failed: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_by_helper(target: str, words: Sequence[str], allow_other: bool, source: str, subtype: str) -> int:
    import array
    import socket
    import subprocess

    helper = _which("fusermount3") or _which("fusermount")
    if helper is None:
        raise Unsupported(f"{target}: mounting needs root or fusermount3", remedy="apt-get install fuse3")
    os.close(open_device())  # so that cowfs can report the reason
    passed = ["default_permissions", f"fsname={_escaped(source)}", f"subtype={subtype}"]
    passed += [word for word in words if word in _HELPER_WORDS]
    if allow_other:
        passed.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", ",".join(passed), "--", target],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()
            message = reason[-1] if reason else f"{helper} ended with status {done.returncode}"
            remedy = ""
            if "user_allow_other" in message:
                remedy = "add the line user_allow_other to /etc/fuse.conf, or mount without --allow-other"
            if "determine username" in message:
                remedy = "fusermount3 wants the user's name: add one to /etc/passwd"
            raise FailedPrecondition(f"{target}: {message.rpartition('fusermount3: ')[2]}", remedy=remedy)
        ours.settimeout(10)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i")
            descriptors.frombytes(data[: descriptors.itemsize])
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
    raise FailedPrecondition(f"{target}: {helper} handed no descriptor over")
