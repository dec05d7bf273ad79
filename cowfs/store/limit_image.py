"""The file systems that an upper's image can have (:mod:`cowfs.store.limit_loop`): how each is made, and kept to a limit.

Strategy. Each is somewhat larger than the limit, and its surplus is withheld: of ext4 by ``reserved_clusters``, which no user
passes, and inodes by empty files; of XFS by one file of reserved blocks (fallocate(2)), which take no room of the host. So
the limit is changed by one number while the file system is large enough. Beyond that the file system grows, mounted as it is:
XFS for any root, ext4 for one with CAP_SYS_RESOURCE, which the kernel asks for.

Sources: mkfs.ext4(8), mkfs.xfs(8), ext4(5), xfs(5).
"""

from __future__ import annotations

import errno
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable

from cowfs._typed import ClassVar, NamedTuple
from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.model import Limit, Usage
from cowfs.sys import blockfs, files, loop, programs

__all__ = ["BLOCK", "KINDS", "ImageKind", "Own", "kind_of", "path_at"]

BLOCK = 4096
_MIB = 1 << 20
_MOST_SPARE = 20_000
_SPARE = "spare"


class Own(NamedTuple):
    """The blocks and inodes that an empty upper takes of its file system."""

    blocks: int
    inodes: int


def path_at(root: int, name: str) -> str:
    """A path below an open directory."""
    return f"/proc/self/fd/{root}/{name}"


class ImageKind(ABC):
    """One kind of file system. The directory ``spare`` in it belongs to :meth:`hold`."""

    engine: ClassVar[str]
    """The limit engine that stands on it."""

    name: ClassVar[str]
    """As mount(8) knows it."""

    mkfs: ClassVar[str]
    package: ClassVar[str]
    """Debian's, with the program."""

    options: ClassVar[tuple[bytes, ...]]
    """Of every mount."""

    mounted: ClassVar[Own]
    """The additional blocks and inodes of an empty upper once overlayfs made its directory in ``work``."""

    magic: ClassVar[tuple[int, bytes]]
    """Where in the image its magic bytes are."""

    def why_not(self) -> str:
        """The reason why this process cannot have such an image; "" if it can."""
        if programs.find(self.mkfs) is None:
            return f"{self.mkfs} is not installed (apt-get install {self.package})"
        with open("/proc/filesystems", encoding="utf-8") as file:
            known = {line.split()[-1] for line in file}
        if self.name not in known and not os.path.isdir(f"/sys/module/{self.name}"):
            return f"this kernel has no {self.name}"
        return loop.why_not()

    def why_not_limit(self, limit: Limit) -> str:
        """The reason why such an image cannot hold a limit; "" if it can."""
        return "a limit on inodes alone is not held by an image" if limit.bytes is None else ""

    @abstractmethod
    def size(self, limit: Limit) -> int:
        """Bytes of an image whose file system has room for a limit, and for a little more."""

    @abstractmethod
    def words(self, limit: Limit) -> list[str]:
        """Words of the program for a file system to be held to a limit."""

    def format(self, path: str, limit: Limit) -> None:
        """Make a file system in a file of the right size.

        Raises:
            Unsupported: the program refuses.
        """
        program = programs.find(self.mkfs)
        if program is None:
            raise Unsupported(self.why_not())
        done = subprocess.run([program, *self.words(limit), path], capture_output=True, text=True, check=False)
        if done.returncode:
            told = " ".join(done.stderr.split())[:300]
            raise Unsupported(f"{self.mkfs} cannot make a file system of {self.size(limit)} bytes: {told}")

    @abstractmethod
    def hold(self, image: str, device: str, root: int, own: Own, limit: Limit, *, more: int) -> Own:
        """Make a limit hold in a file system that is mounted.

        Args:
            image, device, root: the file, the loop device over it, a descriptor of the root directory.
            limit: with a limit on bytes.
            more: additional blocks and inodes that may be used for now.

        Returns:
            ``own``, or more where a larger file system takes more.

        Raises:
            FailedPrecondition: it cannot be had while mounted.
        """

    @abstractmethod
    def withheld(self, root: int) -> Usage:
        """The use that :meth:`hold` takes by files of its own."""


