"""Apply: what each member becomes, in the overlay forms and on a full tree."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from support import trees
from support.archives import apply, directory, hardlink, member, symlink, tar
from support.hostfs import HostFs
from support.users import acting_as

from cowfs.archive import ApplyOptions, DirTree, LowerStat
from cowfs.archive.options import OVERRIDE_XATTR
from cowfs.errors import InvalidArgument, LimitExceeded, Unsupported

NS = 10**9


def _is_whiteout(path: Path) -> bool:
    status = os.lstat(path)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _opaque(path: Path, form: str = "trusted") -> bytes | None:
    try:
        return os.getxattr(path, f"{form}.overlay.opaque")
    except OSError:
        return None


# Members become files --------------------------------------------------------------------------


def test_every_type_with_its_attributes(space: Path) -> None:
    layer = space / "layer"
    done = apply(
        tar(
            directory("./", mode=0o750, uid=7, gid=8, mtime=11),
            directory("d", mode=0o2775, uid=1, gid=2, mtime=12),
            member("d/file", b"hello", mode=0o4755, uid=3, gid=4, mtime=13),
            symlink("d/link", "../nowhere", uid=5, gid=6, mtime=14),
            hardlink("d/hard", "d/file"),
            member("d/fifo", type=tarfile.FIFOTYPE, mode=0o620, mtime=15, uid=9),
            member("d/char", type=tarfile.CHRTYPE, device=(5, 1), mode=0o666, mtime=16),
            member("d/block", type=tarfile.BLKTYPE, device=(259, 70000), mode=0o660, mtime=17),
        ),
        layer,
    )
    tree = trees.snapshot(layer)
    assert done.entries == 8
    assert (tree[""].mode, tree[""].uid, tree[""].gid, tree[""].mtime) == (0o750, 7, 8, 11 * NS)
    assert (tree["d"].mode, tree["d"].uid, tree["d"].gid, tree["d"].mtime) == (0o2775, 1, 2, 12 * NS)
    file = tree["d/file"]
    assert (file.mode, file.uid, file.gid, file.mtime, file.size) == (0o4755, 3, 4, 13 * NS, 5)
    assert tree["d/hard"].same_as == file.same_as == "d/file"
    link = tree["d/link"]
    assert (link.content, link.uid, link.gid, link.mtime) == ("../nowhere", 5, 6, 14 * NS)
    assert (tree["d/fifo"].type, tree["d/fifo"].mode, tree["d/fifo"].uid) == ("fifo", 0o620, 9)
    assert (tree["d/char"].type, tree["d/char"].rdev, tree["d/char"].mode) == ("char", os.makedev(5, 1), 0o666)
    assert (tree["d/block"].rdev, tree["d/block"].mtime) == (os.makedev(259, 70000), 17 * NS)


def test_a_group_inherited_from_a_setgid_directory_is_put_right(space: Path) -> None:
    apply(
        tar(
            directory("d", mode=0o2755, gid=77),
            member("d/file", b"x"),
            directory("d/sub", mode=0o755),
            member("d/implied/file"),
            symlink("d/link", "x"),
        ),
        space / "layer",
    )
    tree = trees.snapshot(space / "layer")
    assert {name: (tree[name].gid, oct(tree[name].mode)) for name in ("d/file", "d/sub", "d/implied", "d/link")} == {
        "d/file": (0, "0o644"), "d/sub": (0, "0o755"), "d/implied": (0, "0o755"), "d/link": (0, "0o777"),
    }  # fmt: skip


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(space: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        apply(tar(directory("d", mode=0o777), member("d/f", mode=0o666), member("x/y", mode=0o600)), space / "layer")
    finally:
        os.umask(old)
    tree = trees.snapshot(space / "layer")
    assert [tree[name].mode for name in ("d", "d/f", "x", "x/y")] == [0o777, 0o666, 0o755, 0o600]


def test_directory_times_survive_entries_in_any_order(space: Path) -> None:
    apply(
        tar(
            directory("a", mtime=1), member("a/1"), directory("b", mtime=2), member("b/1"), member("a/2"),
            directory("a/s", mtime=3), member("b/2"), member("a/s/x"),
        ),
        space / "layer",
    )  # fmt: skip
    tree = trees.snapshot(space / "layer")
    assert [tree[name].mtime for name in ("a", "b", "a/s")] == [1 * NS, 2 * NS, 3 * NS]


def test_directory_times_survive_more_directories_than_are_kept_open(space: Path) -> None:
    names = [f"d{n}" for n in range(600)]
    apply(
        tar(*(directory(name, mtime=n) for n, name in enumerate(names)), *(member(f"{name}/f") for name in names)),
        space / "layer",
    )
    tree = trees.snapshot(space / "layer")
    assert [tree[name].mtime for name in names] == [n * NS for n in range(600)]


@pytest.mark.parametrize(
    "text", ["1.123456789", "-5", "-0.5", "9223372037.000000001", "13000000000.25", "0", "2147483648.5"]
)
def test_times_are_kept_to_the_nanosecond(space: Path, text: str) -> None:
    apply(tar(member("f", pax={"mtime": text}), symlink("l", "x", pax={"mtime": text})), space / "layer")
    seconds, _, fraction = text.lstrip("-").partition(".")
    nanos = int(seconds) * NS + int(fraction.ljust(9, "0") or 0)
    nanos = -nanos if text.startswith("-") else nanos
    assert os.lstat(space / "layer" / "f").st_mtime_ns == nanos
    assert os.lstat(space / "layer" / "l").st_mtime_ns == nanos


def test_a_time_the_file_system_cannot_keep_is_refused(fs: HostFs) -> None:
    target = fs.fresh("archive-times")
    for text in ("-99999999999", "99999999999999"):
        try:
            apply(tar(member("f", pax={"mtime": text})), target)
        except InvalidArgument as error:
            assert "time" in str(error)
            assert "'f'" in str(error)
        else:
            assert os.stat(target / "f").st_mtime_ns == int(text) * NS


def test_a_time_no_clock_can_hold_is_refused(space: Path) -> None:
    with pytest.raises(InvalidArgument, match="time"):
        apply(tar(member("f", pax={"mtime": "9" * 19})), space / "layer")


def test_extended_attributes_of_every_kind(space: Path) -> None:
    cap = b"\x01\x00\x00\x02\x00\x04\x00\x00" + bytes(12)
    data = tar(
        directory("d", pax={"SCHILY.xattr.user.on-dir": "1"}),
        member(
            "d/f",
            b"x",
            pax={"SCHILY.xattr.user.name": "value", "SCHILY.xattr.security.capability": cap.decode("latin")},
        ),
        symlink("d/l", "x", pax={"SCHILY.xattr.trusted.t": "2"}),
    )
    apply(data, space / "layer")
    tree = trees.snapshot(space / "layer")
    assert tree["d"].xattrs == (("user.on-dir", b"1"),)
    assert dict(tree["d/f"].xattrs) == {"user.name": b"value", "security.capability": cap}
    assert tree["d/l"].xattrs == (("trusted.t", b"2"),)
    apply(data, space / "other", options=ApplyOptions(xattrs=False))
    assert all(not entry.xattrs for entry in trees.snapshot(space / "other").values())


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_dialect(space: Path, format: Literal[0, 1, 2]) -> None:
    deep = "/".join(["directory" * 5] * 4) if format != tarfile.USTAR_FORMAT else "/".join(["d" * 40] * 5)
    target = "t" * (99 if format == tarfile.USTAR_FORMAT else 3000)
    apply(tar(member(deep + "/f", b"1", format=format), symlink("l", target, format=format)), space / "layer")
    assert (space / "layer" / deep / "f").read_bytes() == b"1"
    assert os.readlink(space / "layer" / "l") == target


def test_names_that_are_not_utf8(space: Path) -> None:
    apply(tar(member(b"caf\xe9/\xff\xfe", b"1", format=tarfile.GNU_FORMAT)), space / "layer")
    assert Path(os.fsdecode(bytes(space / "layer") + b"/caf\xe9/\xff\xfe")).read_bytes() == b"1"


def test_large_numbers_in_base_256(space: Path) -> None:
    big = 4_000_000_000
    apply(tar(member("f", uid=big, gid=big, mtime=-7, format=tarfile.GNU_FORMAT)), space / "layer")
    status = os.stat(space / "layer" / "f")
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (big, big, -7 * NS)


def test_absolute_and_dotted_names_are_relative(space: Path) -> None:
    apply(tar(member("/etc//passwd", b"1"), member("./a/./b", b"2"), hardlink("/h", "/etc/passwd")), space / "layer")
    assert sorted(trees.snapshot(space / "layer")) == ["", "a", "a/b", "etc", "etc/passwd", "h"]


def test_global_headers_set_times_and_owners_only(space: Path) -> None:
    glob = tarfile.TarInfo.create_pax_global_header({"mtime": "5", "comment": "x"})
    apply(tar(glob, member("f", mtime=9)), space / "layer")
    assert os.stat(space / "layer" / "f").st_mtime_ns == 5 * NS
    with pytest.raises(InvalidArgument, match="global"):
        apply(tar(tarfile.TarInfo.create_pax_global_header({"path": "x"}), member("f")), space / "two")


def test_the_last_of_two_entries_of_one_name_wins(space: Path) -> None:
    apply(
        tar(
            member("f", b"first"), hardlink("keeps", "f"), member("f", b"second"),
            directory("d"), member("d/inner"), member("d", b"file now"),
            symlink("s", "x"), directory("s"), member("s/in", b"1"),
            directory("same", mode=0o700, mtime=1), member("same/kept"), directory("same", mode=0o711, mtime=2),
        ),
        space / "layer",
    )  # fmt: skip
    layer = space / "layer"
    assert (layer / "f").read_bytes() == b"second"
    assert (layer / "keeps").read_bytes() == b"first"
    assert (layer / "d").read_bytes() == b"file now"
    assert (layer / "s" / "in").read_bytes() == b"1"
    tree = trees.snapshot(layer)
    assert "same/kept" in tree
    assert (tree["same"].mode, tree["same"].mtime) == (0o711, 2 * NS)


def test_digests_and_progress_are_reported(space: Path) -> None:
    import hashlib

    digests: dict[bytes, str] = {}
    steps: list[tuple[int, int]] = []
    tee = io.BytesIO()
    data = tar(member("big", bytes(3 << 20)), member("small", b"x"), member("empty"))
    done = apply(data, space / "layer", on_file=digests.__setitem__, progress=lambda *step: steps.append(step), tee=tee)
    assert digests == {
        b"big": hashlib.sha256(bytes(3 << 20)).hexdigest(),
        b"small": hashlib.sha256(b"x").hexdigest(),
        b"empty": hashlib.sha256(b"").hexdigest(),
    }
    assert tee.getvalue() == data
    assert steps[-1] == (len(data), 3)
    assert done.diff_id == done.blob_digest == "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_wrong_digest_is_an_error(space: Path) -> None:
    from cowfs.errors import Corrupt

    data = tar(member("f"))
    with pytest.raises(Corrupt, match="diff id"):
        apply(data, space / "layer", diff_id="sha256:" + "0" * 64)
    with pytest.raises(Corrupt, match="digest"):
        apply(data, space / "layer2", blob_digest="sha256:" + "0" * 64)


# Whiteouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trusted", "user"])
def test_whiteouts_become_overlay_whiteouts(space: Path, form: str) -> None:
    done = apply(
        tar(directory("d"), member("d/.wh.gone"), member("opq/.wh..wh..opq"), member("opq/new")),
        space / "layer", form=form,
    )  # fmt: skip
    layer = space / "layer"
    assert _is_whiteout(layer / "d" / "gone")
    assert _opaque(layer / "opq", form) == b"y"
    assert _opaque(layer / "d", form) is None
    assert done.whiteouts == 2
    assert sorted(trees.snapshot(layer)) == ["", "d", "d/gone", "opq", "opq/new"]


@pytest.mark.parametrize("order", [0, 1])
def test_a_whiteout_and_an_entry_of_one_name_mean_the_entry_hides_all_below(space: Path, order: int) -> None:
    parts = [[member(".wh.dir"), member(".wh.file")], [directory("dir"), member("dir/f"), member("file", b"x")]]
    ordered = parts[order] + parts[1 - order]
    apply(tar(*ordered), space / "layer")
    assert _opaque(space / "layer" / "dir") == b"y"
    assert (space / "layer" / "file").read_bytes() == b"x"
    full = space / "full"
    (full / "dir").mkdir(parents=True)
    (full / "dir" / "old").touch()
    (full / "file").touch()
    apply(tar(*ordered), full, form="plain")
    assert sorted(trees.snapshot(full)) == ["", "dir", "dir/f", "file"]


def _full_tree(path: Path) -> None:
    for name in ("d/sub", "d/other", "keep"):
        (path / name).mkdir(parents=True)
    for name in ("d/sub/old", "d/sub/both", "d/other/x", "d/file", "keep/k"):
        (path / name).write_text("lower " + name)
    os.symlink("d", path / "link")
    os.link(path / "keep" / "k", path / "keep" / "hard")
    os.utime(path / "keep", ns=(5, 5))


LAYERS = {
    "whiteout of a file": [member("d/.wh.file")],
    "whiteout of a directory": [member(".wh.d")],
    "opaque first": [directory("d"), member("d/.wh..wh..opq"), member("d/new", b"1")],
    "opaque after its siblings": [directory("d"), member("d/sub/both", b"1"), member("d/.wh..wh..opq")],
    "opaque without the directory": [member("d/.wh..wh..opq")],
    "a file in place of a directory": [member("d", b"file")],
    "a directory in place of a file": [directory("d"), directory("d/file", mode=0o700), member("d/file/x")],
    "a file in place of a link": [member("link", b"now a file")],
    "a directory in place of a link": [directory("link"), member("link/x", b"1")],
    "an implied directory in place of a link": [member("link/x", b"1")],
    "an implied directory in place of a file": [member("d/file/x", b"1")],
    "a link in place of a directory": [symlink("keep", "d")],
    "a file rewritten": [member("keep/k", b"new")],
    "directory attributes": [directory("keep", mode=0o700, uid=3, mtime=77)],
    "new hard links": [member("keep/n", b"1"), hardlink("keep/n2", "keep/n")],
    "whiteout of nothing": [member("keep/.wh.nothing")],
    "deep delete and recreate": [member(".wh.d"), directory("d", mode=0o711), directory("d/sub"), member("d/sub/n", b"2")],
}  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("what", LAYERS)
def test_a_layer_means_the_same_on_the_kernels_overlay_and_on_a_full_tree(space: Path, what: str) -> None:
    """The kernel's own merge of the overlay form is the judge of the plain form."""
    from support import namespace

    lower, layer, full, merged = (space / name for name in ("lower", "layer", "full", "merged"))
    for path in (lower, full):
        path.mkdir()
        _full_tree(path)
    data = tar(directory("./", mtime=1), *LAYERS[what])
    fd = os.open(lower, os.O_RDONLY)
    try:
        apply(data, layer, lower=DirTree(fd))
    finally:
        os.close(fd)
    apply(data, full, form="plain")
    merged.mkdir()
    (space / "empty").mkdir()
    options = f"lowerdir={layer}:{lower},redirect_dir=on,metacopy=on"
    namespace.mount("overlay", str(merged), "overlay", 1, options)
    try:
        # a lower file's other names and times of directories the layer does not list are not the layer's business
        left, right = trees.snapshot(merged), trees.snapshot(full)
    finally:
        namespace.umount(str(merged))
    ignore = {"ctime", "same_as", "nlink"}
    for name in set(left) & set(right):
        if left[name].mtime > 1e18 and right[name].mtime > 1e18:  # made while the test ran
            left[name] = right[name] if left[name].content == right[name].content else left[name]
    trees.assert_same(left, right, ignore=ignore, names=("overlay", "plain"))


