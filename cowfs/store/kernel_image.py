"""A snapshot's metadata as an EROFS image, which the kernel mounts beneath an upper layer in the time of one directory.

Strategy. The index knows every object of a committed snapshot: type, owner, times, xattrs, and in which layer a file's data is. The image
holds all of that and no data: each file is a *metacopy* whose redirect names its data, relative to the directory of the layers, which
the mount gets as a data-only layer (Documentation/filesystems/overlayfs.rst, "Data-only lower layers"). So a chain of
500 layers is mounted as one, without searches in them.

An image is made on first use, or at commit by option, without a walk; it is kept in ``images-erofs`` under a name of
its sources: the snapshot's id, and a digest over its tree and the ids of all its layers. A change of one of those (by a
squash) makes another image; ``gc`` removes images without a snapshot. An image can always be made again, and one that is
damaged is (:mod:`cowfs.store.image_files`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

from cowfs._log import Part
from cowfs._typed import BinaryIO, NamedTuple
from cowfs.driver.interface import Driver
from cowfs.erofs.reader import Image
from cowfs.erofs.tree import Inode, Map
from cowfs.erofs.writer import write_image
from cowfs.errors import Corrupt, Unsupported
from cowfs.format.whiteout import Form
from cowfs.index.database import Index, Row
from cowfs.index.directory import Entry, Pair, Records, decode, entries, join
from cowfs.store import image_files, kernel_blocks
from cowfs.store.kernel_blocks import Place
from cowfs.sys import loop

_log = Part("cowfs.store")

__all__ = ["FOLDER", "build", "check", "existing", "path_of", "sweep", "unused"]

FOLDER = "images-erofs"
_FORMAT = b"3"  # of the name: raised when the content of images changes


class Key(NamedTuple):
    """A directory of the tree: its record, the base of its files (:mod:`cowfs.index.directory`), and its path."""

    storage: bytes
    base: bytes
    shown: bytes


class IndexedSource:
    """A snapshot's tree for :func:`cowfs.erofs.writer.write_image`.

    Args:
        records: the index.
        root: the snapshot's root entry.
        places: by layer number, the path of its tree below the directory of the layers.
        top: the directory of the layers.
        form: the xattrs of overlayfs that the image is written for.
        blocks: the places of redirect files' data; None if the layers have none.
    """

    def __init__(
        self,
        records: Records,
        root: Pair,
        places: Mapping[int, bytes],
        top: str,
        form: Form,
        blocks: kernel_blocks.Blocks | None = None,
    ) -> None:
        self._records = records
        self._root = root
        self._places = places
        self._top = os.fsencode(top)
        self._form = form
        self._blocks = blocks
        self._redirected: dict[tuple[int, bytes], Map | Place] = {}
        self._devices: dict[int, int] = {}  # of layers
        if blocks is not None:
            self._find_redirected(blocks)

    def _find_redirected(self, blocks: kernel_blocks.Blocks) -> None:
        """Look for redirect files, before anything is written: an image begins with the list of its devices."""
        todo = [self.root()[1]]
        while todo:
            key = todo.pop()
            for name, pair in entries(self._records, key.storage).items():
                entry = decode(pair)
                implied = join(key.base, name)
                if entry.ref is not None:
                    todo.append(self._key(entry, key, name))
                elif stat.S_ISREG(entry.mode) and entry.size:
                    where = entry.layer, implied if entry.path is None else entry.path
                    if where not in self._redirected and blocks.redirected(self._place(*where), where[1]):
                        self._redirected[where] = blocks.find(join(key.shown, name))

    def root(self) -> tuple[Inode, Key]:
        entry = decode(self._root)
        assert entry.ref is not None
        return self._directory(entry), Key(entry.ref.storage, entry.base or b"", b"")

    def _key(self, entry: Entry, above: Key, name: bytes) -> Key:
        assert entry.ref is not None
        base = join(above.base, name) if entry.base is None else entry.base
        return Key(entry.ref.storage, base, join(above.shown, name))

    def names(self, key: Key) -> Iterator[bytes]:
        return iter(sorted(entries(self._records, key.storage)))

    def entries(self, key: Key) -> Iterator[tuple[bytes, Inode, Key | None]]:
        found = entries(self._records, key.storage)
        for name in sorted(found):
            entry = decode(found[name])
            implied = join(key.base, name)
            if entry.ref is not None:
                yield name, self._directory(entry), self._key(entry, key, name)
            else:
                yield name, self._file(entry, implied if entry.path is None else entry.path), None

    def _directory(self, entry: Entry) -> Inode:
        # One link, as for a merged directory, since layers above change the number of sub-directories.
        return Inode(
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            mtime_ns=entry.mtime_ns,
            nlink=1,
            xattrs=self._xattrs(entry),
        )

    def _file(self, entry: Entry, path: bytes) -> Inode:
        kind = stat.S_IFMT(entry.mode)
        xattrs = self._xattrs(entry)
        data = None
        if kind == stat.S_IFREG and entry.size:
            found = self._redirected.get((entry.layer, path))
            if isinstance(found, Map):
                data = found
            else:
                place = found.path if found is not None else self._place(entry.layer, path) + b"/" + path
                xattrs += ((self._form.metacopy, b""), (self._form.redirect, b"/" + place))
        return Inode(
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            size=entry.size if kind == stat.S_IFREG else 0,
            mtime_ns=entry.mtime_ns,
            nlink=max(1, entry.nlink),
            rdev=(os.major(entry.rdev), os.minor(entry.rdev)),
            target=entry.target,
            xattrs=xattrs,
            link=self._link(entry, path) if entry.nlink > 1 else None,
            data=data,
        )

    def _place(self, layer: int, path: bytes) -> bytes:
        place = self._places.get(layer)
        if place is None:
            raise Corrupt(f"the index puts {path!r} in layer {layer}, which is not in this chain")
        return place

    def _xattrs(self, entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
        return tuple((self._form.store_name(name), value) for name, value in entry.xattrs)

    def _link(self, entry: Entry, path: bytes) -> Hashable:
        """The identity of a file with several names: the real device and inode of the layer's file.

        Of a metacopy that is another file than the one with its data; records of before 2026-12 do not tell it.
        """
        if entry.link is None:
            st = self._stat(entry.layer, path)
            return st.st_dev, st.st_ino
        layer, inode = entry.link
        if layer not in self._devices:
            self._devices[layer] = self._stat(layer, b"").st_dev
        return self._devices[layer], inode

    def _stat(self, layer: int, path: bytes) -> os.stat_result:
        try:
            return os.stat(b"/".join((self._top, self._places.get(layer, b""), path)), follow_symlinks=False)
        except OSError as error:
            raise Corrupt(
                f"{os.fsdecode(path)} is missing in its layer: {error.strerror}", remedy="run 'cowfs check'"
            ) from None


Chain = Sequence[tuple[int, str]]
"""(number, id) of a snapshot and its ancestors, nearest first (:meth:`cowfs.index.database.Index.chain`)."""


def path_of(driver: Driver, index: Index, row: Row, chain: Chain | None = None) -> str:
    """The path of a committed snapshot's image, existing or not; ``chain`` of the snapshot, if it was read already."""
    assert row.root is not None
    layers = "".join([f"{num} {id}\n" for num, id in chain or index.chain(row.num)])
    digest = hashlib.sha256(_FORMAT + row.root[1] + layers.encode())
    return f"{driver.root}/{FOLDER}/{row.id}-{digest.hexdigest()[:32]}"


