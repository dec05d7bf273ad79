"""Hardships that a server outlives: trees of any depth, xattrs that fill the host's room, long names, no thread or
memory to be had, a stop."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import bounded, command, deep, hostfs, mounts

import cowfs
from cowfs.row.file import RowFile
from cowfs.row.view import View
from cowfs.sys import trees
from cowfs.union import Options
from cowfs.union.paths import Paths

pytestmark = pytest.mark.usefixtures("can_mount")

DEEP = 1_200


def _deep_layer(space: Path) -> Path:
    lower = space / "lower"
    lower.mkdir()
    fd = deep.make_dirs(lower, deep.chain(DEEP))
    deep.put(fd, b"f", b"data")
    os.close(fd)
    return lower


def test_a_deep_tree_is_removed(space: Path) -> None:
    with bounded.mounted([_deep_layer(space)], space) as mount:
        trees.remove_tree(str(mount.path / "d"))
        assert os.listdir(mount.path) == []


@pytest.mark.parametrize("form", ["trusted", "user"])
def test_a_deep_tree_is_renamed_and_found_again(space: Path, form: str) -> None:
    """In the user form a rename copies all of it."""
    lower = _deep_layer(space)
    for name in ("upper", "work"):
        (space / name).mkdir()
    for again in (False, True):
        view = View([str(lower)], str(space / "upper"), str(space / "work"), options=Options(form=form, max_fds=32))
        try:
            if not again:
                view.rename(view.root, b"d", view.root, b"moved")
            here = view.lookup(view.root, b"moved")
            for _ in range(DEEP - 1):
                here = view.lookup(view.directory(here.id), b"d")
            assert view.size(view.lookup(view.directory(here.id), b"f")) == 4
            assert view.child(view.root, b"d") is None
        finally:
            view.close()
    trees.remove_tree(str(space / "upper"))
    trees.remove_tree(str(lower))


def test_a_handle_from_deep_below_is_found_again(space: Path) -> None:
    lower = _deep_layer(space)
    view = View([str(lower)])
    try:
        way = [view.root]
        for _ in range(DEEP):
            way.append(view.directory(view.lookup(way[-1], b"d").id))
            way[-1].nlookup += 1
        last = way[-1].id
        for node in reversed(way[1:]):
            view.forget(node.id, 1)
        assert last not in view.nodes
        assert view.size(view.lookup(view.directory(view.revive(last).id), b"f")) == 4
    finally:
        view.close()
    trees.remove_tree(str(lower))


@pytest.mark.parametrize("options", [[], ["row=4096"]], ids=["overlay", "row"])
@pytest.mark.parametrize("room", [3_700, 3_900, 3_960, 4_000, 4_020])
def test_lower_objects_whose_xattrs_fill_the_room(
    tmp_path_factory: pytest.TempPathFactory, room: int, options: list[str]
) -> None:
    """ext4 keeps the xattrs of an inode in 4 KiB: what fills that can be changed, moved, linked and removed all the same."""
    place = hostfs.open_fs("ext4", tmp_path_factory.mktemp("full")).fresh()
    lower = place / "lower"
    lower.mkdir()
    acts = ("chmod", "utime", "rename", "link", "write", "unlink")
    for name in acts:
        (lower / name).write_bytes(b"z" * 20_000)
        os.setxattr(lower / name, "user.big", b"v" * room)
        (lower / f"{name}-dir").mkdir()
        (lower / f"{name}-dir/in").write_bytes(b"in")
        os.setxattr(lower / f"{name}-dir", "user.big", b"v" * room)
    with bounded.mounted([lower], place, *options) as mount:
        at = mount.path
        for suffix in ("", "-dir"):
            os.chmod(at / f"chmod{suffix}", 0o700)
            os.utime(at / f"utime{suffix}", (1, 1))
        os.rename(at / "rename", at / "renamed")
        try:
            os.rename(at / "rename-dir", at / "renamed-dir")
        except OSError as error:
            assert error.errno == errno.EXDEV
        os.link(at / "link", at / "linked")
        with open(at / "write", "r+b") as file:
            file.write(b"new")
        (at / "write-dir/in").write_bytes(b"new")
        os.unlink(at / "unlink")
        trees.remove_tree(str(at / "unlink-dir"))
    with bounded.mounted([lower], place, *options) as mount:
        at = mount.path
        assert {"unlink", "unlink-dir", "rename"}.isdisjoint(os.listdir(at))
        for name in ("chmod", "utime", "renamed", "link", "linked"):
            assert (at / name).read_bytes() == b"z" * 20_000
            assert os.getxattr(at / name, "user.big") == b"v" * room
        assert (at / "write").read_bytes() == b"new" + b"z" * 19_997
        assert (at / "write-dir/in").read_bytes() == b"new"
        assert os.stat(at / "linked").st_nlink == 2
        assert os.stat(at / "utime").st_mtime == 1
    kernel = place / "kernel"
    kernel.mkdir()
    if not options:
        with mounts.overlay([lower], kernel, place / "upper", place / "work"):
            assert (kernel / "renamed").read_bytes() == b"z" * 20_000
            assert (kernel / "write").read_bytes() == b"new" + b"z" * 19_997


@pytest.mark.parametrize("length", [251, 252, 255])
@pytest.mark.parametrize("where", ["top", "bottom"])
def test_names_too_long_for_a_dotwh_mark(space: Path, length: int, where: str) -> None:
    name = "n" * length
    for number, layer in enumerate(("l0", "l1")):
        (space / layer / "p").mkdir(parents=True)
        if where == ("bottom", "top")[number]:
            (space / layer / "p" / name).mkdir()
            (space / layer / "p" / name / "f").write_bytes(b"1")
    (space / "l1/p/short").mkdir()
    with bounded.mounted([space / "l0", space / "l1"], space) as mount:
        assert sorted(os.listdir(mount.path / "p")) == sorted([name, "short"])
        assert (mount.path / "p" / name / "f").read_bytes() == b"1"
        trees.remove_tree(str(mount.path / "p" / name))
        assert os.listdir(mount.path / "p") == ["short"]


def test_redirect_files_that_are_forgotten_leave_nothing(space: Path) -> None:
    """Each read through two layers was kept until the end of the mount."""
    lower = space / "lower"
    lower.mkdir()
    for name in ("upper", "work"):
        (space / name).mkdir()
    for number in range(50):
        (lower / f"{number}").write_bytes(b"y" * 9000)
    view = View([str(lower)], str(space / "upper"), str(space / "work"), options=Options(row=4096))
    try:
        for _ in range(3):
            for number in range(50):
                node = view.lookup(view.root, b"%d" % number)
                node.nlookup += 1
                view.write(node, 10, b"x")
                view.pread(node, 5000, memoryview(bytearray(100)))
                view.forget(node.id, 1)
        del node
        gc.collect()
        assert sum(isinstance(found, RowFile) for found in gc.get_objects()) <= 1
    finally:
        view.close()


@pytest.mark.parametrize("end", ["umount", "SIGTERM"])
def test_no_thread_can_be_started_for_a_while(space: Path, end: str) -> None:
    """Verbs and signals are answered then and afterwards, and files are served."""
    lower = space / "lower"
    lower.mkdir()
    (lower / "big").write_bytes(b"b" * (3 << 20))
    with bounded.mounted([lower], space) as mount:
        subprocess.run(["prlimit", f"--pid={mount.pid}", "--as=20000000:unlimited"], check=True)
        try:
            done = command.run_module("cowfs", "usage", mount.path)
            assert done.returncode == 0, done.stderr
            (mount.path / "new").write_bytes(b"x")
            with open(mount.path / "new", "rb") as file:
                os.fsync(file.fileno())
        finally:
            subprocess.run(["prlimit", f"--pid={mount.pid}", "--as=unlimited:unlimited"], check=True)
        assert command.run_module("cowfs", "usage", mount.path).returncode == 0
        assert (mount.path / "big").read_bytes() == b"b" * (3 << 20)
        if end == "SIGTERM":
            os.kill(mount.pid, signal.SIGTERM)
        else:
            assert command.run_module("cowfs", "umount", mount.path).returncode == 0
        mount.process.wait(60)
        assert not os.path.ismount(mount.path)


def test_a_server_that_is_stopped(space: Path) -> None:
    """Others answer, its own verbs end in time, umount --force ends it, and nothing that was synced is lost."""
    lower = space / "lower"
    lower.mkdir()
    with bounded.mounted([lower], space) as stopped, ExitStack() as more:
        other = space / "other"
        other.mkdir()
        well = more.enter_context(bounded.mounted([lower], other))
        with open(stopped.path / "kept", "wb") as file:
            file.write(b"kept")
            file.flush()
            os.fsync(file.fileno())
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            assert command.run_module("cowfs", "usage", well.path).returncode == 0
            listed = command.run_module("cowfs", "mounts", "--json")
            assert str(well.path) in {entry["mountpoint"] for entry in json.loads(listed.stdout)}
            assert command.run_module("cowfs", "usage", stopped.path).returncode != 0
            done = command.run_module("cowfs", "umount", "--force", stopped.path)
            assert done.returncode == 0, done.stderr
        finally:
            if stopped.process.poll() is None:
                os.kill(stopped.pid, signal.SIGCONT)
        stopped.process.wait(60)
        assert not os.path.ismount(stopped.path)
    with bounded.mounted([lower], space) as again:
        assert (again.path / "kept").read_bytes() == b"kept"


def test_a_large_directory_that_is_listed_while_it_changes(space: Path, request: pytest.FixtureRequest) -> None:
    """Every name that stays is listed exactly once (--steps: a hundredth of the names)."""
    lower, count = space / "lower", request.config.getoption("steps")
    (lower / "d").mkdir(parents=True)
    fd = os.open(lower / "d", os.O_RDONLY)
    for number in range(count):
        os.mknod(b"s%06d" % number, 0o100644, dir_fd=fd)
    os.close(fd)
    with bounded.mounted([lower], space) as mount:
        at, done = mount.path / "d", threading.Event()

        def change() -> None:
            number = 0
            while not done.is_set():
                (at / f"n{number}").write_bytes(b"")
                os.unlink(at / f"n{number}")
                os.rename(at / f"s{number % 100:06}", at / f"s{number % 100:06}.moved")
                os.rename(at / f"s{number % 100:06}.moved", at / f"s{number % 100:06}")
                number += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(3):
                names = os.listdir(at)
                staying = [name for name in names if name >= "s000100" and not name.endswith(".moved")]
                assert len(staying) == len(set(staying)) == count - 100
        finally:
            done.set()
            thread.join()


@pytest.mark.slow
def test_two_hundred_mounts_at_once(space: Path) -> None:
    """Each answers, and all end."""
    lower = space / "lower"
    lower.mkdir()
    (lower / "f").write_bytes(b"f")
    count = 200
    begun = time.monotonic()
    with ExitStack() as stack:
        running = []
        for number in range(count):
            base = space / f"m{number}"
            for name in ("", "mnt"):
                (base / name).mkdir()
            code = command.run_module(
                "cowfs", "mount", "--layer", lower, base / "mnt", "--upper", base / "upper", timeout=120
            )
            assert code.returncode == 0, code.stderr
            running.append(base / "mnt")
            stack.callback(mounts.umount_busy, str(base / "mnt"))
        for at in running:
            assert (at / "f").read_bytes() == b"f"
            (at / "own").write_text(str(at))
        listed = json.loads(command.run_module("cowfs", "mounts", "--json", timeout=120).stdout)
        assert {str(at) for at in running} <= {entry["mountpoint"] for entry in listed}
        assert all((at / "own").read_text() == str(at) for at in running)
    assert not any(os.path.ismount(at) for at in running), time.monotonic() - begun


HUNGRY = "import os, sys; [os.stat(os.path.join(sys.argv[1], 'n%d' % n)) for n in range(200)]"


def test_memory_runs_out(space: Path) -> None:
    """Requests fail with ENOMEM, or are served; the server goes on, and works as before once there is memory again."""
    lower = space / "lower"
    (lower / "wide").mkdir(parents=True)
    for number in range(20_000):
        (lower / f"wide/{'x' * 180}{number}").touch()
    with bounded.mounted([lower], space) as mount:
        with open(f"/proc/{mount.pid}/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * 4096
        subprocess.run(["prlimit", f"--pid={mount.pid}", f"--as={now + (1 << 20)}:unlimited"], check=True)
        try:
            names = os.listdir(mount.path / "wide")
        except OSError as error:
            assert error.errno in (errno.ENOMEM, errno.EIO)
        else:
            assert len(names) == 20_000
        finally:
            subprocess.run(["prlimit", f"--pid={mount.pid}", "--as=unlimited:unlimited"], check=True)
        assert len(os.listdir(mount.path / "wide")) == 20_000
        for number in range(200):
            (mount.path / f"n{number}").touch()
        subprocess.run([sys.executable, "-c", HUNGRY, str(mount.path)], check=True)
        assert command.run_module("cowfs", "usage", mount.path).returncode == 0


def test_paths_of_a_deep_tree(space: Path) -> None:
    """The library's own walk and removal."""
    lower = _deep_layer(space)
    for name in ("upper", "work"):
        (space / name).mkdir()
    view = View([str(lower)], str(space / "upper"), str(space / "work"))
    try:
        paths = Paths(view)
        assert sum(1 for _ in paths.walk()) == DEEP + 1
        paths.rmtree(b"d")
        assert paths.listdir() == []
    finally:
        view.close()
    trees.remove_tree(str(lower))


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_a_deep_tree_goes_through_a_store(space: Path, driver: str) -> None:
    """Made through a mount, committed, compared, written out, mounted again and removed."""

    def run(*arguments: object) -> str:
        done = command.run_module("cowfs", *arguments, timeout=300)
        assert done.returncode == 0, (arguments[:2], done.stderr[-300:])
        return done.stdout

    root, mnt = ("--root", space / "store"), space / "mnt"
    mnt.mkdir()
    run("init", *root, "--driver", driver)
    (space / "empty").mkdir()
    subprocess.run(["tar", "-cf", space / "a.tar", "-C", space / "empty", "."], check=True)
    run("import", *root, "--as", "rootfs", space / "a.tar", "base")
    run("prepare", *root, "k", "base")
    run("mount", *root, "--key", "k", mnt)
    fd = deep.make_dirs(mnt, deep.chain(1_100))
    deep.put(fd, b"f", b"data")
    os.close(fd)
    run("umount", mnt)
    assert run("diff", *root, "base", "k").count("d/f") == 1
    run("commit", *root, "k", "top")
    run("check", *root, "--content")
    run("export", *root, "top", "--format", "layer", space / "layer.tar")
    assert os.path.getsize(space / "layer.tar") > 1_100 * 512
    run("prepare", *root, "k2", "top")
    run("mount", *root, "--key", "k2", mnt)
    trees.remove_tree(str(mnt / "d"))
    run("umount", mnt)
    run("rm", *root, "k2")
    run("rm", *root, "top")
    run("gc", *root)


def test_a_mount_right_after_its_server_was_killed(space: Path) -> None:
    """A server that was killed listens until the kernel has closed its files; nobody is mounted there any more."""
    (space / "lower").mkdir()
    (space / "mnt").mkdir()
    for number in range(20):
        mount = cowfs.mount([space / "lower"], space / "mnt", upper=space / "upper")
        assert isinstance(mount, cowfs.MountHandle)
        for name in range(20):
            (space / f"mnt/{name}").write_bytes(b"x" * number)
        os.kill(mount.pid, signal.SIGKILL)
        if number % 2:
            cowfs.umount(space / "mnt")
