"""Random histories of one store, with a plain directory and a copy of every committed snapshot as the judges.

A history is a list of plain data, carried out by :class:`Machine`: file operations (``support.ops``) on a mounted key and
on a plain directory, and the verbs of a store. After each verb

* the mounted tree equals the plain directory: types, modes, owners, contents, targets, devices, xattrs, link counts, and
  which names are one inode;
* the record of every committed snapshot equals what was mounted when it was made, modification times too, and now and then
  so do its content read again, and its export.

Every operation is independent of the state: what does not apply fails alike on both sides, or is left out. So any part of
a failing history is one as well, and :func:`shrink` finds a short one.

By hand: ``python -m support.history --driver overlay --seed 7 --operations 2000 --place DIR`` (PYTHONPATH=tests, in a
private mount namespace); ``--replay FILE`` carries a printed history out again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cowfs.errors import CowfsError
from cowfs.index.directory import Pair, decode, entries, join
from cowfs.store import Store

from .ops import Actor, Op

NAMES = ["a", "b", "c", "d"]
TREES = 3  # directories of a path
KEY = "k"


class Object(NamedTuple):
    """What one name shows. ``group``: the first of the inode's names; ``links``: how many it has."""

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
            content, xattrs = b"", ()
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
        self.whole = self.store.driver.whole
        self.counts = self.store.driver.form.name != "user" or self.whole
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
        while True:
            try:
                os.statvfs(self.mnt)  # not answered from a cache
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    break
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
        if self.whole:
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
        if name is None or self.whole:
            return
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
        """What is looked at once a history is over: everything, the layers as archives, and the store's own check."""
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
    """What an archive holds of a tree: the names of an inode, not their count."""
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


def sync(path: str) -> None:
    """Have the kernel write back what it holds of a file system."""
    subprocess.run(["sync", "-f", path], check=True)


# -- drawing ------------------------------------------------------------------------------------------------------------

#: operation -> how often
WEIGHTS = {
    "create": 9, "write": 9, "mkdir": 6, "link": 13, "unlink": 7, "rmdir": 2, "rmtree": 1, "rename": 12, "rename2": 4,
    "symlink": 2, "chmod": 4, "setxattr": 3, "removexattr": 1, "truncate": 3, "mknod": 1, "utime": 2, "open": 3, "fwrite": 3,
    "close": 1, "flink": 1,
}  # fmt: skip
VERBS = {
    "snapshot": 14, "squash": 7, "rollback": 1, "commit": 2, "remount": 2, "forget": 5, "kill": 1, "read": 3, "look": 4, "remove": 2,
}  # fmt: skip
EVERY = 12  # operations between two verbs, on average
EXCHANGE = 2


class Draw:
    """Steps out of a seed, given what the plain directory holds now."""

    def __init__(self, seed: int, plain: str, root: bool) -> None:
        self.rng, self.plain, self.root = random.Random(seed), plain, root

    def step(self) -> list[Any]:
        rng = self.rng
        if rng.random() < 1 / EVERY:
            verb = rng.choices(list(VERBS), list(VERBS.values()))[0]
            if verb in ("squash", "rollback"):
                return [verb, rng.random(), rng.random() < 0.7]
            if verb == "snapshot":
                return [verb, rng.random() < 0.8]
            return [verb, rng.random()] if verb in ("read", "remove") else [verb]
        return ["op", *self.operation()]

    def operation(self) -> Op:
        rng = self.rng
        paths, directories = self.listed()
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        there = rng.choice(paths or ["nothing"])
        new = self.new(directories)
        if name == "rename2":
            return (name, there, rng.choice(paths or ["nothing"]), EXCHANGE)
        if name == "mknod":
            return (name, new, "fifo" if not self.root else rng.choice(["fifo", "char"]))
        offset, length, seed = rng.choice([0, 0, 5, 4090, 9000]), rng.choice([1, 40, 5000, 9000]), rng.randrange(1000)
        return {
            "create": (name, new, rng.choice([0o600, 0o644])),
            "write": (name, there, 0, offset, length, seed),
            "mkdir": (name, new, 0o755),
            "link": (name, there, new),
            "unlink": (name, there),
            "rmdir": (name, there),
            "rmtree": (name, there),
            "rename": (name, there, new if rng.random() < 0.7 else rng.choice(paths or ["nothing"])),
            "symlink": (name, f"to-{seed}", new),
            "chmod": (name, there, rng.choice([0o600, 0o644, 0o755, 0o444])),
            "setxattr": (name, there, rng.choice(["user.one", "user.two"]), rng.choice([3, 100]), seed, 0),
            "removexattr": (name, there, "user.one"),
            "truncate": (name, there, rng.choice([0, 3, 4096, 10_000])),
            "utime": (name, there, rng.randrange(10**18)),
            "open": (name, seed % 3, there, os.O_RDWR),
            "fwrite": (name, seed % 3, offset, length, seed),
            "close": (name, seed % 3),
            "flink": (name, seed % 3, new),
        }[name]

    def listed(self) -> tuple[list[str], list[str]]:
        paths: list[str] = []
        directories = [""]
        for at, inner, files in os.walk(self.plain):
            here = os.path.relpath(at, self.plain)
            base = "" if here == "." else here + "/"
            paths += [base + name for name in inner + files]
            directories += [base + name + "/" for name in inner if base.count("/") < TREES - 1]
        return sorted(paths), sorted(directories)

    def new(self, directories: list[str]) -> str:
        return self.rng.choice(directories) + self.rng.choice(NAMES)


