"""The image of one layer as a mounted file system: our mount of the chain, a loop device over the file in it, the kernel's mount of that.

Strategy: each of the three is held by the next alone. Our mount is detached from the tree as soon as the loop device has the file open, the device goes
with its last mount (LO_FLAGS_AUTOCLEAR). So one unmount of ``mnt`` takes all of it away, whoever does it, unless a bind or an open file keeps
the file system; nothing is left by a process that is killed but ``mnt`` itself, or, for a moment, ``served``, and both are
found by the next one who wants the layer. A server that was killed leaves a device that answers with errors; it is unmounted and made anew.

The note ``device`` in the layer's directory says which device and which server it was; the device is believed only while it is named after
the directory.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from cowfs._record import record
from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.mounting import client, protocol
from cowfs.mounting.request import MountSpec
from cowfs.sys import atomic, blockfs, files, loop, mounts, process, programs
from cowfs.sys.regular import read_small

from . import block_image
from .block_image import BLOCK, Kind
from .block_pool import DISK

__all__ = [
    "SERVED",
    "DiskRequest",
    "Kept",
    "Served",
    "TooSmall",
    "attach",
    "bound",
    "check_room",
    "detach",
    "device",
    "frozen",
    "furnish",
    "is_attached",
    "is_bound",
    "is_mounted",
    "put",
    "remount",
    "serve",
    "size_of",
    "take_away",
    "used",
]

SERVED = "served"
"""The directory in a layer's that our mount is made at."""

_NOTE = "device"
_MARGIN = 256 << 10  # bytes of the journal, and of maps, that come with what is written
_PATIENCE_FOR_ROOM = 60.0  # seconds that a write waits for room on the host, as dm-thin's do
_END = 0.5  # seconds in which a device goes after its last mount
_PATIENCE = 20.0  # seconds that a server has to end after its last user
_TREE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@record(frozen=True, slots=True, kw_only=True)
class DiskRequest:
    """An image to be mounted.

    Attributes:
        kind: the file system in it.
        lowers: trees of the deltas that are only read, topmost first.
        upper, work: of the delta that is written; "": nothing is.
        block: bytes a block that a new redirect file has.
        form: of the deltas' xattrs.
        fsync: whether a flush of the device brings data to the disk.
        discard: whether freed blocks are discarded.
        blocks: the file system is made so large before it is mounted; 0: it stays as it is.
    """

    kind: Kind
    lowers: Sequence[str]
    upper: str
    work: str
    block: int
    form: str
    fsync: bool
    discard: bool
    blocks: int = 0