def test_a_non_empty_target_counts_as_older_than_the_archive(space: Path) -> None:
    """``cowfs apply`` onto an active snapshot: its upper has content already."""
    layer = space / "layer"
    _full_tree(layer)
    os.mknod(layer / "was-deleted", stat.S_IFCHR, 0)
    apply(
        tar(
            member("d/.wh.file"), member("d/sub/.wh..wh..opq"), member("d/sub/n", b"1"), member("keep/k", b"new"),
            directory("was-deleted"), hardlink("keep/again", "keep/hard"),
        ),
        layer,
    )  # fmt: skip
    assert _is_whiteout(layer / "d" / "file")
    assert sorted(os.listdir(layer / "d" / "sub")) == ["n"]
    assert _opaque(layer / "d" / "sub") == b"y"
    assert (layer / "keep" / "hard").read_text() == "lower keep/k"  # replaced, not written through
    assert (layer / "keep" / "k").read_bytes() == b"new"
    assert os.stat(layer / "keep" / "again").st_ino == os.stat(layer / "keep" / "hard").st_ino
    assert _opaque(layer / "was-deleted") == b"y"
    assert os.stat(layer / "keep").st_mtime_ns == 5


# Parents and lower layers ------------------------------------------------------------------------


def test_missing_parents_are_roots_and_of_the_epoch(space: Path) -> None:
    apply(tar(member("a/b/f", uid=5)), space / "layer")
    tree = trees.snapshot(space / "layer")
    for name in ("", "a", "a/b"):
        assert (tree[name].mode, tree[name].uid, tree[name].gid, tree[name].mtime) == (0o755, 0, 0, 0)


