"""The attributes of a new object by default ACL, umask, setgid directory and maker: as on the host, in every combination.

And what nobody must get: an ACL or a group that the work directory, or a directory above an upper or a store, would hand on.
"""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import layers
from support.layers import ACL_GROUP, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ
from support.users import GID, UID, acting_as

import cowfs
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and mounts: needs root")

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NAMED = layers.acl(
    (ACL_USER_OBJ, 7, -1), (ACL_USER, 7, 101), (ACL_GROUP_OBJ, 5, -1), (ACL_GROUP, 6, 60), (ACL_MASK, 5, -1), (ACL_OTHER, 0, -1)
)  # fmt: skip
DEFAULTS = {
    "none": None,
    "narrow": layers.acl((ACL_USER_OBJ, 7, -1), (ACL_GROUP_OBJ, 0, -1), (ACL_OTHER, 0, -1)),
    "wide": layers.acl((ACL_USER_OBJ, 7, -1), (ACL_GROUP_OBJ, 7, -1), (ACL_OTHER, 7, -1)),
    "named": NAMED,
    "mask 7": layers.acl((ACL_USER_OBJ, 6, -1), (ACL_USER, 7, 101), (ACL_GROUP_OBJ, 7, -1), (ACL_MASK, 7, -1), (ACL_OTHER, 4, -1)),
}  # fmt: skip


def tmpfile(path: Path, mode: int) -> None:
    fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, mode)
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)


MAKERS: dict[str, Callable[[Path, int], Any]] = {
    "file": lambda path, mode: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)),
    "dir": lambda path, mode: os.mkdir(path, mode),
    "fifo": lambda path, mode: os.mkfifo(path, mode),
    "socket": lambda path, mode: os.mknod(path, stat.S_IFSOCK | mode),
    "link": lambda path, mode: os.symlink("x", path),
    "tmpfile": tmpfile,
}
MODES = (0o600, 0o666, 0o777, 0o2755, 0o4711, 0o1777)


def seen(path: Path) -> tuple[object, ...]:
    """Everything that was to be decided."""
    s = os.lstat(path)
    acls = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
    return stat.filemode(s.st_mode), oct(s.st_mode), s.st_uid, s.st_gid, acls


def make_parents(top: Path) -> None:
    """One directory for each default ACL and kind of parent; in each, names that are deleted later, so that whiteouts stay."""
    for name, setgid in itertools.product(DEFAULTS, (False, True)):
        place = top / f"{name}-{setgid}"
        place.mkdir()
        for kind in MAKERS:
            (place / f"over-{kind}").write_bytes(b"")
        os.chown(place, 0, 77)
        os.chmod(place, 0o2777 if setgid else 0o777)
        acl = DEFAULTS[name]
        if acl is not None:
            os.setxattr(place, DEFAULT, acl)


@pytest.fixture
def places(space: Path, can_mount: None) -> Iterator[tuple[Path, Path]]:
    """(the mount, a plain directory of the same host), alike."""
    lower, plain, mnt = space / "lower", space / "plain", space / "mnt"
    for place in (lower, plain):
        place.mkdir()
        place.chmod(0o755)
        make_parents(place)
    mnt.mkdir()
    with cowfs.mount([lower], mnt, upper=space / "upper"):
        yield mnt, plain


@pytest.mark.parametrize("setgid", [False, True])
@pytest.mark.parametrize("default", DEFAULTS)
def test_new_objects_are_as_on_the_host(places: tuple[Path, Path], default: str, setgid: bool) -> None:
    """Kind, mode, umask, root or an ordinary user, a name that is new or was deleted: mode, owner and ACLs agree."""
    combinations = itertools.product(MAKERS, MODES, (0, 0o022, 0o077), (None, (UID, GID), (UID, 77)))
    first: set[str] = set()
    before = os.umask(0)
    try:
        for number, (kind, mode, umask, who) in enumerate(combinations):
            results = []
            for place in places:
                parent = place / f"{default}-{setgid}"
                path = parent / f"{number}"
                if kind not in first:  # once a kind: over a whiteout
                    path = parent / f"over-{kind}"
                    path.unlink()
                os.umask(umask)
                try:
                    if who is None:
                        MAKERS[kind](path, mode)
                    else:
                        with acting_as(*who):
                            MAKERS[kind](path, mode)
                    results.append(seen(path))
                except OSError as error:
                    results.append((error.errno,))
            first.add(kind)
            assert results[0] == results[1], (kind, oct(mode), oct(umask), who)
    finally:
        os.umask(before)


