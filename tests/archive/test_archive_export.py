"""Export: reproducible bytes that GNU tar and bsdtar read, and that apply turns into the same tree."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support import trees
from support.archives import apply, directory, hardlink, member, symlink, tar
from support.users import acting_as

from cowfs.archive import (
    ApplyOptions,
    DirTree,
    Exported,
    apply_layer,
    export_changes,
    export_layer,
    export_tree,
)
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Change

EVERYTHING = tar(
    directory("./", mode=0o711, uid=1, gid=2, mtime=5),
    directory("d", mode=0o2770, uid=70000, gid=3_000_000, mtime=-7),
    member("d/file", b"hello" * 1000, mode=0o4755, pax={"mtime": "12.000000001"}),
    member("d/empty", mode=0),
    hardlink("d/hard", "d/file"),
    symlink("d/link", "../nowhere", uid=5),
    member("d/fifo", type=tarfile.FIFOTYPE, mode=0o600),
    member("d/dev", type=tarfile.BLKTYPE, device=(8, 300), mode=0o660),
    member("d/" + "long" * 60, b"1"),
    member("d/caf\u00e9", b"2", pax={"SCHILY.xattr.user.k": "v"}),
    symlink("d/long-link", "t" * 1000),
    member("big", bytes(range(256)) * 4000),
    directory("opq"),
    member("opq/.wh..wh..opq"),
    member("opq/x", b"3"),
    member(".wh.gone"),
    member("d/.wh.gone too"),
)


def _export(path: Path, **options: object) -> tuple[bytes, Exported]:
    out = io.BytesIO()
    done = export_layer(str(path), out, **options)  # type: ignore[arg-type]
    return out.getvalue(), done


def _same_tree(left: Path, right: Path) -> None:
    """Equal, but for the time of a whiteout, which says nothing."""
    both = trees.snapshot(left), trees.snapshot(right)
    for path in set(both[0]) & set(both[1]):
        if all(tree[path].type == "char" and tree[path].rdev == 0 for tree in both):
            both[0][path] = both[1][path]
    trees.assert_same(*both)


@pytest.mark.parametrize("form", ["trusted", "user"])
def test_an_exported_layer_applies_to_the_same_layer(space: Path, form: str) -> None:
    apply(EVERYTHING, space / "one", form=form)
    data, done = _export(space / "one", form=form)
    applied = apply(data, space / "two", form=form, diff_id=done.diff_id)
    _same_tree(space / "one", space / "two")
    assert applied.entries == done.entries
    assert (done.size, done.blob_size) == (len(data), len(data))
    assert _export(space / "two", form=form)[0] == data


def test_both_forms_of_a_layer_export_to_the_same_bytes(space: Path) -> None:
    apply(EVERYTHING, space / "one", form="trusted")
    apply(EVERYTHING, space / "two", form="user")
    assert _export(space / "one", form="trusted")[0] == _export(space / "two", form="user")[0]


def test_the_order_on_disk_does_not_matter(space: Path) -> None:
    names = [f"n{n}" for n in range(500)]
    parts = [member(name, name.encode()) for name in names]
    apply(tar(*parts), space / "one")
    apply(tar(*reversed(parts)), space / "two")
    assert _export(space / "one")[0] == _export(space / "two")[0]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_every_compression_is_reproducible_and_has_the_digests_it_says(space: Path, compression: str) -> None:
    import hashlib

    if compression == "zstd":
        pytest.importorskip("zstandard")
    apply(EVERYTHING, space / "one")
    data, done = _export(space / "one", compression=compression)
    again, _ = _export(space / "one", compression=compression)
    assert data == again
    assert done.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert done.diff_id == _export(space / "one")[1].diff_id
    applied = apply(data, space / "two", diff_id=done.diff_id, blob_digest=done.digest)
    assert applied.compression == compression
    with pytest.raises(InvalidArgument, match="compression"):
        _export(space / "one", compression="lzw")


def test_plain_entries_are_ustar_and_whiteouts_come_first(space: Path) -> None:
    apply(
        tar(directory("./", mtime=1), directory("d", mtime=1), member("d/!before", b"x"), member("d/.wh.z"),
            member("d/.wh..wh..opq"), member("d/a", b"y")),
        space / "one",
    )  # fmt: skip
    data, _ = _export(space / "one")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
    assert [info.name for info in members] == [".", "d", "d/.wh..wh..opq", "d/.wh.z", "d/!before", "d/a"]
    assert all(not info.pax_headers for info in members)
    assert len(data) == 512 * (6 + 2 + 2)


def test_holes_do_not_show(space: Path) -> None:
    (space / "one").mkdir()
    with open(space / "one" / "f", "wb") as file:
        file.truncate(1 << 20)
    shutil.copytree(space / "one", space / "two")
    (space / "two" / "f").write_bytes(bytes(1 << 20))
    for side in ("one", "two"):
        os.utime(space / side / "f", ns=(1, 1))
        os.utime(space / side, ns=(1, 1))
    assert _export(space / "one")[0] == _export(space / "two")[0]


@pytest.mark.parametrize("tool", ["cowfs", "tar", "bsdtar"])
def test_holes_can_be_kept(space: Path, tool: str) -> None:
    """Data at the start, in the middle, at the end, nowhere; and a small file that is not worth it."""
    one = space / "one"
    one.mkdir()
    size = 1 << 20
    for name, spots in {
        "start": [0],
        "middle": [300_000],
        "end": [size - 5000],
        "none": [],
        "many": range(0, size, 65536),
    }.items():
        with open(one / name, "wb") as file:
            for spot in spots:
                file.seek(spot)
                file.write(name.encode() * 1000)
            file.truncate(size)
    (one / "small").write_bytes(b"x")
    for name in os.listdir(one):
        os.utime(one / name, ns=(1, 1_500_000_000))
    os.setxattr(one / "many", "user.k", b"v")
    data, _ = _export(one, sparse=True)
    assert len(data) < 1 << 19
    (space / "two").mkdir()
    if tool == "cowfs":
        log = io.BytesIO()
        apply(data, space / "two", log=log)
    else:
        (space / "layer.tar").write_bytes(data)
        flags = ["--xattrs", "--xattrs-include=*"] if tool == "tar" else ["--xattrs"]
        subprocess.run([_tool(tool), *flags, "-xpf", str(space / "layer.tar"), "-C", str(space / "two")], check=True)
    for side in ("one", "two"):
        os.utime(space / side, ns=(1, 1))
    _same_tree(one, space / "two")
    if tool == "cowfs":
        assert sum(os.stat(space / "two" / name).st_blocks for name in os.listdir(one)) * 512 < size


def test_sockets_are_left_out(space: Path) -> None:
    (space / "one").mkdir()
    os.mknod(space / "one" / "socket", stat.S_IFSOCK | 0o600)
    with tarfile.open(fileobj=io.BytesIO(_export(space / "one")[0])) as archive:
        assert archive.getnames() == ["."]


def test_a_real_file_with_a_reserved_name_is_refused_in_a_layer_and_kept_in_a_plain_tar(space: Path) -> None:
    (space / "one").mkdir()
    (space / "one" / ".wh.real").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"'\.wh\.real'"):
        _export(space / "one")
    fd = os.open(space / "one", os.O_RDONLY)
    try:
        out = io.BytesIO()
        export_tree(DirTree(fd), out)
    finally:
        os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getnames() == [".", ".wh.real"]


def test_overlay_attributes_do_not_leave(space: Path) -> None:
    apply(tar(directory("d"), member("f", b"x")), space / "one")
    os.setxattr(space / "one" / "d", "trusted.overlay.impure", b"y")
    os.setxattr(space / "one" / "f", "trusted.overlay.origin", b"z")
    os.setxattr(space / "one" / "f", "user.overlay.opaque", b"y")
    os.setxattr(space / "one" / "f", "user.fine", b"kept")
    data, _ = _export(space / "one")
    assert b"overlay" not in data
    assert b"SCHILY.xattr.user.fine=kept" in data


def test_nested_whiteouts_are_exported(space: Path) -> None:
    """An overlay inside an overlay writes its whiteouts as files with an attribute (opaque=x)."""
    one = space / "one"
    (one / "d").mkdir(parents=True)
    (one / "d" / "gone").touch()
    (one / "d" / "stays").touch()
    os.setxattr(one / "d", "trusted.overlay.opaque", b"x")
    os.setxattr(one / "d" / "gone", "trusted.overlay.whiteout", b"y")
    with tarfile.open(fileobj=io.BytesIO(_export(one)[0])) as archive:
        assert archive.getnames() == [".", "d", "d/.wh.gone", "d/stays"]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (space / "one").mkdir()
    (space / "one" / "f").write_bytes(bytes(1 << 20))

    def shrinking(fd: int, first: bytes = b"") -> Iterator[bytes]:
        os.truncate(space / "one" / "f", 5)
        while data := os.read(fd, 1 << 18):
            yield data

    monkeypatch.setattr("cowfs.archive.walk._pieces", shrinking)
    with pytest.raises(FailedPrecondition, match=r"'f' became shorter"):
        _export(space / "one")


# Layers that need the merged tree ------------------------------------------------------------------


@pytest.mark.root
def test_a_directory_renamed_by_the_kernel_is_exported_whole_with_a_whiteout(space: Path) -> None:
    """A real overlay mount with redirects and metadata-only copies writes the layer."""
    from support import namespace

    lower, upper, work, merged = (space / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    for name in ("old/sub/f", "old/g", "new-home/hidden", "big"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text("lower " + name)
    os.link(lower / "old" / "g", lower / "old" / "g2")
    namespace.mount(
        "overlay", str(merged), "overlay", 0,
        f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on,metacopy=on",
    )  # fmt: skip
    try:
        os.rename(merged / "old", merged / "renamed")
        os.chmod(merged / "big", 0o600)
        (merged / "renamed" / "sub" / "new").write_text("upper")
        os.unlink(merged / "renamed" / "g2")
        expected = trees.snapshot(merged)
        namespace.umount(str(merged))
        namespace.mount("overlay", str(merged), "overlay", 1, f"lowerdir={upper}:{lower},redirect_dir=on,metacopy=on")
        assert os.getxattr(upper / "renamed", "trusted.overlay.redirect")
        with pytest.raises(Unsupported, match="lower layer"):
            _export(upper)
        fd = os.open(merged, os.O_RDONLY)
        try:
            data, _ = _export(upper, tree=DirTree(fd))
        finally:
            os.close(fd)
    finally:
        namespace.umount(str(merged))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = archive.getnames()
    assert ".wh.old" in names
    assert "renamed/.wh..wh..opq" in names
    shutil.copytree(lower, space / "full", symlinks=True)
    subprocess.run(["cp", "-a", "--no-target-directory", str(lower), str(space / "full")], check=True)
    apply(data, space / "full", form="plain")
    trees.assert_same(expected, trees.snapshot(space / "full"), ignore={"ctime", "nlink", "same_as"})
    assert (space / "full" / "big").read_text() == "lower big"


def test_the_view_is_a_tree_to_export_from(space: Path) -> None:
    """cowfs's own union, renamed directories and all, through the adapter the store uses."""
    union = pytest.importorskip("cowfs.union")
    from cowfs.union.paths import Paths
    from cowfs.union.view_tree import ViewTree

    lower, upper, work = (space / name for name in ("lower", "upper", "work"))
    for path in (lower, upper, work):
        path.mkdir()
    (lower / "old" / "sub").mkdir(parents=True)
    (lower / "old" / "sub" / "f").write_text("lower")
    (lower / "gone").write_text("x")
    view = union.View([str(lower)], str(upper), str(work))
    try:
        paths = Paths(view)
        paths.rename("old", "renamed")
        paths.unlink("gone")
        paths.write_bytes("renamed/sub/new", b"upper")
        data, _ = _export(upper, tree=ViewTree(view))
        flat = io.BytesIO()
        export_tree(ViewTree(view), flat)
    finally:
        view.close()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == [
            ".", ".wh.gone", ".wh.old", "renamed", "renamed/.wh..wh..opq", "renamed/sub", "renamed/sub/f", "renamed/sub/new",
        ]  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(flat.getvalue())) as archive:
        assert archive.getnames() == [".", "renamed", "renamed/sub", "renamed/sub/f", "renamed/sub/new"]


