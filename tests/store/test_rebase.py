"""A layer that was made upon nothing is put upon another: what is seen is what a layer made there would show."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteout devices: needs root")

Tree = dict[str, bytes]


def upper(store: Store, key: str) -> Path:
    return Path(store.driver.tree(store.index.get(key).id))


def tree(store: Store, name: str) -> Tree:
    with store.tree(name) as found:
        paths: list[bytes] = []
        queue = [b""]
        while queue:
            above = queue.pop()
            for each in found.names(above):
                path = above + b"/" + each if above else each
                status = found.stat(path)
                assert status is not None
                (queue if status.mode & 0o170000 == 0o040000 else paths).append(path)
        return {os.fsdecode(path): b"".join(found.read(path)) for path in paths}


@pytest.mark.parametrize("seed", range(6))
def test_a_random_chain_made_apart(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Store.open(tmp_path / "s", driver="overlay", fsync=False) as store:
        model: Tree = {}
        for number in range(6):
            key = f"k{number}"
            store.prepare(key)
            root, dirs = upper(store, key), set()
            for _ in range(rng.randrange(1, 6)):
                where, name = f"d{rng.randrange(3)}", f"f{rng.randrange(4)}"
                path = f"{where}/{name}"
                new = where not in dirs and not (root / where).exists()
                (root / where).mkdir(exist_ok=True)
                if new and rng.random() < 0.3:  # this layer's directory hides the one beneath
                    os.setxattr(root / where, "trusted.overlay.opaque", b"y")
                    model = {each: data for each, data in model.items() if not each.startswith(f"{where}/")}
                dirs.add(where)
                (root / path).unlink(missing_ok=True)
                if rng.random() < 0.4:
                    os.mknod(root / path, 0o020000, 0)
                    model.pop(path, None)
                else:
                    model[path] = rng.randbytes(20)
                    (root / path).write_bytes(model[path])
            if number:
                assert store.rebase(key, f"n{number - 1}").parent == f"n{number - 1}"
            store.commit(key, f"n{number}")
            assert tree(store, f"n{number}") == model
        assert [info.name for info in store.chain("n5")] == [f"n{number}" for number in range(5, -1, -1)]
        assert store.check(content=True).damage == []


def test_the_root_is_the_parents_unless_it_was_changed(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", driver="overlay", fsync=False) as store:
        store.prepare("base")
        os.chmod(upper(store, "base"), 0o1777)
        os.chown(upper(store, "base"), 5, 6)
        store.commit("base", "base")
        for key, mode, wanted in (("a", None, (0o1777, 5, 6)), ("b", 0o700, (0o700, 0, 0))):
            store.prepare(key)
            if mode is not None:
                os.chmod(upper(store, key), mode)
            store.rebase(key, "base")
            store.commit(key, key)
            status = store.stat_file(key, "")
            assert (status.mode & 0o7777, status.uid, status.gid) == wanted


def test_a_root_with_attributes_of_its_own_keeps_them(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", driver="overlay", fsync=False) as store:
        store.prepare("base")
        os.chmod(upper(store, "base"), 0o1777)
        store.commit("base", "base")
        store.prepare("k")
        os.setxattr(upper(store, "k"), "user.note", b"mine")
        store.rebase("k", "base")
        with store.tree("k") as found:
            assert found.xattrs(b"") == {b"user.note": b"mine"}
        assert store.stat_file("k", "").mode == 0o755


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_an_exported_difference_that_is_applied_apart_keeps_directories(tmp_path: Path, driver: str) -> None:
    with Store.open(tmp_path / "s", driver=driver, fsync=False) as store:
        store.prepare("base")
        with store.paths("base") as paths:
            paths.makedirs("d/sub")
            paths.write_bytes("d/sub/f", b"1")
            paths.chown("d", 5, 6)
            paths.chmod("d", 0o1777)
            paths.setxattr("d/sub", "user.a", b"1")
        store.commit("base", "base")
        store.prepare("k", "base")
        with store.paths("k") as paths:
            paths.write_at("d/sub/f", 0, b"2")
        store.commit("k", "new")
        archive = io.BytesIO()
        store.export_diff("base", "new", archive)
        archive.seek(0)
        store.prepare("apart")
        store.apply("apart", archive)
        store.rebase("apart", "base")
        store.commit("apart", "again")
        assert list(store.diff("new", "again")) == []


def test_what_cannot_be_put_upon_another(tmp_path: Path, can_mount: None) -> None:
    with Store.open(tmp_path / "s", driver="overlay", fsync=False) as store:
        store.prepare("base")
        store.commit("base", "base")
        store.prepare("stands", "base")
        store.prepare("key")
        store.view("view", "base")
        wrong: list[tuple[str, str, type[CowfsError]]] = [
            ("nobody", "base", NotFound),
            ("key", "nobody", NotFound),
            ("key", "stands", InvalidArgument),
            ("view", "base", FailedPrecondition),
            ("base", "base", FailedPrecondition),
            ("stands", "base", FailedPrecondition),
        ]
        for key, parent, error in wrong:
            with pytest.raises(error):
                store.rebase(key, parent)
        (tmp_path / "mnt").mkdir()
        with store.mount("key", tmp_path / "mnt"), pytest.raises(FailedPrecondition, match="in use"):
            store.rebase("key", "base")
        assert store.why_not_rebase() == ""
        assert store.rebase("key", "base").parent == "base"
    with Store.open(tmp_path / "v", driver="vfs", fsync=False) as store:
        store.prepare("base")
        store.commit("base", "base")
        store.prepare("key")
        with pytest.raises(Unsupported, match="whole trees"):
            store.rebase("key", "base")