# -- running ------------------------------------------------------------------------------------------------------------

Run = Callable[[], Machine]


def play(make: Run, steps: Iterator[list[Any]] | list[list[Any]], done: list[list[Any]]) -> str | None:
    """Carry steps out. Returns what went wrong; ``done`` receives the steps."""
    machine = make()
    try:
        for step in steps:
            done.append(step)
            machine.do(step)
        if done:
            done.append(["finish"])
            machine.finish()
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is a finding
        trace = "" if isinstance(error, Mismatch) else traceback.format_exc()
        return f"{done[-1]}: {error}\n{trace}{_log_of(error)}"
    finally:
        machine.close()
    return None


def _log_of(error: Exception) -> str:
    """What a server wrote before it said "see FILE"."""
    log = str(error).rpartition("; see ")[2]
    return Path(log).read_text() if log.endswith(".log") and os.path.exists(log) else ""


def drawn(machine: Machine, seed: int, count: int) -> Iterator[list[Any]]:
    draw = Draw(seed, machine.plain, os.geteuid() == 0)
    for _ in range(count):
        yield draw.step()


def kind_of(wrong: str) -> str:
    """What two failures of one cause have in common: the verb, and the first words of the message without numbers."""
    step, _, message = wrong.partition("]: ")
    return re.sub(r"[0-9]+", "N", f"{step.split(',')[0]} {' '.join(message.split()[:2])}")


def shrink(make: Run, steps: list[list[Any]], wrong: str, seconds: float) -> tuple[list[list[Any]], str]:
    """A shorter history that fails in the same way, found by leaving pieces out for so many seconds; and how it fails."""
    end, kind = time.monotonic() + seconds, kind_of(wrong)
    size = max(1, len(steps) // 2)
    while size and time.monotonic() < end:
        at = 0
        while at < len(steps) and time.monotonic() < end:
            done: list[list[Any]] = []
            now = play(make, steps[:at] + steps[at + size :], done)
            if now is not None and kind_of(now) == kind:
                steps, wrong = [step for step in done if step != ["finish"]], now
            else:
                at += size
        size = size // 2 if size > 1 else 0
    return steps, wrong


def forget_here(mountpoint: str) -> None:
    """Have the kernel drop the names and inodes of one mount that are not in use."""
    subprocess.run(["mount", "-i", "-o", "remount", mountpoint], check=True, capture_output=True)


def forget_there(mountpoint: str) -> None:
    """The same, by a privileged process that reads our output."""
    print(f"forget {mountpoint}", flush=True)
    sys.stdin.readline()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", default="overlay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--length", type=int, default=400, help="operations of one history")
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--failures", type=int, default=1, help="go on until so many histories have failed")
    parser.add_argument("--shrink", type=float, default=0.0, help="seconds")
    wish = parser.parse_args()
    forget = forget_here if os.geteuid() == 0 else forget_there
    places = iter(range(1_000_000))

    def make() -> Machine:
        place = wish.place / f"history-{os.getpid()}-{next(places)}"
        place.mkdir()
        current.append(Machine(place, wish.driver, forget))
        return current[-1]

    current: list[Machine] = []
    failures = 0
    seeds = [0] if wish.replay else [wish.seed * 1000 + n for n in range(-(-wish.operations // wish.length))]
    for seed in seeds:
        done: list[list[Any]] = []
        if wish.replay:
            wrong = play(make, json.loads(wish.replay.read_text()), done)
        else:
            wrong = play(make, _later(current, seed, wish.length), done)
        if wrong is not None:
            steps = [step for step in done if step != ["finish"]]
            if wish.shrink:
                print(f"first {wrong}", flush=True)
                steps, wrong = shrink(make, steps, wrong, wish.shrink)
            print(
                f"driver {wish.driver}, seed {seed}, {len(steps)} steps: {wrong}\nhistory: {json.dumps(steps)}",
                flush=True,
            )
            failures += 1
            if failures >= wish.failures:
                return 1
            continue
        shutil.rmtree(current[-1].place, ignore_errors=True)
    print(f"driver {wish.driver}: {len(seeds) * wish.length} operations", flush=True)
    return 0


def _later(current: list[Machine], seed: int, count: int) -> Iterator[list[Any]]:
    """Steps for the machine that is about to be made."""
    yield from drawn(current[-1], seed, count)


if __name__ == "__main__":
    sys.exit(main())