def test_changes_are_exported_with_parents_before_children_and_whiteouts_before_both(space: Path) -> None:
    apply(tar(directory("d"), directory("d/sub"), member("d/sub/f", b"1"), member("d-e", b"2")), space / "one")
    changes = [
        Change(path=b"d-e", kind="changed", type="file", size=1),
        Change(path=b"d/sub/f", kind="added", type="file", size=1),
        Change(path=b"d/zz", kind="deleted", type="file", size=0),
        Change(path=b"d/sub", kind="added", type="dir", size=0),
        Change(path=b"d", kind="changed", type="dir", size=0),
        Change(path=b"gone", kind="deleted", type="dir", size=0),
    ]
    fd = os.open(space / "one", os.O_RDONLY)
    try:
        out = io.BytesIO()
        export_changes(DirTree(fd), changes, out)
        with pytest.raises(FailedPrecondition, match="'nothing' vanished"):
            export_changes(DirTree(fd), [Change(path=b"nothing", kind="added", type="file", size=0)], io.BytesIO())
    finally:
        os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getnames() == [".wh.gone", "d", "d/.wh.zz", "d/sub", "d/sub/f", "d-e"]


def test_the_directories_above_a_change_are_exported_with_it(space: Path) -> None:
    apply(
        tar(
            directory("d", mode=0o1777, uid=5), directory("d/sub", mode=0o700), member("d/sub/f", b"1"), directory("e")
        ),
        space / "one",
    )
    changes = [
        Change(path=b"d/sub/f", kind="changed", type="file", size=1),
        Change(path=b"d/sub/gone", kind="deleted", type="file"),
        Change(path=b"e/gone", kind="deleted", type="dir"),
    ]
    fd = os.open(space / "one", os.O_RDONLY)
    try:
        out = io.BytesIO()
        export_changes(DirTree(fd), changes, out)
    finally:
        os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getnames() == ["d", "d/sub", "d/sub/.wh.gone", "d/sub/f", "e", "e/.wh.gone"]
        assert [(each.mode, each.uid) for each in archive.getmembers()[:2]] == [(0o1777, 5), (0o700, 0)]