def existing(driver: Driver, index: Index, row: Row, chain: Chain | None = None) -> str:
    """The path of a committed snapshot's image.

    Raises:
        Unsupported: it was not made, or is damaged.
    """
    path = path_of(driver, index, row, chain)
    if not image_files.is_sound(path):
        raise Unsupported(f"no image of {row.name!r} was made", remedy="cowfs commit --kernel-image makes one")
    return path


def build(driver: Driver, index: Index, row: Row, chain: Chain | None = None) -> str:
    """The path of a committed snapshot's image, made if it is missing or damaged.

    Raises:
        Unsupported: the format cannot hold the tree.
        Corrupt: records and layers contradict each other.
        OSError: of writing.
    """
    path = path_of(driver, index, row, chain)
    if image_files.is_sound(path):
        return path
    if os.path.exists(path):
        _log.info("the image %s is damaged (it is not what its digest says): it is made again", path)
    try:
        os.mkdir(f"{driver.root}/{FOLDER}", 0o700)
    except FileExistsError:
        pass
    image_files.make(path, lambda file: _write(driver, index, row, file, path), durable=driver.fsync)
    return path


def _write(driver: Driver, index: Index, row: Row, file: BinaryIO, path: str) -> None:
    top = f"{driver.root}/layers"
    places = {num: os.fsencode(os.path.relpath(driver.tree(id), top)) for num, id in index.chain(row.num)}
    assert row.root is not None
    with ExitStack() as held:
        blocks = None
        if driver.capabilities.row:
            trees = [driver.tree(id) for _, id in index.chain(row.num)]
            blocks = held.enter_context(kernel_blocks.Blocks(trees, top, driver.form))
        source = IndexedSource(index, row.root, places, top, driver.form, blocks)
        devices = blocks.devices if blocks is not None else ()
        written = write_image(source, file.fileno(), devices=devices, uuid=bytes.fromhex(path[-32:]))
        if blocks is not None:
            os.pwrite(file.fileno(), b"\0".join(blocks.paths), written.size)


