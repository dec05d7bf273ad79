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