def test_owners_recorded_in_attributes_are_exported_as_owners(space: Path) -> None:
    space.chmod(0o777)
    data = tar(
        directory("./", uid=1, gid=1), directory("d", mode=0o700, uid=9, gid=9), member("d/f", b"x", mode=0o4711, uid=8),
        member("dev", type=tarfile.CHRTYPE, device=(5, 1), mode=0o666), member("p", type=tarfile.FIFOTYPE),
        symlink("l", "d"),
    )  # fmt: skip
    with acting_as():
        apply(data, space / "user", form="user", options=ApplyOptions(owners="xattr"))
    apply(data, space / "root")
    exported, _ = _export(space / "user", form="user", override=True)
    assert exported == _export(space / "root")[0]
    assert b"override_stat" not in _export(space / "user", form="user")[0]
    flat = []
    for side, override in (("user", True), ("root", False)):
        fd = os.open(space / side, os.O_RDONLY)
        out = io.BytesIO()
        with acting_as() if override else contextlib.nullcontext():
            export_tree(DirTree(fd), out, override=override)
        os.close(fd)
        flat.append(out.getvalue())
    assert flat[0] == flat[1]
    os.setxattr(space / "user" / "d" / "f", "user.containers.override_stat", b"rubbish")
    with pytest.raises(InvalidArgument, match=r"'d/f'"):
        _export(space / "user", form="user", override=True)