def check(path: str) -> str | None:
    """The fault of an image, which is read whole; None for a sound one."""
    with open(path, "rb") as file:
        try:
            if not image_files.sealed(file.fileno()):
                return "it is not what its digest says"
            image = Image(file.fileno())
            if image.uuid != bytes.fromhex(path[-32:]):
                return "it is the image of another snapshot"
            kernel_blocks.paths_of(image, file.fileno())
            _, key = image.root()
            todo, seen = [key], 1
            while todo:
                for _, _, below in image.entries(todo.pop()):
                    if below is not None:
                        todo.append(below)
                        seen += 1
                    if seen > image.inodes:
                        return "its directories lead in a circle"
        except (Corrupt, ValueError) as error:
            return str(error)
    return None


def damaged(driver: Driver) -> Iterator[tuple[str, str]]:
    """(path, fault) of each damaged image."""
    try:
        names = sorted(os.listdir(f"{driver.root}/{FOLDER}"))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(image_files.UNFINISHED):
            continue  # garbage, or being made
        path = f"{driver.root}/{FOLDER}/{name}"
        what = check(path)
        if what is not None:
            yield path, what


def why_not(driver: Driver) -> str:
    """The reason why the kernel cannot mount snapshots of a store through images; "" if it can, as far as known."""
    if driver.capabilities.whole:
        return "each layer is a whole tree"
    if not driver.form.redirects:
        return "the layers are not of the form of the kernel for root"
    return loop.why_no_images(driver.root, devices=bool(driver.capabilities.row))


def how(driver: Driver) -> str:
    """The way of ``mount_type="kernel"`` on this host, for people, with the reason if it uses no image."""
    why = why_not(driver)
    if driver.capabilities.whole:
        return "a bind of the layer: each is a whole tree"
    if why:
        alone = driver.capabilities.row or not driver.form.redirects
        return f"none: {why}" if alone else f"overlayfs over all layers: {why}"
    if driver.capabilities.row:
        return "overlayfs over an EROFS image of the metadata, whose files point at the blocks in all layers"
    return "overlayfs over an EROFS image of the metadata"


def how_for_engines(driver: Driver, why_not_kernel: str) -> str:
    """The mounts that engines get without a limit (:mod:`cowfs.store.engines`), for people, with the reason if the kernel's are fewer.

    Args:
        why_not_kernel: why the kernel cannot mount its layers as they are; "" if it can.
    """
    if driver.capabilities.whole:
        return "a bind of the layer"
    why = why_not(driver)
    if driver.capabilities.row:
        views = f"views, too: {why}" if why else "of views by the kernel, over an EROFS image"
        return f"a bind of a mount by cowfs's own server, which redirects writes; {views}"
    if why_not_kernel:
        return f"a bind of a mount by cowfs's own server: {why_not_kernel}"
    over = f"all layers ({why})" if why else "an EROFS image"
    return f"a record of the kernel's overlayfs; where none can express the chain, a bind of a kernel mount over {over}"


def unused(driver: Driver, index: Index) -> list[str]:
    """The paths of images without a snapshot, and of those that killed makers left, relative to the store."""
    try:
        with image_files.locked(f"{driver.root}/{FOLDER}", wait=False) as free:
            return [
                f"{FOLDER}/{name}"
                for name in os.listdir(f"{driver.root}/{FOLDER}")
                if _is_unused(driver, index, name, free)
            ]
    except FileNotFoundError:
        return []


def _is_unused(driver: Driver, index: Index, name: str, free: bool) -> bool:
    if name.endswith(image_files.UNFINISHED):
        return free
    row = index.find_id(name.partition("-")[0])
    return row is None or row.root is None or path_of(driver, index, row) != f"{driver.root}/{FOLDER}/{name}"


def sweep(driver: Driver, index: Index) -> list[str]:
    """Remove what :func:`unused` finds, and return the paths."""
    gone = []
    for path in unused(driver, index):
        with suppress(FileNotFoundError):  # another process was faster
            os.unlink(f"{driver.root}/{path}")
            gone.append(path)
    return gone