def test_missing_parents_are_as_in_the_lower_layer(space: Path) -> None:
    lower = space / "lower"
    (lower / "a").mkdir(parents=True)
    os.chmod(lower, 0o711)
    os.chown(lower / "a", 11, 12)
    os.chmod(lower / "a", 0o2750)
    os.setxattr(lower / "a", "user.x", b"y")
    os.utime(lower / "a", ns=(3, 4))
    fd = os.open(lower, os.O_RDONLY)
    try:
        apply(tar(member("a/b/f"), member("a/.wh.x")), space / "layer", lower=DirTree(fd))
        apply(tar(member(".wh.a"), member("a/b/f")), space / "hidden", lower=DirTree(fd))
    finally:
        os.close(fd)
    tree = trees.snapshot(space / "layer")
    assert tree[""].mode == 0o711
    above = tree["a"]
    assert (above.mode, above.uid, above.gid, above.mtime, above.xattrs) == (0o2750, 11, 12, 4, (("user.x", b"y"),))
    assert (tree["a/b"].mode, tree["a/b"].gid) == (0o755, 0)
    assert trees.snapshot(space / "hidden")["a"].mode == 0o755  # the lower one is deleted


def test_a_hard_link_to_a_lower_file_copies_it_up(space: Path) -> None:
    lower = space / "lower"
    (lower / "d").mkdir(parents=True)
    (lower / "d" / "f").write_bytes(b"lower data")
    os.chown(lower / "d" / "f", 3, 4)
    os.utime(lower / "d" / "f", ns=(1, 2))
    fd = os.open(lower, os.O_RDONLY)
    try:
        apply(tar(hardlink("x/link", "d/f")), space / "layer", lower=DirTree(fd))
        with pytest.raises(InvalidArgument, match=r"'two'.*'nothing'"):
            apply(tar(hardlink("two", "nothing")), space / "l2", lower=DirTree(fd))
        with pytest.raises(InvalidArgument, match="deletes"):
            apply(tar(member("d/.wh.f"), hardlink("two", "d/f")), space / "l3", lower=DirTree(fd))
    finally:
        os.close(fd)
    tree = trees.snapshot(space / "layer")
    assert tree["x/link"].same_as == tree["d/f"].same_as == "d/f"
    assert (tree["d/f"].uid, tree["d/f"].gid, tree["d/f"].mtime, tree["d/f"].size) == (3, 4, 2, 10)
    (space / "layer" / "x" / "link").write_bytes(b"changed")
    assert (lower / "d" / "f").read_bytes() == b"lower data"


