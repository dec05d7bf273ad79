"""Subvolumes, quotas and send streams of a real btrfs."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.sys import btrfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts: needs root")


@pytest.fixture
def pool(tmp_path: Path, can_mount: None) -> Iterator[Path]:
    where = tmp_path / "pool"
    where.mkdir()
    subprocess.run(["truncate", "-s", "256M", tmp_path / "img"], check=True)
    if subprocess.run(["mkfs.btrfs", "-q", tmp_path / "img"], check=False).returncode:
        pytest.skip("no mkfs.btrfs")
    subprocess.run(["mount", "-o", "loop", tmp_path / "img", where], check=True)
    yield where
    subprocess.run(["umount", "-l", where], check=False)


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def test_subvolumes_are_made_copied_and_deleted(pool: Path) -> None:
    root = opened(pool)
    btrfs.create(root, b"a")
    (pool / "a" / "f").write_text("one")
    a = opened(pool / "a")
    assert btrfs.is_subvolume(a)
    btrfs.snapshot(a, root, b"b")
    (pool / "b" / "f").write_text("two")
    assert (pool / "a" / "f").read_text() == "one"
    btrfs.set_readonly(a)
    assert btrfs.readonly(a)
    with pytest.raises(OSError) as caught:
        (pool / "a" / "g").write_text("")
    assert caught.value.errno == errno.EROFS
    btrfs.set_readonly(a, False)
    assert btrfs.subvolume_id(a) != btrfs.subvolume_id(root)
    with pytest.raises(FileExistsError):
        btrfs.snapshot(a, root, b"b")
    os.close(a)
    for name in (b"a", b"b"):
        btrfs.destroy(root, name)
    assert os.listdir(pool) == []
    with pytest.raises(FileNotFoundError):
        btrfs.destroy(root, b"a")
    for bad in (b"", b"x/y", b"x" * 5000):
        with pytest.raises(OSError):
            btrfs.create(root, bad)
    os.close(root)


def test_a_limit_holds_for_what_a_snapshot_writes(pool: Path) -> None:
    """Simple quotas: what the parent wrote costs its snapshot nothing; what it writes itself is counted and bounded."""
    root = opened(pool)
    assert btrfs.quota_kind(root) is None
    kind = btrfs.enable_quota(root)
    assert kind == btrfs.enable_quota(root) == btrfs.quota_kind(root)
    btrfs.create(root, b"base")
    (pool / "base" / "big").write_bytes(os.urandom(20 << 20))
    os.sync()
    base = opened(pool / "base")
    btrfs.snapshot(base, root, b"top")
    top = opened(pool / "top")
    number = btrfs.subvolume_id(top)
    if kind != "simple":
        pytest.skip("a kernel before 6.7: classic quotas charge the base")
    btrfs.limit(root, number, 8 << 20)
    with pytest.raises(OSError) as caught:
        for at in range(100):
            with open(pool / "top" / f"f{at}", "wb") as file:
                file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
    assert caught.value.errno == errno.EDQUOT
    os.sync()
    held = btrfs.used(root, number)
    assert held is not None
    assert 6 << 20 < held.referenced <= 8 << 20
    btrfs.limit(root, number, None)
    (pool / "top" / "more").write_bytes(os.urandom(8 << 20))
    for fd in (root, base, top):
        os.close(fd)


def test_a_stream_tells_what_changed(pool: Path) -> None:
    """Renames as such, new and removed names, modes, xattrs, which ranges were written: and no data."""
    root = opened(pool)
    btrfs.create(root, b"a")
    tree = pool / "a"
    (tree / "dir").mkdir()
    (tree / "sub").mkdir()
    for name in ("kept", "removed", "renamed", "written", "mode"):
        (tree / "dir" / name).write_text(name * 100)
    a = opened(tree)
    btrfs.snapshot(a, root, b"b")
    other = pool / "b" / "dir"
    (other / "removed").unlink()
    (pool / "b" / "sub").rename(other / "sub")
    (other / "renamed").rename(pool / "b" / "moved")
    (other / "written").write_text("x" * 5000)
    (other / "mode").chmod(0o600)
    os.setxattr(other / "mode", "user.note", b"1")
    (other / "new").write_text("new")
    btrfs.set_readonly(a)
    b = opened(pool / "b")
    btrfs.set_readonly(b)
    commands = list(btrfs.send(b, btrfs.subvolume_id(a)))
    seen = {(c.name, c.values.get("path", b"")) for c in commands}
    assert ("unlink", b"dir/removed") in seen
    assert any(c.name == "link" and c.path() == b"moved" and c.path("path_link") == b"dir/renamed" for c in commands)
    assert ("unlink", b"dir/renamed") in seen
    assert any(c.name == "rename" and c.path() == b"sub" and c.path("path_to") == b"dir/sub" for c in commands)
    assert any(c.name == "update_extent" and c.path() == b"dir/written" for c in commands)
    assert any(c.name == "chmod" and c.path() == b"dir/mode" and c.number("mode") & 0o777 == 0o600 for c in commands)
    assert any(c.name == "set_xattr" and c.values["xattr_name"] == b"user.note" for c in commands)
    assert not any("kept" in repr(c) for c in commands)
    assert sum(len(value) for c in commands for value in c.values.values()) < 4096
    for fd in (root, a, b):
        os.close(fd)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"btrfs-stream\0",
        b"x" * 100,
        b"btrfs-stream\0\1\0\0\0" + b"\xff" * 10,
        b"btrfs-stream\0\1\0\0\0\5\0\0\0\1\0",
    ],
)
def test_what_is_no_stream_is_said(data: bytes) -> None:
    with pytest.raises(ValueError, match="stream"):
        list(btrfs.read_stream(io.BytesIO(data)))
