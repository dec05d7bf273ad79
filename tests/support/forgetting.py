"""A view and a plain directory under the same random operations, while what the view handed out is forgotten.

``Client`` stands for the kernel: it keeps entries and inodes with their look-up counts, and forgets any that are
not in use when told to, in an order drawn from a seed. So what depends on the moment of a FORGET behind a real
mount is a list of operations here that can be carried out again.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cowfs.union import View
from cowfs.union.attr import unpack
from cowfs.union.node import DT_DIR, DT_LNK, DT_REG, Node

from . import posix, stacks

ROOT = 1
OPEN = 3
NAMES = [name.encode() for name in stacks.NAMES]


class Client:
    """The names and inodes that a kernel holds of a view."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.entries: dict[tuple[int, bytes], int] = {}
        self.counts: dict[int, int] = {}
        self.open: dict[int, int] = {}

    def took(self, parent: int, name: bytes, node: Node) -> Node:
        """A reply gave out a node."""
        node.nlookup += 1
        self.counts[node.id] = self.counts.get(node.id, 0) + 1
        self.entries[parent, name] = node.id
        self.view.attr(node)
        return node

    def node(self, id: int) -> Node:
        return self.view.root if id == ROOT else self.view.node(id)

    def find(self, path: bytes) -> Node:
        at = ROOT
        for name in path.split(b"/") if path else ():
            known = self.entries.get((at, name))
            at = self.took(at, name, self.view.lookup(self.view.directory(at), name)).id if known is None else known
        return self.node(at)

    def place(self, path: bytes) -> tuple[Any, bytes]:
        """The directory of a path, and the name in it."""
        head, _, name = path.rpartition(b"/")
        return self.view.directory(self.find(head).id), name

    def forget(self, seed: float) -> None:
        """Forget some of what is not in use, as the kernel may: entries from the leaves on, inodes in any order."""
        rng = random.Random(seed)
        share = rng.choice((0.2, 0.5, 1.0))
        for _ in range(5):
            parents = {parent for parent, _ in self.entries}
            self.entries = {key: id for key, id in self.entries.items() if id in parents or rng.random() >= share}
        used = {*self.entries.values(), *(parent for parent, _ in self.entries), *self.open.values(), ROOT}
        unused = [id for id in self.counts if id not in used]
        rng.shuffle(unused)
        for id in unused:
            if rng.random() < share:
                self.view.forget(id, self.counts.pop(id))

    def forget_all(self) -> None:
        self.entries.clear()
        for id in [id for id in self.counts if id not in self.open.values()]:
            self.view.forget(id, self.counts.pop(id))


def shown(mode: int, nlink: int, size: int) -> tuple[int, ...]:
    return (mode,) if stat.S_ISDIR(mode) else (mode, nlink, size)


def without_count(result: Any) -> Any:
    return result[::2] if isinstance(result, tuple) else result