# Without privilege -------------------------------------------------------------------------------


@pytest.fixture
def homely(space: Path) -> Path:
    space.chmod(0o777)
    return space


MIXED = tar(
    directory("d", mode=0o555, uid=9, gid=9, mtime=3),
    member("d/f", b"x", mode=0o4755, mtime=4),
    member("d/dev", type=tarfile.CHRTYPE, device=(5, 1), mode=0o666),
    member("d/pipe", type=tarfile.FIFOTYPE),
    symlink("d/l", "f"),
    member("d/.wh.gone"),
    directory("closed", mode=0o000),
    member("closed/inner", b"y"),
)


def test_without_privilege_the_default_is_to_fail_naming_the_entry(homely: Path) -> None:
    with acting_as(), pytest.raises(Unsupported, match=r"entry 1 'd/'.*owner 9:9.*--owners xattr"):
        apply(MIXED, homely / "layer", form="user")
    with acting_as(), pytest.raises(Unsupported, match="device"):
        apply(tar(member("dev", type=tarfile.CHRTYPE, device=(5, 1), uid=4321, gid=4321)), homely / "l2", form="user")


def test_without_privilege_owners_can_be_left_out(homely: Path) -> None:
    with acting_as():
        done = apply(MIXED, homely / "layer", form="user", options=ApplyOptions(owners="ignore"))
    tree = trees.snapshot(homely / "layer")
    assert tree["d/f"].mode == 0o755  # no set-id bit without its owner
    assert tree["d"].mode == 0o555
    assert tree["closed"].mode == 0
    assert tree["closed/inner"].size == 1
    assert {entry.uid for entry in tree.values()} == {4321}
    assert "d/dev" not in tree
    assert done.skipped == 1
    assert _is_whiteout(homely / "layer" / "d" / "gone")


