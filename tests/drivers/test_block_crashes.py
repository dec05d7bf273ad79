"""Random histories of a block store against a plain dictionary, with servers killed and hosts started anew between any two steps."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from support import hostfs

from cowfs.mounting import protocol
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images are mounted by root")

Tree = dict[str, bytes]


def another_boot(store: Store) -> None:
    """Have the maps of all deltas as another boot of the host would find them: only records that a sync covers count."""
    for path in Path(store.root, "block").glob("*/map/*"):
        data = bytearray(path.read_bytes())
        data[12:28] = bytes(16)
        data[60:64] = struct.pack("<I", zlib.crc32(data[:60]))
        path.write_bytes(data)


class Machine:
    """One key of a store, mounted by the kernel; the names in ``synced`` are on the disk as they are there."""

    def __init__(self, store: Store, mnt: Path, seed: int) -> None:
        self.store = store
        self.mnt = mnt
        self.rng = random.Random(seed)
        self.now: Tree = {}
        self.synced: Tree = {}
        self.names: dict[str, Tree] = {}
        store.prepare("a")
        self.mount()

    def mount(self) -> None:
        self.made = self.store.mount("a", self.mnt, mount_type="kernel")

    def step(self) -> None:
        rng = self.rng
        what = rng.choices(
            ["write", "patch", "unlink", "sync", "snapshot", "remount", "commit", "kill", "reboot", "forget"],
            [20, 20, 5, 6, 4, 2, 1, 2, 2, 1],
        )[0]
        getattr(self, what)()

    def touch(self, name: str) -> None:
        self.synced.pop(name, None)

    def write(self) -> None:
        name = f"f{self.rng.randrange(8)}"
        self.touch(name)
        self.now[name] = self.rng.randbytes(self.rng.randrange(300_000))
        (self.mnt / name).write_bytes(self.now[name])

    def patch(self) -> None:
        if not self.now:
            return
        name = self.rng.choice(sorted(self.now))
        self.touch(name)
        at, data = self.rng.randrange(len(self.now[name]) + 5000), self.rng.randbytes(self.rng.randrange(1, 9000))
        with (self.mnt / name).open("r+b") as file:
            file.seek(at)
            file.write(data)
        old = self.now[name].ljust(at, b"\0")
        self.now[name] = old[:at] + data + old[at + len(data) :]

    def unlink(self) -> None:
        if self.now:
            name = self.rng.choice(sorted(self.now))
            self.touch(name)
            del self.now[name]
            (self.mnt / name).unlink()

    def sync(self) -> None:
        subprocess.run(["sync", "-f", self.mnt], check=True)
        self.synced = dict(self.now)

    def snapshot(self) -> None:
        name = f"s{len(self.names)}"
        self.store.snapshot("a", name)
        self.names[name] = dict(self.now)

    def remount(self) -> None:
        self.made.unmount()
        self.mount()

    def commit(self) -> None:
        self.made.unmount()
        name = f"s{len(self.names)}"
        self.store.commit("a", name)
        self.names[name] = dict(self.now)
        self.synced = dict(self.now)
        self.store.prepare("a", name)
        self.mount()

    def forget(self) -> None:
        with suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
        self.same()

    def kill(self, *, boot: bool = False) -> None:
        from cowfs_drivers.block_device import Served

        served = Served.of(self.store.driver.directory(self.store.index.get("a").id))
        assert served is not None
        pid = int(protocol.ask(served.socket, "info")["pid"])
        os.kill(pid, signal.SIGKILL)
        self.made.unmount()
        end = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
            time.sleep(0.01)
        if boot:
            another_boot(self.store)
        self.mount()
        for name, data in self.synced.items():
            assert (self.mnt / name).read_bytes() == data, name
        found = {path.name: path.read_bytes() for path in self.mnt.iterdir()}
        self.now = found  # anything else may be as it was before, or be gone
        self.sync()

    def reboot(self) -> None:
        self.kill(boot=True)

    def same(self) -> None:
        assert {path.name: path.read_bytes() for path in self.mnt.iterdir()} == self.now


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_synced_files_survive_and_snapshots_stay(space: Path, can_mount: None, filesystem: str, seed: int) -> None:
    (space / "mnt").mkdir()
    (space / "look").mkdir()
    with Store.open(space / "store", driver="block", filesystem=filesystem, size="400m") as store:
        machine = Machine(store, space / "mnt", seed)
        for _ in range(60):
            machine.step()
        machine.same()
        machine.made.unmount()
        for name, tree in machine.names.items():
            store.view("v", name)
            with store.mount("v", space / "look", mount_type="kernel"):
                assert {path.name: path.read_bytes() for path in (space / "look").iterdir()} == tree
            store.remove("v")
        assert store.check(content=True).problems == []
        with (space / "disk").open("w+b") as file:
            store.commit("a", "last")
            store.export_disk("last", file)
        checker = ["e2fsck", "-fn"] if filesystem == "ext4" else ["xfs_repair", "-n"]
        subprocess.run([*checker, space / "disk"], check=True, capture_output=True)


VERBS = ["prepare", "commit", "snapshot", "mounted snapshot", "remove", "mount", "export", "apply"]


def carry_out(store: Store, verb: str, mnt: Path) -> None:
    match verb:
        case "prepare":
            store.prepare("new", "base")
        case "commit":
            store.commit("work", "done")
        case "snapshot" | "mounted snapshot":
            store.snapshot("work", "taken")
        case "remove":
            store.remove("work")
        case "mount":
            store.mount("work", mnt / "other", mount_type="kernel")
        case "export":
            with (mnt.parent / "disk").open("wb") as file:
                store.export_disk("base", file)
        case "apply":
            list(store.diff("work"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_at_any_moment_loses_nothing(space: Path, can_mount: None, verb: str) -> None:
    """Wherever the kill comes, the store is whole, the key holds all that it held, and nothing is left over."""
    mnt = space / "mnt"
    (mnt / "other").mkdir(parents=True)
    rng = random.Random(verb)
    with Store.open(space / "store", driver="block", fsync=False, size="64m") as store:
        store.prepare("k")
        with store.mount("k", mnt, mount_type="kernel"):
            (mnt / "old").write_bytes(b"old" * 1000)
            (mnt / "other").mkdir()
        store.commit("k", "base")
        whole = 0.6
        for number in range(8):
            store.prepare("work", "base")
            made = store.mount("work", mnt, mount_type="kernel")
            (mnt / "own").write_bytes(b"own" * 1000)
            if verb != "mounted snapshot":
                made.unmount()
            begun = time.monotonic()
            pid = os.fork()
            if pid == 0:
                try:
                    with Store.open(store.root, fsync=False) as child:
                        carry_out(child, verb, mnt)
                finally:
                    os._exit(0)
            time.sleep(rng.random() * whole)
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == 0:  # it was faster
                whole = min(whole, time.monotonic() - begun)
            if verb == "mounted snapshot":
                store.usage("work")  # thaws it
                (mnt / "after").write_text("goes on")
                made.unmount()
            with suppress(OSError):
                subprocess.run(["umount", "-q", mnt / "other"], check=False, capture_output=True)
            with Store.open(store.root, fsync=False) as again:
                assert again.check().damage == []
                for name in ("work", "done", "taken"):
                    if not again.exists(name) or (name == "work" and again.exists("taken") and verb == "snapshot"):
                        continue
                    key = name
                    if name != "work":
                        key = f"look-{name}"
                        again.view(key, name)
                    with again.mount(key, mnt, mount_type="kernel"):
                        assert (mnt / "own").read_bytes() == b"own" * 1000
                        assert (mnt / "old").read_bytes() == b"old" * 1000
                    if name != "work":
                        again.remove(key)
                for name in ("work", "new", "done", "taken"):
                    if again.exists(name):
                        again.remove(name)
                again.gc()
                assert again.check(content=True).problems == []
                pool = set(os.listdir(f"{again.root}/block"))
            assert len([name for name in pool if not name.startswith(("base-", "turn"))]) == 1, (number, pool)


def test_the_first_layer_killed_at_any_moment_is_made_again(space: Path, can_mount: None) -> None:
    """It makes the empty file system that all stand on; nothing of a killed attempt stays mounted."""
    rng = random.Random(5)
    (space / "mnt").mkdir()
    for number in range(10):
        root = space / f"store-{number}"
        Store.open(root, driver="block", fsync=False, size="64m").close()
        pid = os.fork()
        if pid == 0:
            try:
                with Store.open(root, fsync=False) as child:
                    child.prepare("a")
            finally:
                os._exit(0)
        time.sleep(rng.random() * 0.25)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with Store.open(root, fsync=False) as store:
            store.gc()
            if store.exists("a"):
                store.remove("a")
            store.prepare("a")
            with store.mount("a", space / "mnt"):
                (space / "mnt" / "file").write_text("x")
            store.commit("a", "A")
            assert store.check(content=True).problems == []
            left = [name for name in os.listdir(root / "block") if name.startswith(("new-", "rm-"))]
            assert left == []
    assert f" {space}/" not in Path("/proc/self/mounts").read_text()


def test_a_write_without_room_waits_for_it(tmp_path: Path, can_mount: None) -> None:
    """A program loses nothing because the host was full for a while."""
    place = hostfs.make_tmpfs(tmp_path, size="40m")
    (place / "mnt").mkdir()
    data = os.urandom(12 << 20)
    with Store.open(place / "store", driver="block", fsync=False, size="64m") as store:
        store.prepare("a")
        with store.mount("a", place / "mnt", mount_type="kernel"):
            host = os.statvfs(place)
            (place / "ballast").write_bytes(bytes(host.f_bavail * host.f_frsize - (4 << 20)))
            with subprocess.Popen(
                ["python3", "-c", "import os, sys; d = sys.stdin.buffer.read(); f = open('f', 'wb', 0)\n"
                 "while d: d = d[f.write(d):]\nos.fsync(f.fileno())"],
                cwd=place / "mnt", stdin=subprocess.PIPE,
            ) as writer:  # fmt: skip
                assert writer.stdin is not None
                writer.stdin.write(data)
                writer.stdin.close()
                with pytest.raises(subprocess.TimeoutExpired):
                    writer.wait(timeout=2)
                (place / "ballast").unlink()
                assert writer.wait(timeout=50) == 0
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
            assert (place / "mnt" / "f").read_bytes() == data
        store.commit("a", "A")
        assert store.check(content=True).problems == []
