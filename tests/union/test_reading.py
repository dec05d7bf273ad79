"""The tree of a stack of layers: look-up and listing, whiteouts, opaque directories, redirects, metacopy."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

import pytest
from support import trees
from support.layers import EPOCH
from support.posix import fails

Stack = Any


def test_the_topmost_layer_wins(stack: Stack) -> None:
    stack.add().file("f", b"bottom").file("only-below", b"b")
    stack.add().file("f", b"middle")
    stack.add().file("f", b"top")
    paths = stack.open()
    assert paths.read_bytes("f") == b"top"
    assert paths.read_bytes("only-below") == b"b"


def test_directories_merge_and_files_do_not(stack: Stack) -> None:
    stack.add().file("d/a", b"a").file("d/both", b"old")
    stack.add().file("d/b", b"b").file("d/both", b"new")
    paths = stack.open()
    assert sorted(paths.listdir("d")) == [b"a", b"b", b"both"]
    assert paths.read_bytes("d/both") == b"new"


def test_a_directorys_attributes_are_the_topmost_ones(stack: Stack) -> None:
    stack.add().dir("d", mode=0o700, mtime=1)
    stack.add().dir("d", mode=0o711, mtime=EPOCH)
    attr = stack.open().stat("d")
    assert stat.S_IMODE(attr.mode) == 0o711
    assert attr.mtime_ns == EPOCH


def test_a_whiteout_hides_one_name(stack: Stack) -> None:
    stack.add().file("gone", b"x").file("kept", b"k").file("d/in", b"i")
    stack.add().whiteout("gone").whiteout("d")
    paths = stack.open()
    assert paths.listdir() == [b"kept"]
    fails(errno.ENOENT, paths.stat, "gone")
    fails(errno.ENOENT, paths.stat, "d/in")


def test_a_whiteout_hides_nothing_of_its_own_or_upper_layers(stack: Stack) -> None:
    stack.add().file("f", b"1")
    stack.add().whiteout("f")
    stack.add().file("f", b"3")
    assert stack.open().read_bytes("f") == b"3"


def test_an_xattr_whiteout_hides_too(stack: Stack) -> None:
    """The other encoding: an empty file with overlay.whiteout in a directory marked opaque=x."""
    stack.add().file("d/gone", b"x").file("d/kept", b"k")
    stack.add().dir("d").xattr_whiteout("d/gone")
    paths = stack.open(readonly=True)
    assert paths.listdir("d") == [b"kept"]
    fails(errno.ENOENT, paths.stat, "d/gone")


def test_an_opaque_directory_hides_all_below(stack: Stack) -> None:
    stack.add().file("d/old", b"o").file("d/sub/deep", b"d")
    stack.add().dir("d", opaque=True).file("d/new", b"n")
    stack.add().file("d/newer", b"r")
    paths = stack.open()
    assert sorted(paths.listdir("d")) == [b"new", b"newer"]
    fails(errno.ENOENT, paths.stat, "d/sub/deep")


def test_a_file_over_a_directory_and_back(stack: Stack) -> None:
    """Nothing merges through a layer where the name is no directory."""
    stack.add().file("x/lowest", b"1")
    stack.add().file("x", b"a file")
    stack.add().file("x/top", b"3")
    assert stack.open().listdir("x") == [b"top"]


def test_wh_names_are_ordinary(stack: Stack) -> None:
    """AUFS names mean something in archives only."""
    stack.add().file("f", b"1").file("d/in", b"2")
    stack.add().file(".wh.f", b"").file("d/.wh..wh..opq", b"")
    paths = stack.open()
    assert sorted(paths.listdir()) == [b".wh.f", b"d", b"f"]
    assert sorted(paths.listdir("d")) == [b".wh..wh..opq", b"in"]


def test_a_redirect_in_the_same_directory(trusted: Stack) -> None:
    trusted.add().file("old/in", b"i")
    trusted.add().whiteout("old").redirect("new", "old").file("new/added", b"a")
    paths = trusted.open()
    assert paths.listdir() == [b"new"]
    assert sorted(paths.listdir("new")) == [b"added", b"in"]
    assert paths.read_bytes("new/in") == b"i"


def test_an_absolute_redirect(trusted: Stack) -> None:
    trusted.add().file("a/b/c/in", b"i").dir("other")
    trusted.add().dir("a/b").whiteout("a/b/c").redirect("other/moved", "/a/b/c")
    paths = trusted.open()
    assert paths.read_bytes("other/moved/in") == b"i"
    assert paths.listdir("a/b") == []


def test_redirects_through_three_layers(trusted: Stack) -> None:
    trusted.add().file("one/in", b"i")
    trusted.add().whiteout("one").redirect("two", "/one").file("two/second", b"2")
    trusted.add().whiteout("two").redirect("three", "/two").file("three/third", b"3")
    paths = trusted.open()
    assert paths.listdir() == [b"three"]
    assert sorted(paths.listdir("three")) == [b"in", b"second", b"third"]


def test_a_directory_below_a_redirect_is_found(trusted: Stack) -> None:
    trusted.add().file("a/sub/deep/in", b"i")
    trusted.add().whiteout("a").redirect("b", "/a")
    trusted.add().file("b/sub/deep/top", b"t")
    assert sorted(trusted.open().listdir("b/sub/deep")) == [b"in", b"top"]


def test_metacopy_takes_data_from_below_and_attributes_from_itself(trusted: Stack) -> None:
    trusted.add().file("f", b"the data", mode=0o644)
    trusted.add().metacopy("f", 8, mode=0o600, uid=7, gid=8)
    paths = trusted.open()
    attr = paths.stat("f")
    assert (stat.S_IMODE(attr.mode), attr.uid, attr.gid, attr.size) == (0o600, 7, 8, 8)
    assert paths.read_bytes("f") == b"the data"


def test_metacopy_with_a_redirect(trusted: Stack) -> None:
    trusted.add().file("dir/was", b"data of old")
    trusted.add().dir("dir").whiteout("dir/was").metacopy("now", 11, redirect="/dir/was")
    assert trusted.open().read_bytes("now") == b"data of old"


def test_every_type_is_shown_as_it_is(stack: Stack) -> None:
    layer = stack.add()
    layer.file("file", b"f").dir("dir").symlink("link", "target").fifo("fifo").socket("socket")
    layer.char("char", 1, 3).block("block", 7, 200)
    paths = stack.open()
    shown = {name: stat.S_IFMT(paths.stat(name).mode) for name in paths.listdir()}
    assert shown == {
        b"file": stat.S_IFREG, b"dir": stat.S_IFDIR, b"link": stat.S_IFLNK, b"fifo": stat.S_IFIFO,
        b"socket": stat.S_IFSOCK, b"char": stat.S_IFCHR, b"block": stat.S_IFBLK,
    }  # fmt: skip
    assert paths.readlink("link") == b"target"


def test_symbolic_links_are_never_followed(stack: Stack) -> None:
    stack.add().symlink("out", "/etc").symlink("up", "..")
    paths = stack.open()
    for link in ("out", "up"):
        fails(errno.ENOTDIR, paths.listdir, link)
        fails(errno.ENOTDIR, paths.stat, link + "/passwd")


def test_a_layers_own_xattrs_are_hidden_and_others_shown(stack: Stack) -> None:
    stack.add().dir("d", xattrs={"user.mine": b"m"})
    stack.add().dir("d", opaque=True, xattrs={"user.mine": b"m"})
    assert stack.open().listxattr("d") == [b"user.mine"]


def test_the_other_forms_names_are_ordinary(stack: Stack) -> None:
    other = "user.overlay.opaque" if stack.form == "trusted" else "trusted.overlay.opaque"
    stack.add().file("d/old", b"o")
    stack.add().dir("d", xattrs={other: b"y"})
    paths = stack.open()
    assert paths.listxattr("d") == [other.encode()]
    assert paths.listdir("d") == [b"old"]


def test_numbers_of_different_filesystems_are_distinct(stack: Stack, tmp_path: Any) -> None:
    """Two lower layers on two filesystems may use one inode number twice; the view may not."""
    from support import hostfs

    one = hostfs.make_tmpfs(stack.base, "16m", "one")
    two = hostfs.make_tmpfs(stack.base, "16m", "two")
    from support.layers import Layer

    for root, name in ((one, "a"), (two, "b")):
        layer = Layer(root / "layer", stack.form)
        for i in range(50):
            layer.file(f"{name}{i}", b"")
        stack.layers.append(layer)
    paths = stack.open()
    numbers = [paths.stat(name).ino for name in paths.listdir()]
    assert len(numbers) == len(set(numbers)) == 100
    paths.view.close()
    for root in (one, two):
        from support import namespace

        namespace.umount(str(root), namespace.MNT_DETACH)


def test_hard_links_of_a_layer_are_one_node(stack: Stack) -> None:
    stack.add().file("f", b"x").link("f", "g").link("f", "d/h")
    paths = stack.open()
    nodes = [paths.node(name) for name in ("f", "g", "d/h")]
    assert len({id(node) for node in nodes}) == 1
    assert paths.stat("f").nlink == 3


def test_names_of_255_bytes_and_odd_bytes(stack: Stack) -> None:
    layer = stack.add()
    names = [b"n" * 255, b"\xff\x01", b" ", b"a\nb", "é".encode()]
    for name in names:
        layer.file(os.fsdecode(name), name)
    paths = stack.open()
    assert sorted(paths.listdir()) == sorted(names)
    for name in names:
        assert paths.read_bytes(name) == name
    fails(errno.ENAMETOOLONG, paths.stat, b"n" * 256)


def test_a_readonly_view_refuses_every_change(stack: Stack) -> None:
    stack.add().file("f", b"x").dir("d")
    paths = stack.open(readonly=True)
    for call in (
        lambda: paths.write_bytes("f", b"y"), lambda: paths.mkdir("new"), lambda: paths.unlink("f"), lambda: paths.rmdir("d"),
        lambda: paths.rename("f", "g"), lambda: paths.link("f", "g"), lambda: paths.symlink("x", "l"), lambda: paths.chmod("f", 0),
        lambda: paths.chown("f", 1, 1), lambda: paths.utime("f", mtime_ns=1), lambda: paths.setxattr("f", "user.x", b""),
        lambda: paths.truncate("f", 0), lambda: paths.mknod("p", stat.S_IFIFO),
    ):  # fmt: skip
        fails(errno.EROFS, call)


def test_a_listing_goes_on_after_its_cookie(stack: Stack) -> None:
    """Names that stay are neither skipped nor repeated while others come and go."""
    layer = stack.add()
    for i in range(100):
        layer.file(f"f{i:02}", b"")
    paths = stack.open()
    root = paths.view.root
    seen, cookie = [], 0
    for name, after in paths.view.listing(root, 0):
        seen.append(name)
        cookie = after
        if len(seen) == 40:
            break
    assert seen[:2] == [b".", b".."]
    paths.unlink(seen[10])
    paths.write_bytes("new", b"")
    rest = [entry[0] for entry in paths.view.listing(root, cookie)]
    assert not set(rest) & set(seen)
    assert set(rest) | set(seen) >= {f"f{i:02}".encode() for i in range(100)}


def test_the_view_shows_what_the_kernel_shows(trusted: Stack) -> None:
    """One stack with every device of the format, compared name by name with the kernel's overlayfs."""
    low = trusted.add()
    low.file("keep", b"k", xattrs={"user.a": b"1"}).file("gone", b"g").file("meta", b"m" * 5000).file(
        "moved/in/deep", b"d"
    )
    low.file("opaque/hidden", b"h").symlink("link", "keep").fifo("fifo").sparse("sparse", 100_000, {50_000: b"x"})
    top = trusted.add()
    top.whiteout("gone").metacopy("meta", 5000, mode=0o600).whiteout("moved").redirect("there", "/moved")
    top.dir("opaque", opaque=True).file("opaque/new", b"n").char("char", 5, 1)
    paths = trusted.open()
    shown = {path.decode(): attr for path, attr in paths.walk()}
    data = {path: paths.read_bytes(path) for path, attr in shown.items() if stat.S_ISREG(attr.mode)}
    paths.view.close()
    kernel = trusted.kernel()
    theirs = trees.snapshot(kernel)
    assert set(shown) | {""} == set(theirs)
    for path, attr in shown.items():
        entry = theirs[path]
        assert (stat.S_IMODE(attr.mode), attr.uid, attr.gid, attr.mtime_ns) == (
            entry.mode,
            entry.uid,
            entry.gid,
            entry.mtime,
        ), path
        if entry.type == "file":
            assert data[path] == (kernel / path).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 64])
def test_many_layers(stack: Stack, count: int) -> None:
    for i in range(count):
        stack.add().file(f"d/f{i}", str(i).encode()).file("shared", str(i).encode())
    paths = stack.open()
    assert len(paths.listdir("d")) == count
    assert paths.read_bytes("shared") == str(count - 1).encode()
