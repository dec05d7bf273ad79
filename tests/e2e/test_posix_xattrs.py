"""Extended attributes: sizes, flags, namespaces, what a union hides."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from support.posix import KINDS, error_of, fails, make_all, read, tree, write
from support.users import acting_as


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "user.a", b"1"), os.setxattr(d / "f", "trusted.t", b"2")])
def test_set_get_list_remove(d: Path) -> None:
    assert sorted(os.listxattr(d / "f")) == ["trusted.t", "user.a"]
    os.setxattr(d / "f", "user.b", b"")
    os.setxattr(d / "f", "user.a", b"changed")
    assert os.getxattr(d / "f", "user.a") == b"changed"
    assert os.getxattr(d / "f", "user.b") == b""
    os.removexattr(d / "f", "user.a")
    fails(errno.ENODATA, os.getxattr, d / "f", "user.a")
    fails(errno.ENODATA, os.removexattr, d / "f", "user.a")
    assert sorted(os.listxattr(d / "f")) == ["trusted.t", "user.b"]


@tree(lambda d: [write(d / "f"), (d / "d").mkdir()])
def test_removing_an_acl_that_is_not_there_succeeds(d: Path) -> None:
    for name in ("f", "d"):
        os.removexattr(d / name, "system.posix_acl_access")
    os.removexattr(d / "d", "system.posix_acl_default")
    os.setxattr(d / "f", "system.posix_acl_access", struct.pack("<I", 2))
    assert os.listxattr(d / "f") == []


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "user.a", b"1")])
def test_create_and_replace_flags(d: Path) -> None:
    fails(errno.EEXIST, os.setxattr, d / "f", "user.a", b"2", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, d / "f", "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(d / "f", "user.a", b"2", os.XATTR_REPLACE)
    os.setxattr(d / "f", "user.b", b"2", os.XATTR_CREATE)
    assert os.getxattr(d / "f", "user.a") == os.getxattr(d / "f", "user.b") == b"2"


def test_names_of_255_bytes(d: Path) -> None:
    write(d / "f")
    os.setxattr(d / "f", "user." + "n" * 250, b"v")
    assert error_of(os.setxattr, d / "f", "user." + "n" * 251, b"v") in ("ERANGE", "ENAMETOOLONG")
    assert os.listxattr(d / "f") == ["user." + "n" * 250]
    fails(errno.EINVAL, os.setxattr, d / "f", "user.", b"v")
    fails(errno.EOPNOTSUPP, os.setxattr, d / "f", "nonsense.x", b"v")


def test_values_up_to_64_kib(d: Path) -> None:
    """65,536 bytes are the kernel's bound; what the host cannot store is ENOSPC, never a cut value."""
    write(d / "f")
    for size in (1, 255, 256, 4000, 65536):
        value = bytes(i * 7 % 256 for i in range(size))
        result = error_of(os.setxattr, d / "f", f"user.v{size}", value)
        assert result in ("", "ENOSPC") if size > 4000 else result == ""
        if not result:
            assert os.getxattr(d / "f", f"user.v{size}") == value
    fails(errno.E2BIG, os.setxattr, d / "f", "user.big", bytes(65537))


