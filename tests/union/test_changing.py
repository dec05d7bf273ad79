"""The effects of changes: copy-up, whiteouts, rename, hard links, metacopy; read back by cowfs and by the kernel."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
from support import trees, users
from support.layers import EPOCH
from support.posix import fails

from cowfs.model import Limit
from cowfs.union.attr import unpack

Stack = Any
EXCHANGE, NOREPLACE = 2, 1


def is_whiteout(path: Path) -> bool:
    status = os.lstat(path)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def overlay_names(stack: Stack, path: Path) -> list[str]:
    return sorted(n for n in os.listxattr(path, follow_symlinks=False) if n.startswith(f"{stack.form}.overlay."))


def test_the_first_write_copies_up_and_lower_stays(stack: Stack) -> None:
    layer = stack.add().file("d/f", b"old content", mode=0o640, uid=3, gid=4, xattrs={"user.x": b"v"})
    paths = stack.open()
    paths.write_at("d/f", 4, b"CONTENT")
    assert paths.read_bytes("d/f") == b"old CONTENT"
    assert (layer.path / "d/f").read_bytes() == b"old content"
    copy = stack.upper / "d" / "f"
    assert copy.read_bytes() == b"old CONTENT"
    status = copy.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 3, 4)
    assert os.getxattr(copy, "user.x") == b"v"


def test_copied_up_parents_keep_their_attributes(stack: Stack) -> None:
    stack.add().dir("a/b", mode=0o711, uid=5, gid=6, mtime=123, xattrs={"user.p": b"1"}).file("a/b/f", b"x")
    os.utime(stack.layers[0].at("a/b"), ns=(123, 123))
    paths = stack.open()
    paths.chmod("a/b/f", 0o600)
    status = (stack.upper / "a" / "b").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime_ns) == (0o711, 5, 123)
    assert os.getxattr(stack.upper / "a" / "b", "user.p") == b"1"


def test_inode_numbers_survive_copy_up_and_remount(trusted: Stack) -> None:
    trusted.add().file("f", b"x").dir("d").symlink("l", "t").fifo("p").file("g", b"y").link("g", "h")
    paths = trusted.open()
    names = ("f", "d", "l", "p", "g", "h")
    before = {name: paths.stat(name).ino for name in names}
    for name in names:
        paths.chown(name, 1, 1)
    paths.write_bytes("f", b"changed")
    paths.rename("f", "renamed")
    assert paths.stat("renamed").ino == before["f"]
    paths.rename("renamed", "f")
    assert {name: paths.stat(name).ino for name in names} == before
    paths = trusted.again(paths)
    assert {name: paths.stat(name).ino for name in names} == before


def test_inode_numbers_of_files_and_directories_survive_in_the_user_form(stack: Stack) -> None:
    stack.add().file("f", b"x").dir("d")
    paths = stack.open()
    before = paths.stat("f").ino, paths.stat("d").ino
    paths.chmod("f", 0o600)
    paths.chmod("d", 0o700)
    paths = stack.again(paths)
    assert (paths.stat("f").ino, paths.stat("d").ino) == before


def test_chmod_and_chown_copy_no_data(trusted: Stack) -> None:
    trusted.add().file("f", b"x" * 1_000_000)
    paths = trusted.open()
    paths.chmod("f", 0o600)
    paths.chown("f", 9, 9)
    paths.utime("f", mtime_ns=77)
    copy = trusted.upper / "f"
    assert copy.stat().st_blocks == 0
    assert copy.stat().st_size == 1_000_000
    assert "trusted.overlay.metacopy" in overlay_names(trusted, copy)
    assert paths.read_bytes("f") == b"x" * 1_000_000
    assert paths.stat("f").mtime_ns == 77
    paths.write_at("f", 10, b"yy")
    assert "trusted.overlay.metacopy" not in overlay_names(trusted, copy)
    assert paths.read_bytes("f") == b"x" * 10 + b"yy" + b"x" * 999_988


def test_a_sparse_file_is_copied_up_sparse(stack: Stack) -> None:
    stack.add().sparse("f", 10_000_000, {5_000_000: b"data"})
    paths = stack.open()
    paths.write_at("f", 0, b"x")
    assert (stack.upper / "f").stat().st_blocks * 512 <= 65536
    assert paths.read_bytes("f", 5_000_000, 4) == b"data"
    assert paths.stat("f").size == 10_000_000


def test_truncation_to_nothing_copies_nothing(stack: Stack) -> None:
    stack.add().file("f", b"x" * 5_000_000)
    paths = stack.open(limit=Limit(bytes=8192))
    paths.truncate("f", 0)
    assert paths.stat("f").size == 0
    assert (stack.upper / "f").stat().st_size == 0


def test_deleting_a_lower_name_leaves_a_whiteout(stack: Stack) -> None:
    stack.add().file("d/f", b"x").file("d/keep", b"k")
    paths = stack.open()
    paths.unlink("d/f")
    assert is_whiteout(stack.upper / "d" / "f")
    assert paths.listdir("d") == [b"keep"]
    paths = stack.again(paths)
    assert paths.listdir("d") == [b"keep"]


def test_deleting_an_upper_name_leaves_nothing(stack: Stack) -> None:
    stack.add().dir("d")
    paths = stack.open()
    paths.write_bytes("d/new", b"n")
    paths.unlink("d/new")
    paths.mkdir("newdir")
    paths.rmdir("newdir")
    assert os.listdir(stack.upper / "d") == []
    assert os.listdir(stack.upper) == ["d"]


def test_whiteouts_are_links_of_one_inode(stack: Stack) -> None:
    layer = stack.add()
    for i in range(10):
        layer.file(f"f{i}", b"")
    paths = stack.open()
    for i in range(10):
        paths.unlink(f"f{i}")
    assert len({os.lstat(stack.upper / f"f{i}").st_ino for i in range(10)}) == 1


def test_a_directory_made_over_a_whiteout_is_opaque(stack: Stack) -> None:
    stack.add().file("d/old", b"o")
    paths = stack.open()
    paths.unlink("d/old")
    paths.rmdir("d")
    paths.mkdir("d")
    assert os.getxattr(stack.upper / "d", stack.layers[0].attr("opaque")) == b"y"
    paths = stack.again(paths)
    assert paths.listdir("d") == []


def test_rmdir_of_a_directory_that_still_shows_something(stack: Stack) -> None:
    stack.add().file("d/low", b"l")
    paths = stack.open()
    fails(errno.ENOTEMPTY, paths.rmdir, "d")
    paths.write_bytes("d/up", b"u")
    paths.unlink("d/low")
    fails(errno.ENOTEMPTY, paths.rmdir, "d")
    paths.unlink("d/up")
    paths.rmdir("d")
    fails(errno.ENOENT, paths.stat, "d")
    assert is_whiteout(stack.upper / "d")


def test_attributes_of_a_removed_lower_directory_that_is_in_use_can_still_be_changed(stack: Stack) -> None:
    stack.add().dir("d")
    view = stack.open().view
    node = view.lookup(view.root, b"d")
    node.nlookup += 1
    view.rmdir(view.root, b"d")
    view.setattr(node, mode=0o2711, uid=5, atime=-1_500_000_000, mtime=view.NOW)
    attr = unpack(view.attr(node))
    assert (attr.mode, attr.uid, attr.gid, attr.nlink, attr.atime_ns) == (0o42711, 5, os.getegid(), 0, -1_500_000_000)
    assert is_whiteout(stack.upper / "d")


def test_a_lower_directory_is_renamed_by_redirect(trusted: Stack) -> None:
    """No data moves: the upper gets an empty directory that names the old path."""
    trusted.add().file("a/b/deep", b"x" * 100_000).dir("c")
    paths = trusted.open()
    paths.rename("a/b", "c/moved")
    assert os.getxattr(trusted.upper / "c" / "moved", "trusted.overlay.redirect") == b"/a/b"
    assert os.listdir(trusted.upper / "c" / "moved") == []
    paths = trusted.again(paths)
    assert paths.read_bytes("c/moved/deep") == b"x" * 100_000
    assert paths.listdir("a") == []


def test_a_lower_directory_is_renamed_in_the_user_form_too(stack: Stack) -> None:
    """Where there are no redirects the subtree is copied; never EXDEV."""
    stack.add().file("a/b/deep", b"x", mode=0o640).symlink("a/b/l", "t").dir("c")
    paths = stack.open()
    paths.rename("a", "c/a")
    paths = stack.again(paths)
    assert paths.read_bytes("c/a/b/deep") == b"x"
    assert paths.readlink("c/a/b/l") == b"t"
    assert paths.listdir() == [b"c"]


def test_a_rename_that_copies_is_refused_whole_when_it_would_pass_the_limit(unprivileged: Stack) -> None:
    unprivileged.add().file("a/one", b"x" * 50_000).file("a/two", b"y" * 50_000)
    paths = unprivileged.open(limit=Limit(bytes=80_000))
    fails(errno.ENOSPC, paths.rename, "a", "b")
    assert sorted(paths.listdir("a")) == [b"one", b"two"]
    assert paths.listdir() == [b"a"]
    assert paths.view.usage().bytes == 0


def test_rename_flags(stack: Stack) -> None:
    stack.add().file("f", b"f").file("g", b"g").file("d/in", b"i")
    paths = stack.open()
    fails(errno.EEXIST, paths.rename, "f", "g", NOREPLACE)
    paths.rename("f", "g", EXCHANGE)
    assert (paths.read_bytes("f"), paths.read_bytes("g")) == (b"g", b"f")
    paths.rename("f", "d", EXCHANGE)
    assert paths.read_bytes("d") == b"g"
    assert paths.listdir("f") == [b"in"]
    fails(errno.EINVAL, paths.rename, "g", "d", EXCHANGE | NOREPLACE)
    paths = stack.again(paths)
    assert paths.listdir("f") == [b"in"]


def test_hard_links_of_a_layer_are_copied_up_under_all_their_names(stack: Stack) -> None:
    stack.add().file("f", b"old").link("f", "g").link("f", "d/h").file("other", b"o")
    paths = stack.open()
    paths.write_bytes("g", b"new")
    assert [paths.read_bytes(n) for n in ("f", "g", "d/h")] == [b"new"] * 3
    assert len({(stack.upper / n).stat().st_ino for n in ("f", "g", "d/h")}) == 1
    paths = stack.again(paths)
    assert paths.stat("f").nlink == 3
    assert paths.read_bytes("d/h") == b"new"


def test_names_of_a_hard_link_are_found_with_few_descriptors(trusted: Stack) -> None:
    layer = trusted.add().file("f", b"data")
    for i in range(150):
        layer.file(f"d{i}/sub/g", b"")
    layer.link("f", "d77/sub/f")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        paths = trusted.open()
        paths.chmod("f", 0o600)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert paths.stat("d77/sub/f").mode & 0o777 == 0o600


def test_unlinking_one_lower_hard_link_lowers_the_count_of_the_others(trusted: Stack) -> None:
    trusted.add().file("f", b"x" * 10_000).link("f", "g").link("f", "h")
    paths = trusted.open()
    paths.unlink("f")
    assert paths.stat("g").nlink == paths.stat("h").nlink == 2
    assert (trusted.upper / "g").stat().st_blocks == 0, "metadata only"
    assert paths.read_bytes("h") == b"x" * 10_000


def test_copy_up_keeps_everything_of_special_files(stack: Stack) -> None:
    stack.add().fifo("p", mode=0o621).symlink("l", "somewhere").char("c", 1, 5).socket("s")
    paths = stack.open()
    for name in ("p", "l", "c", "s"):
        paths.chown(name, 7, 7)
    paths = stack.again(paths)
    assert stat.S_ISFIFO(paths.stat("p").mode)
    assert stat.S_IMODE(paths.stat("p").mode) == 0o621
    assert paths.readlink("l") == b"somewhere"
    assert paths.stat("c").rdev == 0x105  # as the kernel packs 1, 5
    assert {paths.stat(n).uid for n in ("p", "l", "c", "s")} == {7}
    assert paths.stat("l").mtime_ns == EPOCH


def test_nobody_makes_a_whiteout(stack: Stack) -> None:
    paths = stack.open()
    fails(errno.EPERM, paths.mknod, "w", stat.S_IFCHR | 0o600, 0)
    assert paths.listdir() == []


def test_overlay_xattrs_set_through_the_view_are_escaped(stack: Stack) -> None:
    name = stack.layers[0].attr("opaque") if stack.layers else f"{stack.form}.overlay.opaque"
    stack.add().file("d/old", b"o")
    paths = stack.open()
    paths.setxattr("d", name, b"y")
    assert paths.listxattr("d") == [name.encode()]
    paths = stack.again(paths)
    assert paths.getxattr("d", name) == b"y"
    assert paths.listdir("d") == [b"old"]
    assert f"{stack.form}.overlay.overlay.opaque" in os.listxattr(stack.upper / "d")


def test_work_is_empty_after_every_kind_of_change(stack: Stack) -> None:
    stack.add().file("f", b"x" * 5000).file("g", b"y").link("g", "h").file("d/in", b"i").file("w", b"w")
    paths = stack.open()
    paths.write_at("f", 0, b"X")
    paths.chmod("g", 0o600)
    paths.rename("d", "e")
    paths.unlink("w")
    paths.mkdir("w")
    paths.rename("f", "e/f")
    paths.rename("g", "w", EXCHANGE)
    left = [
        os.path.relpath(os.path.join(at, name), stack.work) for at, _, files in os.walk(stack.work) for name in files
    ]
    assert all(is_whiteout(stack.work / name) for name in left), left  # the one that all whiteouts are links of
    assert len(left) <= 1


def test_the_kernel_reads_what_the_view_wrote(stack: Stack) -> None:
    """The same changes again by the kernel's eye: names, types, owners, times, content, link counts."""
    low = stack.add().file("f", b"f" * 9000).file("gone", b"g").file("a/b/c", b"c").file("h1", b"h").link("h1", "h2")
    low.file("m", b"m" * 9000).symlink("l", "f")
    paths = stack.open()
    paths.write_at("f", 100, b"changed")
    paths.unlink("gone")
    paths.rename("a/b", "moved")
    paths.chmod("m", 0o4711)
    paths.chown("h1", 8, 8)
    paths.mkdir("new")
    paths.write_bytes("new/file", b"n")
    paths.symlink("x", "new/link")
    paths.setxattr("new", "user.x", b"1")
    paths.utime("new", mtime_ns=5)
    paths.rmtree("a")
    paths.mkdir("a")
    shown = {path.decode(): attr for path, attr in paths.walk()}
    data = {path: paths.read_bytes(path) for path, attr in shown.items() if stat.S_ISREG(attr.mode)}
    paths.view.close()
    kernel = stack.kernel()
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
            assert data[path] == (kernel / path).read_bytes(), path
            assert attr.nlink == entry.nlink, path


