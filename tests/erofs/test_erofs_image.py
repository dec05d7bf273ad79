"""Images against the kernel and against their own reader: random trees, hostile bytes, a million names."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from cowfs.erofs import layout
from cowfs.erofs.reader import Image
from cowfs.erofs.tree import Chunk, Device, Inode, Map
from cowfs.erofs.writer import write_image
from cowfs.errors import Corrupt, Unsupported

Tree = dict[bytes, Any]
"""A directory: name -> inode, or (inode, directory)."""


class MemoryTree:
    """A source whose keys are dictionaries."""

    def __init__(self, root: Inode, tree: Tree) -> None:
        self._root, self._tree = root, tree

    def root(self) -> tuple[Inode, Tree]:
        return self._root, self._tree

    def names(self, key: Tree) -> Iterator[bytes]:
        return iter(sorted(key))

    def entries(self, key: Tree) -> Iterator[tuple[bytes, Inode, Tree | None]]:
        for name in sorted(key):
            item = key[name]
            if isinstance(item, tuple):
                yield name, item[0], item[1]
            else:
                yield name, item, None


def walk(source: Any) -> dict[bytes, Inode]:
    """Every object by its path."""
    root, key = source.root()
    found, todo = {b"": root}, [(b"", key)]
    while todo:
        path, key = todo.pop()
        for name, inode, below in source.entries(key):
            found[path + b"/" + name] = inode
            if below is not None:
                todo.append((path + b"/" + name, below))
    return found


def links(tree: dict[bytes, Inode]) -> set[frozenset[bytes]]:
    """Which paths are one file."""
    groups: dict[Any, set[bytes]] = {}
    for path, inode in tree.items():
        if inode.link is not None:
            groups.setdefault(inode.link, set()).add(path)
    return {frozenset(paths) for paths in groups.values() if len(paths) > 1}


def random_name(rng: random.Random) -> bytes:
    size = rng.choice((1, 1, 2, 5, 12, 40, 200, 255))
    name = bytes(rng.choice(b"!-.az\xff\x80\x01") for _ in range(size))
    return b"x" if name in (b".", b"..") else name


def random_xattrs(rng: random.Random) -> tuple[tuple[bytes, bytes], ...]:
    found: dict[bytes, bytes] = {}
    for _ in range(rng.choice((0, 0, 0, 1, 3, 20))):
        name = rng.choice((b"user.", b"trusted.", b"security.")) + b"n%d" % rng.randrange(30)
        found[name] = rng.choice((b"", b"v", b"shared value", rng.randbytes(rng.choice((3, 900, 5000)))))
    return tuple(sorted(found.items()))


def random_inode(rng: random.Random, kind: int) -> Inode:
    size = rng.choice((0, 1, 4095, 4096, 4097, 10**6, 1 << 40)) if kind == stat.S_IFREG else 0
    return Inode(
        mode=kind | rng.choice((0, 0o644, 0o4755, 0o7777)),
        uid=rng.choice((0, 1000, 0xFFFFFFFE)),
        gid=rng.choice((0, 70000)),
        size=size,
        mtime_ns=rng.choice((0, 1_700_000_000_123_456_789, -1, -(10**18), 2**34 * 10**9)),
        rdev=rng.choice(((1, 3), (259, 1 << 19))) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
        target=rng.randbytes(rng.choice((1, 40, 4000))).replace(b"\0", b"z") if kind == stat.S_IFLNK else b"",
        xattrs=random_xattrs(rng) if kind in (stat.S_IFREG, stat.S_IFDIR) else (),
    )


def random_tree(rng: random.Random, depth: int = 0) -> Tree:
    tree: Tree = {}
    linked: list[Inode] = []
    for _ in range(rng.choice((0, 1, 3, 20, 90)) if depth < 4 else 2):
        name = random_name(rng)
        if name in tree:
            continue
        if rng.random() < 0.2 and depth < 6:
            below = random_tree(rng, depth + 1)
            count = 2 + sum(isinstance(item, tuple) for item in below.values())
            tree[name] = (replace(random_inode(rng, stat.S_IFDIR), nlink=count), below)
        elif linked and rng.random() < 0.2:
            tree[name] = rng.choice(linked)
        else:
            inode = random_inode(rng, rng.choice((stat.S_IFREG,) * 4 + (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)))
            if rng.random() < 0.2:
                inode = replace(inode, link=object())
                linked.append(inode)
            tree[name] = inode
    for inode in linked:
        names = [name for name, item in tree.items() if item is inode]
        fixed = replace(inode, nlink=len(names)) if len(names) > 1 else replace(inode, link=None)
        for name in names:
            tree[name] = fixed
    return tree


def source_of(seed: int) -> MemoryTree:
    rng = random.Random(seed)
    tree = random_tree(rng)
    count = 2 + sum(isinstance(item, tuple) for item in tree.values())
    return MemoryTree(replace(random_inode(rng, stat.S_IFDIR), nlink=count), tree)


def same(a: Inode, b: Inode) -> bool:
    """Equal but for what names a link, and the order of xattrs."""
    return replace(a, link=None, xattrs=tuple(sorted(a.xattrs))) == replace(
        b, link=None, xattrs=tuple(sorted(b.xattrs))
    )


def write(path: Path, source: Any, **more: Any) -> Any:
    with open(path, "w+b") as file:
        return write_image(source, file.fileno(), **more)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_is_read(tmp_path: Path, seed: int) -> None:
    source = source_of(seed)
    written = write(tmp_path / "image", source)
    with open(tmp_path / "image", "rb") as file:
        image = Image(file.fileno())
        assert image.inodes == written.inodes
        mine, its = walk(source), walk(image)
    assert mine.keys() == its.keys()
    for path, inode in mine.items():
        assert same(inode, its[path]), path
    assert links(mine) == links(its)


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, source_of(3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def mount_erofs(image: Path, target: Path, data: str = "") -> None:
    """Mount a file: without a loop device where the file's host and the kernel can do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(image), os.fsencode(target), b"erofs", 1, data.encode()) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.ENOTBLK and data:
        pytest.skip("the host's file system cannot back an EROFS image by a file")
    if code != errno.ENOTBLK:
        raise OSError(code, os.strerror(code))
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", image, target], check=True)


