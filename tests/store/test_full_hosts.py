"""A store on a host without a free byte or inode, and one that can only be read: looking needs no room, deleting has some kept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import hostfs, namespace
from support.command import environment, one_line, run_module

from cowfs.sys import mounts

pytestmark = pytest.mark.usefixtures("can_mount")

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]

LOOKS: tuple[tuple[str, ...], ...] = (
    ("ls", "-q"), ("tree",), ("df",), ("df", "-v"), ("stat", "base"), ("log", "top"), ("images",), ("info",),
    ("usage", "big"), ("usage", "base"), ("mounts", "look"), ("diff", "base", "top"), ("diff", "work"), ("diff", "top"),
    ("export", "base", "/dev/null", "--format", "tar"), ("export", "top", "/dev/null"),
    ("export", "top", "/dev/null", "--format", "docker"), ("export", "work", "/dev/null", "--format", "layer"),
    ("check",), ("check", "--content"),
)  # fmt: skip

WRITES: tuple[tuple[str, ...], ...] = (
    ("prepare", "new", "base"), ("commit", "work", "done"), ("label", "base", "a=b"), ("tag", "t3", "top"),
    ("snapshot", "work", "s1"),
)  # fmt: skip


def _cowfs(root: Path) -> Cowfs:
    def run(*arguments: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = run_module("cowfs", *arguments, env={**environment(), "COWFS_ROOT": str(root), "COWFS_FSYNC": "0"})
        if status is not None:
            assert done.returncode == status, f"{arguments}: {done.stderr}"
        return done

    return run


def _store(root: Path, elsewhere: Path) -> Cowfs:
    """A store with base < top, the keys work, old and big, the view look, and the tag t2; mount points beside it."""
    cowfs = _cowfs(root)
    (elsewhere / "tree").mkdir()
    (elsewhere / "tree" / "data").write_bytes(os.urandom(300_000))
    for name in ("mnt", "look"):
        (elsewhere / name).mkdir()
    cowfs("import", elsewhere / "tree", "base")
    cowfs("prepare", "work", "base")
    cowfs("mount", "--key", "work", elsewhere / "mnt")
    (elsewhere / "mnt" / "own").write_text("own")
    cowfs("umount", elsewhere / "mnt")
    cowfs("commit", "work", "top")
    for key, parent in (("work", "top"), ("old", "base"), ("old2", "base")):
        cowfs("prepare", key, parent)
    cowfs("prepare", "big")
    cowfs("view", "look", "base")
    cowfs("tag", "t2", "top")
    return cowfs


def _fill(place: Path) -> None:
    """Write until nothing more can be written, by anybody."""
    for size in (1 << 20, 1 << 14, 1 << 10, 1):
        try:
            with (place / f"ballast-{size}").open("wb", buffering=0) as file:
                while size > 1 or file.tell() < 8192:
                    file.write(bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.sync()


def _use_up_inodes(place: Path) -> None:
    for number in range(100_000):
        try:
            (place / f"inode-{number}").touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return


@pytest.fixture(params=[*hostfs.NAMES, "btrfs driver"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(a small file system of each kind, a place on another one)."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if request.param == "tmpfs":
        place = hostfs.make_tmpfs(tmp_path, size="48m")
    else:
        name, _, driver = request.param.partition(" ")
        place = hostfs.make_image(name, tmp_path, {"ext4": 48 << 20, "btrfs": 128 << 20}.get(name))
        if driver:
            run_module("cowfs", "init", "--root", place / "store", "--driver", "btrfs")
    yield place, elsewhere
    for name in ("mnt", "look"):
        run_module("cowfs", "umount", "--force", elsewhere / name)
    mounts.umount(place, mounts.MNT_DETACH)


def test_a_host_without_a_free_byte_can_be_looked_at_and_emptied(small: tuple[Path, Path]) -> None:
    place, elsewhere = small
    cowfs = _store(place / "store", elsewhere)
    cowfs("mount", "--key", "big", elsewhere / "mnt")
    try:
        with (elsewhere / "mnt" / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    cowfs("umount", elsewhere / "mnt")
    _fill(place)
    for look in LOOKS:
        assert cowfs(*look).stderr == "", look
    for write in WRITES:
        done = cowfs(*write, status=None)
        if done.returncode == 0:
            continue  # a few bytes were left after all, as on xfs
        line = one_line(done)
        assert "no space left" in line
        assert str(place) in line
        assert "cowfs rm" in line
    cowfs("mount", "--key", "look", elsewhere / "look")
    assert (elsewhere / "look" / "data").read_bytes() == (elsewhere / "tree" / "data").read_bytes()
    cowfs("umount", elsewhere / "look")
    cowfs("rm", "old")
    cowfs("rm", "t2")
    cowfs("gc")
    cowfs("check", "--repair")
    cowfs("mount", "--key", "big", elsewhere / "mnt")
    (elsewhere / "mnt" / "fill").unlink()
    cowfs("umount", elsewhere / "mnt")
    cowfs("rm", "big")
    names = cowfs("ls", "-q").stdout.split()
    assert {"old", "big"} & set(names) == set()
    assert {"work", "top", "old2", "look"} <= set(names)
    cowfs("prepare", "after", "base")
    assert "no damage" in cowfs("check", "--content").stdout


def test_a_host_without_a_free_inode_can_be_looked_at_and_emptied(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = hostfs.make_tmpfs(tmp_path, size="48m", inodes="200")
    cowfs = _store(place / "store", elsewhere)
    _use_up_inodes(place)
    for look in LOOKS:
        assert cowfs(*look).stderr == "", look
    assert "no inodes left" in one_line(cowfs("prepare", "new", "base", status=1))
    cowfs("rm", "old")
    cowfs("rm", "old2")
    cowfs("gc")
    cowfs("prepare", "after", "base")
    assert "no damage" in cowfs("check").stdout
    mounts.umount(place, mounts.MNT_DETACH)


def test_a_kept_upper_on_a_full_host_is_mounted_and_emptied(tmp_path: Path) -> None:
    """A mount of plain layers, too: its record is there already."""
    place = hostfs.make_tmpfs(tmp_path, size="24m")
    (place / "layers" / "base" / "app").mkdir(parents=True)
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    cowfs = _cowfs(tmp_path / "none")
    cowfs("mount", place / "layers", mnt)
    (mnt / "app" / "big").write_bytes(bytes(1 << 20))
    cowfs("umount", mnt)
    _fill(place)
    cowfs("mount", place / "layers", mnt)
    (mnt / "app" / "big").unlink()
    cowfs("umount", mnt)
    (place / "layers" / ".cowfs" / "upper" / "fits").write_bytes(bytes(1 << 19))
    mounts.umount(place, mounts.MNT_DETACH)


READS = """
import os, sys, cowfs
with cowfs.Store.open(sys.argv[1], create=False) as store:
    print(dict(store.stat("base").labels), flush=True)
    while sys.stdin.readline():
        print(dict(store.stat("base").labels), flush=True)
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[tuple[Cowfs, Cowfs, Path]]:
    """(the command over a store, the command over a read-only bind mount of it, a place elsewhere)."""
    place, seen, elsewhere = tmp_path / "place", tmp_path / "seen", tmp_path / "elsewhere"
    for path in (place, seen, elsewhere):
        path.mkdir()
    writer = _store(place / "store", elsewhere)
    namespace.bind(str(place), str(seen))
    mounts.mount("", seen, "", mounts.MS_BIND | mounts.MS_REMOUNT | mounts.MS_RDONLY)
    yield writer, _cowfs(seen / "store"), elsewhere
    for name in ("mnt", "look"):
        run_module("cowfs", "umount", "--force", elsewhere / name)
    mounts.umount(seen, mounts.MNT_DETACH)