@tree(lambda d: write(d / "f"))
def test_many_attributes(d: Path) -> None:
    for i in range(100):
        os.setxattr(d / "f", f"user.{i}", str(i).encode())
    assert sorted(os.listxattr(d / "f")) == sorted(f"user.{i}" for i in range(100))
    for i in range(0, 100, 2):
        os.removexattr(d / "f", f"user.{i}")
    assert all(os.getxattr(d / "f", f"user.{i}") == str(i).encode() for i in range(1, 100, 2))


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_user_attributes_are_for_files_and_directories(d: Path, kind: str) -> None:
    if kind in ("file", "dir"):
        os.setxattr(d / kind, "user.x", b"1")
        assert os.listxattr(d / kind) == ["user.x"]
    else:
        fails(errno.EPERM, os.setxattr, d / kind, "user.x", b"1", follow_symlinks=False)
        assert os.listxattr(d / kind, follow_symlinks=False) == []


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_trusted_attributes_are_for_everything(d: Path, kind: str) -> None:
    os.setxattr(d / kind, "trusted.x", b"1", follow_symlinks=False)
    assert os.listxattr(d / kind, follow_symlinks=False) == ["trusted.x"]
    assert os.getxattr(d / kind, "trusted.x", follow_symlinks=False) == b"1"


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "trusted.t", b"1"), os.chmod(d / "f", 0o666)])
def test_trusted_attributes_are_for_root(d: Path) -> None:
    with acting_as():
        fails(errno.EPERM, os.setxattr, d / "f", "trusted.x", b"1")
        fails(errno.ENODATA, os.getxattr, d / "f", "trusted.t")
        os.setxattr(d / "f", "user.x", b"1")
        assert "user.x" in os.listxattr(d / "f")


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "user.x", b"1"), os.chmod(d / "f", 0o200)])
def test_user_attributes_follow_the_mode(d: Path) -> None:
    os.chown(d / "f", 4321, 4321)
    with acting_as():
        fails(errno.EACCES, os.getxattr, d / "f", "user.x")
        os.setxattr(d / "f", "user.y", b"1")
        os.chmod(d / "f", 0o400)
        assert os.getxattr(d / "f", "user.x") == b"1"
        fails(errno.EACCES, os.setxattr, d / "f", "user.y", b"2")


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service, effective


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "security.capability", CAPABILITY)])
def test_file_capabilities_are_kept_and_dropped_by_a_write(d: Path) -> None:
    assert os.getxattr(d / "f", "security.capability") == CAPABILITY
    os.chmod(d / "f", 0o755)
    assert os.getxattr(d / "f", "security.capability") == CAPABILITY
    with open(d / "f", "r+b", buffering=0) as file:
        file.write(b"changed")
    fails(errno.ENODATA, os.getxattr, d / "f", "security.capability")


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "security.capability", CAPABILITY)])
def test_chown_drops_file_capabilities(d: Path) -> None:
    os.chown(d / "f", 1, 1)
    fails(errno.ENODATA, os.getxattr, d / "f", "security.capability")


@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", "security.capability", CAPABILITY)])
def test_truncate_drops_file_capabilities(d: Path) -> None:
    os.truncate(d / "f", 0)
    fails(errno.ENODATA, os.getxattr, d / "f", "security.capability")


@tree(lambda d: [os.mkdir(d / "dir"), write(d / "dir" / "f"), os.setxattr(d / "dir", "user.x", b"1")])
def test_a_unions_own_attributes_are_hidden(d: Path) -> None:
    """After copy-ups, whiteouts and redirects no overlay.* shows."""
    os.rename(d / "dir", d / "moved")
    os.chmod(d / "moved" / "f", 0o600)
    os.mkdir(d / "dir")
    os.unlink(d / "moved" / "f")
    for name in ("dir", "moved"):
        assert not [x for x in os.listxattr(d / name) if ".overlay." in x]
    assert os.listxattr(d / "moved") == ["user.x"]


@pytest.mark.only("kernel", "overlay", "fusepy", reason="")
def test_a_unions_own_names_are_escaped(d: Path) -> None:
    """trusted.overlay.* set through the mount is kept as an ordinary attribute and means nothing."""
    os.mkdir(d / "dir")
    write(d / "dir" / "f")
    os.setxattr(d / "dir", "trusted.overlay.opaque", b"y")
    os.setxattr(d / "dir" / "f", "trusted.overlay.metacopy", b"")
    assert os.getxattr(d / "dir", "trusted.overlay.opaque") == b"y"
    assert os.listxattr(d / "dir") == ["trusted.overlay.opaque"]
    assert read(d / "dir" / "f") == b"data"
    os.removexattr(d / "dir", "trusted.overlay.opaque")
    assert os.listxattr(d / "dir") == []


def test_user_overlay_names_are_ordinary_in_the_trusted_form(d: Path) -> None:
    write(d / "f")
    os.setxattr(d / "f", "user.overlay.opaque", b"y")
    assert os.listxattr(d / "f") == ["user.overlay.opaque"]
    os.removexattr(d / "f", "user.overlay.opaque")


@tree(lambda d: [os.symlink("f", d / "l"), write(d / "f")])
def test_through_a_link_and_at_it(d: Path) -> None:
    os.setxattr(d / "l", "user.x", b"1")
    assert os.listxattr(d / "f") == ["user.x"]
    assert os.listxattr(d / "l", follow_symlinks=False) == []
