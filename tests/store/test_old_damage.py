"""``check --content`` finds what 0.1.0 left in stores, and ``--repair`` does what it says.

``tests/data/damaged-0.1.tar.gz`` was made by that version (tests/data/README.md).
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from cowfs.cli import main
from cowfs.index.directory import root_digest
from cowfs.store import Store
from cowfs.sys import xattr
from cowfs.union import View

from .conftest import content

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (trusted.overlay.*)")

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def stores(space: Path) -> Path:
    subprocess.run(
        ["tar", "--xattrs", "--xattrs-include=*", "-xzC", str(space), "-f", str(DATA / "damaged-0.1.tar.gz")],
        check=True,
    )
    return space


def found(root: Path, *, repair: bool = False) -> list[tuple[str, str, str, bool]]:
    """(kind, snapshot, first path named or "", whether it was repaired)."""
    with Store.open(root, create=False) as store:
        report = store.check(content=True, repair=repair)
    return [
        (each.kind, each.name, each.what.partition("'")[2].partition("'")[0], bool(each.repaired))
        for each in report.problems
    ]


@pytest.mark.parametrize(("name", "path"), [("back", "b/g"), ("broken", "a/f")])
def test_links_that_a_squash_broke_are_told(stores: Path, name: str, path: str) -> None:
    """Nothing can tell what was meant, so nothing is repaired: the message says what helps."""
    for repair in (False, True, False):
        assert found(stores / name, repair=repair) == [("links", "s2", path, False)]
    with Store.open(stores / name, create=False) as store:
        report = store.check(content=True)
        assert not report.damage
        assert "only a new snapshot can link it again" in report.problems[0].what


def test_the_summary_speaks_of_links(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--content", "--root", str(stores / "back")]) == 0
    assert "no damage, but links to look into" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["edited-overlay", "edited-vfs"])
def test_a_layer_that_is_not_its_archive_is_found_and_its_diff_id_forgotten(stores: Path, name: str) -> None:
    good = _layer(b"good")
    with Store.open(stores / name, create=False) as store:
        assert store.index.get("w1").diff_id == "sha256:" + hashlib.sha256(good).hexdigest()
    assert [(kind, who, done) for kind, who, _, done in found(stores / name)] == [("archive", "w1", False)]
    assert [(kind, who, done) for kind, who, _, done in found(stores / name, repair=True)] == [("archive", "w1", True)]
    assert found(stores / name) == []
    with Store.open(stores / name, create=False) as store:
        assert store.index.get("w1").diff_id is store.index.get("w1").chain_id is store.index.get("x1").chain_id is None
        store.import_image(io.BytesIO(good), "clean", form="layer")
        top = store.index.tag("clean")
        assert top is not None
        assert content(store, top.target, "app/conf") == b"good"
        assert content(store, "w1", "app/conf") == b"EVIL"
        out = io.BytesIO()
        store.export("w1", out, format="layer")
        assert b"EVIL" in out.getvalue()


def test_an_edit_that_vanished_is_found_and_recorded(stores: Path) -> None:
    wrong = [("content", name, "app/conf") for name in ("w1", "x1")]
    assert found(stores / "kept") == [(*each, False) for each in wrong]
    assert found(stores / "kept", repair=True) == [(*each, True) for each in wrong]
    assert found(stores / "kept") == []
    with Store.open(stores / "kept", create=False) as store:
        assert [(change.path, set(change.what)) for change in store.diff("base", "w1")] == [(b"app/conf", {"content"})]
        assert list(store.diff("w1", "x1")) == []


def test_names_that_were_exchanged_are_found_and_recorded(stores: Path) -> None:
    wrong = [("content", "top", name) for name in "abcd"]
    assert found(stores / "exchanged") == [(*each, False) for each in wrong]
    assert found(stores / "exchanged", repair=True) == [(*each, True) for each in wrong]
    assert found(stores / "exchanged") == []
    with Store.open(stores / "exchanged", create=False) as store:
        assert {change.path for change in store.diff("base", "top")} >= {b"a", b"b", b"c", b"d"}


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_records_of_before_are_rebuilt_as_they_were(space: Path, driver: str) -> None:
    """They do not say which names are one file: made anew with that, they would be others."""
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.prepare("k")
        with store.paths("k") as paths:
            paths.write_bytes("a", b"one")
            paths.link("a", "b")
        store.commit("k", "base")
        row = store.index.get("base")
        before = store.services.scanning.scan_row(row, links=False)
        assert before.root != row.root
        with store.index.write() as change:
            change.add_records(before.pending.new)
            change.set_root(row.num, before.root)
        store.gc()
        digest = root_digest(before.root[1])
        with store.index.write() as change:
            change.remove_records([digest])
        assert [problem.repaired for problem in store.check(repair=True).problems] == ["rebuilt from the layer"]
        assert store.check(content=True).problems == []
        assert store.index.get("base").root == before.root


def _layer(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("app/conf")
        member.size, member.mtime = len(data), 1_600_000_000
        tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


UNDELETED = {"whiteout": "dir/a", "opaque": "dir/a", "directory": "dir", "root": "data"}


@pytest.fixture
def undeleted(space: Path) -> Path:
    subprocess.run(
        ["tar", "--xattrs", "--xattrs-include=*", "-xzC", str(space), "-f", str(DATA / "undeleted-0.1.tar.gz")],
        check=True,
    )
    return space


@pytest.mark.parametrize("case", UNDELETED)
@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_what_an_archive_deletes_and_its_layer_shows_is_told(undeleted: Path, driver: str, case: str) -> None:
    """A repair forgets the diff ids, so that the same archive, imported again, becomes a layer of its own."""
    root, path = undeleted / f"{driver}-{case}", UNDELETED[case]
    assert found(root) == [("archive", "top", path, False)]
    assert found(root, repair=True) == [("archive", "top", path, True)]
    assert found(root) == []
    with Store.open(root, create=False) as store:
        top, above = store.index.get("top"), store.index.get("above")
        assert top.diff_id is top.chain_id is above.chain_id is None


@pytest.mark.parametrize("committed", [False, True])
def test_writes_that_a_mark_hides_are_told(space: Path, committed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1.0 left a metacopy mark that the host did not remove; data of an interrupted copy is what is shown, and no damage."""
    body = os.urandom(300_000)
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("work")
        for name in ("lost", "torn", "fine"):
            (space / "store" / "layers" / store.index.get("work").id / "fs" / name).write_bytes(body)
        store.commit("work", "base")
        store.prepare("key", "base")
        driver = store.driver
        lower, upper = driver.tree(store.index.get("base").id), driver.tree(store.index.get("key").id)
        view = View([lower], upper, driver.work(store.index.get("key").id))
        for inner in (b"lost", b"torn", b"fine"):
            view.setattr(view.lookup(view.root, inner), mode=0o600)
        real = xattr.drop
        monkeypatch.setattr(
            xattr,
            "drop",
            lambda fd, name, attribute: None if attribute == view.form.metacopy else real(fd, name, attribute),
        )
        view.write(view.lookup(view.root, b"lost"), 100_000, b"new")
        monkeypatch.undo()
        view.close()
        with open(f"{upper}/torn", "r+b") as file:  # killed in the middle of a copy
            file.write(body[:200_000])
        if committed:
            store.commit("key", "top")
    name = "top" if committed else "key"
    for repair in (False, True):
        assert found(space / "store", repair=repair) == [("content", name, "lost", False)]