def hand_on(place: Path) -> None:
    """Have a directory give everything that is made in it an ACL and a group."""
    os.setxattr(place, DEFAULT, NAMED)
    os.chown(place, -1, 60)
    os.chmod(place, 0o2755)


@pytest.mark.parametrize("where", ["work", "above"])
@pytest.mark.parametrize("row", [None, 4096])
def test_nothing_comes_from_the_work_directory(space: Path, can_mount: None, where: str, row: int | None) -> None:
    """Copied up, created over a whiteout, renamed: everything has the attributes that it had, or that its own directory gives."""
    lower, mnt, above = space / "lower", space / "mnt", space / "above"
    (lower / "dir").mkdir(parents=True)
    (lower / "dir" / "f").write_bytes(b"secret")
    (lower / "dir" / "g").write_bytes(b"")
    for path, mode in ((lower / "dir" / "f", 0o640), (lower / "dir", 0o700), (lower, 0o755)):
        path.chmod(mode)
    mnt.mkdir()
    above.mkdir()
    if where == "above":
        hand_on(above)
    else:
        (above / "work").mkdir()
        hand_on(above / "work")
    with cowfs.mount([lower], mnt, upper=above / "upper", work=above / "work", row=row):
        expected = {name: seen(mnt / name) for name in ("", "dir", "dir/f")}
        with open(mnt / "dir" / "f", "ab") as file:
            file.write(b"!")
        os.unlink(mnt / "dir" / "g")
        before = os.umask(0o077)
        try:
            os.mkdir(mnt / "dir" / "g")
            os.mkfifo(mnt / "fifo")
            (mnt / "new").write_bytes(b"")
        finally:
            os.umask(before)
        assert {name: seen(mnt / name) for name in expected} == expected
        assert seen(mnt / "dir" / "g") == ("drwx------", "0o40700", 0, 0, {})
        assert seen(mnt / "fifo") == ("prw-------", "0o10600", 0, 0, {})
        assert seen(mnt / "new") == ("-rw-------", "0o100600", 0, 0, {})
    assert seen(above / "upper")[:2] == ("drwxr-xr-x", "0o40755")
    assert seen(above / "upper" / "dir" / "f")[:4] == expected["dir/f"][:4]


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_nothing_comes_from_above_a_store(space: Path, can_mount: None, driver: str) -> None:
    """A store below a directory with a default ACL holds what was put in, and nothing of that."""
    (space / "above").mkdir()
    (space / "source").mkdir()
    (space / "mnt").mkdir()
    (space / "source" / "f").write_bytes(b"secret")
    (space / "source" / "f").chmod(0o640)
    hand_on(space / "above")
    with Store.open(space / "above" / "store", driver=driver, fsync=False) as store:
        store.prepare("key")
        with store.mount("key", space / "mnt"):
            (space / "mnt" / "d").mkdir()
            (space / "mnt" / "d" / "f").write_bytes(b"x")
            (space / "mnt" / "d" / "f").chmod(0o640)
            assert seen(space / "mnt" / "d" / "f") == ("-rw-r-----", "0o100640", 0, 0, {})
            assert seen(space / "mnt" / "d")[4] == {}
        store.commit("key", "done")
        assert store.check(content=True).damage == []
    found = subprocess.run(
        ["getfacl", "-Rspcn", space / "above" / "store"], capture_output=True, text=True, check=False
    )
    assert "user:101" not in found.stdout
