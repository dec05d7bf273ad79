"""Redirect files in an EROFS image: chunks that point into the files of the layers, so that the kernel reads a row chain.

Strategy. A redirect file's data lies in several files of the chain, each block at its own offset (docs/row.md). An image may have
*devices*, files that its chunk maps point into. So each file that a chain of redirect files is made of becomes a device, and
the segments that cowfs's own server would read by become the chunk map. A chunk is as large as the segments' alignment allows, so
a file that was written in a few places has a short map.

Rules:

1. A file whose bytes are all in one file of the chain, and are all that is in it, needs no map: it is shown as any other file.
2. A map counts whole blocks of 4,096 bytes, and the kernel reads a device by whole blocks (a device that ends within
   one gives EIO). Where a base was cut off, or the file ends, within a block, that block is put into the image as it is
   read.
3. The devices' paths, relative to the directory of the layers, stand behind the image's last block, before its seal. The image's device table has
   the digest of each, and its size: a mount opens exactly the files that the image was made of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cowfs._typed import TYPE_CHECKING, NamedTuple
from cowfs.erofs.layout import BLOCK, BLOCK_BITS, CHUNK_BITS_MASK
from cowfs.erofs.reader import Image
from cowfs.erofs.tree import Chunk, Device, Map
from cowfs.errors import Corrupt, Unsupported
from cowfs.format.redirect import is_marked
from cowfs.format.whiteout import Form
from cowfs.row.extents import ZEROS, Extents
from cowfs.row.file import RowFile
from cowfs.store.image_files import SEAL
from cowfs.sys import files, xattr

if TYPE_CHECKING:
    from typing import overload

    from cowfs.row.view import View
    from cowfs.union.layers import Source
    from cowfs.union.node import Node

__all__ = ["Blocks", "Place", "opened_devices", "paths_of"]

_MOST = 0xFFFE
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class Place(NamedTuple):
    """A file below the directory of the layers that holds all of a redirect file's data, and nothing else."""

    path: bytes


class _Chunks(Sequence[Chunk]):
    """The chunks of a redirect file, made from its segments on demand, in order.

    Args:
        extents: the segments.
        devices: the device number of each owner.
        size: bytes of the file.
        bits: a chunk has ``4096 << bits`` bytes.
        parts: the blocks that several owners share, by number; ``bits`` is 0 if there are any.
    """

    def __init__(
        self, extents: Extents, devices: dict[int, int], size: int, bits: int, parts: dict[int, bytes]
    ) -> None:
        self._extents = extents
        self._devices = devices
        self._bits = bits
        self._parts = parts
        self._size = size

    def __len__(self) -> int:
        return -(-self._size >> BLOCK_BITS + self._bits)

    def __iter__(self) -> Iterator[Chunk]:
        at, end, step = 0, len(self) << BLOCK_BITS + self._bits, 1 << self._bits
        for start, stop, owner in self._extents.runs(0, end):
            device = self._devices.get(owner)
            while at << BLOCK_BITS < stop:
                part = self._parts.get(at)
                if part is not None:
                    yield part
                elif at << BLOCK_BITS < start:
                    raise ValueError(f"block {at} has several owners")
                else:
                    yield None if device is None else (device, at)
                at += step

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, at: int) -> Chunk: ...
        @overload
        def __getitem__(self, at: slice) -> Sequence[Chunk]: ...

    def __getitem__(self, at: int | slice) -> Chunk | Sequence[Chunk]:
        return list(self)[at]


