"""Block-level differences: the changes that turn one tree into another; a changed block travels as one block.

Strategy: the paths that differ are given (:func:`cowfs.index.compare.compare` knows them from the index). For a file that both
trees have, ranges that come from the same place of the same stored file are equal without being read; of two redirect
files of one chain that is nearly all. The rest is compared, 4 KiB by 4 KiB.

Format (docs/row.md, "Block-level differences"). A stream; numbers are little endian. Header ``<8sHHI32s``: magic, version,
0, block size, digest of the tree that it applies to (zeros: the empty tree). Then frames ``<cI`` kind, length, payload:

=====  =====================================================================
``M``  one path, JSON: its new state (:func:`_meta`)
``D``  u64 offset, bytes: data of the path before
``Z``  u64 offset, u64 length: zeros
``E``  the end: SHA-256 of all bytes before this frame
=====  =====================================================================

Hostile input: nothing in a stream is trusted. Frames are bounded, paths are components of the tree and nothing else, and all
is done through a view, which reaches nothing outside its layers.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cowfs._typed import Any, BinaryIO
from cowfs.errors import Corrupt, FailedPrecondition, InvalidArgument
from cowfs.model import Change
from cowfs.row.file import RowFile
from cowfs.union import Dir, Node, View
from cowfs.union.attr import unpack
from cowfs.union.node import DT_LNK, DT_REG
from cowfs.union.paths import find

__all__ = ["BLOCK", "MAGIC", "Counts", "apply", "produce"]

MAGIC = b"COWFSBLK"
VERSION = 1
BLOCK = 4096
_HEADER = struct.Struct("<8sHHI32s")
_FRAME = struct.Struct("<cI")
_U64 = struct.Struct("<Q")
_CHUNK = 1 << 20
_MAX_FRAME = _CHUNK + (1 << 18)
_KINDS = ("added", "changed", "deleted")

Range = tuple[int, int]


@dataclass(slots=True)
class Counts:
    """The figures of a stream.

    Attributes:
        paths: paths that differ.
        data: bytes of file data.
        size: bytes of the whole stream.
    """

    paths: int = 0
    data: int = 0
    size: int = 0


class _Out:
    """Frames into a stream, with their digest."""

    def __init__(self, stream: BinaryIO, base: bytes) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.counts = Counts()
        self._put(_HEADER.pack(MAGIC, VERSION, 0, BLOCK, base))

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._stream.write(data)
        self.counts.size += len(data)

    def frame(self, kind: bytes, payload: bytes) -> None:
        self._put(_FRAME.pack(kind, len(payload)) + payload)

    def end(self) -> None:
        digest = self._digest.digest()
        self.frame(b"E", digest)


def produce(before: View, after: View, changes: Iterable[Change], stream: BinaryIO, *, base: bytes) -> Counts:
    """Write the changes that turn ``before`` into ``after``.

    Args:
        changes: the paths that differ, in path order.
        base: the digest of the tree that the stream applies to, 32 bytes.

    Raises:
        OSError: a file cannot be read, or the stream cannot be written.
    """
    out = _Out(stream, base)
    linked: dict[int, bytes] = {}
    for change in changes:
        out.counts.paths += 1
        old, new = find(before, change.path), find(after, change.path)
        if change.kind == "deleted" or new is None:
            out.frame(b"M", _json({"path": _text(change.path), "kind": "deleted"}))
            continue
        meta = _meta(after, change, new)
        first = linked.setdefault(new.id, change.path) if meta.pop("nlink") > 1 else change.path
        if first != change.path:
            out.frame(b"M", _json({**meta, "link": _text(first)}))
            continue
        patch = change.kind == "changed" and not {"type", "links"} & change.what and new.type == DT_REG
        out.frame(b"M", _json({**meta, "patch": patch}))
        if new.type == DT_REG and (not patch or "content" in change.what):
            _send(before, old if patch else None, after, new, out)
    out.end()
    return out.counts


def _meta(view: View, change: Change, node: Node) -> dict[str, Any]:
    attr = unpack(view.attr(node))
    found: dict[str, Any] = {
        "path": _text(change.path), "kind": change.kind, "mode": attr.mode, "uid": attr.uid, "gid": attr.gid,
        "mtime": attr.mtime_ns, "nlink": 1 if isinstance(node, Dir) else attr.nlink,
    }  # fmt: skip
    if node.type == DT_REG:
        found["size"] = attr.size
    elif node.type == DT_LNK:
        found["target"] = _text(view.readlink(node))
    elif attr.rdev:
        found["rdev"] = [os.major(attr.rdev), os.minor(attr.rdev)]
    xattrs = {_text(name): base64.b64encode(view.getxattr(node, name)).decode() for name in view.listxattr(node)}
    if xattrs:
        found["xattrs"] = xattrs
    return found


def _send(before: View, old: Node | None, after: View, new: Node, out: _Out) -> None:
    size = after.size(new)
    known = before.size(old) if old is not None else 0
    for start, end in _maybe_different(before, old, after, new, size):
        at = start
        while at < end:
            data = _read(after, new, at, min(end - at, _CHUNK))
            there = _read(before, old, at, min(len(data), known - at)) if old is not None and at < known else b""
            for a, b in _differing(data, there):
                piece = data[a:b]
                if piece.count(0) == len(piece):
                    out.frame(b"Z", _U64.pack(at + a) + _U64.pack(b - a))
                else:
                    out.frame(b"D", _U64.pack(at + a) + piece)
                    out.counts.data += len(piece)
            at += len(data)


def _differing(data: bytes, there: bytes) -> Iterator[Range]:
    """Runs of blocks that differ; blocks missing in ``there`` count as zeros."""
    if data == there:
        return
    start, was_zero = -1, False
    zeros = bytes(BLOCK)
    for at in range(0, len(data), BLOCK):
        one, other = data[at : at + BLOCK], there[at : at + BLOCK]
        if one == other.ljust(len(one), b"\0") if len(other) < len(one) else one == other:
            if start >= 0:
                yield start, at
                start = -1
        else:
            is_zero = one == zeros[: len(one)]
            if start >= 0 and is_zero != was_zero:
                yield start, at
                start = at
            elif start < 0:
                start = at
            was_zero = is_zero
    if start >= 0:
        yield start, len(data)


def _maybe_different(before: View, old: Node | None, after: View, new: Node, size: int) -> list[Range]:
    """Block-aligned ranges of ``new`` whose equality is unknown without reading."""
    theirs = _places(before, old) if old is not None else []
    found: list[Range] = []
    index = 0
    for start, end, place in _places(after, new):
        at = start
        while at < end:
            while index < len(theirs) and theirs[index][1] <= at:
                index += 1
            if index == len(theirs):
                stop, same = end, False
            else:
                stop = min(end, theirs[index][1])
                same = place == theirs[index][2]
            if not same:
                low, high = at // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, size)
                if found and found[-1][1] >= low:
                    found[-1] = (found[-1][0], max(high, found[-1][1]))
                else:
                    found.append((low, high))
            at = stop
    return found


def _places(view: View, node: Node) -> list[tuple[int, int, object]]:
    """(start, end, the stored file): equal files at equal offsets hold equal bytes."""
    size = view.size(node)
    if not size:
        return []
    data = node.data
    if not isinstance(data, RowFile):
        status = os.fstat(view.data_fd(node, False))
        return [(0, size, (status.st_dev, status.st_ino))]
    extents = data.load()
    stats = [os.stat(level.name, dir_fd=level.where.open(), follow_symlinks=False) for level in data.levels]
    stats.append(os.fstat(data.own_fd()))
    names: list[object] = [(status.st_dev, status.st_ino) for status in stats]
    return [(start, end, names[owner] if owner >= 0 else "zeros") for start, end, owner in extents.runs(0, size)]


def _read(view: View, node: Node, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    done = 0
    while done < length:
        count = view.pread(node, offset + done, memoryview(buffer)[done:])
        if not count:
            break
        done += count
    return bytes(buffer[:done])


# -- applying -----------------------------------------------------------------------------------------------------------


class _In:
    """Frames out of a stream, checked for their size, with the digest of the frames before."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.counts = Counts()
        magic, version, _, block, self.base = _HEADER.unpack(self._take(_HEADER.size))
        if magic != MAGIC:
            raise InvalidArgument("this is not a block-level difference")
        if version != VERSION or block != BLOCK:
            raise InvalidArgument(f"a block-level difference of version {version}, blocks of {block} bytes")

    def _take(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._stream.read(count)
            if not part:
                raise Corrupt("the block-level difference is cut short")
            parts.append(part)
            count -= len(part)
        data = b"".join(parts)
        self.counts.size += len(data)
        return data

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        self._digest.update(_HEADER.pack(MAGIC, VERSION, 0, BLOCK, self.base))
        while True:
            head = self._take(_FRAME.size)
            kind, length = _FRAME.unpack(head)
            if kind not in b"MDZE" or length > _MAX_FRAME:
                raise Corrupt(f"the block-level difference holds a frame {kind!r} of {length} bytes")
            payload = self._take(length)
            if kind == b"E":
                if payload != self._digest.digest():
                    raise Corrupt("the block-level difference has another digest than it says")
                return
            self._digest.update(head)
            self._digest.update(payload)
            yield kind, payload


def apply(view: View, stream: BinaryIO, *, base: bytes) -> Counts:
    """Apply a stream to a view.

    Args:
        base: the digest of the view's tree; must be the one that the stream applies to.

    Raises:
        FailedPrecondition: the stream applies to another tree; the view is unchanged.
        Corrupt, InvalidArgument: the stream is damaged or hostile; part of it may have been applied.
        OSError: ENOSPC and so on, likewise.
    """
    source = _In(stream)
    if source.base != base:
        raise FailedPrecondition(
            "the block-level difference applies to another tree than this snapshot's parent",
            remedy="prepare the snapshot from the base that it was made against",
        )
    target = _Target(view)
    for kind, payload in source.frames():
        if kind == b"M":
            source.counts.paths += 1
            target.path(_parsed(payload))
        else:
            source.counts.data += target.data(kind, payload)
    target.end()
    return source.counts


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        found = json.loads(payload)
        if not isinstance(found, dict) or found.get("kind") not in _KINDS:
            raise ValueError
        path = _bytes(found["path"])
        if path and any(part in (b"", b".", b"..") or len(part) > 255 for part in path.split(b"/")):
            raise InvalidArgument(f"the block-level difference names {found['path']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt("the block-level difference holds a damaged record") from error
    return found


class _Target:
    """A view that is being changed, path by path."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._now: Node | None = None
        self._meta: dict[str, Any] = {}
        self._directories: list[tuple[bytes, dict[str, Any]]] = []

    def path(self, meta: dict[str, Any]) -> None:
        """Begin with a path, and complete the one before."""
        self._finish()
        path = _bytes(meta["path"])
        try:
            self._begin(path, meta)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise Corrupt(f"the block-level difference holds a damaged record for {meta['path']!r}") from error

    def _begin(self, path: bytes, meta: dict[str, Any]) -> None:
        view, here = self._view, find(self._view, path)
        if meta["kind"] == "deleted":
            if here is not None and path:
                _remove(view, path, here)
            return
        mode = int(meta["mode"])
        keep = here is not None and (
            (isinstance(here, Dir) and stat.S_ISDIR(mode)) or (here.type == DT_REG and meta.get("patch") is True)
        )
        if here is not None and not keep:
            _remove(view, path, here)
        if "link" in meta:
            twin = find(view, _bytes(meta["link"]))
            if twin is None:
                raise Corrupt(f"{meta['path']!r} is a link to nothing")
            parent, name = _place(view, path)
            view.link(twin, parent, name)
            return
        if keep:
            assert here is not None
            node = here
        else:
            node = self._make(path, mode, meta)
        if isinstance(node, Dir):
            self._directories.append((path, meta))
            return
        if node.type == DT_REG:
            size = int(meta["size"])
            if not 0 <= size < 1 << 62:
                raise ValueError
            if view.size(node) != size:
                view.setattr(node, size=size)
        node.nlookup += 1
        self._now, self._meta = node, meta

    def _make(self, path: bytes, mode: int, meta: dict[str, Any]) -> Node:
        parent, name = _place(self._view, path)
        uid, gid = int(meta["uid"]), int(meta["gid"])
        if stat.S_ISDIR(mode):
            return self._view.mkdir(parent, name, 0o700, uid, gid)
        if stat.S_ISLNK(mode):
            return self._view.symlink(parent, name, _bytes(meta["target"]), uid, gid)
        major, minor = meta.get("rdev", (0, 0))
        return self._view.mknod(parent, name, stat.S_IFMT(mode) | 0o600, os.makedev(major, minor), uid, gid)

    def data(self, kind: bytes, payload: bytes) -> int:
        """Data of the present path. Returns how many bytes."""
        node = self._now
        if node is None or node.type != DT_REG or len(payload) < _U64.size:
            raise Corrupt("the block-level difference holds data that belong to no file")
        (offset,) = _U64.unpack_from(payload)
        size = int(self._meta["size"])
        if kind == b"Z":
            if len(payload) != 2 * _U64.size:
                raise Corrupt("the block-level difference holds a damaged record")
            length = _U64.unpack_from(payload, _U64.size)[0]
            if offset + length > size:
                raise Corrupt(f"{self._meta['path']!r}: zeros behind its end")
            self._zero(node, offset, length)
            return 0
        data = memoryview(payload)[_U64.size :]
        if offset + len(data) > size:
            raise Corrupt(f"{self._meta['path']!r}: data behind its end")
        done = 0
        while done < len(data):
            done += self._view.write(node, offset + done, data[done:])
        return done

    def _zero(self, node: Node, offset: int, length: int) -> None:
        from cowfs.sys.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

        if not length:
            return
        try:
            self._view.fallocate(node, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            zeros = bytes(min(length, _CHUNK))
            done = 0
            while done < length:
                done += self._view.write(node, offset + done, zeros[: min(len(zeros), length - done)])

    def _finish(self) -> None:
        node, self._now = self._now, None
        if node is not None:
            self._attributes(node, self._meta)
            self._view.forget(node.id, 1)

    def end(self) -> None:
        """Complete the last path, and with it the directories."""
        self._finish()
        for path, meta in reversed(self._directories):
            node = find(self._view, path)
            if node is not None:
                self._attributes(node, meta)

    def _attributes(self, node: Node, meta: dict[str, Any]) -> None:
        view = self._view
        try:
            view.setattr(node, uid=int(meta["uid"]), gid=int(meta["gid"]))
            wanted = {
                _bytes(name): base64.b64decode(value, validate=True) for name, value in meta.get("xattrs", {}).items()
            }
            for name in view.listxattr(node):
                if name not in wanted:
                    view.removexattr(node, name)
            if node.type != DT_LNK:
                view.setattr(node, mode=stat.S_IMODE(int(meta["mode"])))
            for name, value in wanted.items():
                view.setxattr(node, name, value)
            mtime = int(meta["mtime"])
            view.setattr(node, atime=mtime, mtime=mtime)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, binascii.Error) as error:
            raise Corrupt(f"the block-level difference holds a damaged record for {meta['path']!r}") from error


def _place(view: View, path: bytes) -> tuple[Dir, bytes]:
    head, _, name = path.rpartition(b"/")
    parent = find(view, head)
    if not isinstance(parent, Dir) or not name:
        raise Corrupt(f"the block-level difference names {os.fsdecode(path)!r} without its directory")
    return parent, name


def _remove(view: View, path: bytes, node: Node) -> None:
    """Remove what has a path, a tree deeper than Python's stack, too. A file with several names loses the one that is meant."""
    if not isinstance(node, Dir):
        view.unlink(*_place(view, path))
        return
    stack: list[Dir] = [node]
    while stack:
        here = stack[-1]
        assert here.parent is not None
        inner = next(iter(here.children if here.children is not None else view.load(here)), None)
        child = view.child(here, inner) if inner is not None else None
        if child is not None and inner is not None:
            if isinstance(child, Dir):
                stack.append(child)
            else:
                view.unlink(here, inner)
            continue
        view.rmdir(here.parent, here.name)
        stack.pop()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
