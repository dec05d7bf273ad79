"""A store against a model that keeps a plain copy of every snapshot: contents, diffs, usages and errors agree.

The store's trees are changed through the merged view over the index, in this process; the model's by plain system
calls in a copied directory.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import Kind
from cowfs.store import Store
from cowfs.union.paths import Paths

NAMES = ["a", "b", "c", "d"]
TREE_PATHS = ["a", "b", "c", "a/x", "a/y", "b/x", "a/x/1", "a/x/2", "b/x/1", "c/z"]


class Plain:
    """The calls of :class:`cowfs.union.paths.Paths` that the machine makes, on a directory."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def __truediv__(self, path: str) -> Path:
        return self.top / path

    def write_bytes(self, path: str, data: bytes) -> None:
        fd = os.open(self / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    def mkdir(self, path: str) -> None:
        os.mkdir(self / path)

    def unlink(self, path: str) -> None:
        os.unlink(self / path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self / path)

    def rmtree(self, path: str) -> None:
        shutil.rmtree(self / path)

    def rename(self, old: str, new: str) -> None:
        os.rename(self / old, self / new)

    def link(self, old: str, new: str) -> None:
        os.link(self / old, self / new, follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self / path)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self / path, mode)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self / path, name, value, follow_symlinks=False)


def plain_tree(top: Path) -> dict[str, tuple[object, ...]]:
    """path -> (mode, size, content, xattrs, link count) of a directory."""
    found: dict[str, tuple[object, ...]] = {}
    for here, dirs, names in os.walk(top):
        for name in [*dirs, *names]:
            full = os.path.join(here, name)
            found[os.path.relpath(full, top)] = _plain_entry(full)
    return found


def _plain_entry(full: str) -> tuple[object, ...]:
    s = os.lstat(full)
    if stat.S_ISDIR(s.st_mode):
        return (s.st_mode, 0, b"", _plain_xattrs(full), 0)
    content: bytes = b""
    if stat.S_ISREG(s.st_mode):
        content = Path(full).read_bytes()
    elif stat.S_ISLNK(s.st_mode):
        content = os.readlink(full).encode()
    return (s.st_mode, s.st_size, content, _plain_xattrs(full), s.st_nlink)


def _plain_xattrs(full: str) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (name, os.getxattr(full, name, follow_symlinks=False))
        for name in sorted(os.listxattr(full, follow_symlinks=False))
        if name.startswith("user.")
    )


def view_tree(paths: Paths) -> dict[str, tuple[object, ...]]:
    """The same of a view."""
    found: dict[str, tuple[object, ...]] = {}
    for raw, attr in paths.walk():
        if not raw:
            continue
        path = raw.decode()
        xattrs = tuple(
            (name.decode(), paths.getxattr(raw, name))
            for name in sorted(paths.listxattr(raw))
            if name.startswith(b"user.")
        )
        if stat.S_ISDIR(attr.mode):
            found[path] = (attr.mode, 0, b"", xattrs, 0)
            continue
        content = b""
        if stat.S_ISREG(attr.mode):
            content = paths.read_bytes(raw)
        elif stat.S_ISLNK(attr.mode):
            content = paths.readlink(raw)
        found[path] = (attr.mode, attr.size, content, xattrs, attr.nlink)
    return found


def model_diff(old: dict[str, tuple[object, ...]], new: dict[str, tuple[object, ...]]) -> list[tuple[str, str]]:
    """(kind, path): deletions only of the topmost, and none below what became something else."""
    found = []
    for path in sorted(old.keys() | new.keys(), key=lambda path: path.split("/")):
        if path not in new:
            above = path.rpartition("/")[0]
            if not above or (above in new and stat.S_ISDIR(int(str(new[above][0])))):
                found.append(("deleted", path))
        elif path not in old:
            found.append(("added", path))
        elif old[path][:4] != new[path][:4]:
            found.append(("changed", path))
    return found


def through_link(plain: Plain, path: str) -> bool:
    """Whether a directory on the way to ``path`` is a symbolic link."""
    parts = path.split("/")
    return any(os.path.islink(plain / "/".join(parts[:end])) for end in range(1, len(parts)))