def test_ids_are_mapped_both_ways(stack: Stack) -> None:
    stack.add().file("f", b"x", uid=1000, gid=1001)
    paths = stack.open(uid_map=((0, 100_000, 65536),), gid_map=((0, 200_000, 65536),))
    attr = paths.stat("f")
    assert (attr.uid, attr.gid) == (101_000, 201_001)
    paths.chown("f", 100_005, 200_006)
    status = (stack.upper / "f").stat()
    assert (status.st_uid, status.st_gid) == (5, 6)


def test_whom_no_range_has_makes_files_as_nobody_but_gives_none_away(stack: Stack) -> None:
    stack.add().file("f", b"x")
    paths = stack.open(uid_map=((0, 100_000, 65536),), gid_map=((0, 200_000, 65536),))
    paths.write_bytes("new", b"")
    status = (stack.upper / "new").stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)
    fails(errno.EOVERFLOW, paths.chown, "f", 5, -1)


def test_squashed_ids(stack: Stack) -> None:
    stack.add().file("f", b"x", uid=1000)
    paths = stack.open(squash_uid=42, squash_gid=43)
    assert (paths.stat("f").uid, paths.stat("f").gid) == (42, 43)


def test_no_xattrs_when_asked_for_none(stack: Stack) -> None:
    stack.add().file("f", b"x", xattrs={"user.x": b"1"})
    paths = stack.open(noxattrs=True)
    fails(errno.EOPNOTSUPP, paths.getxattr, "f", "user.x")
    fails(errno.EOPNOTSUPP, paths.setxattr, "f", "user.x", b"2")