# Other tools ---------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("tool", ["tar", "bsdtar"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_other_tars_unpack_what_we_export(space: Path, tool: str, compression: str) -> None:
    program = _tool(tool)
    apply(tar(*[part for part in _parts(EVERYTHING) if b".wh." not in part[:100]]), space / "one")
    data, _ = _export(space / "one", compression=compression)
    (space / "layer.tar").write_bytes(data)
    (space / "two").mkdir()
    flags = ["--xattrs", "--xattrs-include=*"] if tool == "tar" else ["--xattrs"]
    if compression == "zstd":
        _tool("zstd")
    subprocess.run(
        [program, *flags, "-xpf", str(space / "layer.tar"), "-C", str(space / "two")],
        check=True, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    if tool == "bsdtar":  # it does not restore the times of "."
        for side in ("one", "two"):
            os.utime(space / side, ns=(1, 1))
    _same_tree(space / "one", space / "two")


def _parts(data: bytes) -> list[bytes]:
    """The members of an archive, each with its extension headers."""
    from cowfs.archive.compress import Source
    from cowfs.archive.reader import Reader

    class Bytes(Source):
        rest = data

        def next_chunk(self) -> bytes:
            chunk, self.rest = self.rest, b""
            return chunk

    parts: list[bytes] = []
    current: list[bytes] = []
    reader = Reader(Bytes(), raw=lambda piece: current.append(bytes(piece)))
    for _ in reader:
        head = b"".join(current)
        body = b"".join(bytes(piece) for piece in reader.data())
        parts.append(head + body + bytes(-len(body) % 512))
        current.clear()
    # the padding of a member's data is shown to raw with the next one's header
    return [part[-(-len(part) % 512) or None :] if len(part) % 512 else part for part in map(_unpadded, parts)]


def _unpadded(part: bytes) -> bytes:
    start = 0
    while start < len(part) and part[start + 257 : start + 262] != b"ustar":
        start += 1
    return part[start:]


@pytest.mark.parametrize(
    "args",
    [
        ["tar", "--format=gnu", "-cSf"],
        ["tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-cf"],
        ["tar", "--format=posix", "--sparse-version=0.0", "-cSf"],
        ["tar", "--format=posix", "--sparse-version=0.1", "-cSf"],
        ["tar", "--format=posix", "--sparse-version=1.0", "-cSf"],
        ["tar", "--format=ustar", "-cf"],
        ["tar", "--format=v7", "-cf"],
        ["bsdtar", "--format=pax", "-cf"],
        ["bsdtar", "--format=gnutar", "-cf"],
        ["bsdtar", "--format=ustar", "-cf"],
        ["tar", "--format=gnu", "-czf"],
        ["tar", "--zstd", "-cf"],
        ["tar", "-cJf"],
        ["tar", "-cjf"],
    ],
    ids=" ".join,
)
def test_what_other_tars_write_is_read(space: Path, args: list[str]) -> None:
    """The tree they pack, whatever dialect they pack it in (as far as the dialect can say it)."""
    program = _tool(args[0])
    source = space / "source"
    plain = "ustar" in args[1] or "v7" in args[1]
    old = "v7" in args[1]
    (source / "d" / "e").mkdir(parents=True)
    (source / "d" / "f").write_bytes(b"hello" * 1000)
    os.link(source / "d" / "f", source / "d" / "hard")
    os.symlink("f", source / "d" / "link")
    if not old:
        os.mkfifo(source / "d" / "fifo")
        os.mknod(source / "d" / "dev", stat.S_IFBLK | 0o640, os.makedev(8, 3))
    os.chown(source / "d" / "f", 1234, 5678)
    os.chmod(source / "d" / "f", 0o4750)
    with open(source / "d" / "sparse", "wb") as file:
        for n in range(64):
            file.seek(n * 65536)
            file.write(b"x" * 4096)
        file.truncate(64 * 65536 + 123)
    if not plain:
        (source / ("n" * 200)).write_bytes(b"long")
        (source / "d" / "l200").symlink_to("t" * 200)
        os.chown(source / "d" / "e", 3_000_000, 3_000_001)
    if "--xattrs" in args or args[:2] == ["bsdtar", "--format=pax"]:
        os.setxattr(source / "d" / "f", "user.x", b"y")
        os.setxattr(source / "d", "user.dir", b"z\0binary\xff")
    whole_seconds = (args[0] == "tar" and "posix" not in args[1]) or ("pax" not in args[1] and args[0] == "bsdtar")
    for root, dirs, files in os.walk(source, topdown=False):
        for name in files + dirs:
            os.utime(os.path.join(root, name), ns=(7, 1_500_000_000 * 10**9 + (0 if whole_seconds else 123456789)),
                     follow_symlinks=False)  # fmt: skip
    os.utime(source, ns=(7, 1_500_000_000 * 10**9))
    archive = space / "archive"
    try:
        subprocess.run([program, *args[1:], str(archive), "-C", str(source), "."], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{args[0]} cannot: {error.stderr.decode()[:200]}")
    (space / "layer").mkdir()
    with open(archive, "rb") as stream:
        apply_layer(stream, str(space / "layer"), form="plain")
    _same_tree(source, space / "layer")


# Properties ------------------------------------------------------------------------------------------

NAMES = st.sampled_from([b"a", b"b", b"c", b"dir", b"caf\xc3\xa9", b"x" * 120, b"-", b" ", b"\xff", b".hidden", b"z\n"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
KINDS = st.sampled_from(["file", "dir", "symlink", "hardlink", "fifo", "whiteout", "opaque"])


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    parts = []
    for _ in range(draw(st.integers(0, 12))):
        path, kind = draw(PATHS), draw(KINDS)
        fields: dict[str, Any] = {
            "mode": draw(st.sampled_from([0o644, 0o755, 0o4755, 0o2755, 0o1777, 0])),
            "uid": draw(st.sampled_from([0, 1, 1000, 3_000_000])),
            "gid": draw(st.sampled_from([0, 7])),
            "pax": {"mtime": draw(st.sampled_from(["0", "1.5", "-3.25", "1700000000.123456789"]))},
        }
        if kind == "file":
            parts.append(member(path, draw(st.sampled_from([b"", b"x", b"data" * 300])), **fields))
        elif kind == "dir":
            parts.append(directory(path, **fields))
        elif kind == "symlink":
            parts.append(symlink(path, draw(PATHS), **fields))
        elif kind == "hardlink":
            parts.append(hardlink(path, draw(PATHS)))
        elif kind == "fifo":
            parts.append(member(path, type=tarfile.FIFOTYPE, **fields))
        elif kind == "whiteout":
            parent, _, name = path.rpartition(b"/")
            parts.append(member((parent + b"/" if parent else b"") + b".wh." + name))
        else:
            parts.append(member(path + b"/.wh..wh..opq"))
    return tar(*parts)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=_archives())
def test_export_of_apply_is_a_fixed_point(space: Path, data: bytes) -> None:
    """For any archive, its layer's export applies to the same layer and exports to the same bytes."""
    one, two = space / "one", space / "two"
    for path in (one, two):
        shutil.rmtree(path, ignore_errors=True)
    try:
        apply(data, one)
    except InvalidArgument:
        return
    first, done = _export(one)
    apply(first, two, diff_id=done.diff_id)
    _same_tree(one, two)
    assert _export(two)[0] == first
