"""Layers, uppers and stores from strangers: what lies under the names that cowfs opens by itself may be anything.

Each kind of thing (a FIFO, a device, a symbolic link, a directory, a sparse file of a size that no memory has) is put in the place of
each of them. Then nothing hangs, nothing outside is written, no memory is filled; other requests are answered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import one_line, run_module
from support.users import UID, command_as

import cowfs

pytestmark = pytest.mark.usefixtures("can_mount")

HUGE = 1 << 40


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def huge_behind_a_header(path: Path) -> None:
    no_block_is_present(path)
    os.truncate(path, HUGE)


def no_block_is_present(path: Path) -> None:
    """A map in order, without a record."""
    boot = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    head = struct.pack("<8sHBB16s32x", b"COWFSROW", 1, 12, 0, boot)
    with path.open("wb") as file:
        file.write(head + struct.pack("<I", zlib.crc32(head)))


THINGS: list[Callable[[Path], None]] = [fifo, device, link, directory, huge]


def replace(path: Path, thing: Callable[[Path], None]) -> None:
    """Put something else under a name."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    thing(path)


def row_layers(space: Path) -> Path:
    """``0/fs`` with a file, and ``1/fs`` with a redirect file over it; returns where the map of that is to be."""
    for name in ("0/fs", "1/fs", "1/map", "mnt"):
        (space / name).mkdir(parents=True, mode=0o755)
    (space / "1/map").chmod(0o700)
    (space / "0/fs/f").write_bytes(b"L" * (1 << 20))
    (space / "1/fs/f").write_bytes(b"")
    os.truncate(space / "1/fs/f", 1 << 20)
    os.setxattr(space / "1/fs", "trusted.overlay.cowfs.row", b"\x01root")
    reference = struct.pack("<BBHQQQ", 1, 12, 1, 1, 1 << 20, 0) + b"f"
    os.setxattr(space / "1/fs/f", "trusted.overlay.cowfs.row", reference)
    return space / "1/map" / f"{1:016x}"


def peak(pid: int) -> int:
    """The most memory that a process has had, bytes."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def first_byte(path: Path) -> tuple[int, bytes]:
    """(errno, byte), read by a process that is killed when it has to wait."""
    script = "import sys\ntry: sys.stdout.buffer.write(b'0' + open(sys.argv[1], 'rb').read(1))\nexcept OSError as e: print(e.errno)"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, timeout=60, check=True)
    return (0, done.stdout[1:]) if done.stdout.startswith(b"0") else (int(done.stdout), b"")


@pytest.mark.parametrize("thing", [*THINGS, huge_behind_a_header])
def test_the_map_of_a_redirect_file(space: Path, thing: Callable[[Path], None]) -> None:
    thing(row_layers(space))
    with cowfs.mount([space / "0/fs", space / "1/fs"], space / "mnt", readonly=True) as handle:
        told, data = first_byte(space / "mnt/f")
        assert (told, data) == ((0, b"L") if thing in (huge, huge_behind_a_header) else (errno.EIO, b""))
        assert os.listdir(space / "mnt") == ["f"]
        assert isinstance(handle, cowfs.MountHandle)
        assert peak(handle.pid) < 200 << 20


def elsewhere(space: Path) -> None:
    (space / "there").mkdir()
    (space / "1/map").symlink_to(space / "there")


def anothers(space: Path) -> None:
    (space / "1/map").mkdir(mode=0o700)
    os.chown(space / "1/map", UID, UID)


def anybodys(space: Path) -> None:
    (space / "1/map").mkdir()
    (space / "1/map").chmod(0o777)


def mounted_there(space: Path) -> None:
    (space / "1/map").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "x", space / "1/map"], check=True)


@pytest.mark.parametrize("kind", [elsewhere, anothers, anybodys, mounted_there])
def test_the_directory_of_maps_beside_a_layer(space: Path, kind: Callable[[Path], None]) -> None:
    """It is the layer's own, or nobody reads it or writes in it."""
    name = row_layers(space)
    name.parent.rmdir()
    kind(space)
    no_block_is_present(name)
    held = name.read_bytes()
    try:
        with cowfs.mount([space / "0/fs"], space / "mnt", upper=space / "1/fs", row=4096) as handle:
            with pytest.raises(OSError, match=r"Input/output|not permitted") as told:
                (space / "mnt/f").read_bytes()
            assert told.value.errno in (errno.EIO, errno.EPERM)
            with pytest.raises(OSError, match=r"Input/output|not permitted"), (space / "mnt/f").open("r+b") as file:
                file.write(b"x")
            assert isinstance(handle, cowfs.MountHandle)
        assert os.listdir(name.parent) == [name.name]
        assert name.read_bytes() == held
    finally:
        if kind is mounted_there:
            subprocess.run(["umount", space / "1/map"], check=True)


@pytest.mark.parametrize("thing", THINGS)
def test_the_record_beside_an_upper(space: Path, thing: Callable[[Path], None]) -> None:
    (space / "stack/1").mkdir(parents=True)
    (space / "stack/.cowfs").mkdir(mode=0o700)
    (space / "mnt").mkdir()
    thing(space / "stack/.cowfs/state.json")
    done = run_module("cowfs", "mount", space / "stack", space / "mnt")
    assert done.returncode != 0
    assert "state.json" in one_line(done)


