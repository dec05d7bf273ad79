"""The mark of a volatile mount, which syncs nothing: after a crash of the host its upper may be incomplete.

The mark is the kernel's (Documentation/filesystems/overlayfs.rst, "Volatile mount"): ``work/incompat/volatile/dirty`` in
the work directory. The kernel leaves that file empty and refuses the upper from then on. cowfs writes the host's boot
id in it, which tells whether the host can have lost data since.
"""

from __future__ import annotations

import contextlib
import os

from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.sys.process import boot_id
from cowfs.sys.regular import read_small

__all__ = ["check_volatile", "mark_volatile"]


def check_volatile(work: str, *, volatile: bool, upper: str) -> None:
    """Honour the mark that an earlier volatile mount left in the work directory.

    A marker of this boot's is harmless: the writes are in the host's cache. A durable mount syncs it and drops the
    marker. Any other marker means that the host may have lost writes.

    Raises:
        FailedPrecondition: the upper was used by a volatile mount that a crash of the host may have damaged.
        Unsupported: the work directory asks for an unknown feature.
    """
    incompat = os.path.join(work, "work", "incompat")
    try:
        try:
            names = os.listdir(incompat)
        except PermissionError:  # the kernel's overlayfs leaves it closed to everybody, which root does not notice
            _open_to_owner(os.path.join(work, "work"))
            names = os.listdir(incompat)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if name != "volatile":
            raise Unsupported(f"{incompat}/{name}: a feature that cowfs does not know")
    marker = os.path.join(incompat, "volatile")
    if "volatile" in names:
        try:
            boot = read_small(os.path.join(marker, "dirty"), limit=100).decode("ascii", "replace").strip()
        except OSError:
            boot = ""
        if not boot or boot != boot_id():
            raise FailedPrecondition(
                f"{upper} belongs to a volatile mount and may be incomplete",
                remedy=f"start with an empty upper, or, if the host has not crashed since: rm -r {marker}",
            )
        if not volatile:
            from cowfs.sys.files import syncfs

            fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
            try:
                syncfs(fd)
            finally:
                os.close(fd)
            import shutil

            shutil.rmtree(incompat)


def _open_to_owner(path: str) -> None:
    """Let a directory's owner in.

    Raises:
        OSError: it is another user's, or no directory.
    """
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def mark_volatile(work: str) -> None:
    """Write the marker that :func:`check_volatile` and the kernel honour.

    Raises:
        OSError: the work directory has another object in its place, such as a symbolic link that leads out of it.
    """
    here = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in ("work", "incompat", "volatile"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=here)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = inner
        with contextlib.suppress(FileNotFoundError):
            os.unlink("dirty", dir_fd=here)
        fd = os.open("dirty", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=here)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(boot_id() + "\n")
    finally:
        os.close(here)
