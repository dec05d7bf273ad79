"""Creating, naming and removing: errno tables of open, mkdir, mknod, symlink, link, unlink, rmdir."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from support.posix import KINDS, error_of, fails, kind_of, make, make_all, mode_of, read, tree, write
from support.users import acting_as


@pytest.mark.parametrize("kind", KINDS)
def test_create_makes_what_was_asked(d: Path, kind: str) -> None:
    """mknod, mkdir, open and symlink make an object of the type asked for, with one link."""
    make(kind, d / "x")
    status = os.lstat(d / "x")
    expected = {
        "file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK,
    }[kind]  # fmt: skip
    assert stat.S_IFMT(status.st_mode) == expected
    if kind != "dir":
        assert status.st_nlink == 1
    if kind in ("char", "block"):
        assert status.st_rdev == os.makedev(1, 7)
    if kind == "symlink":
        assert status.st_size == len("nowhere")


@tree(make_all)
@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_create_over_an_existing_name_is_eexist(d: Path, there: str, wanted: str) -> None:
    fails(errno.EEXIST, make, wanted, d / there)
    assert kind_of(d / there) != 0


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_unlink_and_rmdir_by_type(d: Path, kind: str) -> None:
    """unlink of a directory is EISDIR, rmdir of anything else ENOTDIR; the right one removes the name."""
    wrong, right = (os.unlink, os.rmdir) if kind == "dir" else (os.rmdir, os.unlink)
    fails(errno.EISDIR if kind == "dir" else errno.ENOTDIR, wrong, d / kind)
    right(d / kind)
    fails(errno.ENOENT, os.lstat, d / kind)
    assert kind not in os.listdir(d)


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", KINDS)
def test_a_removed_name_can_be_used_again(d: Path, kind: str, again: str) -> None:
    """Over a whiteout any kind of object can be made, and is empty."""
    (os.rmdir if kind == "dir" else os.unlink)(d / kind)
    make(again, d / kind)
    make_type = kind_of(d / kind)
    make(again, d / "fresh")
    assert make_type == kind_of(d / "fresh")
    if again == "dir":
        assert os.listdir(d / kind) == []


@tree(make_all)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dir", "symlink")])
def test_a_component_that_is_no_directory_is_enotdir(d: Path, kind: str) -> None:
    for call in (os.lstat, os.unlink, os.rmdir, os.mkdir, os.readlink, os.listdir):
        fails(errno.ENOTDIR, call, d / kind / "x")
    fails(errno.ENOTDIR, os.open, d / kind / "x", os.O_CREAT | os.O_RDWR)
    fails(errno.ENOTDIR, os.rename, d / "dir", d / kind / "x")
    fails(errno.ENOTDIR, os.link, d / "file", d / kind / "x")


@tree(make_all)
def test_a_missing_component_is_enoent(d: Path) -> None:
    for call in (os.lstat, os.unlink, os.rmdir, os.mkdir, os.readlink, os.listdir):
        fails(errno.ENOENT, call, d / "missing" / "x")
    fails(errno.ENOENT, os.symlink, "t", d / "missing" / "x")
    fails(errno.ENOENT, os.rename, d / "file", d / "missing" / "x")
    fails(errno.ENOENT, os.link, d / "file", d / "missing" / "x")
    fails(errno.ENOENT, os.open, d / "missing" / "x", os.O_CREAT | os.O_RDWR)


def test_names_of_255_bytes_and_not_of_256(d: Path) -> None:
    long, longer = "n" * 255, "n" * 256
    for kind in KINDS:
        make(kind, d / long)
        assert long in os.listdir(d)
        if kind not in ("dir", "symlink"):
            os.link(d / long, d / ("l" * 255))
            os.unlink(d / ("l" * 255))
        os.rename(d / long, d / ("m" * 255))
        (os.rmdir if kind == "dir" else os.unlink)(d / ("m" * 255))
        fails(errno.ENAMETOOLONG, make, kind, d / longer)
    write(d / "f")
    for call in (os.lstat, os.unlink, os.rmdir, os.readlink):
        fails(errno.ENAMETOOLONG, call, d / longer)
    fails(errno.ENAMETOOLONG, os.rename, d / "f", d / longer)
    fails(errno.ENAMETOOLONG, os.link, d / "f", d / longer)


@tree(lambda d: [write(d / ("n" * 255)), os.mkdir(d / ("d" * 255))])
def test_long_names_of_a_lower_layer(d: Path) -> None:
    """Names of 255 bytes can be written to, renamed and removed wherever they come from."""
    write(d / ("n" * 255), b"new")
    os.rename(d / ("n" * 255), d / ("o" * 255))
    assert read(d / ("o" * 255)) == b"new"
    os.rename(d / ("d" * 255), d / ("e" * 255))
    os.unlink(d / ("o" * 255))
    os.rmdir(d / ("e" * 255))
    assert os.listdir(d) == []


def test_names_are_bytes(d: Path) -> None:
    """Any byte but '/' and NUL may be in a name."""
    base = os.fsencode(d)
    names = [bytes([b]) for b in range(1, 256) if b not in b"/."] + [
        b"\xff\xfe\x80",
        "né".encode(),
        b"a\nb",
        b"...",
        b".wh.x",
        b".wh..wh..opq",
    ]
    for name in names:
        write(base + b"/" + name, name)
    assert sorted(os.listdir(base)) == sorted(names)
    for name in names:
        assert read(base + b"/" + name) == name
        os.unlink(base + b"/" + name)
    assert os.listdir(base) == []


def test_a_path_of_4095_bytes_and_not_of_4096(d: Path) -> None:
    root = str(d)
    room = 4095 - len(root) - 1
    parts = []
    while room > 0:
        take = min(200, room)
        if room - take == 1:
            take -= 1
        parts.append("p" * take)
        room -= take + 1
    path = root + "/" + "/".join(parts)
    assert len(path) == 4095
    os.makedirs(os.path.dirname(path))
    write(path)
    assert read(path) == b"data"
    fails(errno.ENAMETOOLONG, os.lstat, path + "x")


def test_symlink_targets_of_4095_bytes(d: Path) -> None:
    os.symlink("t" * 4095, d / "l")
    assert os.readlink(d / "l") == "t" * 4095
    assert os.lstat(d / "l").st_size == 4095
    fails(errno.ENAMETOOLONG, os.symlink, "t" * 4096, d / "m")
    fails(errno.ENOENT, os.symlink, "", d / "m")


def test_symlink_loops_are_eloop(d: Path) -> None:
    os.symlink("b", d / "a")
    os.symlink("a", d / "b")
    for look in (os.stat, os.listdir):
        fails(errno.ELOOP, look, d / "a")
    for change in (os.mkdir, os.unlink, os.rmdir):
        fails(errno.ELOOP, change, d / "a" / "x")
    fails(errno.ELOOP, os.open, d / "a", os.O_RDONLY)
    fails(errno.ELOOP, os.open, d / "a", os.O_RDONLY | os.O_NOFOLLOW)


@tree(lambda d: [os.mkdir(d / "full"), write(d / "full" / "f"), os.mkdir(d / "deep"), os.makedirs(d / "deep" / "er")])
def test_rmdir_of_a_directory_that_is_not_empty(d: Path) -> None:
    fails(errno.ENOTEMPTY, os.rmdir, d / "full")
    fails(errno.ENOTEMPTY, os.rmdir, d / "deep")
    os.unlink(d / "full" / "f")
    os.rmdir(d / "full")
    os.rmdir(d / "deep" / "er")
    os.rmdir(d / "deep")
    assert os.listdir(d) == []


@tree(lambda d: [os.mkdir(d / "dir"), write(d / "dir" / "old")])
def test_a_directory_made_again_is_empty(d: Path) -> None:
    """rm -r then mkdir: nothing of the lower directory shines through."""
    os.unlink(d / "dir" / "old")
    os.rmdir(d / "dir")
    os.mkdir(d / "dir")
    assert os.listdir(d / "dir") == []
    fails(errno.ENOENT, os.lstat, d / "dir" / "old")
    write(d / "dir" / "new")
    assert os.listdir(d / "dir") == ["new"]


def test_rmdir_of_dot_and_dotdot(d: Path) -> None:
    os.mkdir(d / "x")
    fails(errno.EINVAL, os.rmdir, f"{d}/x/.")
    assert error_of(os.rmdir, f"{d}/x/..") in ("ENOTEMPTY", "EEXIST")


@tree(lambda d: write(d / "f", b"old"))
def test_open_flags_on_a_file(d: Path) -> None:
    fails(errno.EEXIST, os.open, d / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails(errno.ENOTDIR, os.open, d / "f", os.O_RDONLY | os.O_DIRECTORY)
    fails(errno.ENOENT, os.open, d / "g", os.O_RDWR)
    fd = os.open(d / "f", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"+1")
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"+2")
    os.close(fd)
    assert read(d / "f") == b"old+1+2"
    os.close(os.open(d / "f", os.O_WRONLY | os.O_TRUNC))
    assert os.stat(d / "f").st_size == 0
    fd = os.open(d / "f", os.O_RDONLY)
    fails(errno.EBADF, os.write, fd, b"x")
    os.close(fd)
    fd = os.open(d / "f", os.O_WRONLY)
    fails(errno.EBADF, os.read, fd, 1)
    os.close(fd)


@tree(lambda d: os.mkdir(d / "dir"))
def test_open_flags_on_a_directory(d: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_CREAT | os.O_RDONLY):
        fails(errno.EISDIR, os.open, d / "dir", flags)
    fails(errno.EISDIR, os.truncate, d / "dir", 0)
    fd = os.open(d / "dir", os.O_RDONLY)
    fails(errno.EISDIR, os.read, fd, 1)
    os.close(fd)


@tree(lambda d: make("socket", d / "s"))
def test_open_of_a_socket_is_enxio(d: Path) -> None:
    fails(errno.ENXIO, os.open, d / "s", os.O_RDONLY)


@tree(lambda d: make("fifo", d / "p"))
def test_a_fifo_carries_bytes(d: Path) -> None:
    fails(errno.ENXIO, os.open, d / "p", os.O_WRONLY | os.O_NONBLOCK)
    reader = os.open(d / "p", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(d / "p", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)


def test_a_socket_accepts(d: Path) -> None:
    import socket

    server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with server, client:
        here = os.getcwd()
        os.chdir(d)
        try:
            server.bind("s")
            server.listen(1)
            client.connect("s")
        finally:
            os.chdir(here)
        peer, _ = server.accept()
        with peer:
            client.sendall(b"hello")
            assert peer.recv(5) == b"hello"
    assert stat.S_ISSOCK(os.lstat(d / "s").st_mode)


@tree(lambda d: os.mknod(d / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
def test_a_device_node_works(d: Path) -> None:
    fd = os.open(d / "null", os.O_RDWR)
    assert os.write(fd, b"gone") == 4
    assert os.read(fd, 1) == b""
    os.close(fd)


def test_nobody_makes_a_whiteout_device(d: Path) -> None:
    """mknod of character device 0/0 would be a whiteout: EPERM, as the kernel's overlayfs says."""
    expected = errno.EPERM
    if "plain" in str(d):
        pytest.skip("only a union has whiteouts")
    fails(expected, os.mknod, d / "w", stat.S_IFCHR | 0o600, 0)
    assert os.listdir(d) == []
    os.mknod(d / "b", stat.S_IFBLK | 0o600, 0)
    assert stat.S_ISBLK(os.lstat(d / "b").st_mode)