class _Ext4(ImageKind):
    engine = "loop"
    name = "ext4"
    mkfs = "mkfs.ext4"
    package = "e2fsprogs"
    options = (b"noinit_itable",)  # tables of inodes that were written in advance would take unused room on the host
    mounted = Own(1, 1)
    magic = (1024 + 56, b"\x53\xef")

    def size(self, limit: Limit) -> int:
        assert limit.bytes is not None
        room = limit.bytes + _journal(limit.bytes) + 2 * _MIB
        inodes = limit.inodes + 300 if limit.inodes is not None else 0
        size = room + inodes * 256 if limit.inodes is not None else room * 16 // 15
        return (size + size // 256) & -BLOCK

    def words(self, limit: Limit) -> list[str]:
        assert limit.bytes is not None
        inodes = ["-N", str(limit.inodes + 64)] if limit.inodes is not None else ["-i", str(BLOCK)]
        journal = f"size={_journal(limit.bytes) // _MIB}"
        lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        return ["-q", "-F", "-b", str(BLOCK), "-I", "256", "-m", "0", "-J", journal, *inodes, "-E", lazy]

    def hold(self, image: str, device: str, root: int, own: Own, limit: Limit, *, more: int) -> Own:
        assert limit.bytes is not None
        wanted = -(-limit.bytes // BLOCK)
        _set_inodes(root, own, limit, more)
        room = os.fstatvfs(root).f_blocks - own.blocks
        if room < wanted:
            self._grow(image, device, root, (wanted - room) * BLOCK)
            _set_inodes(root, own, limit, more)  # a larger file system has more
            room = os.fstatvfs(root).f_blocks - own.blocks
        loop.ext4_reserve(device, max(0, room - wanted - more))
        return own

    def _grow(self, image: str, device: str, root: int, missing: int) -> None:
        size = (os.stat(image).st_size + missing + missing // 12 + 2 * _MIB) & -BLOCK
        try:
            loop.grow(image, device, size)
            _on_root(root, blockfs.grow_ext4, size // BLOCK)
        except PermissionError:
            raise FailedPrecondition(
                "this process may not make a mounted ext4 larger (CAP_SYS_RESOURCE)",
                remedy="unmount it, set the limit, and mount it again; or mount it with --limit-engine loop-xfs, which grows",
            ) from None

    def withheld(self, root: int) -> Usage:
        return Usage(inodes=len(os.listdir(path_at(root, _SPARE))))


def _journal(size: int) -> int:
    """Bytes of the journal of an ext4 for so much data."""
    return 4 * _MIB if size < 128 * _MIB else 16 * _MIB if size < 1024 * _MIB else 64 * _MIB


def _set_inodes(root: int, own: Own, limit: Limit, more: int) -> None:
    """Take the inodes of an ext4 beyond the limit, with empty files."""
    have = sorted(os.listdir(path_at(root, _SPARE)), key=int)
    total = os.fstatvfs(root).f_files - own.inodes
    wanted = 0 if limit.inodes is None else total - limit.inodes
    if not 0 <= wanted <= _MOST_SPARE:
        raise FailedPrecondition(
            f"the file system has {total} inodes, and cannot be given a limit of {limit.inodes} while it is mounted",
            remedy="unmount it first",
        )
    wanted = max(0, wanted - more)
    for name in have[wanted:]:
        os.unlink(path_at(root, f"{_SPARE}/{name}"))
    for number in range(len(have), wanted):
        try:
            new = path_at(root, f"{_SPARE}/{number}")
            os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break  # the use is beyond the new limit


class _Xfs(ImageKind):
    engine = "loop-xfs"
    name = "xfs"
    mkfs = "mkfs.xfs"
    package = "xfsprogs"
    options = (b"nouuid",)
    mounted = Own(0, 1)
    magic = (0, b"XFSB")

    _LEAST = 320 * _MIB  # mkfs.xfs makes none below 300 MiB; what is not written takes no room
    _KEPT = 64  # blocks at the end of a full one that XFS gives to nobody
    _LOG = 64 * _MIB  # the least that mkfs.xfs makes

    def why_not_limit(self, limit: Limit) -> str:
        if limit.inodes is not None:
            return "an XFS image holds no limit on inodes"
        return super().why_not_limit(limit)

    def size(self, limit: Limit) -> int:
        assert limit.bytes is not None
        return max(self._LEAST, (limit.bytes + limit.bytes // 32 + self._LOG + 16 * _MIB) & -_MIB)

    def words(self, limit: Limit) -> list[str]:
        return ["-q", "-f", "-K", "-b", f"size={BLOCK}", "-l", f"size={self._LOG}"]

    def hold(self, image: str, device: str, root: int, own: Own, limit: Limit, *, more: int) -> Own:
        assert limit.bytes is not None
        if limit.inodes is not None:
            raise FailedPrecondition(self.why_not_limit(limit), remedy="unmount it, and mount it with another engine")
        wanted = -(-limit.bytes // BLOCK)
        while self._room(root, own) < wanted:
            missing = (wanted - self._room(root, own)) * BLOCK
            size = (os.stat(image).st_size + missing + missing // 8 + 4 * _MIB) & -BLOCK
            before = _used(root)
            loop.grow(image, device, size)
            _on_root(root, blockfs.grow_xfs, size // BLOCK)
            own = own._replace(blocks=own.blocks + max(0, _used(root) - before))  # of new allocation groups
        fd = os.open(path_at(root, f"{_SPARE}/blocks"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._withhold(fd, root, own, wanted + more)
        finally:
            os.close(fd)
        return own

    def _room(self, root: int, own: Own) -> int:
        """Blocks that an empty upper has, the withheld ones among them."""
        return os.fstatvfs(root).f_blocks - own.blocks

    def _withhold(self, fd: int, root: int, own: Own, wanted: int) -> None:
        """Have the file take all blocks but so many.

        Raises:
            FailedPrecondition: they are in use. The former bound stays.
        """
        take = max(0, self._room(root, own) - wanted)
        former = os.fstat(fd).st_size
        if take < _blocks(fd):
            os.ftruncate(fd, take * BLOCK)
        have = os.fstat(fd).st_size // BLOCK
        step = take - have
        while step > 0 and have < take:  # by halves, down to one block, where not all of it is free
            try:
                files.fallocate(fd, 0, have * BLOCK, min(step, take - have) * BLOCK)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
            have = os.fstat(fd).st_size // BLOCK
        if take - _blocks(fd) > self._KEPT:
            os.ftruncate(fd, former)
            used = (self._room(root, own) - have) * BLOCK
            raise FailedPrecondition(
                f"about {used} bytes are in use, and an XFS image cannot be held to less",
                remedy="delete something first, or mount it with another engine",
            )
        if (over := _blocks(fd) - take) > 0:  # its own map
            os.ftruncate(fd, max(0, have - over) * BLOCK)

    def withheld(self, root: int) -> Usage:
        try:
            told = os.stat(path_at(root, f"{_SPARE}/blocks"))
        except FileNotFoundError:
            return Usage()
        return Usage(bytes=told.st_blocks * 512, inodes=1)


def _blocks(fd: int) -> int:
    """Blocks that a file takes, with those of its map."""
    return os.fstat(fd).st_blocks * 512 // BLOCK


def _used(root: int) -> int:
    """Blocks in use of a mounted file system."""
    told = os.fstatvfs(root)
    return told.f_blocks - told.f_bfree


def _on_root(root: int, grow: Callable[[int, int], None], blocks: int) -> None:
    """Grow by a descriptor that takes ioctls: the one of a mount itself does not."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        grow(fd, blocks)
    finally:
        os.close(fd)


KINDS: dict[str, ImageKind] = {kind.engine: kind for kind in (_Ext4(), _Xfs())}
"""The kinds by the limit engine that stands on each."""


def kind_of(image: str) -> ImageKind:
    """The kind of file system in an image, by its magic bytes; ext4 where none is told, and the mount then fails."""
    with open(image, "rb") as file:
        for kind in KINDS.values():
            at, magic = kind.magic
            file.seek(at)
            if file.read(len(magic)) == magic:
                return kind
    return KINDS["loop"]