class InView:
    """The operations on a view, as a kernel asks for them after its own checks."""

    def __init__(self, view: View) -> None:
        self.view, self.client = view, Client(view)

    def mkdir(self, path: bytes) -> None:
        parent, name = self.client.place(path)
        self.client.took(parent.id, name, self.view.mkdir(parent, name, 0o755, 0, 0))

    def create(self, path: bytes) -> None:
        parent, name = self.client.place(path)
        self.client.took(parent.id, name, self.view.mknod(parent, name, stat.S_IFREG | 0o644, 0, 0, 0))

    def _link(self, node: Node, path: bytes) -> None:
        parent, name = self.client.place(path)
        assert self.client.took(parent.id, name, self.view.link(node, parent, name)) is node

    def link(self, path: bytes, other: bytes) -> None:
        self._link(self.client.find(path), other)

    def unlink(self, path: bytes) -> None:
        self.client.find(path)
        parent, name = self.client.place(path)
        self.view.unlink(parent, name)
        self.client.entries.pop((parent.id, name), None)

    def rmdir(self, path: bytes) -> None:
        self.client.find(path)
        parent, name = self.client.place(path)
        self.view.rmdir(parent, name)
        self.client.entries.pop((parent.id, name), None)

    def rename(self, path: bytes, other: bytes) -> None:
        node, (parent, name), (to, to_name) = self.client.find(path), self.client.place(path), self.client.place(other)
        if path == other:
            return
        if (other + b"/").startswith(path + b"/") or (path + b"/").startswith(other + b"/"):
            raise OSError(errno.EINVAL, "one is inside the other")
        victim = self.view.child(to, to_name)
        self.view.rename(parent, name, to, to_name)
        if victim is not node:
            del self.client.entries[parent.id, name]
            self.client.entries[to.id, to_name] = node.id

    def exchange(self, path: bytes, other: bytes) -> None:
        one, two = self.client.find(path), self.client.find(other)
        (parent, name), (to, to_name) = self.client.place(path), self.client.place(other)
        if path == other:
            return
        if (other + b"/").startswith(path + b"/") or (path + b"/").startswith(other + b"/"):
            raise OSError(errno.EINVAL, "one is inside the other")
        self.view.rename(parent, name, to, to_name, posix.RENAME_EXCHANGE)
        self.client.entries[parent.id, name], self.client.entries[to.id, to_name] = two.id, one.id

    def rmtree(self, path: bytes) -> None:
        node = self.client.find(path)
        if node.type != DT_DIR:
            return
        for name in self.names(path):
            inner = path + b"/" + name
            if self.client.find(inner).type == DT_DIR:
                self.rmtree(inner)
            else:
                self.unlink(inner)
        self.rmdir(path)

    def chmod(self, path: bytes, mode: int) -> None:
        node = self.client.find(path)
        if node.type != DT_LNK:
            self.view.setattr(node, mode=mode)

    def write(self, path: bytes, offset: int) -> None:
        node = self.client.find(path)
        if node.type == DT_REG:
            self.view.write(node, offset, b"written %d" % offset)

    def open(self, slot: int, path: bytes) -> None:
        node = self.client.find(path)
        if node.type == DT_REG:
            self.client.open[slot] = node.id

    def close(self, slot: int) -> None:
        self.client.open.pop(slot, None)

    def fwrite(self, slot: int, offset: int) -> None:
        if slot in self.client.open:
            self.view.write(self.client.node(self.client.open[slot]), offset, b"open %d" % offset)

    def flink(self, slot: int, path: bytes) -> None:
        if slot in self.client.open:
            node = self.client.node(self.client.open[slot])
            if unpack(self.view.attr(node)).nlink:
                self._link(node, path)

    def fstat(self, slot: int) -> Any:
        return self._shown(self.client.node(self.client.open[slot])) if slot in self.client.open else None

    def stat(self, path: bytes) -> Any:
        return self._shown(self.client.find(path))

    def _shown(self, node: Node) -> tuple[int, ...]:
        attr = unpack(self.view.attr(node))
        return shown(attr.mode, attr.nlink, attr.size)

    def names(self, path: bytes) -> list[bytes]:
        directory = self.view.directory(self.client.find(path).id)
        return sorted(name for name, _ in self.view.listing(directory) if name not in (b".", b".."))

    def inode(self, path: bytes) -> int:
        return self.client.find(path).id

    def content(self, path: bytes) -> bytes:
        node = self.client.find(path)
        buffer = bytearray(200_000)
        return bytes(buffer[: self.view.pread(node, 0, memoryview(buffer))])