@tree(make_all)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dir"])
def test_link_makes_one_file_of_two_names(d: Path, kind: str) -> None:
    os.link(d / kind, d / "other", follow_symlinks=False)
    one, two = os.lstat(d / kind), os.lstat(d / "other")
    assert (one.st_ino, one.st_mode, one.st_rdev) == (two.st_ino, two.st_mode, two.st_rdev)
    assert one.st_nlink == two.st_nlink == 2
    os.unlink(d / kind)
    assert os.lstat(d / "other").st_nlink == 1
    assert os.lstat(d / "other").st_ino == one.st_ino


@tree(make_all)
def test_link_errors(d: Path) -> None:
    fails(errno.EPERM, os.link, d / "dir", d / "x")
    for kind in KINDS:
        fails(errno.EEXIST, os.link, d / "file", d / kind)
    fails(errno.ENOENT, os.link, d / "missing", d / "x")


@tree(
    lambda d: [
        write(d / "f", b"one"),
        os.link(d / "f", d / "g"),
        os.mkdir(d / "sub"),
        os.link(d / "f", d / "sub" / "h"),
    ]
)
def test_hard_links_of_a_layer_stay_one_file_when_written(d: Path) -> None:
    """A change through one name shows through all, and the inode number stays one."""
    assert os.stat(d / "f").st_nlink == 3
    write(d / "g", b"changed")
    assert [read(d / name) for name in ("f", "g", "sub/h")] == [b"changed"] * 3
    status = [os.stat(d / name) for name in ("f", "g", "sub/h")]
    assert len({s.st_ino for s in status}) == 1
    assert {s.st_nlink for s in status} == {3}
    os.chmod(d / "sub" / "h", 0o600)
    assert mode_of(d / "f") == 0o600
    os.unlink(d / "f")
    assert {os.stat(d / name).st_nlink for name in ("g", "sub/h")} == {2}