class Blocks:
    """The redirect files of one chain, in the form for an image.

    Args:
        trees: the layers' trees, topmost first, below ``top``.
        top: the directory of the layers.
        form: of their xattrs.

    Attributes:
        devices: the devices of the maps given so far.
        paths: the same files, relative to ``top``.
    """

    def __init__(self, trees: Sequence[str], top: str, form: Form) -> None:
        self._trees = trees
        self._top = os.fsencode(top)
        self._fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._form = form
        self._marked: dict[bytes, bool] = {}
        self._numbers: dict[bytes, int] = {}
        self._view: View | None = None
        self.devices: list[Device] = []

    @property
    def paths(self) -> list[bytes]:
        return list(self._numbers)

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)
        if self._view is not None:
            self._view.close()

    def redirected(self, place: bytes, path: bytes) -> bool:
        """Whether a file is a redirect file.

        Args:
            place: the tree of its layer, below the directory of the layers.
            path: its path in that tree.
        """
        marked = self._marked.get(place)
        if marked is None:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                marked = self._marked[place] = is_marked(fd, self._form)
            finally:
                os.close(fd)
        if not marked:
            return False
        try:
            return xattr.try_get(self._fd, place + b"/" + path, self._form.row) is not None
        except FileNotFoundError:
            raise Corrupt(f"{os.fsdecode(path)} is missing in its layer", remedy="run 'cowfs check'") from None

    def find(self, shown: bytes) -> Map | Place:
        """The place of a redirect file's data, for its path in the merged tree.

        Raises:
            Corrupt: its map, or a file of its chain, is missing or damaged.
            Unsupported: an image cannot hold it.
        """
        from cowfs.row.view import View
        from cowfs.union import Dir, Options

        if self._view is None:
            self._view = View(self._trees, options=Options(form=self._form.name, readonly=True))
        view = self._view
        node: Node = view.root
        try:
            for name in shown.split(b"/"):
                assert isinstance(node, Dir)
                node = view.lookup(node, name)
            file = node.data
            if not isinstance(file, RowFile):
                raise Corrupt(f"{os.fsdecode(shown)} is a redirect file in its layer and none in the tree")
            return self._map(file)
        except OSError as error:
            raise Corrupt(f"{os.fsdecode(shown)}: {error.strerror}", remedy="run 'cowfs check'") from None

    def _map(self, file: RowFile) -> Map | Place:
        extents = file.load()
        places = [(level.where, level.name) for level in file.levels] + [file.place()]
        size, bits, parts = file.size, CHUNK_BITS_MASK, {}
        owners: set[int] = set()
        blocks = -(-size >> BLOCK_BITS)
        for start, _, owner in extents.runs(0, blocks << BLOCK_BITS):
            owners.add(owner)
            if start % BLOCK:
                parts[start >> BLOCK_BITS] = b""
            elif start:
                bits = min(bits, (start & -start).bit_length() - 1 - BLOCK_BITS)
        if len(owners) == 1 and ZEROS not in owners:
            where, name = places[owners.pop()]
            if os.stat(name, dir_fd=where.open(), follow_symlinks=False).st_size == size:
                return Place(self._below(where, name))
            owners = {owner for _, _, owner in extents.runs(0, size)}
        if size % BLOCK:
            parts[blocks - 1] = b""
        for block in parts:
            part = bytearray(min(BLOCK, size - (block << BLOCK_BITS)))
            file.pread(block << BLOCK_BITS, memoryview(part))
            parts[block] = bytes(part)
        bits = 0 if parts else min(bits, max(0, (size - 1).bit_length() - BLOCK_BITS))
        devices = {owner: self._device(*places[owner]) for owner in owners if owner != ZEROS}
        return Map(bits, _Chunks(extents, devices, size, bits, parts))

    def _below(self, where: Source, name: bytes) -> bytes:
        tree = os.path.relpath(where.layer.path, self._top)
        inside = where.path()
        return b"/".join((tree, inside, name)) if inside else tree + b"/" + name

    def _device(self, where: Source, name: bytes) -> int:
        path = self._below(where, name)
        number = self._numbers.get(path)
        if number is None:
            if len(self._numbers) >= _MOST:
                raise Unsupported(f"more than {_MOST} files with redirected blocks are not in one image")
            number = self._numbers[path] = len(self._numbers) + 1
            size = os.stat(name, dir_fd=where.open(), follow_symlinks=False).st_size
            if size >> BLOCK_BITS >= 0xFFFFFFFF:
                raise Unsupported(f"a file of {size} bytes is not in an image")
            self.devices.append(Device(-(-size >> BLOCK_BITS), hashlib.sha256(path).hexdigest().encode()))
        return number


def paths_of(image: Image, fd: int) -> list[bytes]:
    """The files of an image's devices, below the directory of the layers, in order.

    Raises:
        Corrupt: the list behind the image is damaged.
    """
    if not image.devices:
        return []
    paths = os.pread(fd, os.fstat(fd).st_size - SEAL - image.end, image.end).split(b"\0")
    if [hashlib.sha256(path).hexdigest().encode() for path in paths] != [device.tag for device in image.devices]:
        raise Corrupt("the EROFS image does not say which files its devices are")
    return paths


@contextmanager
def opened_devices(path: str, top: str) -> Iterator[list[str]]:
    """Names by which the kernel can open an image's devices until the block ends.

    Args:
        path: the image.
        top: the directory of the layers.

    Raises:
        Corrupt: the image is damaged, or a file has changed.
        OSError: EMFILE: more devices than this process may have open.
    """
    with ExitStack() as held:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, fd)
        image = Image(fd)
        names = []
        if image.devices:
            root = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, root)
            for device, below in zip(image.devices, paths_of(image, fd), strict=True):
                file = files.open_beneath(root, below, _FLAGS)
                held.callback(os.close, file)
                if -(-os.fstat(file).st_size >> BLOCK_BITS) != device.blocks:
                    raise Corrupt(f"{os.fsdecode(below)} is not as large as it was", remedy="run 'cowfs check'")
                names.append(f"/proc/self/fd/{file}")
        yield names
