"""Trees of any depth, and random operations in them: every step is relative to a directory descriptor.

A path is a tuple of names, so nothing here is bound by PATH_MAX. ``Actor`` carries out operations below a root
and returns what two trees that behave alike must both return: a value, or the name of the errno. Its slots hold
what programs hold: open files (also without a name), maps, directories.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import posix

Path_ = tuple[bytes, ...]
Op = tuple[Any, ...]
DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_dir(root: str | bytes | os.PathLike[str] | int, path: Path_) -> int:
    """A new descriptor of a directory, found one name at a time."""
    fd = os.dup(root) if isinstance(root, int) else os.open(root, DIR)
    for name in path:
        try:
            deeper = os.open(name, DIR, dir_fd=fd)
        finally:
            os.close(fd)
        fd = deeper
    return fd


def make_dirs(root: str | os.PathLike[str], path: Path_) -> int:
    """Make each directory of a path that is missing; returns a descriptor of the last."""
    fd = os.open(root, DIR)
    for name in path:
        try:
            os.mkdir(name, 0o755, dir_fd=fd)
        except FileExistsError:
            pass
        deeper = os.open(name, DIR, dir_fd=fd)
        os.close(fd)
        fd = deeper
    return fd


def put(fd: int, name: bytes, data: bytes, mode: int = 0o644) -> None:
    """A file in an open directory."""
    file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600, dir_fd=fd)
    try:
        os.fchmod(file, mode)
        if data:
            os.write(file, data)
    finally:
        os.close(file)


def chain(depth: int, name: bytes = b"d") -> Path_:
    """A path of so many names."""
    return (name,) * depth


def build(root: Path, depth: int, long: int, room: int, seed: int = 1) -> None:
    """A lower tree: ``depth`` nested directories, a path of ``long`` bytes, files whose xattrs take ``room`` bytes."""
    rng = random.Random(seed)
    wide = {"deep": chain(depth, b"d"), "long": (b"L" * 200,) * (long // 201 + 1), "flat": ()}
    for top, below in wide.items():
        for level in sorted({0, min(1, len(below)), len(below) // 2, len(below)}):
            fd = make_dirs(root, (top.encode(), *below[:level]))
            try:
                for number in range(4):
                    put(fd, b"f%d" % number, rng.randbytes(rng.choice((0, 10, 5000, 70_000))))
                os.link(b"f0", b"twin", src_dir_fd=fd, dst_dir_fd=fd)
                os.symlink(b"f1", b"link", dir_fd=fd)
                os.mkdir(b"sub", 0o755, dir_fd=fd)
                sub = os.open(b"sub", DIR, dir_fd=fd)
                put(sub, b"in", b"inside")
                os.close(sub)
                if room:
                    put(fd, b"full", b"z" * 9000)
                    os.mkdir(b"fulldir", 0o755, dir_fd=fd)
                    for name in (b"full", b"fulldir"):
                        os.setxattr(b"/proc/self/fd/%d/%b" % (fd, name), b"user.big", b"v" * room)
                    inner = os.open(b"fulldir", DIR, dir_fd=fd)
                    put(inner, b"in", b"inside")
                    os.close(inner)
            finally:
                os.close(fd)


def walk(root: str | os.PathLike[str]) -> dict[Path_, tuple[Any, ...]]:
    """Everything below a root that two trees must agree on: path -> record."""
    found: dict[Path_, tuple[Any, ...]] = {}
    groups: dict[int, list[Path_]] = {}
    stack: list[tuple[Path_, int, list[bytes]]] = [((), os.open(root, DIR), _names(root))]
    while stack:
        path, fd, names = stack[-1]
        if not names:
            os.close(fd)
            stack.pop()
            continue
        name = names.pop()
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        found[*path, name] = _record(fd, name, st)
        if stat.S_ISDIR(st.st_mode):
            deeper = os.open(name, DIR, dir_fd=fd)
            stack.append(((*path, name), deeper, _names(deeper)))
        elif st.st_nlink > 1:
            groups.setdefault(st.st_ino, []).append((*path, name))
    for group in groups.values():
        first = min(group)
        for path in group:
            found[path] = (*found[path], first)
    return found


def _names(directory: str | os.PathLike[str] | int) -> list[bytes]:
    return sorted(map(os.fsencode, os.listdir(directory)))


def _record(fd: int, name: bytes, st: os.stat_result) -> tuple[Any, ...]:
    if stat.S_ISDIR(st.st_mode):
        return oct(st.st_mode), _xattrs(fd, name)
    if stat.S_ISLNK(st.st_mode):
        return oct(st.st_mode), st.st_nlink, os.readlink(name, dir_fd=fd)
    data = b""
    if stat.S_ISREG(st.st_mode):
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
        try:
            data = _read(file)
        finally:
            os.close(file)
    return oct(st.st_mode), st.st_nlink, st.st_size, hashlib.sha256(data).hexdigest()[:12], _xattrs(fd, name)


def _read(fd: int) -> bytes:
    parts, at = [], 0
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _xattrs(fd: int, name: bytes) -> tuple[tuple[str, int], ...]:
    at = b"/proc/self/fd/%d/%b" % (fd, name)
    return tuple(
        (key, len(os.getxattr(at, key, follow_symlinks=False)))
        for key in sorted(os.listxattr(at, follow_symlinks=False))
        if key.startswith("user.")
    )


class Actor:
    """Carries out operations below ``root``."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.open(root, DIR)
        self.slots: dict[int, int] = {}
        self.maps: dict[int, mmap.mmap] = {}

    def close(self) -> None:
        for held in self.maps.values():
            held.close()
        for fd in [*self.slots.values(), self.root]:
            os.close(fd)

    def do(self, op: Op) -> Any:
        """The operation's value, or ``"!" + name of errno``."""
        method: Callable[..., Any] = getattr(self, "op_" + op[0])
        try:
            return method(*op[1:])
        except OSError as error:
            return "!" + errno.errorcode.get(error.errno or 0, str(error.errno))

    def _in(self, path: Path_, call: Callable[[int, bytes], Any]) -> Any:
        fd = open_dir(self.root, path[:-1])
        try:
            return call(fd, path[-1])
        finally:
            os.close(fd)

    def _two(self, one: Path_, two: Path_, call: Callable[[int, bytes, int, bytes], Any]) -> Any:
        return self._in(one, lambda a, n: self._in(two, lambda b, m: call(a, n, b, m)))

    def _file(self, path: Path_, flags: int, call: Callable[[int], Any]) -> Any:
        def opened(fd: int, name: bytes) -> Any:
            file = os.open(name, flags | os.O_NOFOLLOW, 0o644, dir_fd=fd)
            try:
                return call(file)
            finally:
                os.close(file)

        return self._in(path, opened)

    def op_mkdir(self, path: Path_) -> None:
        self._in(path, lambda fd, name: os.mkdir(name, 0o755, dir_fd=fd))

    def op_create(self, path: Path_, data: bytes) -> None:
        self._file(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, lambda fd: os.write(fd, data))

    def op_write(self, path: Path_, offset: int, data: bytes) -> Any:
        return self._file(path, os.O_RDWR, lambda fd: os.pwrite(fd, data, offset))

    def op_append(self, path: Path_, data: bytes) -> Any:
        return self._file(path, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, data))

    def op_truncate(self, path: Path_, size: int) -> None:
        self._file(path, os.O_WRONLY, lambda fd: os.ftruncate(fd, size))

    def op_fsync(self, path: Path_) -> None:
        self._file(path, os.O_RDONLY, os.fsync)

    def op_read(self, path: Path_) -> Any:
        return self._file(path, os.O_RDONLY, lambda fd: hashlib.sha256(_read(fd)).hexdigest()[:12])

    def op_store(self, path: Path_, offset: int, data: bytes) -> Any:
        """Write through a shared map, and close the file before the map is synced."""

        def store(fd: int) -> Any:
            size = os.fstat(fd).st_size
            if size < offset + len(data):
                return None
            with mmap.mmap(fd, 0) as held:
                held[offset : offset + len(data)] = data
                held.flush()
            return size

        return self._file(path, os.O_RDWR, store)

    def op_unlink(self, path: Path_) -> None:
        self._in(path, lambda fd, name: os.unlink(name, dir_fd=fd))

    def op_rmdir(self, path: Path_) -> None:
        self._in(path, lambda fd, name: os.rmdir(name, dir_fd=fd))

    def op_link(self, old: Path_, new: Path_) -> None:
        self._two(old, new, lambda a, n, b, m: os.link(n, m, src_dir_fd=a, dst_dir_fd=b, follow_symlinks=False))

    def op_symlink(self, path: Path_, target: bytes) -> None:
        self._in(path, lambda fd, name: os.symlink(target, name, dir_fd=fd))

    def op_rename(self, old: Path_, new: Path_) -> None:
        self._two(old, new, lambda a, n, b, m: os.rename(n, m, src_dir_fd=a, dst_dir_fd=b))

    def op_chmod(self, path: Path_, mode: int) -> None:
        def change(fd: int, name: bytes) -> None:
            if not stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.chmod(name, mode, dir_fd=fd)

        self._in(path, change)

    def op_utime(self, path: Path_, when: int) -> None:
        self._in(path, lambda fd, name: os.utime(name, ns=(when, when), dir_fd=fd, follow_symlinks=False))

    def op_names(self, path: Path_) -> Any:
        fd = open_dir(self.root, path)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    # -- what is held ---------------------------------------------------------------------

    def op_hold(self, slot: int, path: Path_, flags: int) -> None:
        """Open, and keep it open."""
        self.op_let_go(slot)
        self._in(path, lambda fd, name: self.slots.__setitem__(slot, os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)))

    def op_nameless(self, slot: int, path: Path_) -> None:
        """A file that never gets a name."""
        self.op_let_go(slot)
        fd = open_dir(self.root, path)
        try:
            self.slots[slot] = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=fd)
        finally:
            os.close(fd)

    def op_name_it(self, slot: int, path: Path_) -> None:
        """Give what a slot holds one more name."""
        if slot in self.slots:
            self._in(
                path,
                lambda fd, name: os.link(
                    b"/proc/self/fd/%d" % self.slots[slot], name, dst_dir_fd=fd, follow_symlinks=True
                ),
            )

    def op_let_go(self, slot: int) -> None:
        if slot in self.slots:
            os.close(self.slots.pop(slot))

    def op_use(self, slot: int, offset: int, data: bytes) -> Any:
        """Write to, read and stat what a slot holds; a directory gets another mode."""
        fd = self.slots.get(slot)
        if fd is None:
            return None
        st = os.fstat(fd)
        if stat.S_ISDIR(st.st_mode):
            os.fchmod(fd, 0o700 | len(data) % 64)
            return oct(os.fstat(fd).st_mode)
        if not stat.S_ISREG(st.st_mode):
            return oct(st.st_mode)
        try:
            os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
        os.fsync(fd)
        return st.st_nlink, os.fstat(fd).st_size, hashlib.sha256(_read(fd)).hexdigest()[:12]