@tree(lambda d: [write(d / "f", b"one"), os.link(d / "f", d / "g")])
def test_unlinking_one_name_of_a_lower_hard_link(d: Path) -> None:
    """The other name says one link at once; its data is untouched."""
    os.unlink(d / "f")
    assert os.stat(d / "g").st_nlink == 1
    assert read(d / "g") == b"one"


def test_many_links(d: Path) -> None:
    write(d / "f")
    for i in range(300):
        os.link(d / "f", d / f"l{i}")
    assert os.stat(d / "f").st_nlink == 301
    for i in range(0, 300, 2):
        os.unlink(d / f"l{i}")
    assert os.stat(d / "l1").st_nlink == 151


@pytest.mark.only("kernel", "overlay", reason="libfuse2 asks by path, and a removed directory has none")
@tree(lambda d: [os.mkdir(d / "dir"), os.mkdir(d / "dir" / "in")])
def test_a_removed_working_directory_is_empty_and_enoent(d: Path) -> None:
    here = os.getcwd()
    os.chdir(d / "dir" / "in")
    try:
        os.rmdir(d / "dir" / "in")
        fails(errno.ENOENT, os.mkdir, "x")
        fails(errno.ENOENT, os.open, "x", os.O_CREAT | os.O_RDWR)
        assert os.listdir(".") == []
    finally:
        os.chdir(here)


