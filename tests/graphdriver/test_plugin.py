"""The plugin's requests without dockerd: a random life against a model, with kills; hostile requests; one owner of a door."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import run_module
from support.containerd import check
from support.daemon import wait_for
from support.dockerd import PLUGINS, PluginService, raw

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

Tree = dict[str, bytes]


def tree_of(directory: str) -> Tree:
    found = {}
    for where, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = file.read()
    return found


class Life:
    """Layers as dockerd would make them, and what must be in each: path -> content."""

    def __init__(self, plugin: PluginService, home: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.plugin = plugin
        self.home = home
        self.trees: dict[str, Tree] = {}
        self.parents: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.gets: dict[str, int] = {}
        self.count = 0

    def ask(self, name: str, **fields: Any) -> dict[str, Any]:
        told = self.plugin.ask(f"GraphDriver.{name}", **fields)
        assert told["Err"] == "", (name, fields, told)
        return told

    def children(self, id: str) -> list[str]:
        return [child for child, parent in self.parents.items() if parent == id]

    def create(self, how: str | None = None) -> str:
        idle = [id for id in self.trees if not self.gets.get(id)]
        parent = self.rng.choice(["", *idle])
        self.count += 1
        id = f"{self.count:04x}" + self.rng.choice(["", "-init"])
        options = self.rng.choice([{}, {}, {"size": "1G"}, {"inodes": "10k"}])
        self.ask(how or self.rng.choice(["Create", "CreateReadWrite"]), ID=id, Parent=parent, StorageOpt=options)
        if parent:
            self.frozen.add(parent)
        self.trees[id] = dict(self.trees[parent]) if parent else {}
        self.parents[id] = parent
        return id

    def get(self) -> None:
        if not self.trees:
            return
        id = self.rng.choice(list(self.trees))
        where = self.ask("Get", ID=id)["Dir"]
        assert where == str(self.home / id)
        self.gets[id] = self.gets.get(id, 0) + 1
        tree = self.trees[id]
        assert tree_of(where) == tree, id
        if id in self.frozen:
            return
        for _ in range(self.rng.randrange(4)):
            path = f"{self.rng.choice('abc')}/{self.rng.choice('defgh')}"
            if path in tree and self.rng.random() < 0.4:
                os.unlink(f"{where}/{path}")
                del tree[path]
            else:
                os.makedirs(os.path.dirname(f"{where}/{path}"), exist_ok=True)
                tree[path] = self.rng.randbytes(self.rng.randrange(10_000))
                with open(f"{where}/{path}", "wb") as file:
                    file.write(tree[path])

    def put(self) -> None:
        held = [id for id, gets in self.gets.items() if gets]
        if held:
            id = self.rng.choice(held)
            self.ask("Put", ID=id)
            self.gets[id] -= 1
            assert os.path.ismount(self.home / id) == bool(self.gets[id]), (id, self.gets[id])

    def compare(self) -> None:
        """Changes and Diff of a layer say what it is beyond its parent; a Diff of what was applied is the same archive."""
        if not self.trees:
            return
        id = self.rng.choice(list(self.trees))
        before, now = self.trees.get(self.parents[id], {}), self.trees[id]
        told = {
            each["Path"][1:]: each["Kind"] for each in self.ask("Changes", ID=id, Parent=self.parents[id])["Changes"]
        }
        wanted = dict.fromkeys(now.keys() - before.keys(), 1) | dict.fromkeys(before.keys() - now.keys(), 2)
        wanted |= {path: 0 for path in now.keys() & before.keys() if now[path] != before[path]}
        assert {path: kind for path, kind in told.items() if "/" in path} == wanted
        if self.gets.get(self.parents[id]):
            return  # nobody makes a layer upon what a container has mounted
        status, archive = self.diff(id)
        assert status == 200
        self.count += 1
        copy = f"{self.count:04x}"
        self.ask("Create", ID=copy, Parent=self.parents[id])
        if self.parents[id]:
            self.frozen.add(self.parents[id])
        status, answer = raw(f"GraphDriver.ApplyDiff?id={copy}&parent={self.parents[id]}", archive)
        assert status == 200
        assert b'"Err":""' in answer, answer
        self.trees[copy], self.parents[copy] = dict(now), self.parents[id]
        self.frozen.add(copy)
        assert self.diff(copy) == (200, archive)

    def diff(self, id: str) -> tuple[int, bytes]:
        return raw("GraphDriver.Diff", json.dumps({"ID": id, "Parent": self.parents[id]}).encode())

    def remove(self) -> None:
        leaves = [id for id in self.trees if not self.children(id)]
        if leaves:
            id = self.rng.choice(leaves)
            self.ask("Remove", ID=id)
            for kept in (self.trees, self.parents, self.gets):
                kept.pop(id, None)
            self.frozen.discard(id)
            assert not self.ask("Exists", ID=id)["Exists"]
            assert not (self.home / id).exists()

    def kill(self) -> None:
        """The next service, which knows nothing of the Gets before it, counts each mount once."""
        self.plugin.stop(signal.SIGKILL)
        self.plugin.start()
        self.gets = {id: min(gets, 1) for id, gets in self.gets.items()}


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_a_random_life(make_plugin: Callable[..., PluginService], tmp_path: Path, driver: str) -> None:
    plugin = make_plugin("-s", driver).start()
    home = plugin.base / "home"
    plugin.ask("GraphDriver.Init", Home=str(home), Opts=[])
    life = Life(plugin, home, seed=13)
    steps = [life.create] * 3 + [life.get] * 4 + [life.put] * 4 + [life.compare] * 2 + [life.remove]
    for number in range(160):
        life.rng.choice(steps)()
        if number % 20 == 19:
            life.kill()
    while life.trees:
        life.remove()
    wait_for(lambda: os.listdir(plugin.root / "layers") == [], "the layers to go")
    assert os.listdir(home) == []
    with open("/proc/self/mounts", encoding="utf-8") as file:
        assert not [line for line in file if str(plugin.base) in line]
    assert plugin.stop() == 0
    assert check(plugin.root) == []


def test_a_server_that_was_killed_is_replaced(make_plugin: Callable[..., PluginService]) -> None:
    """Get makes a new mount where the server of the old one is gone; one Put then ends it."""
    plugin = make_plugin("-s", "overlay").start()
    home = plugin.base / "home"
    plugin.ask("GraphDriver.Init", Home=str(home))
    plugin.ask("GraphDriver.CreateReadWrite", ID="a", StorageOpt={"size": "1M"})
    where = plugin.ask("GraphDriver.Get", ID="a")["Dir"]
    Path(where, "f").write_bytes(b"kept")
    (found,) = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and b"cowfs server" in _title(name) and os.fsencode(where) in _title(name)
    ]
    os.kill(found, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{found}") or not _title(str(found)), "the server to end")
    assert plugin.ask("GraphDriver.Get", ID="a") == {"Err": "", "Dir": where, "status": 200}
    assert Path(where, "f").read_bytes() == b"kept"
    plugin.ask("GraphDriver.Put", ID="a")
    assert os.listdir(home) == []


def _title(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


def test_every_error_is_one_line(make_plugin: Callable[..., PluginService]) -> None:
    """Requests that cannot be done, and those that nobody sends: an answer that says why, and the service goes on."""
    plugin = make_plugin("-s", "overlay").start()
    assert "restart dockerd" in plugin.ask("GraphDriver.Create", ID="a")["Err"]
    assert "no absolute path" in plugin.ask("GraphDriver.Init", Home="here")["Err"]
    assert "no storage option" in plugin.ask("GraphDriver.Init", Home="/x", Opts=["dm.fs=ext4"])["Err"]
    assert "no list of maps" in plugin.ask("GraphDriver.Init", Home="/x", UIDMaps=[{"a": 1}])["Err"]
    home = plugin.base / "home"
    plugin.ask("GraphDriver.Init", Home=str(home))
    assert home.stat().st_mode & 0o777 == 0o710, "no user of the host gets to the set-id programs of containers"
    plugin.ask("GraphDriver.Create", ID="a")
    plugin.ask("GraphDriver.Create", ID="b", Parent="a")
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("Create", {}, "the id of a layer is missing"),
        ("Create", {"ID": "a"}, "is taken"),
        ("Create", {"ID": "c", "Parent": "nobody"}, "nobody"),
        ("Create", {"ID": "c", "StorageOpt": {"size": "-1"}}, "not a size"),
        ("Create", {"ID": "c", "StorageOpt": {"size": 7}}, "no object of strings"),
        ("Create", {"ID": "c", "StorageOpt": {"what": "7"}}, "no storage option 'what'"),
        ("Create", {"ID": ["c"]}, "ID is no text"),
        ("Create", {"ID": "c", "MountLabel": "system_u:object_r"}, "SELinux"),
        ("Get", {"ID": "nobody"}, "nobody"),
        ("Get", {"ID": "../../etc"}, "not the id of a layer"),
        ("Get", {"ID": "a", "MountLabel": "system_u:object_r"}, "SELinux"),
        ("Remove", {"ID": "a"}, "has children"),
        ("Diff", {"ID": "nobody"}, "nobody"),
        ("Diff", {"ID": "b", "Parent": ""}, "another layer"),
        ("Changes", {"ID": "b", "Parent": "nobody"}, "nobody"),
        ("DiffSize", {"ID": "b", "Parent": "b"}, "does not stand on"),
        ("GetMetadata", {"ID": ""}, "missing"),
    ]
    for name, fields, words in wrong:
        told = plugin.ask(f"GraphDriver.{name}", **fields)
        assert words in told["Err"], (name, fields, told)
        assert "\n" not in told["Err"]
        assert told["status"] == (500 if name == "Diff" else 200)
    for path, body in (("GraphDriver.Create", b"{"), ("GraphDriver.Create", b"[]"), ("GraphDriver.Get", b"\xff")):
        assert b"JSON" in raw(path, body)[1]
    assert raw("GraphDriver.Nothing")[0] == 404
    assert raw("containers/json", method="GET")[0] == 404, "this door is no door for Docker's clients"
    assert b"Err" in raw("GraphDriver.ApplyDiff?id=b&parent=b", b"")[1]
    assert b"Err" in raw("GraphDriver.ApplyDiff?id=b&parent=a", b"x" * 512)[1]
    assert plugin.ask("GraphDriver.Exists", ID="b")["Exists"], "dockerd removes what it could not fill"
    assert plugin.ask("GraphDriver.Remove", ID="never")["Err"] == ""


def test_hostile_archives_stay_inside(make_plugin: Callable[..., PluginService], tmp_path: Path) -> None:
    plugin = make_plugin("-s", "overlay").start()
    plugin.ask("GraphDriver.Init", Home=str(plugin.base / "home"))
    for number, name in enumerate(("../../out", "/../out")):
        plugin.ask("GraphDriver.Create", ID=f"l{number}")
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"out"))
        raw(f"GraphDriver.ApplyDiff?id=l{number}&parent=", made.getvalue())
        assert not list(plugin.base.glob("**/../out"))
        plugin.ask("GraphDriver.Remove", ID=f"l{number}")


def test_a_door_has_one_owner(make_plugin: Callable[..., PluginService], tmp_path: Path) -> None:
    plugin = make_plugin("-s", "overlay").start()
    assert (PLUGINS / "cowfs.sock").stat().st_mode & 0o777 == 0o600
    done = run_module("cowfs", "serve", "--root", tmp_path / "other", f"--docker-plugin=unix://{PLUGINS}/cowfs.sock")
    assert done.returncode != 0
    assert "another process listens" in done.stderr
    done = run_module("cowfs", "serve", "--root", tmp_path / "other", "--docker-plugin=tcp://0.0.0.0:1")
    assert done.returncode == 2
    assert "--docker-plugin" in done.stderr
    assert plugin.stop() == 0
    assert not (PLUGINS / "cowfs.sock").exists()
