"""Archives for tests, honest and hostile, and a place to unpack them next to canaries.

``tarfile`` only builds input here (its own extraction is what cowfs exists not to use); what it
cannot be talked into is patched into the block afterwards.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cowfs.archive import Applied, apply_layer

from . import trees

BLOCK = 512
END = bytes(2 * BLOCK)


def member(
    name: str | bytes,
    data: bytes = b"",
    *,
    type: bytes = tarfile.REGTYPE,
    link: str | bytes = "",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    pax: Mapping[str, str] | None = None,
    device: tuple[int, int] = (0, 0),
    size: int | None = None,
    format: Literal[0, 1, 2] = tarfile.PAX_FORMAT,
) -> bytes:
    """One member as ``tarfile`` writes it, with its data padded; ``size`` overrides the header's."""
    info = tarfile.TarInfo(os.fsdecode(name))
    info.type, info.linkname, info.mode, info.uid, info.gid, info.mtime = type, os.fsdecode(link), mode, uid, gid, mtime
    info.devmajor, info.devminor = device
    info.size = len(data) if size is None else size
    info.pax_headers = dict(pax or {})
    head = info.tobuf(format, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % BLOCK)


def directory(name: str | bytes, **fields: Any) -> bytes:
    """A directory member."""
    return member(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str | bytes, target: str | bytes, **fields: Any) -> bytes:
    """A symbolic link member."""
    return member(name, type=tarfile.SYMTYPE, link=target, **{"mode": 0o777, **fields})


def hardlink(name: str | bytes, target: str | bytes, **fields: Any) -> bytes:
    """A hard link member."""
    return member(name, type=tarfile.LNKTYPE, link=target, **fields)


def tar(*members: bytes) -> bytes:
    """An archive with its end blocks."""
    return b"".join(members) + END


def patched(block: bytes, *patches: tuple[int, bytes]) -> bytes:
    """A header block with bytes overwritten and the checksum made right again."""
    data = bytearray(block)
    for offset, value in patches:
        data[offset : offset + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    return bytes(data)


def apply(data: bytes, target: Path, **options: Any) -> Applied:
    """Apply an archive from memory to a directory that is made if it is missing."""
    target.mkdir(exist_ok=True)
    return apply_layer(io.BytesIO(data), str(target), **options)


class OneByOne(io.RawIOBase):
    """A stream that gives a byte at a time, as a slow pipe does."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        self._at += 1
        return self._data[self._at - 1 : self._at]


def _is_expected(name: str) -> bool:
    """Whether a name may come beside the target: the target's own, and the files of a store beside a layer's tree."""
    return name == "layer" or name.startswith("cowfs-")


@contextmanager
def canaries(space: Path) -> Iterator[Callable[[], None]]:
    """Files around the target that no archive may touch; checked at the end, and by the call it yields."""
    outside = space / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"canary")
    (outside / "file").chmod(0o640)
    (outside / "dir").mkdir(mode=0o750)
    (outside / "dir" / "inner").write_bytes(b"inner canary")
    os.symlink("file", outside / "link")
    before = trees.snapshot(outside)
    names = sorted(os.listdir(space))

    def check() -> None:
        trees.assert_same(before, trees.snapshot(outside), ignore=(), names=("before", "after"))
        found = [name for name in sorted(os.listdir(space)) if not _is_expected(name)]
        assert found == [name for name in names if not _is_expected(name)]

    yield check
    check()
