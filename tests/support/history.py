"""Random histories of one store, with a plain directory and a copy of every committed snapshot as the judges.

A history is a list of plain data, carried out by :class:`Machine`: file operations (``support.ops``) on a mounted key and
on a plain directory, and the verbs of a store. After each verb

* the mounted tree equals the plain directory: types, modes, owners, contents, targets, devices, xattrs, link counts, and
  which names are one inode;
* the record of every committed snapshot equals what was mounted when it was made, modification times too, and now and then
  so do its content read again, and its export.

``support.histories`` draws histories, carries them out and shrinks those that fail.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cowfs.errors import CowfsError
from cowfs.index.directory import Pair, decode, entries, join
from cowfs.store import Store

from .ops import Actor

KEY = "k"


class Object(NamedTuple):
    """The visible object of one name. ``group``: the first of the inode's names; ``links``: how many it has."""

    mode: int
    uid: int
    gid: int
    size: int
    content: bytes
    rdev: int
    xattrs: tuple[tuple[str, bytes], ...]
    links: int
    group: str


Tree = dict[str, Object]
Times = dict[str, int]


class Mismatch(AssertionError):
    """Two trees that should be equal are not."""


def grouped(found: dict[str, tuple[Any, Object]]) -> Tree:
    """Objects with their groups named, from path -> (identity of the inode, object)."""
    first: dict[Any, str] = {}
    for path in sorted(found):
        first.setdefault(found[path][0], path)
    return {path: each._replace(group=first[ident]) for path, (ident, each) in found.items()}


def read_tree(top: str) -> tuple[Tree, Times]:
    """A directory by system calls."""
    found: dict[str, tuple[Any, Object]] = {}
    times: Times = {}
    pending = [""]
    while pending:
        here = pending.pop()
        for entry in os.scandir(f"{top}/{here}" if here else top):
            path = f"{here}/{entry.name}" if here else entry.name
            st = os.lstat(entry.path)
            times[path] = st.st_mtime_ns
            content = b""
            xattrs: tuple[tuple[str, bytes], ...] = ()
            if stat.S_ISDIR(st.st_mode):
                pending.append(path)
            elif stat.S_ISREG(st.st_mode):
                content = Path(entry.path).read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(entry.path).encode()
            if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
                xattrs = tuple(
                    (name, os.getxattr(entry.path, name))
                    for name in sorted(os.listxattr(entry.path))
                    if name[:5] == "user."
                )
            found[path] = (
                st.st_ino,
                _object(st.st_mode, st.st_uid, st.st_gid, st.st_size, content, st.st_rdev, xattrs, st.st_nlink),
            )
    return grouped(found), times


def _object(
    mode: int,
    uid: int,
    gid: int,
    size: int,
    content: bytes,
    rdev: int,
    xattrs: tuple[tuple[str, bytes], ...],
    links: int,
) -> Object:
    kind = stat.S_IFMT(mode)
    return Object(
        mode, uid, gid, size if kind == stat.S_IFREG else 0, content, rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        xattrs, 0 if kind == stat.S_IFDIR else links, "",
    )  # fmt: skip


