"""`cowfs diff` and cowfs.diff.changes: exactly what an upper changes, whoever wrote it and in whatever encoding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import mounts
from support.command import Run
from support.layers import Layer

from cowfs.cli.output import change_line
from cowfs.diff import changes as diff_changes
from cowfs.errors import InvalidArgument, NotFound
from cowfs.model import Change


def found(upper: Path, *layers: Path) -> list[str]:
    """A diff as lines, times left out: directories change theirs with every name in them."""
    lines = []
    for change in diff_changes.changes(str(upper), [str(layer) for layer in layers]):
        what = change.what - {"mtime"}
        if change.kind == "changed" and not what:
            continue
        lines.append(change_line(Change(path=change.path, kind=change.kind, type=change.type, what=what)))
    return lines


@pytest.fixture
def base(space: Path, can_mount: None) -> Layer:
    layer = Layer(space / "base")
    layer.file("etc/passwd", b"root\n").file("etc/group", b"root\n").file("usr/lib/a", b"a" * 5000)
    layer.file("usr/lib/b", b"b").symlink("usr/lib/link", "a").dir("var/empty")
    return layer


def test_nothing(base: Layer, space: Path) -> None:
    upper = Layer(space / "upper")
    os.utime(upper.path, ns=(0, os.stat(base.path).st_mtime_ns))
    assert list(diff_changes.changes(str(upper.path), [str(base.path)])) == []


def test_additions_list_everything_in_them(base: Layer, space: Path) -> None:
    upper = Layer(space / "upper").file("opt/app/main", b"12345").fifo("opt/pipe")
    changes = list(diff_changes.changes(str(upper.path), [str(base.path)]))
    assert [(c.path, c.kind, c.type, c.size) for c in changes if c.kind == "added"] == [
        (b"opt", "added", "dir", 0),
        (b"opt/app", "added", "dir", 0),
        (b"opt/app/main", "added", "file", 5),
        (b"opt/pipe", "added", "fifo", 0),
    ]


def test_deletions_in_every_encoding(base: Layer, space: Path) -> None:
    """Character devices 0/0, xattr whiteouts, and a directory made opaque; a deleted directory is one change."""
    upper = Layer(space / "upper").whiteout("etc/passwd").xattr_whiteout("usr/lib/b").whiteout("var")
    assert found(upper.path, base.path) == ["D /etc/passwd", "D /usr/lib/b", "D /var/"]
    opaque = Layer(space / "opaque").dir("usr/lib", opaque=True).file("usr/lib/new", b"")
    assert found(opaque.path, base.path) == ["D /usr/lib/a", "D /usr/lib/b", "D /usr/lib/link", "A /usr/lib/new"]


def test_whiteout_of_nothing_is_no_change(base: Layer, space: Path) -> None:
    assert found(Layer(space / "upper").whiteout("etc/nothing").path, base.path) == []


def test_content_is_compared_by_bytes(base: Layer, space: Path) -> None:
    """Same size and same time, other bytes: changed. Other time, same bytes: only the time."""
    upper = Layer(space / "upper")
    upper.file("usr/lib/a", b"a" * 4999 + b"X")
    assert found(upper.path, base.path) == ["C /usr/lib/a (content)"]
    (upper.path / "usr/lib/a").write_bytes(b"a" * 5000)
    os.utime(upper.path / "usr/lib/a", ns=(0, 42))
    changes = [c for c in diff_changes.changes(str(upper.path), [str(base.path)]) if c.path == b"usr/lib/a"]
    assert [c.what for c in changes] == [frozenset({"mtime"})]


def test_attributes(base: Layer, space: Path) -> None:
    upper = Layer(space / "upper").file("etc/passwd", b"root\n", 0o600).file("etc/group", b"root\n")
    os.chown(upper.path / "etc/group", 1, 2)
    os.setxattr(upper.path / "etc/group", "user.note", b"1")
    assert found(upper.path, base.path) == ["C /etc/group (owner, xattrs)", "C /etc/passwd (mode)"]


def test_metadata_only_copies_have_no_changed_content(base: Layer, space: Path) -> None:
    upper = Layer(space / "upper").metacopy("usr/lib/a", 5000, 0o600)
    assert found(upper.path, base.path) == ["C /usr/lib/a (mode)"]


def test_change_of_type_is_one_change(base: Layer, space: Path) -> None:
    """A directory that became a file lists no deletions below it; the reverse lists what is new."""
    upper = Layer(space / "upper").file("usr", b"").dir("etc/passwd", opaque=True).file("etc/passwd/x", b"")
    lines = [line.split(" (")[0] for line in found(upper.path, base.path)]
    assert lines == ["C /etc/passwd/", "A /etc/passwd/x", "C /usr"]
    kinds = {c.path: c.what for c in diff_changes.changes(str(upper.path), [str(base.path)])}
    assert "type" in kinds[b"usr"]
    assert "content" not in kinds[b"usr"]


def test_renamed_directory_of_a_lower_layer(base: Layer, space: Path) -> None:
    """A redirect: gone there, and all of it new here."""
    upper = Layer(space / "upper").whiteout("usr").redirect("opt", "usr")
    assert found(upper.path, base.path) == [
        "A /opt/", "A /opt/lib/", "A /opt/lib/a", "A /opt/lib/b", "A /opt/lib/link", "D /usr/",
    ]  # fmt: skip


def test_order_is_that_of_paths(base: Layer, space: Path) -> None:
    """A directory before what is in it, names by their bytes."""
    upper = Layer(space / "upper").file("b/x", b"").file("b-", b"").file("a", b"").file("\udcff", b"")
    paths = [c.path for c in diff_changes.changes(str(upper.path), [str(base.path)]) if c.path]
    assert paths == [b"a", b"b", b"b/x", b"b-", b"\xff"]


def test_layers_are_bottom_first(base: Layer, space: Path) -> None:
    """The upper is compared with the merged tree: a middle layer's whiteout counts."""
    middle = Layer(space / "middle").whiteout("etc/passwd")
    upper = Layer(space / "upper").file("etc/passwd", b"new\n").whiteout("etc/group")
    assert found(upper.path, base.path, middle.path) == ["D /etc/group", "A /etc/passwd"]