@pytest.fixture
def mounted(tmp_path: Path, can_mount: None) -> Iterator[Any]:
    target = tmp_path / "mnt"
    target.mkdir()
    yield lambda image, data="": mount_erofs(image, target, data) or target
    subprocess.run(["umount", "-l", target], check=False, stderr=subprocess.DEVNULL)


def kernel_inode(path: bytes) -> Inode:
    s = os.lstat(path)
    kind = stat.S_IFMT(s.st_mode)
    return Inode(
        mode=s.st_mode,
        uid=s.st_uid,
        gid=s.st_gid,
        size=s.st_size if kind == stat.S_IFREG else 0,
        mtime_ns=s.st_mtime_ns,
        nlink=s.st_nlink,
        rdev=(os.major(s.st_rdev), os.minor(s.st_rdev)),
        target=os.readlink(path) if kind == stat.S_IFLNK else b"",
        xattrs=tuple(
            sorted(
                (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False))
                for name in os.listxattr(path, follow_symlinks=False)
            )
        ),
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting EROFS needs root")
@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_shows_the_tree(tmp_path: Path, mounted: Any, seed: int) -> None:
    """Names in order, attributes to the nanosecond, xattrs, targets, which names are one file."""
    source = source_of(seed)
    write(tmp_path / "image", source)
    top = os.fsencode(mounted(tmp_path / "image"))
    numbers: dict[int, set[bytes]] = {}
    mine, seen = walk(source), {b""}
    for directory, names, files in os.walk(top):
        for name in names + files:
            full = directory + b"/" + name
            path = full[len(top) :]
            seen.add(path)
            assert same(kernel_inode(full), mine[path]), path
            if not stat.S_ISDIR(mine[path].mode):
                numbers.setdefault(os.lstat(full).st_ino, set()).add(path)
    assert same(kernel_inode(top), mine[b""])
    assert seen == mine.keys()
    assert {frozenset(paths) for paths in numbers.values() if len(paths) > 1} == links(mine)
    fsck = subprocess.run(["fsck.erofs", tmp_path / "image"], capture_output=True, text=True)
    assert fsck.returncode == 0 or "not found" in fsck.stderr, fsck.stderr + fsck.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting EROFS needs root")