class StoreMachine(RuleBasedStateMachine):
    """Rules are the verbs; ``model`` holds (kind, parent, directory) by name."""

    driver = "overlay"
    base: Path
    number = 0

    @initialize()
    def start(self) -> None:
        type(self).number += 1
        self.place = self.base / f"{self.driver}-{self.number}"
        self.place.mkdir()
        self.store = Store.open(self.place / "store", driver=self.driver, fsync=False)
        self.other = Store.open(self.place / "other", driver=self.driver, fsync=False)
        self.model: dict[str, tuple[Kind, str | None, Path]] = {}
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.check(content=True).problems == []
            self.store.gc()
            assert set(os.listdir(self.place / "store" / "layers")) == {row.id for row in self.store.index.rows()}
            for store in (self.store, self.other):
                for row in sorted(
                    store.index.rows(), key=lambda row: -row.depth
                ):  # subvolumes, datasets and images go so
                    store.remove(row.name)
                store.close()
            shutil.rmtree(self.place)

    # -- helpers

    def fresh(self) -> Path:
        self.count += 1
        return self.place / f"model-{self.count}"

    def copy(self, name: str | None) -> Path:
        target = self.fresh()
        if name is None:
            target.mkdir()
        else:
            subprocess.run(["cp", "-a", str(self.model[name][2]), str(target)], check=True)
        return target

    @contextmanager
    def same_error(self, expected: type[CowfsError] | None) -> Iterator[None]:
        if expected is None:
            yield
        else:
            with pytest.raises(expected):
                yield

    def of(self, kind: Kind) -> list[str]:
        return [name for name, one in self.model.items() if one[0] is kind]

    def parent_error(self, parent: str | None) -> type[CowfsError] | None:
        if parent is None:
            return None
        if parent not in self.model:
            return NotFound
        return None if self.model[parent][0] is Kind.COMMITTED else InvalidArgument

    # -- rules: verbs

    @rule(key=st.sampled_from(NAMES), parent=st.sampled_from([None, *[n.upper() for n in NAMES]]), view=st.booleans())
    def create(self, key: str, parent: str | None, view: bool) -> None:
        expected = self.parent_error(parent) or (AlreadyExists if key in self.model else None)
        with self.same_error(expected):
            (self.store.view if view else self.store.prepare)(key, parent)
        if expected is None:
            self.model[key] = (Kind.VIEW if view else Kind.ACTIVE, parent, self.copy(parent))

    @rule(key=st.sampled_from(NAMES), name=st.sampled_from([n.upper() for n in NAMES]))
    def commit(self, key: str, name: str) -> None:
        expected: type[CowfsError] | None = None
        if key not in self.model:
            expected = NotFound
        elif self.model[key][0] is not Kind.ACTIVE:
            expected = FailedPrecondition
        elif name in self.model:
            expected = AlreadyExists
        with self.same_error(expected):
            self.store.commit(key, name)
        if expected is None:
            _, parent, directory = self.model.pop(key)
            self.model[name] = (Kind.COMMITTED, parent, directory)
            assert self.store.usage(name) == self.fresh_usage(name)

    def fresh_usage(self, name: str) -> object:
        """A scan of the layer, less what was copied."""
        row = self.store.index.get(name)
        whole = self.store.driver.usage(row.id)
        return type(whole)(bytes=max(0, whole.bytes - row.base.bytes), inodes=max(0, whole.inodes - row.base.inodes))

    @rule(name=st.sampled_from(NAMES + [n.upper() for n in NAMES]))
    def remove(self, name: str) -> None:
        expected: type[CowfsError] | None = None
        if name not in self.model:
            expected = NotFound
        elif any(parent == name for _, parent, _ in self.model.values()):
            expected = FailedPrecondition
        with self.same_error(expected):
            self.store.remove(name)
        if expected is None:
            del self.model[name]

    # -- rules: trees

    @precondition(lambda self: self.of(Kind.ACTIVE))
    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.of(Kind.ACTIVE)))
        plain = Plain(self.model[key][2])
        with self.store.paths(key) as paths:
            for _ in range(data.draw(st.integers(1, 6))):
                self.one_change(data, plain, paths)

    def one_change(self, data: st.DataObject, plain: Plain, paths: Paths) -> None:
        path, other = data.draw(st.sampled_from(TREE_PATHS)), data.draw(st.sampled_from(TREE_PATHS))
        self.count += 1
        content = f"{self.count:06}".encode() * data.draw(st.sampled_from([1, 1, 3, 1000]))
        mode = data.draw(st.sampled_from([0o600, 0o755, 0o4711]))
        act = data.draw(
            st.sampled_from(
                [
                    "write",
                    "write",
                    "mkdir",
                    "mkdir",
                    "unlink",
                    "rmdir",
                    "rmtree",
                    "rename",
                    "link",
                    "symlink",
                    "chmod",
                    "xattr",
                ]
            )
        )
        calls = {
            "write": lambda on: on.write_bytes(path, content),
            "mkdir": lambda on: on.mkdir(path),
            "unlink": lambda on: on.unlink(path),
            "rmdir": lambda on: on.rmdir(path),
            "rmtree": lambda on: on.rmtree(path),
            "rename": lambda on: on.rename(path, other),
            "link": lambda on: on.link(path, other),
            "symlink": lambda on: on.symlink(f"to-{self.count}", path),
            "chmod": lambda on: on.chmod(path, mode) if not os.path.islink(plain / path) else None,
            "xattr": lambda on: (
                on.setxattr(path, "user.note", content[:6]) if not os.path.islink(plain / path) else None
            ),
        }
        if any(through_link(plain, each) for each in (path, other)):
            return  # by path, the view follows no link; the system calls do
        if act == "write" and (os.path.islink(plain / path) or os.path.isdir(plain / path)):
            return
        if act == "rmtree" and not (os.path.isdir(plain / path) and not os.path.islink(plain / path)):
            return
        if act == "xattr" and not self.store.driver.capabilities.xattrs:
            return
        if act == "link" and os.path.isdir(plain / path):
            return  # the kernel refuses it before it asks a file system
        outcome: list[Any] = []
        for on in (plain, paths):
            try:
                calls[act](on)
                outcome.append(None)
            except OSError as error:
                outcome.append(error.errno)
        assert outcome[0] == outcome[1], (act, path, other)

    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        """One snapshot's tree is the model's."""
        if not self.model:
            return
        name = data.draw(st.sampled_from(sorted(self.model)))
        expected = plain_tree(self.model[name][2])
        if self.model[name][0] is Kind.COMMITTED:
            self.store.view("look", name)
            with self.store.paths("look") as paths:
                assert view_tree(paths) == expected
            self.store.remove("look")
        else:
            with self.store.paths(name) as paths:
                assert view_tree(paths) == expected

    @rule(data=st.data())
    def diff(self, data: st.DataObject) -> None:
        """Any two snapshots differ as the model's directories do."""
        if not self.model:
            return
        a, b = (data.draw(st.sampled_from(sorted(self.model))) for _ in range(2))
        expected = model_diff(plain_tree(self.model[a][2]), plain_tree(self.model[b][2]))
        found = [
            (change.kind, change.path.decode())
            for change in self.store.diff(a, b)
            if change.path and change.what != {"mtime"}
        ]
        assert sorted(found) == sorted(expected)

    @precondition(lambda self: len(self.of(Kind.COMMITTED)) > 1)
    @rule(data=st.data())
    def diff_then_apply(self, data: st.DataObject) -> None:
        """The changes from A to B, applied to A, give B; here, and in another store that has A from a tar."""
        a, b = (data.draw(st.sampled_from(self.of(Kind.COMMITTED))) for _ in range(2))
        layer = io.BytesIO()
        self.store.export_diff(a, b, layer)
        self.store.prepare("copy", a)
        layer.seek(0)
        self.store.apply("copy", layer)
        self.store.commit("copy", "COPY")
        assert list(self.store.diff(b, "COPY")) == []
        self.store.remove("COPY")

        whole = io.BytesIO()
        self.store.export(a, whole, format="tar")
        whole.seek(0)
        layer.seek(0)
        self.other.prepare("one")
        self.other.apply("one", whole)
        self.other.commit("one", "ONE")
        self.other.prepare("two", "ONE")
        self.other.apply("two", layer)
        with self.other.paths("two") as paths:
            assert view_tree(paths) == plain_tree(self.model[b][2])
        self.other.remove("two")
        self.other.remove("ONE")

    @invariant()
    def names_agree(self) -> None:
        if hasattr(self, "model"):
            assert {info.name: (info.kind, info.parent) for info in self.store.walk()} == {
                name: (kind, parent) for name, (kind, parent, _) in self.model.items()
            }


#: examples by driver, as the cost of a tree that is wanted allows
EXAMPLES = {"overlay": 25, "vfs": 20, "row": 8, "aufs": 15, "btrfs": 8, "zfs": 2, "block": 6}


@pytest.mark.parametrize("driver", EXAMPLES)
def test_a_store_agrees_with_plain_copies(home: Path, driver: str, request: pytest.FixtureRequest) -> None:
    machine = type("Machine", (StoreMachine,), {"driver": driver, "base": home})
    thorough = 20 if request.config.getoption("--thorough") else 1
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[driver] * thorough,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            phases=[Phase.explicit, Phase.generate],
        ),
    )