class TooSmall(FailedPrecondition):
    """A file system that is mounted, and that this process may not make larger now.

    Attributes:
        blocks: the size that is wanted.
    """

    def __init__(self, blocks: int, message: str, remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.blocks = blocks


@record(frozen=True, slots=True, kw_only=True)
class Served:
    """The device and the server of a layer.

    Attributes:
        device: its path.
        socket: the server's control socket.
    """

    device: str
    socket: str

    @classmethod
    def of(cls, directory: str) -> Served | None:
        """Those that a layer's directory has now; None where there is no such device any more."""
        try:
            noted = json.loads(read_small(f"{directory}/{_NOTE}", limit=1000))
            found = cls(device=str(noted["device"]), socket=str(noted["socket"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return found if loop.name_of(found.device) == _name(directory) else None

    def upper(self) -> str:
        """The tree that the server writes in."""
        return str(protocol.ask(self.socket, "info")["upper"])

    def switch(self, upper: str, work: str) -> None:
        """Have the server go on in another delta; its file system is frozen. Raises CowfsError: it did not."""
        mark = f"{os.path.dirname(upper)}/switched"
        with suppress(FileNotFoundError):
            os.unlink(mark)
        places = {"upper": upper, "work": work, "final_upper": upper, "final_work": work}
        try:
            protocol.ask(self.socket, "freeze", timeout=600.0, mark=mark, **places)
        except CowfsError:
            if not os.path.exists(mark):
                raise


class Kept:
    """Which trees stay mounted: those of records that somebody has, and those planned for a mount that is being made, or there.

    One file a layer: ``described``, or ``planned`` with the process that makes the mount, or ``made``.

    Args:
        path: their directory.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._mine: dict[str, int] = {}  # id -> the thread that planned it

    def _write(self, id: str, word: str) -> None:
        os.makedirs(self._path, mode=0o700, exist_ok=True)
        atomic.write_file(f"{self._path}/{id}", f"{word}\n".encode(), durable=False)

    def _read(self, id: str) -> list[str]:
        try:
            return read_small(f"{self._path}/{id}", limit=200).decode("ascii", "replace").split() or [""]
        except FileNotFoundError:
            return [""]

    def has(self, id: str) -> bool:
        """Whether a tree stays."""
        return os.path.exists(f"{self._path}/{id}")

    def plan(self, id: str) -> None:
        """It does until the mount that this process makes is gone."""
        if self._read(id)[0] != "described":
            self._mine[id] = threading.get_ident()
            self._write(id, f"planned {os.getpid()} {process.start_time(os.getpid())}")

    def made(self, id: str) -> None:
        """It does until it can be unmounted."""
        self._write(id, "made")

    def describe(self, id: str) -> None:
        """It does until its layer is removed."""
        self._mine.pop(id, None)
        self._write(id, "described")

    def drop(self, id: str) -> None:
        """It does not any more."""
        self._mine.pop(id, None)
        with suppress(FileNotFoundError):
            os.unlink(f"{self._path}/{id}")

    def release(self, *, here: bool = False) -> None:
        """The mounts that were planned through this object (``here``: by this thread) are made, or never will be."""
        for id, thread in list(self._mine.items()):
            if here and thread != threading.get_ident():
                continue
            self._mine.pop(id, None)
            if self._read(id)[0] == "planned":
                self.made(id)

    def done(self) -> list[str]:
        """Trees that stay until their mount is gone, and whose mount nobody is about to make."""
        try:
            names = os.listdir(self._path)
        except FileNotFoundError:
            return []
        found = []
        for id in names:
            word, *who = self._read(id)
            if word == "made" or (word == "planned" and not _is_running(who)):
                found.append(id)
        return found


def _is_running(who: list[str]) -> bool:
    """Whether a process, by number and start, is there."""
    if len(who) != 2 or not who[0].isdecimal():
        return False
    return str(process.start_time(int(who[0]))) == who[1]


def put(path: str, text: str) -> None:
    """Note a few words, in place of those before: as the target of a symbolic link, which is on the disk with its directory."""
    with suppress(FileNotFoundError):
        os.unlink(f"{path}.new")
    os.symlink(text, f"{path}.new")
    os.rename(f"{path}.new", path)


def _name(directory: str) -> str:
    there = os.stat(directory)
    return f"cowfs-block {there.st_dev}:{there.st_ino}"


def take_away(place: str, flags: int = 0) -> bool:
    """Unmount the mount at a place; whether there was one, since its server may have been faster.

    Raises:
        OSError: as umount(2).
    """
    try:
        mounts.umount(place, flags)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        return False
    return True


def is_mounted(place: str) -> bool:
    """Whether something is mounted at a place, also where that does not answer (EIO of a file system, ENOTCONN of a server)."""
    try:
        there = os.lstat(place)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return there.st_dev != os.lstat(os.path.dirname(place)).st_dev


def is_attached(directory: str) -> bool:
    """Whether a layer's file system is mounted and its server there; a mount whose server is gone is taken away."""
    place = f"{directory}/mnt"
    if not is_mounted(place):
        return False
    with suppress(OSError):
        if blockfs.is_alive(loop.device_at(place)):
            root = os.open(place, _TREE)
            try:
                blockfs.thaw(root)  # of a snapshot that was killed
            finally:
                os.close(root)
            return True
    take_away(place, mounts.MNT_DETACH)
    return False


def attach(directory: str, request: DiskRequest) -> None:
    """Mount a layer's file system at ``mnt``, whose turn this is.

    Raises:
        OSError, CowfsError: it cannot be; nothing is left mounted.
    """
    place = f"{directory}/mnt"
    os.makedirs(place, mode=0o700, exist_ok=True)
    served = Served.of(directory)  # mounted elsewhere still: by a bind, or with a file open
    if served is not None and blockfs.is_alive(served.device):
        block_image.mount(
            request.kind, served.device, place, readonly=loop.is_readonly(served.device), discard=request.discard
        )
        return
    path, fd = device(directory, request)
    try:
        if request.blocks:
            block_image.grow_at_rest(request.kind, path, request.blocks)
        block_image.mount(request.kind, path, place, readonly=not request.upper, discard=request.discard)
    finally:
        os.close(fd)


def device(directory: str, request: DiskRequest) -> tuple[str, int]:
    """Make a loop device over the image: (its path, a descriptor that holds it)."""
    at = f"{directory}/{SERVED}"
    os.makedirs(at, mode=0o700, exist_ok=True)
    while is_mounted(at) and take_away(at, mounts.MNT_DETACH):
        pass  # of a process that was killed
    handle = serve(directory, request)
    try:
        path, fd = loop.attach(f"{at}/{DISK}", readonly=not request.upper, name=_name(directory))
    finally:
        take_away(at, mounts.MNT_DETACH)
    note = {"device": path, "socket": handle.socket}
    try:
        atomic.write_file(f"{directory}/{_NOTE}", json.dumps(note).encode(), durable=False)
    except BaseException:
        os.close(fd)
        raise
    return path, fd


def serve(directory: str, request: DiskRequest) -> client.MountHandle:
    """Mount a layer's chain at :data:`SERVED` by our server; one that is about to end has the layer for a moment still."""
    spec = _spec(directory, request)
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return client.spawn(spec)
        except FailedPrecondition:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _spec(directory: str, request: DiskRequest) -> MountSpec:
    return MountSpec(
        layers=tuple(request.lowers)[::-1],
        mountpoint=f"{directory}/{SERVED}",
        upper=request.upper or None,
        work=request.work or None,
        record=False,
        readonly=not request.upper,
        fsync=request.fsync,
        form=request.form,
        row=request.block if request.upper else 0,
        drop_synced=True,
        patience=_PATIENCE_FOR_ROOM,
        label=f"image of {os.path.basename(directory)}",
        checked=True,
    )


def detach(directory: str, *, lazily: bool = False) -> bool:
    """Unmount a layer's file system, and wait for its server to end; whether it is unmounted.

    Args:
        lazily: also where files are open; those stay, and nobody is waited for.
    """
    place = f"{directory}/mnt"
    while is_mounted(f"{directory}/{SERVED}") and take_away(f"{directory}/{SERVED}", mounts.MNT_DETACH):
        pass
    if not is_mounted(place):
        return True
    served = Served.of(directory)
    with suppress(OSError):
        root = os.open(place, _TREE)
        try:
            blockfs.thaw(root)  # of a snapshot that was killed: a frozen one cannot be unmounted
        finally:
            os.close(root)
    while is_mounted(place):
        try:
            if not lazily:
                check_room(place)
            if not take_away(place, mounts.MNT_DETACH if lazily else 0):
                break
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOSPC) or lazily:
                raise
            return False  # in use, or the host has no room for what is to be written first
    if served is not None and not lazily:
        _wait_for_end(directory, served)
    return True


def _wait_for_end(directory: str, served: Served) -> None:
    """Until a server whose file system was unmounted has ended; one that is mounted elsewhere, too, does not."""
    end = time.monotonic() + _END
    while Served.of(directory) is not None and time.monotonic() < end:
        time.sleep(0.002)
    end = time.monotonic() + (_PATIENCE if Served.of(directory) is None else 0)
    while os.path.exists(served.socket) and time.monotonic() < end:
        time.sleep(0.002)


def is_bound(directory: str) -> bool:
    """Whether a layer's file system is mounted elsewhere, too, in this mount namespace."""
    place = f"{directory}/mnt"
    try:
        there = os.stat(place).st_dev
    except OSError:
        return False  # it does not answer any more
    device, own = f"{os.major(there)}:{os.minor(there)}", os.fsencode(os.path.realpath(place))
    return is_mounted(place) and any(one.dev == device and one.target != own for one in mounts.mountinfo())


def check_room(place: str) -> None:
    """Refuse to have written what a mounted file system holds in memory while its host has no room for it.

    It would be lost: a file system takes a write that its device refuses for a defect.

    Raises:
        OSError: ENOSPC.
    """
    try:
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            return
    except OSError:
        return  # it does not answer any more
    host = os.statvfs(os.path.dirname(place))
    free = host.f_bfree * host.f_frsize
    if free < blockfs.unwritten(loop.device_at(place)) + _MARGIN:
        raise OSError(errno.ENOSPC, "the host has no room for what is still to be written", place)


def remount(place: str, *, readonly: bool) -> None:
    """Make a mounted file system read-only, which leaves it clean, or let it be written again.

    Raises:
        FailedPrecondition: files are open for writing.
    """
    flags = mounts.MS_REMOUNT | mounts.MS_NOATIME | (mounts.MS_RDONLY if readonly else 0)
    try:
        mounts.mount("", place, "", flags)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise FailedPrecondition(
            f"files are open for writing in {place}", remedy="end who writes there, or take a snapshot"
        ) from None


def used(root: int) -> int:
    """Blocks that a mounted file system has in use."""
    told = os.fstatvfs(root)
    return told.f_blocks - told.f_bfree


@contextmanager
def frozen(root: int, place: str) -> Iterator[None]:
    """A file system that nobody can change until the block ends, or this process does: another one thaws it then.

    Args:
        root: a descriptor of it.
        place: where it is mounted.
    """
    program = programs.find("fsfreeze")
    guard = None
    if program is not None:
        guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read done || {program} -u ."], cwd=place, stdin=subprocess.PIPE, start_new_session=True
        )
    try:
        blockfs.freeze(root)
        try:
            yield
        finally:
            blockfs.thaw(root)
    finally:
        if guard is not None:
            guard.communicate(b"done\n")


def bound(kind: Kind, device: str, place: str, base: int, wanted: int | None, *, least: int = 0) -> None:
    """Have a mounted file system take no more than it is to.

    Args:
        base: blocks that were in use when the layer was made.
        wanted: blocks that it may take beyond those; None: all that there are.
        least: blocks that it is to have room for in all, at least: a limit that somebody else holds.

    Raises:
        TooSmall: this process may not make it larger now.
    """
    root = os.open(place, _TREE)
    try:
        room = os.fstatvfs(root).f_blocks - base
        more = max(wanted or 0, least - base) - room
        if more > 0:
            size = size_of(device, kind) + more + more // 12 + 1024
            size = min(size, block_image.DEVICE // BLOCK)
            try:
                block_image.grow(kind, root, size)
            except FailedPrecondition as error:
                raise TooSmall(size, error.message, error.remedy) from None
            room = os.fstatvfs(root).f_blocks - base
        if kind.limits:
            block_image.withhold(device, 0 if wanted is None else max(0, room - wanted))
    finally:
        os.close(root)


def size_of(device: str, kind: Kind) -> int:
    """Blocks of the file system on a device: of ext4's superblock, or XFS's (both say so in their first 4 KiB)."""
    with open(device, "rb") as file:
        head = file.read(BLOCK)
    if kind.name == "xfs":
        return int.from_bytes(head[8:16], "big")
    return (
        int.from_bytes(head[1024 + 4 : 1024 + 8], "little")
        | int.from_bytes(head[1024 + 0x150 : 1024 + 0x154], "little") << 32
    )


def furnish(kind: Kind, disk: str) -> int:
    """Put the directories of a layer into an empty file system; blocks in use then. It is mounted nowhere that others see."""
    device, fd = loop.attach(disk)
    try:
        hidden = mounts.detached_mount(
            kind.name.encode(), [(b"source", device.encode()), (kind.options.encode(), None)]
        )
    finally:
        os.close(fd)
    try:
        root = os.open(".", _TREE, dir_fd=hidden)
        try:
            os.mkdir("fs", 0o755, dir_fd=root)
            os.mkdir("work", 0o700, dir_fd=root)
            os.chmod("fs", 0o755, dir_fd=root)
            files.syncfs(root)
            found = used(root)
        finally:
            os.close(root)
    finally:
        os.close(hidden)
    end = time.monotonic() + _PATIENCE
    while loop.device_of(disk) is not None:
        if time.monotonic() > end:
            raise Unsupported(f"{device} does not let go of {disk}")
        time.sleep(0.01)
    return found