NAMES = (
    b"a",
    b"b",
    b"c",
    b"n" * 60,
    b"L" * 200,
    b"f0",
    b"f1",
    b"f2",
    b"f3",
    b"twin",
    b"full",
    b"fulldir",
    b"sub",
    b"d",
)


class Generator:
    """Draws operations that mostly make sense for the tree that ``plain`` has now."""

    def __init__(self, plain: str | os.PathLike[str], seed: int, slots: int) -> None:
        self.plain = plain
        self.rng = random.Random(seed)
        self.slots = slots
        self.known: list[tuple[Path_, bool]] = []
        self.refresh()

    def refresh(self) -> None:
        self.known = [(path, record[0].startswith("0o4")) for path, record in walk(self.plain).items()]
        self.dirs = [path for path, is_dir in self.known if is_dir] or [()]
        self.files = [path for path, is_dir in self.known if not is_dir] or [(b"nothing",)]

    def new(self) -> Path_:
        return (*self.rng.choice(self.dirs), self.rng.choice(NAMES))

    def any(self) -> Path_:
        return self.rng.choice(self.known)[0] if self.known else (b"nothing",)

    def data(self) -> bytes:
        return self.rng.randbytes(self.rng.choice((1, 100, 5000)))

    def draw(self) -> Op:
        rng = self.rng
        offset = rng.choice((0, 10, 4096, 60_000))
        table: list[tuple[int, Callable[[], Op]]] = [
            (6, lambda: ("mkdir", self.new())),
            (8, lambda: ("create", self.new(), self.data())),
            (8, lambda: ("write", rng.choice(self.files), offset, self.data())),
            (8, lambda: ("append", rng.choice(self.files), self.data())),
            (4, lambda: ("store", rng.choice(self.files), rng.choice((0, 4090)), self.data()[:100])),
            (3, lambda: ("truncate", rng.choice(self.files), rng.choice((0, 5, 5000)))),
            (6, lambda: ("fsync", rng.choice(self.files))),
            (6, lambda: ("read", rng.choice(self.files))),
            (8, lambda: ("unlink", rng.choice(self.files))),
            (4, lambda: ("rmdir", rng.choice(self.dirs))),
            (5, lambda: ("link", rng.choice(self.files), self.new())),
            (2, lambda: ("symlink", self.new(), b"target")),
            (8, lambda: ("rename", self.any(), self.new())),
            (4, lambda: ("rename", self.any(), self.any())),
            (5, lambda: ("chmod", self.any(), rng.choice((0o600, 0o644, 0o755)) | 0o500)),
            (3, lambda: ("utime", self.any(), rng.randrange(10**18))),
            (3, lambda: ("names", rng.choice(self.dirs))),
            (
                8,
                lambda: (
                    "hold",
                    rng.randrange(self.slots),
                    rng.choice(self.files),
                    rng.choice((os.O_RDONLY, os.O_RDWR)),
                ),
            ),
            (3, lambda: ("hold", rng.randrange(self.slots), rng.choice(self.dirs), os.O_RDONLY)),
            (3, lambda: ("nameless", rng.randrange(self.slots), rng.choice(self.dirs))),
            (2, lambda: ("name_it", rng.randrange(self.slots), self.new())),
            (10, lambda: ("use", rng.randrange(self.slots), offset, self.data())),
            (1, lambda: ("let_go", rng.randrange(self.slots))),
        ]
        (made,) = rng.choices([make for _, make in table], [weight for weight, _ in table])
        return made()


