"""An ordinary user's store, with owners kept in attributes: what goes in as root's and other people's comes out so."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from support.users import GID, UID, acting_as

from cowfs.archive import ApplyOptions
from cowfs.errors import Unsupported
from cowfs.store import Store

from .conftest import tree_path
from .test_store_images import member

RECORDED = ApplyOptions(owners="xattr")


def _layer(*, extra: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member(tar, ".", kind=tarfile.DIRTYPE, mode=0o755)
        member(tar, "bin", kind=tarfile.DIRTYPE, mode=0o555, uid=7, gid=8)
        member(tar, "bin/su", b"#!" * 3000, mode=0o4711)
        member(tar, "bin/sudo", kind=tarfile.LNKTYPE, linkname="bin/su", mode=0o4711)
        member(tar, "null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        member(tar, "pipe", kind=tarfile.FIFOTYPE, mode=0o600, uid=33)
        member(tar, "sh", kind=tarfile.SYMTYPE, linkname="bin/su", mode=0o777)
        if extra:
            member(tar, "mail", b"hello", uid=8, gid=12)
    return out.getvalue()


@pytest.fixture
def warm(space: Path, driver: str) -> None:
    """Root does all of it once: the user may not read the modules that are imported on the way."""
    with Store.open(space / "warm", driver=driver, fsync=False) as store:
        store.import_image(io.BytesIO(_layer()), "base", options=RECORDED)
        store.export("base", space / "warm.tar")
        store.import_image(str(space / "warm.tar"), "again")
        store.prepare("k", "base")
        with store.paths("k") as paths:
            paths.write_bytes(b"new", b"new")
        store.commit("k", "top")
        for form in ("tar", "layer"):
            _exported(store, "top", form)


@pytest.fixture
def user_store(space: Path, driver: str, warm: None) -> Iterator[Store]:
    space.chmod(0o777)
    with acting_as(), Store.open(space / "store", driver=driver, fsync=False) as opened:
        yield opened


def _members(data: bytes) -> dict[str, tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            one.name: (
                one.type,
                one.uid,
                one.gid,
                one.mode,
                one.size,
                one.linkname,
                one.devmajor,
                one.devminor,
                one.mtime,
            )
            for one in tar
        }


def _exported(store: Store, name: str, form: str) -> bytes:
    out = io.BytesIO()
    store.export(name, out, format=form)
    return out.getvalue()


def test_an_ordinary_users_import_is_exported_with_the_same_digests(user_store: Store, space: Path) -> None:
    """Layers byte for byte; also when the headers are gone and they are made anew."""
    layer = _layer()
    top = user_store.import_image(io.BytesIO(layer), "base", options=RECORDED)
    assert _exported(user_store, top, "layer") == layer
    user_store.export("base", space / "base.tar")
    again = Store.open(space / "again", driver=user_store.driver.name, fsync=False)
    with again:
        assert again.import_image(str(space / "base.tar"), options=RECORDED) == top
    for kept in ("cowfs-headers", "cowfs-applied"):
        (Path(user_store.driver.directory(user_store.index.get(top).id)) / kept).unlink(missing_ok=True)
    wanted = _members(layer)
    del wanted["."]  # as in the tree beneath: no change
    assert _members(_exported(user_store, top, "layer")) == wanted


def test_a_whole_tree_is_exported_with_the_owners_recorded(user_store: Store) -> None:
    """Of all its layers; devices and pipes are what they stand for."""
    user_store.import_image(io.BytesIO(_layer()), "base", options=RECORDED)
    user_store.prepare("k", "base")
    user_store.apply("k", io.BytesIO(_layer(extra=True)), options=RECORDED)
    user_store.commit("k", "top")
    assert _members(_exported(user_store, "top", "tar")) == _members(_layer(extra=True))


def test_what_is_made_over_recorded_owners_is_roots(user_store: Store) -> None:
    """In the namespace of `cowfs run` the user is root; a file that was copied up keeps its recorded owner."""
    user_store.import_image(io.BytesIO(_layer()), "base", options=RECORDED)
    user_store.prepare("k", "base")
    with user_store.paths("k") as paths:
        paths.write_bytes(b"new", b"new")
        paths.write_bytes(b"bin/su", b"changed")
    user_store.commit("k", "top")
    found = _members(_exported(user_store, "top", "layer"))
    assert found["new"][1:3] == (0, 0)
    assert found["bin/su"][1:4] == (0, 0, 0o4711)


def test_an_attribute_that_no_archive_option_made_is_not_believed(user_store: Store) -> None:
    """Any writer of a file may set the attribute."""
    user_store.prepare("k")
    (tree_path(user_store, "k") / "f").write_bytes(b"")
    os.setxattr(tree_path(user_store, "k") / "f", "user.containers.override_stat", b"0:0:04755:file")
    user_store.commit("k", "plain")
    assert _members(_exported(user_store, "plain", "tar"))["f"][1:4] == (UID, GID, 0o644)


Policy = Literal["fail", "xattr", "ignore"]
POLICIES: list[Policy] = ["fail", "xattr", "ignore"]


@pytest.mark.parametrize("first", POLICIES)
@pytest.mark.parametrize("second", POLICIES)
def test_a_layer_with_owners_by_another_policy_is_not_the_same_layer(
    user_store: Store, first: Policy, second: Policy
) -> None:
    """The policy of owners of an import holds, whatever was imported before."""
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w") as tar:
        member(tar, "f", b"x", uid=0, gid=42)
    shown = {"xattr": (0, 42), "ignore": (UID, GID)}
    for tag, policy in (("first", first), ("second", second)):
        theirs.seek(0)
        options = ApplyOptions(owners=policy)
        if policy == "fail":
            with pytest.raises(Unsupported, match="cannot be set"):
                user_store.import_image(theirs, tag, options=options)
            continue
        user_store.import_image(theirs, tag, options=options)
        found = _exported(user_store, tag, "tar")
        with tarfile.open(fileobj=io.BytesIO(found)) as tar:
            info = tar.getmember("f")
            assert (info.uid, info.gid) == shown[policy], (tag, policy)
    if first == second != "fail":
        assert user_store.index.tag("first").target == user_store.index.tag("second").target  # type: ignore[union-attr]