class Plain:
    """The same operations on a directory."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root) + b"/"
        self.slots: dict[int, int] = {}

    def at(self, path: bytes) -> bytes:
        return self.root + path

    def _type(self, path: bytes) -> int:
        return stat.S_IFMT(os.lstat(self.at(path)).st_mode)

    def mkdir(self, path: bytes) -> None:
        os.mkdir(self.at(path), 0o755)

    def create(self, path: bytes) -> None:
        os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    def link(self, path: bytes, other: bytes) -> None:
        os.link(self.at(path), self.at(other), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def rename(self, path: bytes, other: bytes) -> None:
        os.rename(self.at(path), self.at(other))

    def exchange(self, path: bytes, other: bytes) -> None:
        posix.rename2(os.fsdecode(self.at(path)), os.fsdecode(self.at(other)), posix.RENAME_EXCHANGE)

    def rmtree(self, path: bytes) -> None:
        if self._type(path) == stat.S_IFDIR:
            shutil.rmtree(self.at(path))

    def chmod(self, path: bytes, mode: int) -> None:
        if self._type(path) != stat.S_IFLNK:
            os.chmod(self.at(path), mode)

    def write(self, path: bytes, offset: int) -> None:
        if self._type(path) == stat.S_IFREG:
            with open(self.at(path), "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"written %d" % offset, offset)

    def open(self, slot: int, path: bytes) -> None:
        if self._type(path) == stat.S_IFREG:
            fd = os.open(self.at(path), os.O_RDWR)
            self.close(slot)
            self.slots[slot] = fd

    def close(self, slot: int) -> None:
        if slot in self.slots:
            os.close(self.slots.pop(slot))

    def fwrite(self, slot: int, offset: int) -> None:
        if slot in self.slots:
            os.pwrite(self.slots[slot], b"open %d" % offset, offset)

    def flink(self, slot: int, path: bytes) -> None:
        if slot in self.slots and os.fstat(self.slots[slot]).st_nlink:
            posix.link_fd(self.slots[slot], os.fsdecode(self.at(path)))

    def fstat(self, slot: int) -> Any:
        return self._shown(os.fstat(self.slots[slot])) if slot in self.slots else None

    def stat(self, path: bytes) -> Any:
        return self._shown(os.lstat(self.at(path)))

    def _shown(self, st: os.stat_result) -> tuple[int, ...]:
        return shown(st.st_mode, st.st_nlink, st.st_size)

    def paths(self) -> list[bytes]:
        found = []
        for at, directories, files in os.walk(self.root):
            found += [(at + b"/" + name).replace(b"//", b"/")[len(self.root) :] for name in directories + files]
        return sorted(found)


#: operation -> how often, and its arguments: P a path that is there, N a name in a directory that is there
TABLE: dict[str, tuple[int, str]] = {
    "create": (5, "N"), "mkdir": (5, "N"), "link": (9, "PN"), "unlink": (8, "P"), "rmdir": (3, "P"), "rename": (12, "PN"),
    "exchange": (7, "PP"), "rmtree": (2, "P"), "chmod": (4, "Pm"), "write": (6, "Po"), "open": (4, "sP"), "close": (3, "s"),
    "fstat": (4, "s"), "fwrite": (3, "so"), "flink": (2, "sN"), "stat": (4, "P"), "names": (0, "P"),
}  # fmt: skip


class Pair:
    """A view, to be had from ``ours``, and the plain directory that starts like it.

    ``counted``: link counts are compared (in the user form, that of a lower inode stays when one of its names goes).
    """

    def __init__(self, plain: Path, seed: int, *, counted: bool = True) -> None:
        self.rng = random.Random(seed)
        self.plain, self.counted = Plain(plain), counted
        self.ours: InView
        self.log: list[str] = []
        self.forgets = self.rng.choice((0.05, 0.3, 0.8))

    def let_go(self) -> None:
        """Close all that is open and forget all."""
        for slot in range(OPEN):
            self.plain.close(slot)
            self.ours.close(slot)
        self.ours.client.forget_all()

    def draw(self) -> tuple[str, list[Any]]:
        rng, paths = self.rng, self.plain.paths()
        dirs = [
            b"",
            *(path + b"/" for path in paths if path.count(b"/") < 3 and self.plain._type(path) == stat.S_IFDIR),
        ]
        sources: dict[str, Callable[[], Any]] = {
            "P": lambda: rng.choice(paths or [b"nothing"]),
            "N": lambda: rng.choice(dirs) + rng.choice(NAMES),
            "m": lambda: rng.choice((0o600, 0o644, 0o755)),
            "o": lambda: rng.randrange(6000),
            "s": lambda: rng.randrange(OPEN),
        }
        weights = [weight if name != "flink" or self.counted else 0 for name, (weight, _) in TABLE.items()]
        name = rng.choices(list(TABLE), weights)[0]
        return name, [sources[kind]() for kind in TABLE[name][1]]

    def step(self) -> None:
        name, arguments = self.draw()
        self.log.append(f"{name} {arguments}")
        self.same(name, *arguments)
        if self.rng.random() < self.forgets:
            self.ours.client.forget(self.rng.random())
            self.log.append("some are forgotten")
        if self.rng.random() < 0.1:
            self.compare()

    def same(self, name: str, *arguments: Any) -> None:
        """An operation has the same result on both sides."""
        results = [_outcome(partial(getattr(side, name), *arguments)) for side in (self.plain, self.ours)]
        plain, ours = results if self.counted else map(without_count, results)
        assert plain == ours, self.story(f"{name} {arguments}: plain {plain}, view {ours}")

    def story(self, what: str) -> str:
        return "\n  ".join([what, *self.log[-40:]])

    def compare(self) -> None:
        """Every name shows the same, and names of one inode are one node."""
        self.log.append("compare")
        nodes: dict[int, int] = {}
        for path in self.plain.paths():
            self.same("stat", path)
            st = os.lstat(self.plain.at(path))
            if stat.S_ISREG(st.st_mode):
                assert Path(os.fsdecode(self.plain.at(path))).read_bytes() == self.ours.content(path), self.story(
                    f"{path!r}: content"
                )
            if not stat.S_ISDIR(st.st_mode):
                assert nodes.setdefault(st.st_ino, self.ours.inode(path)) == self.ours.inode(path), self.story(
                    f"{path!r}: two nodes"
                )
        assert len(set(nodes.values())) == len(nodes), self.story("one node for two inodes")
        for slot in range(OPEN):
            self.same("fstat", slot)


def _outcome(act: Callable[[], Any]) -> Any:
    """A result, or "refused": which errno comes first is decided by the kernel, who is not here."""
    try:
        return act()
    except OSError:
        return "refused"