def agree(generator: Generator, plain: Actor, mounted: Actor, steps: int, log: list[Op] | None = None) -> None:
    """Run the same random operations in both trees; AssertionError names the first that differs.

    A directory that only a lower layer has may refuse to move (EXDEV): then the plain tree is left alone, too.
    """
    for step in range(steps):
        if step % 50 == 0:
            generator.refresh()
        op = generator.draw()
        if log is not None:
            log.append(op)
        if op[0] in ("rename", "link"):
            there = mounted.do(op)
            if there == "!EXDEV":
                continue
            here = plain.do(op)
        else:
            here, there = plain.do(op), mounted.do(op)
        assert here == there, (
            step,
            op[0],
            [len(part) if isinstance(part, bytes) and len(part) > 60 else _short(part) for part in op[1:]],
            here,
            there,
        )


def _short(part: Any) -> Any:
    if isinstance(part, tuple):
        return f"{len(part)} names ... {b'/'.join(part[-3:])[-60:]!r}"
    return part


def compare(plain: str | os.PathLike[str], mounted: str | os.PathLike[str]) -> None:
    """AssertionError names what differs between two trees."""
    one, two = walk(plain), walk(mounted)
    wrong = [
        (_short(path), one.get(path), two.get(path))
        for path in one.keys() | two.keys()
        if one.get(path) != two.get(path)
    ]
    assert not wrong, wrong[:5]


__all__ = ["Actor", "Generator", "agree", "build", "chain", "compare", "make_dirs", "open_dir", "posix", "put", "walk"]
