"""Permissions, and the effect of changes on setuid, setgid, sticky bits and ACLs."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from support import layers, posix
from support.layers import ACL_GROUP, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ
from support.posix import KINDS, fails, make, make_all, mode_of, read, tree, write
from support.users import GID, OTHER_GID, OTHER_UID, UID, acting_as

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


acl_free = pytest.mark.only("kernel", "overlay", reason="libfuse2 does not tell who writes at that moment")


def owned(path: Path, mode: int, uid: int = UID, gid: int = GID, data: bytes = b"data") -> None:
    """A file of an ordinary user."""
    write(path, data)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


@tree(make_all)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "symlink"])
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o644, 0o755, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777])
def test_chmod_sets_exactly_the_bits(d: Path, kind: str, mode: int) -> None:
    os.chmod(d / kind, mode)
    assert mode_of(d / kind) == mode


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_chown_sets_exactly_the_ids(d: Path, kind: str) -> None:
    os.chown(d / kind, 1, 2, follow_symlinks=False)
    os.chown(d / kind, 3, -1, follow_symlinks=False)
    os.chown(d / kind, -1, 4, follow_symlinks=False)
    os.chown(d / kind, 4_000_000_000, 4_000_000_001, follow_symlinks=False)
    status = os.lstat(d / kind)
    assert (status.st_uid, status.st_gid) == (4_000_000_000, 4_000_000_001)


@tree(lambda d: [owned(d / "f", 0o644), owned(d / "g", 0o644, OTHER_UID, OTHER_GID)])
def test_only_the_owner_changes_mode_and_owner(d: Path) -> None:
    with acting_as():
        os.chmod(d / "f", 0o600)
        fails(errno.EPERM, os.chmod, d / "g", 0o600)
        fails(errno.EPERM, os.chown, d / "f", OTHER_UID, -1)
        fails(errno.EPERM, os.chown, d / "f", -1, OTHER_GID)
        fails(errno.EPERM, os.chown, d / "g", UID, -1)
        os.chown(d / "f", UID, GID)
    with acting_as(groups=[OTHER_GID]):
        os.chown(d / "f", -1, OTHER_GID)
    assert os.stat(d / "f").st_gid == OTHER_GID


@tree(lambda d: owned(d / "f", 0o6755))
@pytest.mark.parametrize("how", ["write", "truncate", "ftruncate", "open-trunc", "fallocate", "append"])
def test_a_change_of_data_by_a_user_clears_suid_and_sgid(d: Path, how: str) -> None:
    """write, truncate and the like by somebody without CAP_FSETID drop both bits, at once and for fstat."""
    os.chmod(d / "f", 0o6777)
    with acting_as(OTHER_UID, OTHER_GID):
        if how == "write":
            fd = os.open(d / "f", os.O_WRONLY)
            os.write(fd, b"x")
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o777
            os.close(fd)
        elif how == "append":
            fd = os.open(d / "f", os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"x")
            os.close(fd)
        elif how == "truncate":
            os.truncate(d / "f", 1)
        elif how == "ftruncate":
            fd = os.open(d / "f", os.O_WRONLY)
            os.ftruncate(fd, 1)
            os.close(fd)
        elif how == "open-trunc":
            os.close(os.open(d / "f", os.O_WRONLY | os.O_TRUNC))
        else:
            fd = os.open(d / "f", os.O_WRONLY)
            posix.fallocate(fd, 0, 0, 100)
            os.close(fd)
    assert mode_of(d / "f") == 0o777


@acl_free
@tree(lambda d: owned(d / "f", 0o666))
@pytest.mark.parametrize(
    ("gid", "groups", "expected"), [(GID, [], 0o2666), (OTHER_GID, [GID], 0o2666), (OTHER_GID, [], 0o666)]
)
@pytest.mark.parametrize("how", ["write", "truncate", "fallocate"])
def test_sgid_without_execute_goes_only_when_an_outsider_writes(
    d: Path, how: str, gid: int, groups: list[int], expected: int
) -> None:
    """02666 is no program; a member of the group keeps the bit, somebody outside loses it (Linux 6.2)."""
    os.chmod(d / "f", 0o2666)
    with acting_as(OTHER_UID, gid, groups):
        fd = os.open(d / "f", os.O_WRONLY)
        {
            "write": lambda: os.write(fd, b"x"),
            "truncate": lambda: os.ftruncate(fd, 1),
            "fallocate": lambda: posix.fallocate(fd, 0, 0, 100),
        }[how]()
        os.close(fd)
    assert mode_of(d / "f") == expected


@tree(lambda d: owned(d / "f", 0o6755))
def test_a_stranger_clears_no_suid_by_a_chown_of_nothing(d: Path) -> None:
    with acting_as(OTHER_UID, OTHER_GID):
        posix.error_of(os.chown, d / "f", -1, -1)
    assert mode_of(d / "f") == 0o6755


@tree(lambda d: owned(d / "f", 0o6755))
def test_a_write_by_root_keeps_suid(d: Path) -> None:
    fd = os.open(d / "f", os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)
    assert mode_of(d / "f") == 0o6755


@tree(lambda d: owned(d / "f", 0o6755))
def test_chown_clears_suid_and_sgid_of_a_file(d: Path) -> None:
    """By the owner, and by root as Linux does it."""
    with acting_as():
        os.chown(d / "f", UID, GID)
    assert mode_of(d / "f") == 0o755
    os.chmod(d / "f", 0o6755)
    os.chown(d / "f", UID, OTHER_GID)
    assert mode_of(d / "f") == 0o755


@tree(lambda d: owned(d / "f", 0o644))
def test_sgid_without_group_execute_survives_chown_by_root(d: Path) -> None:
    """02644 means mandatory locking, not set-group-id: chown by root leaves it."""
    os.chmod(d / "f", 0o2644)
    os.chown(d / "f", UID, OTHER_GID)
    assert mode_of(d / "f") == 0o2644


@tree(lambda d: [os.mkdir(d / "s"), os.chown(d / "s", 0, 77), os.chmod(d / "s", 0o2777)])
def test_setgid_directories_hand_down_their_group(d: Path) -> None:
    """New objects get the directory's group; new directories the bit as well."""
    with acting_as():
        for kind in ("file", "dir", "symlink", "fifo"):
            make(kind, d / "s" / kind)
            assert os.lstat(d / "s" / kind).st_gid == 77
        assert mode_of(d / "s" / "dir") & stat.S_ISGID
        assert not mode_of(d / "s" / "file") & stat.S_ISGID
        os.close(os.open(d / "s" / "x", os.O_CREAT | os.O_WRONLY, 0o2775))
        assert not mode_of(d / "s" / "x") & stat.S_ISGID, "a user outside the group cannot make a set-group-id program"