class Machine:
    """One store, one key, one plain directory.

    Args:
        place: an empty directory.
        driver: the store's.
        forget: makes the kernel forget what it keeps of a mount.
    """

    def __init__(self, place: Path, driver: str, forget: Callable[[str], None]) -> None:
        self.place, self.forget = place, forget
        self.mnt, self.plain = str(place / "mnt"), str(place / "plain")
        os.mkdir(self.mnt)
        os.mkdir(self.plain, 0o755)
        os.chmod(self.plain, 0o755)
        self.store = Store.open(place / "store", driver=driver, fsync=False)
        self.whole = self.store.driver.capabilities.whole
        self.counts = self.store.driver.form.redirects or self.whole
        self.trees: dict[str, tuple[Tree, Times]] = {}
        self.chain: list[str] = []  # committed ancestors of the key, bottom first
        self.parents: dict[str, str | None] = {}
        self.number = 0
        self.pid = 0
        started = time.time_ns() - 3600 * 10**9
        self.ours, self.theirs = Actor(self.mnt, started, self.counts), Actor(self.plain, started, self.counts)
        self.store.prepare(KEY)
        self.mount()

    # -- the mount

    def mount(self) -> None:
        handle = self.store.mount(KEY, self.mnt)
        self.pid = handle.pid  # type: ignore[union-attr]

    def unmount(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.store.unmount(KEY)

    def kill(self) -> None:
        """Kill the server, and mount again."""
        self.ours.close()
        self.theirs.close()
        sync(self.mnt)
        os.kill(self.pid, signal.SIGKILL)
        while not ended(self.pid):  # until then, its control socket answers to a connect
            time.sleep(0.001)
        self.mount()

    def close(self) -> None:
        """Leave nothing mounted."""
        self.ours.close()
        self.theirs.close()
        with contextlib.suppress(CowfsError, OSError):
            self.store.unmount(KEY, lazy=True)
        self.store.close()

    # -- one step

    def do(self, step: list[Any]) -> None:
        """Carry out one step. Raises Mismatch."""
        kind, *arguments = step
        if kind == "op":
            if arguments[0] == "chmod" and os.path.isdir(f"{self.plain}/{arguments[1]}"):
                arguments[2] |= 0o700  # an ordinary user still looks at all of it
            one, two = self.theirs.do(tuple(arguments)), self.ours.do(tuple(arguments))
            if one != two:
                raise Mismatch(f"{arguments}: plain {one!r}, mounted {two!r}")
            return
        getattr(self, "verb_" + kind)(*arguments)

    def fresh(self) -> str:
        self.number += 1
        return f"s{self.number}"

    def verb_look(self) -> None:
        """The mounted tree, and every record."""
        self.compare()

    def verb_forget(self) -> None:
        self.forget(self.mnt)
        self.compare()

    def verb_kill(self) -> None:
        self.kill()
        self.compare()

    def verb_remount(self) -> None:
        self.unmount()
        self.mount()
        self.compare()

    def keep(self, name: str, seen: tuple[Tree, Times]) -> None:
        self.trees[name] = seen
        self.parents[name] = self.chain[-1] if self.chain else None
        self.chain.append(name)

    def verb_snapshot(self, mounted: bool) -> None:
        if self.whole and not self.store.driver.capabilities.snapshots:
            return self.verb_commit()
        seen, name = self.compare(), self.fresh()
        with self.away(mounted):
            self.store.snapshot(KEY, name)
        self.keep(name, seen)
        self.compare()
        return None

    def verb_commit(self) -> None:
        seen, name = self.compare(), self.fresh()
        with self.away(False):
            self.store.commit(KEY, name)
            self.keep(name, seen)
            self.store.prepare(KEY, name)
        self.compare()

    def children(self, name: str) -> list[str]:
        return [each for each, parent in self.parents.items() if parent == name]

    def verb_squash(self, place: float, mounted: bool) -> None:
        name = self.pick(place, lambda name: len(self.children(name)) + (self.chain[-1:] == [name]) == 1)
        if name is None or self.whole:
            return
        with self.away(mounted):
            self.store.squash(name)
        parent = self.parents.pop(name)
        for child in [each for each, above in self.parents.items() if above == name]:
            self.parents[child] = parent
        del self.trees[name]
        if name in self.chain:
            self.chain.remove(name)
        self.compare()

    def verb_rollback(self, place: float, mounted: bool) -> None:
        name = self.pick(place, lambda name: name in self.chain)
        can = self.store.driver.capabilities
        if name is None or (self.whole and not can.snapshots):
            return
        mounted = mounted and (can.live or self.store.driver.name == "btrfs")
        self.ours.close()
        self.theirs.close()
        with self.away(mounted):
            self.store.rollback(KEY, name)
        del self.chain[self.chain.index(name) + 1 :]
        self.restore(self.trees[name])
        self.compare()

    def verb_remove(self, place: float) -> None:
        """A snapshot that nothing stands on: its inode numbers are free again."""
        name = self.pick(place, lambda name: name not in self.chain and not self.children(name))
        if name is not None:
            self.store.remove(name)
            del self.trees[name], self.parents[name]

    def verb_read(self, place: float) -> None:
        """A committed snapshot's files, and its export."""
        name = self.pick(place, lambda name: True)
        if name is not None:
            self.reread(name)

    def pick(self, place: float, fits: Callable[[str], bool]) -> str | None:
        names = [name for name in self.trees if fits(name)]
        return names[int(place * len(names))] if names else None

    @contextlib.contextmanager
    def away(self, mounted: bool) -> Iterator[None]:
        """Mounted within the block, or not."""
        if mounted:
            yield
            return
        self.unmount()
        try:
            yield
        finally:
            self.mount()

    # -- judging

    def compare(self) -> tuple[Tree, Times]:
        """The mounted tree is the plain one, and the records are what they were. Returns the mounted tree."""
        plain, _ = read_tree(self.plain)
        ours, times = read_tree(self.mnt)
        self.same(plain, ours, "mounted")
        for name in self.trees:
            self.compare_record(name)
        return ours, times

    def same(self, expected: Tree, found: Tree, what: str) -> None:
        if not self.counts:
            expected, found = (
                {path: each._replace(links=0) for path, each in tree.items()} for tree in (expected, found)
            )
        if expected != found:
            lines = [
                f"  {path}: expected {shown(expected.get(path))}\n  {' ' * len(path)}     found {shown(found.get(path))}"
                for path in sorted(expected.keys() | found.keys())
                if expected.get(path) != found.get(path)
            ]
            raise Mismatch("\n".join([f"{what}:", *lines[:8]]))

    def compare_record(self, name: str) -> None:
        expected, times = self.trees[name]
        row = self.store.index.get(name)
        assert row.root is not None
        found, ours = self.recorded(row.root)
        without = {
            path: each._replace(content=each.content if stat.S_ISLNK(each.mode) else b"")
            for path, each in expected.items()
        }
        self.same(without, found, f"record of {name}")
        self.same_times(times, ours, f"record of {name}")

    def same_times(self, expected: Times, found: Times, what: str) -> None:
        wrong = [path for path, when in expected.items() if found[path] != when]
        if wrong:
            raise Mismatch(f"{what}: mtime of {wrong}: {[(expected[path], found[path]) for path in wrong]}")

    def recorded(self, root: Pair) -> tuple[Tree, Times]:
        """A tree as the index has it."""
        found: dict[str, tuple[Any, Object]] = {}
        times: Times = {}
        pending = [(root, b"")]
        while pending:
            pair, above = pending.pop()
            ref = decode(pair).ref
            assert ref is not None
            for name, inner in entries(self.store.index, ref.storage).items():
                entry, path = decode(inner), join(above, name)
                xattrs = tuple((key.decode(), value) for key, value in entry.xattrs if key[:5] == b"user.")
                times[path.decode()] = entry.mtime_ns
                if entry.ref is not None:
                    pending.append((inner, path))
                each = _object(
                    entry.mode, entry.uid, entry.gid, entry.size, entry.target, entry.rdev, xattrs, entry.nlink
                )
                ident = path if entry.nlink <= 1 else entry.file  # of a directory, the count is 0
                found[path.decode()] = ident, each
        return grouped(found), times

    def reread(self, name: str) -> None:
        """A committed snapshot through a view of its own, and out of its export."""
        expected, times = self.trees[name]
        self.store.view("look", name)
        try:
            with self.store.paths("look") as paths:
                found: dict[str, tuple[Any, Object]] = {}
                ours: Times = {}
                for raw, attr in paths.walk():
                    content = b""
                    if stat.S_ISREG(attr.mode):
                        content = paths.read_bytes(raw)
                    elif stat.S_ISLNK(attr.mode):
                        content = paths.readlink(raw)
                    names = sorted(key for key in paths.listxattr(raw) if key[:5] == b"user.")
                    xattrs = tuple((key.decode(), paths.getxattr(raw, key)) for key in names)
                    ours[raw.decode()] = attr.mtime_ns
                    found[raw.decode()] = (
                        attr.ino,
                        _object(attr.mode, attr.uid, attr.gid, attr.size, content, attr.rdev, xattrs, attr.nlink),
                    )
        finally:
            self.store.remove("look")
        self.same(expected, grouped(found), f"view of {name}")
        self.same_times(times, ours, f"view of {name}")
        out = io.BytesIO()
        self.store.export(name, out, format="tar")
        self.same(without_links(expected), without_links(untarred(out)), f"tar of {name}")

    def finish(self) -> None:
        """The final checks of a history: the whole tree, the layers as archives, and the store's own check."""
        self.compare()
        for name in self.trees:
            self.reread(name)
        self.unmount()
        self.mount()
        self.compare()
        if self.chain:
            self.reapply()
        problems = self.store.check(content=True).problems
        if problems:
            raise Mismatch(f"check: {problems}")

    def reapply(self) -> None:
        """The layers beneath the key, exported and applied one by one, give the same trees."""
        with Store.open(self.place / "other", driver=self.store.driver.name, fsync=False) as other:
            parent = None
            for name in self.chain:
                layer = io.BytesIO()
                self.store.export(name, layer, format="layer")
                layer.seek(0)
                other.prepare("new", parent)
                other.apply("new", layer)
                other.commit("new", name)
                parent = name
                whole = io.BytesIO()
                other.export(name, whole, format="tar")
                self.same(
                    without_links(self.trees[name][0]), without_links(untarred(whole)), f"layer of {name}, applied"
                )

    def restore(self, seen: tuple[Tree, Times]) -> None:
        """Make the plain directory what it was."""
        tree, times = seen
        for entry in os.scandir(self.plain):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        for path in sorted(tree):
            each, full = tree[path], f"{self.plain}/{path}"
            if each.group != path:
                os.link(f"{self.plain}/{each.group}", full, follow_symlinks=False)
                continue
            kind = stat.S_IFMT(each.mode)
            if kind == stat.S_IFDIR:
                os.mkdir(full)
            elif kind == stat.S_IFLNK:
                os.symlink(each.content.decode(), full)
            elif kind == stat.S_IFREG:
                Path(full).write_bytes(each.content)
            else:
                os.mknod(full, each.mode, each.rdev)
            for key, value in each.xattrs:
                os.setxattr(full, key, value)
            if os.geteuid() == 0:
                os.chown(full, each.uid, each.gid, follow_symlinks=False)
            if kind != stat.S_IFLNK:
                os.chmod(full, each.mode & 0o7777)
        for path in sorted(tree, reverse=True):
            os.utime(f"{self.plain}/{path}", ns=(times[path], times[path]), follow_symlinks=False)


def shown(each: Object | None) -> str:
    return "nothing" if each is None else str(each._replace(mode=oct(each.mode), content=each.content[:24]))  # type: ignore[arg-type]


def without_links(tree: Tree) -> Tree:
    """The part of a tree that an archive holds: the names of an inode, not their count."""
    return {path: each._replace(links=0) for path, each in tree.items()}


def untarred(archive: io.BytesIO) -> Tree:
    """The tree of a tar, by Python's own reader."""
    archive.seek(0)
    found: dict[str, tuple[Any, Object]] = {}
    kinds = {
        b"0": stat.S_IFREG,
        b"2": stat.S_IFLNK,
        b"3": stat.S_IFCHR,
        b"4": stat.S_IFBLK,
        b"5": stat.S_IFDIR,
        b"6": stat.S_IFIFO,
    }
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            if path in ("", "."):
                continue
            if member.islnk():
                found[path] = found[member.linkname.removeprefix("./")]
                continue
            content = member.linkname.encode() if member.issym() else b""
            if member.isreg():
                data = tar.extractfile(member)
                assert data is not None
                content = data.read()
            xattrs = sorted(
                (key.removeprefix("SCHILY.xattr."), value.encode("utf-8", "surrogateescape"))
                for key, value in member.pax_headers.items()
                if key.startswith("SCHILY.xattr.user.")
            )
            rdev = os.makedev(member.devmajor, member.devminor) if member.ischr() or member.isblk() else 0
            mode = kinds[member.type] | (0o777 if member.issym() else member.mode)
            found[path] = path, _object(mode, member.uid, member.gid, member.size, content, rdev, tuple(xattrs), 0)
    return grouped(found)


def ended(pid: int) -> bool:
    """Whether a process has let go of all it held, each thread of it; perhaps its parent has not heard of its end yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def sync(path: str) -> None:
    """Have the kernel write back what it holds of a file system."""
    subprocess.run(["sync", "-f", path], check=True)