def test_agrees_with_what_the_kernel_wrote(base: Layer, space: Path) -> None:
    """The kernel's overlayfs makes changes; the diff of its upper says just those."""
    upper, work, mnt = space / "upper", space / "work", space / "mnt"
    for path in (upper, work, mnt):
        path.mkdir()
    with mounts.overlay([base.path], mnt, upper, work):
        (mnt / "new").write_text("1")
        (mnt / "etc/passwd").unlink()
        (mnt / "usr/lib/b").chmod(0o600)
        (mnt / "usr/lib").rename(mnt / "usr/lib64")
        (mnt / "var/empty").rmdir()
        (mnt / "var/empty").mkdir()
        (mnt / "var/empty/x").write_text("")
    assert found(upper, base.path) == [
        "D /etc/passwd", "A /new", "D /usr/lib/", "A /usr/lib64/", "A /usr/lib64/a", "A /usr/lib64/b",
        "A /usr/lib64/link", "A /var/empty/x",
    ]  # fmt: skip


def test_diff_of_missing_directories(base: Layer, space: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        diff_changes.changes(str(space / "nowhere"), [str(base.path)])
    with pytest.raises(InvalidArgument, match="passwd"):
        diff_changes.changes(str(base.path / "etc/passwd"), [str(base.path)])


def test_command_on_mount_and_on_upper_say_the_same(cowfs: Run, stack: Path, mnt: Path) -> None:
    """List, JSON and tree of a live mount; the upper alone, by its record, tells the same after umount."""
    cowfs("mount", stack, mnt)
    (mnt / "app/main").write_text("changed\n")
    (mnt / "app/new\nline").write_text("x" * 10)
    (mnt / "usr/bin/python").unlink()
    lines = cowfs("diff", mnt).stdout.splitlines()
    assert "C /app/main (content, mtime)" in lines
    assert "A /app/new\\nline" in lines
    assert "D /usr/bin/python" in lines
    objects = json.loads(cowfs("diff", mnt, "--json").stdout)
    assert [json.loads(line) for line in cowfs("diff", mnt, "--jsonl").stdout.splitlines()] == objects
    assert {"path": "/app/new\nline", "kind": "added", "type": "file", "size": 10} in objects
    stat = cowfs("diff", mnt, "--stat").stdout
    assert "+1" in stat
    assert "-1" in stat
    cowfs("diff", mnt, "--quiet", code=1)
    cowfs("umount", mnt)
    assert cowfs("diff", stack / ".cowfs/upper").stdout.splitlines() == lines
    layers = [part for name in ("1-base", "2-python", "10-app") for part in ("--layer", stack / name)]
    assert cowfs("diff", stack / ".cowfs/upper", *layers).stdout.splitlines() == lines


def test_diff_sees_what_a_map_wrote(cowfs: Run, stack: Path, mnt: Path) -> None:
    """Dirty pages of a shared map are handed to the server before the diff looks."""
    import mmap

    cowfs("mount", stack, mnt)
    with open(mnt / "app/main", "r+b") as file, mmap.mmap(file.fileno(), 5) as view:
        view[:4] = b"MAIN"
        assert "C /app/main (content" in cowfs("diff", mnt).stdout