@tree(lambda d: owned(d / "f", 0o644, UID, 77))
def test_chmod_by_one_outside_the_group_drops_sgid(d: Path) -> None:
    with acting_as():
        os.chmod(d / "f", 0o2755)
    assert mode_of(d / "f") == 0o755


@tree(lambda d: [owned(d / "f", 0o000), owned(d / "r", 0o444), owned(d / "w", 0o222), owned(d / "x", 0o111)])
def test_mode_bits_decide_access(d: Path) -> None:
    with acting_as():
        fails(errno.EACCES, os.open, d / "f", os.O_RDONLY)
        fails(errno.EACCES, os.open, d / "f", os.O_WRONLY)
        os.close(os.open(d / "r", os.O_RDONLY))
        fails(errno.EACCES, os.open, d / "r", os.O_WRONLY)
        os.close(os.open(d / "w", os.O_WRONLY))
        fails(errno.EACCES, os.open, d / "w", os.O_RDWR)
        fails(errno.EACCES, os.truncate, d / "r", 0)
        for name, mask in (("f", 0), ("r", os.R_OK), ("w", os.W_OK), ("x", os.X_OK)):
            for bit in (os.R_OK, os.W_OK, os.X_OK):
                assert os.access(d / name, bit, effective_ids=True) == bool(mask & bit)