@pytest.mark.parametrize("name", [".cowfs", ".cowfs/upper", ".cowfs/work"])
def test_a_stack_that_would_lead_the_writes_elsewhere(space: Path, name: str) -> None:
    """A symbolic link where cowfs keeps its upper: what is written in the mount would land wherever it leads."""
    (space / "stack/1").mkdir(parents=True)
    (space / "mnt").mkdir()
    (space / "victim").mkdir()
    place = space / "stack" / name
    place.parent.mkdir(exist_ok=True, mode=0o700)
    place.symlink_to(space / "victim")
    done = run_module("cowfs", "mount", space / "stack", space / "mnt")
    assert done.returncode != 0
    assert "symbolic link" in one_line(done)
    assert os.listdir(space / "victim") == []
    with cowfs.mount([space / "stack/1"], space / "mnt", readonly=True):
        pass


@pytest.mark.parametrize("name", ["work", "work/incompat", "work/incompat/volatile", "work/incompat/volatile/dirty"])
def test_the_mark_of_a_volatile_mount_is_written_in_the_work_directory_only(space: Path, name: str) -> None:
    for made in ("lower", "upper", "mnt", "victim"):
        (space / made).mkdir()
    target = space / "victim"
    if name.endswith("dirty"):
        target = space / "victim/file"
        target.write_text("precious")
    place = space / "w" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(target)
    try:
        with cowfs.mount([space / "lower"], space / "mnt", upper=space / "upper", work=space / "w", volatile=True):
            (space / "mnt/f").write_bytes(b"x")
    except (cowfs.CowfsError, OSError):
        pass
    assert os.listdir(space / "victim") == (["file"] if name.endswith("dirty") else [])
    if name.endswith("dirty"):
        assert target.read_text() == "precious"


def test_directories_that_somebody_else_made_beside_an_upper(space: Path) -> None:
    """In a directory like /tmp anybody can make the place where the work directory of an upper is to be."""
    for name in ("lower", "mnt"):
        (space / name).mkdir()
    shared = space / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    subprocess.run(command_as(["mkdir", "-p", str(shared / ".upper.cowfs/work")]), check=True)
    done = run_module("cowfs", "mount", "--layer", space / "lower", space / "mnt", "--upper", shared / "upper")
    assert done.returncode != 0
    assert f"user {UID}" in one_line(done)


def store_files(root: Path) -> list[Path]:
    """Every file of a store that is cowfs's own."""
    found = []
    for where, dirs, names in os.walk(root):
        if os.path.basename(where) == "fs":
            dirs.clear()
            continue
        found += [Path(where) / name for name in names]
    return found


def make_store(space: Path, driver: str) -> Path:
    """A store with an imported layer and one made here."""
    root = space / "store"
    tree = space / "tree"
    tree.mkdir()
    (tree / "f").write_bytes(b"data" * 5000)
    subprocess.run(["tar", "-C", tree, "-cf", space / "layer.tar", "f"], check=True)
    for arguments in (
        ("init", "--driver", driver),
        ("import", space / "layer.tar", "base"),
        ("prepare", "key", "base"),
    ):
        assert run_module("cowfs", *arguments, "--root", root).returncode == 0, arguments
    return root


@pytest.mark.parametrize("driver", ["overlay", "vfs", "row"])
def test_every_file_of_a_store(space: Path, driver: str) -> None:
    """Each verb ends, with an answer or with one line, for any object in a note's place."""
    pristine = make_store(space, driver)
    names = [path.relative_to(pristine) for path in store_files(pristine)]
    assert any(path.name == "index.db" for path in names)
    for name in names:
        for thing in THINGS:
            root = space / "copy"
            subprocess.run(["cp", "-a", pristine, root], check=True)
            replace(root / name, thing)
            for verb in (["ls"], ["check"], ["export", "base", str(space / "out.tar")], ["gc"]):
                done = run_module("cowfs", *verb, "--root", root)
                assert "Traceback" not in done.stderr, (name, thing.__name__, verb, done.stderr)
                assert done.returncode in range(8), (name, thing.__name__, verb, done.returncode)
            subprocess.run(["rm", "-rf", root, space / "out.tar"], check=True)


@pytest.mark.parametrize("id", ["../../victim", "..", ".", "", "/etc", "a/../../../victim", "rm-/../../victim", "x\0y"])
def test_an_index_whose_layers_lead_out_of_the_store(space: Path, id: str) -> None:
    """Nothing is read, written or deleted where they lead; each verb says it in one line."""
    root = make_store(space, "overlay")
    (space / "victim/fs").mkdir(parents=True)
    (space / "victim/fs/precious").write_text("precious")
    with contextlib.closing(sqlite3.connect(root / "index.db")) as index:
        index.execute("UPDATE snapshots SET id = ? WHERE name = 'key'", (id,))
        index.commit()
    for verb in (
        ["ls"],
        ["check"],
        ["check", "--repair"],
        ["mounts", "key"],
        ["usage", "key"],
        ["commit", "key", "n"],
        ["rm", "key"],
        ["gc"],
    ):
        done = run_module("cowfs", *verb, "--root", root)
        assert "Traceback" not in done.stderr, (verb, done.stderr)
        assert (space / "victim/fs/precious").read_text() == "precious", verb
    (space / "mnt").mkdir()
    (space / "victim/work").mkdir()
    done = run_module("cowfs", "mount", "--key", "key", space / "mnt", "--root", root)
    if not done.returncode:  # by another verb it is gone already
        run_module("cowfs", "umount", space / "mnt")
    assert done.returncode != 0
    assert sorted(str(path) for path in (space / "victim").rglob("*")) == [
        f"{space}/victim/{name}" for name in ("fs", "fs/precious", "work")
    ]
    for verb in (["commit", "key", "n"], ["rm", "key"]):
        assert "Traceback" not in run_module("cowfs", *verb, "--root", root).stderr
    assert (space / "victim/fs/precious").read_text() == "precious"
    done = run_module("cowfs", "prepare", "other", "--root", root)
    assert done.returncode == 0, done.stderr