def test_chunks_of_two_devices_are_one_file(tmp_path: Path, mounted: Any) -> None:
    """A redirect-on-write file: blocks of a base and of a pool, some in the image itself, holes between, a tail that ends within one."""
    rng = random.Random(1)
    (tmp_path / "base").write_bytes(rng.randbytes(64 * 4096))
    (tmp_path / "pool").write_bytes(rng.randbytes(64 * 4096 - 100))
    places: list[Chunk] = [None if rng.random() < 0.1 else (rng.choice((1, 2)), rng.randrange(63)) for _ in range(500)]
    for number in (0, 7, 8, 499):
        places[number] = rng.randbytes(4096)
    size = 499 * 4096 + 77
    inode = Inode(mode=stat.S_IFREG | 0o644, size=size, data=Map(0, tuple(places)))
    devices = [Device(64, b"base"), Device(64, b"pool")]
    write(tmp_path / "image", MemoryTree(Inode(mode=stat.S_IFDIR | 0o755, nlink=2), {b"f": inode}), devices=devices)
    with open(tmp_path / "image", "rb") as file:
        image = Image(file.fileno())
        assert image.devices == devices
        assert walk(image)[b"/f"] == inode
    files = {1: (tmp_path / "base").read_bytes(), 2: (tmp_path / "pool").read_bytes()}
    expected = b"".join(
        bytes(4096)
        if place is None
        else place
        if isinstance(place, bytes)
        else files[place[0]][place[1] * 4096 :][:4096]
        for place in places
    )[:size]
    target = mounted(tmp_path / "image", f"device={tmp_path / 'base'},device={tmp_path / 'pool'}")
    assert (target / "f").read_bytes() == expected


@pytest.mark.parametrize(
    "inode",
    [
        Inode(mode=stat.S_IFREG | 0o644, xattrs=((b"system.other", b""),)),
        Inode(mode=stat.S_IFREG | 0o644, xattrs=((b"user.big", bytes(65536)),)),
        Inode(mode=stat.S_IFREG | 0o644, xattrs=tuple((b"user.%d" % n, bytes(65000)) for n in range(5))),
        Inode(mode=stat.S_IFLNK | 0o777, target=b"x" * 5000),
    ],
)
def test_what_the_format_cannot_hold_is_said(tmp_path: Path, inode: Inode) -> None:
    """In one line with a remedy, so that the caller takes another way to mount."""
    with pytest.raises(Unsupported) as caught:
        write(tmp_path / "image", MemoryTree(Inode(mode=stat.S_IFDIR | 0o755, nlink=2), {b"x": inode}))
    assert caught.value.remedy


class Sample(bytes):
    """The bytes of an image; a failure does not show them all."""

    def __repr__(self) -> str:
        return "an image"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sample") / "image"
    write(path, source_of(7))
    return Sample(path.read_bytes())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.integers(0, (1 << 32) - 1), st.integers(1024, 8192)), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    ),
    st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
)
@example([(198382, 1)], None)  # a file of petabytes
def test_a_damaged_image_is_corrupt_or_another_tree(
    sample: bytes, damage: list[tuple[int, int]], cut: int | None
) -> None:
    """Never another error, never a read outside of it, never a loop without end."""
    image = bytearray(sample)
    for at, value in damage:
        image[at % len(image)] = value
    if cut is not None:
        del image[cut % len(image) :]
    if len(image) > 2048:  # a checksum that fits, so that what is behind it is looked at
        image[1028:1032] = bytes(4)
        image[1028:1032] = layout.checksum(bytes(image[1024:4096])).to_bytes(4, "little")
    fd = os.memfd_create("image")
    try:
        os.write(fd, image)
        source = Image(fd)
        _, key = source.root()
        todo, steps = [key], 0
        while todo and steps < 5_000:
            for _, _, below in source.entries(todo.pop()):
                steps += 1
                if below is not None:
                    todo.append(below)
    except Corrupt:
        pass
    finally:
        os.close(fd)


def test_a_hundred_thousand_names_in_bounded_memory(tmp_path: Path) -> None:
    """Directories that are wide, and many: what is held is the names of one directory."""
    code = """
import resource, stat, sys
from cowfs.erofs.tree import Inode
from cowfs.erofs.writer import write_image
class Source:
    def root(self): return Inode(mode=stat.S_IFDIR | 0o755, nlink=102), -1
    def names(self, key): return (b"%06d" % n for n in range(100 if key < 0 else 1000))
    def entries(self, key):
        for name in self.names(key):
            if key < 0: yield name, Inode(mode=stat.S_IFDIR | 0o755, nlink=2), int(name)
            else: yield name, Inode(mode=stat.S_IFREG | 0o644, size=5, xattrs=((b"user.p", name * 3),)), None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "w+b") as file: print(write_image(Source(), file.fileno()).inodes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    import sys

    done = subprocess.run([sys.executable, "-c", code, tmp_path / "i"], capture_output=True, text=True, check=True)
    inodes, grown = map(int, done.stdout.split())
    assert inodes == 100_101
    assert grown < 40_000  # KiB