@tree(lambda d: [owned(d / "g", 0o070), owned(d / "o", 0o007)])
def test_the_first_class_that_matches_decides(d: Path) -> None:
    """Owner without bits is refused although group or others may."""
    with acting_as():
        fails(errno.EACCES, os.open, d / "g", os.O_RDONLY)
        fails(errno.EACCES, os.open, d / "o", os.O_RDONLY)
    with acting_as(OTHER_UID, GID):
        os.close(os.open(d / "g", os.O_RDWR))
        fails(errno.EACCES, os.open, d / "o", os.O_RDONLY)
    with acting_as(OTHER_UID, OTHER_GID, groups=[GID]):
        os.close(os.open(d / "g", os.O_RDWR))
    with acting_as(OTHER_UID, OTHER_GID):
        fails(errno.EACCES, os.open, d / "g", os.O_RDONLY)
        os.close(os.open(d / "o", os.O_RDWR))


@tree(lambda d: [os.mkdir(d / "x"), write(d / "x" / "f"), os.mkdir(d / "r"), write(d / "r" / "f")])
def test_directories_need_x_to_pass_and_r_to_list(d: Path) -> None:
    os.chmod(d / "x", 0o711)
    os.chmod(d / "r", 0o744)
    with acting_as():
        assert read(d / "x" / "f") == b"data"
        fails(errno.EACCES, os.listdir, d / "x")
        assert os.listdir(d / "r") == ["f"]
        fails(errno.EACCES, os.stat, d / "r" / "f")


@tree(lambda d: [os.mkdir(d / "ro"), write(d / "ro" / "f"), os.chmod(d / "ro" / "f", 0o666)])
def test_changing_a_directory_needs_w(d: Path) -> None:
    with acting_as():
        for kind in ("file", "dir", "symlink", "fifo"):
            fails(errno.EACCES, make, kind, d / "ro" / "new")
        fails(errno.EACCES, os.unlink, d / "ro" / "f")
        fails(errno.EACCES, os.link, d / "ro" / "f", d / "ro" / "g")


def test_only_root_makes_devices(d: Path) -> None:
    with acting_as():
        for kind in ("char", "block"):
            fails(errno.EPERM, make, kind, d / kind)


@tree(lambda d: [owned(d / "f", 0o644), owned(d / "w", 0o666, OTHER_UID)])
def test_setting_times_needs_ownership_setting_now_only_w(d: Path) -> None:
    with acting_as():
        os.utime(d / "f", ns=(1, 2))
        os.utime(d / "w")
        fails(errno.EPERM, os.utime, d / "w", ns=(1, 2))
    os.chmod(d / "w", 0o644)
    with acting_as():
        fails(errno.EACCES, os.utime, d / "w")


# -- POSIX ACLs ---------------------------------------------------------------------------

ACL_NAMED = layers.acl(
    (ACL_USER_OBJ, 6, -1), (ACL_USER, 6, UID), (ACL_GROUP_OBJ, 4, -1), (ACL_MASK, 6, -1), (ACL_OTHER, 0, -1)
)
ACL_INHERIT = layers.acl(
    (ACL_USER_OBJ, 7, -1), (ACL_GROUP_OBJ, 5, -1), (ACL_GROUP, 7, OTHER_GID), (ACL_MASK, 7, -1), (ACL_OTHER, 0, -1)
)
acl_needed = pytest.mark.only(
    "kernel", "overlay", reason="libfuse2 has no POSIX_ACL: the kernel would not enforce them"
)


@acl_needed
@tree(lambda d: [write(d / "f"), os.chmod(d / "f", 0o640), os.setxattr(d / "f", ACCESS, ACL_NAMED)])
def test_an_acl_grants_access(d: Path) -> None:
    with acting_as():
        assert read(d / "f") == b"data"
        write(d / "f", b"by a named user")
    with acting_as(OTHER_UID, OTHER_GID):
        fails(errno.EACCES, os.open, d / "f", os.O_RDONLY)
    assert layers.acl_entries(os.getxattr(d / "f", ACCESS)) == layers.acl_entries(ACL_NAMED)