def test_umask_applies(d: Path) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(d / "f", os.O_CREAT | os.O_RDWR, 0o666))
        os.mkdir(d / "dir", 0o777)
        os.mkfifo(d / "p", 0o666)
    finally:
        os.umask(old)
    assert (mode_of(d / "f"), mode_of(d / "dir"), mode_of(d / "p")) == (0o640, 0o750, 0o640)


def test_a_new_object_belongs_to_who_made_it(d: Path) -> None:
    with acting_as(4321, 4321):
        for kind in ("file", "dir", "symlink", "fifo", "socket"):
            make(kind, d / kind)
            status = os.lstat(d / kind)
            assert (status.st_uid, status.st_gid) == (4321, 4321)


def test_readlink_of_what_is_no_link(d: Path) -> None:
    make_all(d)
    for kind in KINDS:
        if kind != "symlink":
            fails(errno.EINVAL, os.readlink, d / kind)


def test_an_open_with_nofollow_of_a_dangling_link_creates_its_target(d: Path) -> None:
    """open(O_CREAT) follows a dangling link and creates; with O_EXCL it is EEXIST."""
    os.symlink("target", d / "l")
    fails(errno.EEXIST, os.open, d / "l", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(os.open(d / "l", os.O_CREAT | os.O_WRONLY))
    assert stat.S_ISREG(os.lstat(d / "target").st_mode)
