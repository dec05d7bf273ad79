"""The contract of a graph driver, as containers/storage and dockerd test their own: base layers, deep stacks, changes, diffs that carry everything, quotas."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.archives import directory, member, tar
from support.containerd import check
from support.dockerd import PluginService, raw

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

CHANGED, ADDED, DELETED = 0, 1, 2


class Graph:
    """One plugin, whose every request must succeed."""

    def __init__(self, plugin: PluginService) -> None:
        self.plugin = plugin
        self.ask("Init", Home=str(plugin.base / "home"), Opts=[])

    def ask(self, name: str, **fields: Any) -> dict[str, Any]:
        told = self.plugin.ask(f"GraphDriver.{name}", **fields)
        assert told["Err"] == "", (name, fields, told)
        return told

    def changed(self, id: str, parent: str, change: Callable[[Path], object], **options: str) -> None:
        """Make a layer by a change of a mounted tree."""
        self.ask("CreateReadWrite", ID=id, Parent=parent, StorageOpt=options)
        try:
            change(Path(self.ask("Get", ID=id)["Dir"]))
        finally:
            self.ask("Put", ID=id)

    def tree(self, id: str) -> dict[str, Any]:
        """All that a container would see."""
        root = Path(self.ask("Get", ID=id)["Dir"])
        try:
            found: dict[str, Any] = {}
            groups: dict[int, str] = {}
            for path in sorted(root.rglob("*")):
                st, name = path.lstat(), str(path.relative_to(root))
                data = (
                    os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(st.st_mode) else None
                )
                xattrs = {
                    each: os.getxattr(path, each, follow_symlinks=False)
                    for each in os.listxattr(path, follow_symlinks=False)
                }
                group = groups.setdefault(st.st_ino, name) if not path.is_dir() else None
                times = st.st_mtime if stat.S_ISREG(st.st_mode) else None
                found[name] = (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, data, xattrs, group, times)
            return found
        finally:
            self.ask("Put", ID=id)

    def diff(self, id: str, parent: str) -> bytes:
        status, archive = raw("GraphDriver.Diff", json.dumps({"ID": id, "Parent": parent}).encode())
        assert status == 200
        return archive

    def apply(self, id: str, parent: str, archive: bytes) -> int:
        self.ask("Create", ID=id, Parent=parent)
        status, answer = raw(f"GraphDriver.ApplyDiff?id={id}&parent={parent}", archive)
        told = json.loads(answer)
        assert status == 200, answer
        assert told["Err"] == "", told
        return int(told["Size"])

    def changes(self, id: str, parent: str) -> dict[str, int]:
        return {each["Path"]: each["Kind"] for each in self.ask("Changes", ID=id, Parent=parent)["Changes"]}


@pytest.fixture(params=["overlay", "vfs"])
def graph(make_plugin: Callable[..., PluginService], request: pytest.FixtureRequest) -> Any:
    plugin = make_plugin("-s", request.param).start()
    yield Graph(plugin)
    assert plugin.stop() == 0
    assert check(plugin.root) == []


def _base(root: Path) -> None:
    (root / "dir").mkdir(mode=0o755)
    os.chmod(root / "dir", 0o1777)
    (root / "set").mkdir()
    os.chown(root / "set", 7, 8)
    os.chmod(root / "set", 0o2755)
    for name in ("keep", "change", "remove", "mode", "owner", "attribute", "replace"):
        (root / "dir" / name).write_bytes(name.encode() * 100)
    (root / "dir/program").write_bytes(b"#!")
    os.chown(root / "dir/program", 0, 5)
    os.chmod(root / "dir/program", 0o6755)
    os.link(root / "dir/keep", root / "set/also")
    os.symlink("../set", root / "dir/link")
    os.mknod(root / "dir/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(root / "dir/fifo", 0o600)
    (root / "gone/deep/er").mkdir(parents=True)
    (root / "gone/deep/er/file").write_bytes(b"x")
    (root / "opaque").mkdir()
    (root / "opaque/old").write_bytes(b"old")


def _change(root: Path) -> None:
    (root / "dir/change").write_bytes(b"other")
    os.unlink(root / "dir/remove")
    os.chmod(root / "dir/mode", 0o600)
    os.chown(root / "dir/owner", 9, 9)
    os.setxattr(root / "dir/attribute", "user.x", b"\0value")
    os.unlink(root / "dir/replace")
    (root / "dir/replace").mkdir()
    (root / "dir/replace/in").write_bytes(b"in")
    for path in ("gone/deep/er/file",):
        os.unlink(root / path)
    for path in ("gone/deep/er", "gone/deep", "gone"):
        os.rmdir(root / path)
    os.unlink(root / "opaque/old")
    os.rmdir(root / "opaque")
    (root / "opaque").mkdir()
    (root / "opaque/new").write_bytes(b"new")
    (root / "new").write_bytes(b"linked")
    os.link(root / "new", root / "set/new")
    os.symlink("/absolute", root / "new link")


def test_a_diff_carries_everything(graph: Graph) -> None:
    """Modes with set-id and sticky bits, owners, devices, links of both kinds, xattrs, replaced and emptied directories: applied elsewhere, the tree is the same."""
    graph.changed("base", "", _base)
    graph.changed("top", "base", _change)
    assert graph.tree("base")["dir/program"][0] & 0o7777 == 0o6755
    copied = graph.diff("base", "")
    assert graph.apply("base2", "", copied) == graph.ask("DiffSize", ID="base2", Parent="")["Size"]
    assert graph.tree("base2") == graph.tree("base")
    graph.apply("top2", "base2", graph.diff("top", "base"))
    assert graph.tree("top2") == graph.tree("top")
    for id in ("top2", "base2", "top", "base"):
        graph.ask("Remove", ID=id)


def test_changes_are_exactly_what_was_changed(graph: Graph) -> None:
    graph.changed("base", "", _base)
    assert set(graph.changes("base", "").values()) == {ADDED}
    graph.changed("none", "base", lambda root: (root / "dir/keep").read_bytes())
    assert graph.changes("none", "base") == {}
    graph.changed("top", "base", _change)
    assert {path: kind for path, kind in graph.changes("top", "base").items() if path not in ("/", "/dir", "/set")} == {
        "/dir/change": CHANGED, "/dir/remove": DELETED, "/dir/mode": CHANGED, "/dir/owner": CHANGED, "/dir/attribute": CHANGED,
        "/dir/replace": CHANGED, "/dir/replace/in": ADDED, "/gone": DELETED, "/opaque": CHANGED, "/opaque/new": ADDED, "/opaque/old": DELETED,
        "/new": ADDED, "/set/new": ADDED, "/new link": ADDED,
    }  # fmt: skip
    for id in ("top", "none", "base"):
        graph.ask("Remove", ID=id)


def test_a_stack_of_130_layers(graph: Graph) -> None:
    """Each layer adds a file, changes one that all change, and deletes the file of the layer three beneath."""
    depth = 130 if graph.plugin.arguments[1] != "vfs" else 30
    before = ""
    for number in range(depth):
        members = [directory("d"), member(f"d/{number}", b"%d" % number), member("d/common", b"of %d" % number)]
        if number >= 3:
            members.append(member(f"d/.wh.{number - 3}"))
        id = f"layer{number}"
        graph.apply(id, before, tar(*members))
        before = id
    tree = {name: fields[4] for name, fields in graph.tree(before).items() if name != "d"}
    assert tree == {
        "d/common": b"of %d" % (depth - 1),
        **{f"d/{number}": b"%d" % number for number in range(depth - 3, depth)},
    }
    assert graph.changes(before, f"layer{depth - 2}") == {
        "/d": CHANGED, f"/d/{depth - 1}": ADDED, "/d/common": CHANGED, f"/d/{depth - 4}": DELETED,
    }  # fmt: skip
    for number in reversed(range(depth)):
        graph.ask("Remove", ID=f"layer{number}")


def test_a_quota_holds_for_one_layer_alone(graph: Graph) -> None:
    def fill(root: Path) -> None:
        with pytest.raises(OSError) as caught, open(root / "big", "wb", buffering=0) as file:
            for _ in range(64):
                file.write(bytes(64 << 10))
        assert caught.value.errno == errno.ENOSPC
        assert (root / "big").stat().st_size <= 1 << 20

    graph.changed("base", "", _base)
    graph.changed("limited", "base", fill, size="1M")
    graph.changed("free", "base", lambda root: (root / "big").write_bytes(bytes(2 << 20)))
    assert graph.ask("DiffSize", ID="free", Parent="base")["Size"] >= 2 << 20
    for id in ("limited", "free", "base"):
        graph.ask("Remove", ID=id)
