"""A store that was copied file by file, as a backup does: its marks are of other files, and nothing believes them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from cowfs.store import Store

from .conftest import content, tree_path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (trusted.overlay.*)")


@pytest.fixture(params=["overlay", "row", "vfs"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def layer(data: bytes = b"good") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("app/conf")
        member.size, member.mtime = len(data), 1_600_000_000
        tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def copy(source: Path, target: Path, how: str) -> None:
    if how == "rsync":
        if shutil.which("rsync") is None:
            pytest.skip("rsync is not installed")
        command = ["rsync", "-aHAX", "--numeric-ids", f"{source}/", str(target)]
    elif how == "tar":
        target.mkdir()
        packed = subprocess.run(
            ["tar", "--xattrs", "--xattrs-include=*", "-cC", str(source), "."], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "-xC", str(target)], check=True, input=packed)
        return
    else:
        command = ["cp", "-a", str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("how", ["cp", "rsync", "tar"])
@pytest.mark.parametrize("copied", [False, True], ids=["here", "copied"])
def test_an_edited_layer_is_not_the_archive_that_it_came_from(
    store: Store, space: Path, how: str, copied: bool
) -> None:
    if how != "cp" and not copied:
        pytest.skip("the same as with cp")
    store.prepare("w")
    store.apply("w", io.BytesIO(layer()))
    with (tree_path(store, "w") / "app/conf").open("r+b") as file:  # what a mount writes to
        file.write(b"EVIL")
    place = space / "store"
    if copied:
        copy(place, space / "copy", how)
        place = space / "copy"
    with Store.open(place, fsync=False) as there:
        there.commit("w", "w1")
        assert there.index.get("w1").diff_id is None
        out = io.BytesIO()
        there.export("w1", out, format="layer")
        assert b"EVIL" in out.getvalue()
        assert not there.check(content=True).problems


def test_a_layer_that_nobody_touched_keeps_its_diff_id_where_it_was_made(store: Store) -> None:
    store.prepare("w")
    store.apply("w", io.BytesIO(layer()))
    store.commit("w", "w1")
    assert store.index.get("w1").diff_id == "sha256:" + hashlib.sha256(layer()).hexdigest()


@pytest.mark.parametrize("driver", ["vfs"], indirect=True)
@pytest.mark.parametrize("copied", [False, True], ids=["here", "copied"])
def test_an_edit_that_keeps_size_and_mtime_does_not_vanish(store: Store, space: Path, copied: bool) -> None:
    store.prepare("b")
    store.apply("b", io.BytesIO(layer()))
    store.commit("b", "base")
    store.prepare("k", "base")
    path = tree_path(store, "k") / "app/conf"
    st = path.stat()
    path.write_bytes(b"EDIT")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    place = space / "store"
    if copied:
        copy(place, space / "copy", "cp")
        place = space / "copy"
    with Store.open(place, fsync=False) as there:
        there.commit("k", "k1")
        assert [(change.path, set(change.what)) for change in there.diff("base", "k1")] == [(b"app/conf", {"content"})]
        assert content(there, "k1", "app/conf") == b"EDIT"