def test_without_privilege_owners_can_be_recorded_as_fuse_overlayfs_does(homely: Path) -> None:
    with acting_as():
        apply(MIXED, homely / "layer", form="user", options=ApplyOptions(owners="xattr"))
    tree = trees.snapshot(homely / "layer")
    recorded = {
        path: dict(entry.xattrs)[OVERRIDE_XATTR.decode()]
        for path, entry in tree.items()
        if OVERRIDE_XATTR.decode() in dict(entry.xattrs)
    }
    assert recorded == {
        "": b"0:0:0755:dir",
        "d": b"9:9:0555:dir",
        "d/f": b"0:0:04755:file",
        "d/dev": b"0:0:0666:char-5-1",
        "d/pipe": b"0:0:0644:pipe",
        "closed": b"0:0:00:dir",
        "closed/inner": b"0:0:0644:file",
    }
    assert tree["d/f"].mode == 0o755
    assert tree["closed"].mode & 0o700 == 0o700
    assert tree["d/dev"].type == "file"


def test_without_privilege_privileged_attributes_fail_or_are_counted(homely: Path) -> None:
    data = tar(
        member("f", uid=4321, gid=4321, pax={"SCHILY.xattr.trusted.x": "1"}), directory("./", uid=4321, gid=4321)
    )
    for path in ("layer", "l2"):
        (homely / path).mkdir()
        os.chown(homely / path, 4321, 4321)
    with acting_as(), pytest.raises(Unsupported, match=r"'f'.*trusted\.x"):
        apply(data, homely / "layer", form="plain")
    with acting_as():
        done = apply(data, homely / "l2", form="user", options=ApplyOptions(owners="ignore"))
    assert done.dropped == {"trusted.x": 1}


# Bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "what"),
    [
        (tar(*(member(f"f{n}") for n in range(11))), {"max_entries": 10}, "more than 10 entries"),
        (tar(member("f", bytes(5000))), {"max_bytes": 4096}, "longer than 4096"),
        (tar(member("f", bytes(5000))), {"max_file": 4096}, "'f'.*5000 bytes"),
        (tar(member("a/" * 20 + "f")), {"max_depth": 20}, "21 directories deep"),
        (tar(member("/".join(["n" * 200] * 3))), {"max_path": 500}, "602 bytes long"),
        (tar(member("n" * 5000)), {"max_header": 4096}, "extension header of"),
    ],
)
def test_bounds_are_kept_and_named(space: Path, data: bytes, options: dict[str, int], what: str) -> None:
    with pytest.raises(LimitExceeded, match=what):
        apply(data, space / "layer", options=ApplyOptions(**options))  # type: ignore[arg-type]


def test_a_lower_tree_answers_for_what_is_there_and_not_for_what_is_not(space: Path) -> None:
    (space / "d").mkdir()
    (space / "d" / "f").write_bytes(b"x")
    os.symlink("d", space / "l")
    fd = os.open(space, os.O_RDONLY)
    try:
        tree = DirTree(fd)
        assert isinstance(tree.stat(b"d/f"), LowerStat)
        for missing in (b"nothing", b"l/f", b"d/f/x"):
            assert tree.stat(missing) is None
        assert b"".join(tree.read(b"d/f")) == b"x"
        with pytest.raises(OSError, match="symbolic links"):
            list(tree.read(b"l/f"))
    finally:
        os.close(fd)