def test_forgotten_nodes_are_found_again_by_their_number(stack: Stack) -> None:
    stack.add().file("a/b/f", b"x")
    paths = stack.open()
    node = paths.node("a/b/f")
    node.nlookup += 1
    number = node.id
    paths.view.forget(number, 1)
    fails(errno.ESTALE, paths.view.node, number)
    assert paths.view.revive(number).id == number
    paths.unlink("a/b/f")
    fails(errno.ESTALE, paths.view.revive, number)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 1_048_576 + 3])
def test_a_copy_is_the_whole_file(stack: Stack, count: int) -> None:
    data = bytes(i * 31 % 251 for i in range(count))
    stack.add().file("f", data)
    paths = stack.open()
    paths.setxattr("f", "user.touch", b"1")
    paths.write_at("f", count, b"+end")
    assert paths.read_bytes("f") == data + b"+end"


def test_a_server_without_privilege_keeps_set_id_bits_that_a_write_must_not_clear(
    space: Path, ordinary_user: int
) -> None:
    """Pages that were changed through a map arrive as writes that kill nothing; the host would."""
    space.chmod(0o777)
    script = f"""
import os
from cowfs.union import View
for name in ("lower", "upper", "work"):
    os.mkdir("{space}/" + name)
view = View(["{space}/lower"], "{space}/upper", "{space}/work")
node = view.mknod(view.root, b"f", 0o100755, 0, os.getuid(), os.getgid())
view.setattr(node, mode=0o6755)
view.write(node, 0, b"x")
kept = view.mode(node)
view.write(node, 0, b"x", kill=True)
print(oct(kept), oct(view.mode(node)))
"""
    done = users.run_python(script, HOME=str(space))
    assert (done.stdout, done.stderr) == ("0o106755 0o100755\n", "")