def test_a_read_only_bind_mount_of_a_store_can_be_looked_at(
    read_only: tuple[Cowfs, Cowfs, Path], tmp_path: Path
) -> None:
    _, reader, elsewhere = read_only
    (tmp_path / "place" / "store" / "new-left").mkdir()  # what a sweep would delete
    for look in LOOKS:
        assert reader(*look).stderr == "", look
    reader("mount", "--key", "look", elsewhere / "look")
    assert (elsewhere / "look" / "data").stat().st_size == 300_000
    reader("umount", elsewhere / "look")
    for write in (*WRITES, ("rm", "old"), ("gc",), ("check", "--repair")):
        assert "read-only" in one_line(reader(*write, status=1)), write


def test_a_read_only_bind_mount_shows_what_a_writer_does_meanwhile(
    read_only: tuple[Cowfs, Cowfs, Path], tmp_path: Path
) -> None:
    """Whether the writer has the store open or not, and when it ends."""
    writer, reader, elsewhere = read_only
    with subprocess.Popen(
        [sys.executable, "-c", READS, str(tmp_path / "seen" / "store")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment(),
    ) as watching:  # fmt: skip
        assert watching.stdin is not None
        assert watching.stdout is not None
        assert watching.stdout.readline() == "{}\n"

        def shown() -> str:
            watching.stdin.write("\n")  # type: ignore[union-attr]
            watching.stdin.flush()  # type: ignore[union-attr]
            return watching.stdout.readline().strip()  # type: ignore[union-attr]

        writer("label", "base", "a=1")
        assert shown() == "{'a': '1'}"
        writer("mount", "--key", "work", elsewhere / "mnt")  # its server has the index open
        writer("label", "base", "b=2")
        assert shown() == "{'a': '1', 'b': '2'}"
        assert "b=2" in reader("stat", "base").stdout
        writer("umount", elsewhere / "mnt")
        writer("label", "base", "c=3")
        assert shown() == "{'a': '1', 'b': '2', 'c': '3'}"
        watching.stdin.close()


def test_a_store_whose_writer_was_killed_can_be_read_where_nothing_can_be_written(
    read_only: tuple[Cowfs, Cowfs, Path], tmp_path: Path
) -> None:
    """Rows that are only in SQLite's log are read from there."""
    _, reader, _ = read_only
    script = (
        "import os, signal, sys, cowfs; store = cowfs.Store.open(sys.argv[1]); store.update('base', {'last': 'words'});"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "place" / "store")], env=environment(), check=False)
    assert os.path.getsize(tmp_path / "place" / "store" / "index.db-wal")
    assert "last=words" in reader("stat", "base").stdout
