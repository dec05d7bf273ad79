"""Snapshots of the block driver leave as disks, which fsck, qemu-img and mount(8) take as any other."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import run_module

from cowfs.errors import InvalidArgument, Unsupported
from cowfs.store import Store
from cowfs.testing.trees import differences, tree_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images are mounted by root")
MIB = 1 << 20


def have(program: str, package: str) -> None:
    if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        pytest.skip(f"{program} is not installed (apt-get install {package})")


@pytest.fixture(params=["ext4", "xfs"])
def store(request: pytest.FixtureRequest, space: Path, can_mount: None) -> Iterator[Store]:
    """A store with the snapshot A of a small tree."""
    have(f"mkfs.{request.param}", "e2fsprogs xfsprogs")
    with Store.open(space / "store", driver="block", fsync=False, filesystem=request.param, size="1g") as store:
        store.prepare("a")
        (space / "mnt").mkdir()
        with store.mount("a", space / "mnt", mount_type="kernel") as made:
            fill(Path(made.mountpoint))
        store.commit("a", "A")
        yield store


def fill(tree: Path) -> None:
    """One of everything, and the names that a layer's own file system has."""
    for name in ("fs", "work", "lost+found"):
        (tree / name).mkdir()
        (tree / name / "inside").write_text(name)
    (tree / "file").write_bytes(os.urandom(3 * MIB))
    os.link(tree / "file", tree / "hard")
    os.symlink("file", tree / "link")
    os.mknod(tree / "null", 0o020666, os.makedev(1, 3))
    os.mkfifo(tree / "fifo")
    os.setxattr(tree / "file", "user.note", b"kept")
    os.setxattr(tree / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    with (tree / "sparse").open("wb") as file:
        file.truncate(100 * MIB)
        file.seek(50 * MIB)
        file.write(b"middle")
    os.chmod(tree, 0o751)
    os.setxattr(tree, "user.root", b"too")
    os.utime(tree, ns=(10**18 + 1, 10**18 + 2))


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_disk_has_the_tree_for_its_root(store: Store, space: Path, format: str) -> None:
    disk = space / f"disk.{format}"
    with disk.open("w+b") as file:
        told = store.export_disk("A", file, format=format)
    assert told.size >= 900 * MIB
    assert disk.stat().st_blocks * 512 < 200 * MIB
    raw = disk
    if format == "qcow2":
        have("qemu-img", "qemu-utils")
        raw = space / "back.raw"
        subprocess.run(["qemu-img", "check", "-q", disk], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    assert raw.stat().st_size == told.size
    with raw.open("rb") as file:
        is_ext4 = file.read(1082)[1080:] == b"\x53\xef"
    checker = ["e2fsck", "-fn"] if is_ext4 else ["xfs_repair", "-n"]
    subprocess.run([*checker, raw], check=True, capture_output=True)
    (space / "vm").mkdir()
    store.view("v", "A")
    subprocess.run(["mount", "-o", "loop,ro", raw, space / "vm"], check=True)
    try:
        with store.mount("v", space / "mnt", mount_type="kernel"):
            assert differences(tree_of(space / "mnt"), tree_of(space / "vm")) == []
            assert (space / "vm" / "hard").stat().st_nlink == 2
            assert (space / "vm" / "sparse").stat().st_blocks * 512 < MIB
    finally:
        subprocess.run(["umount", space / "vm"], check=True)
    assert [name for name in os.listdir(store.root) if name.startswith(("new-", "rm-"))] == []
    assert store.check(content=True).problems == []


def test_two_disks_have_two_identities(store: Store, space: Path) -> None:
    found = set()
    for number in range(2):
        with (space / f"{number}").open("w+b") as file:
            store.export_disk("A", file)
        told = subprocess.run(
            ["blkid", "-o", "value", "-s", "UUID", space / f"{number}"], check=True, capture_output=True
        )
        found.add(told.stdout)
    assert len(found) == 2


def test_a_pipe_gets_the_same_bytes_and_a_size_is_kept(space: Path, can_mount: None) -> None:
    with Store.open(space / "store", driver="block", fsync=False, size="64m") as store:
        store.prepare("a")
        store.commit("a", "A")

        class Pipe(io.RawIOBase):
            """Takes bytes, and cannot seek."""

            count = 0

            def writable(self) -> bool:
                return True

            def write(self, data: object) -> int:
                size = len(memoryview(data))  # type: ignore[arg-type]
                self.count += size
                return size

        pipe = Pipe()
        told = store.export_disk("A", pipe, size="96m")  # type: ignore[arg-type]
        assert pipe.count == told.size == 96 * MIB
        for size in ("1m", 3):
            with pytest.raises(InvalidArgument):
                store.export_disk("A", io.BytesIO(), size=size)
        with pytest.raises(InvalidArgument, match="raw or qcow2"):
            store.export_disk("A", io.BytesIO(), format="vmdk")
        store.prepare("b", "A")
        with pytest.raises(InvalidArgument, match="not committed"):
            store.export_disk("b", io.BytesIO())
        assert store.check(content=True).problems == []


def test_the_command(space: Path, can_mount: None) -> None:
    root = str(space / "store")
    run_module("cowfs", "init", "--root", root, "--driver", "block")
    run_module("cowfs", "prepare", "a", "--root", root)
    run_module("cowfs", "commit", "a", "A", "--root", root)
    told = run_module("cowfs", "export", "A", str(space / "disk"), "--disk", "qcow2", "--size", "2G", "--root", root)
    assert "a disk of 2 GiB" in told.stdout
    assert (space / "disk").read_bytes()[:4] == b"QFI\xfb"


def test_other_drivers_have_none(space: Path) -> None:
    with Store.open(space / "store", driver="vfs", fsync=False) as store:
        store.prepare("a")
        store.commit("a", "A")
        with pytest.raises(Unsupported, match="keeps no disk images"):
            store.export_disk("A", io.BytesIO())
        assert store.check().problems == []