@acl_needed
@tree(lambda d: [write(d / "f"), os.setxattr(d / "f", ACCESS, ACL_NAMED)])
def test_mode_and_acl_are_one(d: Path) -> None:
    """The group bits are the mask: chmod changes the ACL, setting an ACL changes the mode."""
    assert mode_of(d / "f") == 0o660
    os.chmod(d / "f", 0o600)
    assert (ACL_MASK, 0, -1) in layers.acl_entries(os.getxattr(d / "f", ACCESS))
    with acting_as():
        fails(errno.EACCES, os.open, d / "f", os.O_RDONLY)
    os.setxattr(d / "f", ACCESS, layers.acl((ACL_USER_OBJ, 7, -1), (ACL_GROUP_OBJ, 1, -1), (ACL_OTHER, 4, -1)))
    assert mode_of(d / "f") == 0o714
    assert ACCESS not in os.listxattr(d / "f"), "an ACL that the mode expresses is not kept"


@acl_needed
@tree(lambda d: [os.mkdir(d / "dir"), os.setxattr(d / "dir", DEFAULT, ACL_INHERIT)])
def test_default_acls_are_inherited(d: Path) -> None:
    """The umask is ignored; files get the access ACL, directories both."""
    old = os.umask(0o077)
    try:
        os.close(os.open(d / "dir" / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(d / "dir" / "sub", 0o777)
        os.symlink("x", d / "dir" / "link")
        os.mknod(d / "dir" / "fifo", stat.S_IFIFO | 0o666)
    finally:
        os.umask(old)
    assert mode_of(d / "dir" / "f") == 0o660
    assert mode_of(d / "dir" / "fifo") == 0o660
    assert mode_of(d / "dir" / "sub") == 0o770
    entries = layers.acl_entries(os.getxattr(d / "dir" / "f", ACCESS))
    assert (ACL_GROUP, 7, OTHER_GID) in entries
    assert (ACL_MASK, 6, -1) in entries
    assert os.getxattr(d / "dir" / "sub", DEFAULT) == ACL_INHERIT
    assert DEFAULT not in os.listxattr(d / "dir" / "f")
    with acting_as(OTHER_UID, OTHER_GID):
        write(d / "dir" / "sub" / "g", b"in")
        write(d / "dir" / "f", b"group")


@acl_needed
@tree(
    lambda d: [
        os.mkdir(d / "dir"),
        write(d / "dir" / "f"),
        os.setxattr(d / "dir" / "f", ACCESS, ACL_NAMED),
        os.setxattr(d / "dir", DEFAULT, ACL_INHERIT),
    ]
)
def test_acls_survive_copy_up_and_removal_restores_the_mode(d: Path) -> None:
    write(d / "dir" / "f", b"new")
    assert os.getxattr(d / "dir" / "f", ACCESS) == ACL_NAMED
    os.removexattr(d / "dir" / "f", ACCESS)
    assert ACCESS not in os.listxattr(d / "dir" / "f")
    with acting_as():
        fails(errno.EACCES, os.open, d / "dir" / "f", os.O_WRONLY)
    os.removexattr(d / "dir", DEFAULT)
    make("dir", d / "dir" / "plain")
    assert os.listxattr(d / "dir" / "plain") == []


@acl_needed
def test_malformed_acls_are_einval(d: Path) -> None:
    write(d / "f")
    for bad in (
        b"\x02\0\0\0\x01",
        layers.acl((ACL_USER_OBJ, 7, -1)),
        layers.acl((ACL_USER_OBJ, 8, -1), (ACL_GROUP_OBJ, 0, -1), (ACL_OTHER, 0, -1)),
    ):
        fails(errno.EINVAL, os.setxattr, d / "f", ACCESS, bad)
    good = layers.acl((ACL_USER_OBJ, 7, -1), (ACL_GROUP_OBJ, 0, -1), (ACL_OTHER, 0, -1))
    assert posix.error_of(os.setxattr, d / "f", DEFAULT, good) == "EACCES", "a default ACL belongs to directories only"


@acl_needed
@tree(lambda d: owned(d / "f", 0o644, OTHER_UID, OTHER_GID))
def test_only_the_owner_sets_an_acl(d: Path) -> None:
    with acting_as():
        fails(errno.EPERM, os.setxattr, d / "f", ACCESS, ACL_NAMED)
