"""The library at its edges: closed stores, arguments of the wrong kind, errors that travel, a damaged index inside a mount."""

from __future__ import annotations

import copy
import os
import pickle
import sqlite3
import subprocess
from pathlib import Path

import pytest

import cowfs
from cowfs.diff.changes import changes
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.index.transaction import NameTaken
from cowfs.model import parse_count, parse_size
from cowfs.store import Store


def _every_error() -> list[type[CowfsError]]:
    found = [CowfsError]
    for kind in found:
        found += kind.__subclasses__()
    return [
        kind for kind in found if not kind.__module__.startswith("cowfs.service")
    ]  # answers to requests, which travel as such


@pytest.mark.parametrize("kind", _every_error(), ids=lambda kind: kind.__name__)
def test_errors_keep_message_and_remedy_when_they_travel(kind: type[CowfsError]) -> None:
    error = kind("what") if kind is NameTaken else kind("what", remedy="how")
    error.exit_code = 42  # type: ignore[misc]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.message, again.remedy, str(again), again.exit_code) == (
            error.message,
            error.remedy,
            str(error),
            42,
        )


@pytest.mark.parametrize(
    "text", [1.5, 2.0, True, "1.5", "0.9", "", "-1", "2X", "Gi", "1.5i", "٣", "1e3", None, "9" * 30, b"5"]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(InvalidArgument, match="not a size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [1.5, True, "1.5", "0", "-3", "2Gi", "٣", None])
def test_what_is_no_count_is_refused(text: object) -> None:
    with pytest.raises(InvalidArgument, match="not a count"):
        parse_count(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2Gi", 2 << 30), ("2G", 2 << 30), ("2GiB", 2 << 30), ("2GB", 2 << 30), ("1.5k", 1536), ("9007199254740993", 9007199254740993),
     ("0.1T", (1 << 40) // 10), (" 7 ", 7), ("4096b", 4096), ("1.0", 1)],
)  # fmt: skip
def test_sizes_are_exact(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_limit_is_at_least_one_unit(space: Path) -> None:
    with Store.open(space / "store", fsync=False) as store:
        for size in (5, "5", 4095):
            with pytest.raises(InvalidArgument, match="4096"):
                store.prepare("k", size=size)
        store.prepare("k", size=4096)


def test_a_closed_store_refuses_every_verb(space: Path) -> None:
    store = Store.open(space / "store", fsync=False)
    store.prepare("k")
    store.close()
    store.close()
    for verb in (
        lambda: store.prepare("k2"), lambda: store.commit("k", "c"), lambda: store.remove("k"), lambda: store.stat("k"),
        lambda: list(store.walk()), lambda: store.mounts("k"), lambda: store.usage("k"), lambda: store.gc(),
        lambda: store.check(), lambda: store.describe(), lambda: store.totals(), lambda: store.tags(),
        lambda: store.mounted_at("k"), lambda: store.snapshot("k", "s"), lambda: store.mount("k", space),
        lambda: store.export("k", os.devnull, format="tar"), lambda: store.import_image(space), lambda: list(store.events()),
    ):  # fmt: skip
        with pytest.raises(FailedPrecondition, match="is closed"):
            verb()
    with Store.open(space / "store", fsync=False) as again:
        assert [info.name for info in again.walk()] == ["k"]


def test_one_path_is_no_sequence_of_layers(space: Path) -> None:
    (space / "s" / "a").mkdir(parents=True)
    for path in (str(space / "s"), os.fsencode(space / "s"), space / "s"):
        with pytest.raises(InvalidArgument, match="sequence"):
            cowfs.View(path)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="sequence"):
        changes(str(space / "s"), str(space / "s"))


def test_one_string_of_options_or_filters_is_not_taken_letter_by_letter(space: Path) -> None:
    with pytest.raises(InvalidArgument, match="'frobnicate'"):
        cowfs.mount([space], space, options="nodev,frobnicate", readonly=True)
    with Store.open(space / "store", fsync=False) as store:
        store.prepare("k")
        assert [info.name for info in store.walk("kind==active")] == ["k"]
        assert store.spec("k", str(space), options="nodev,ro").readonly


def test_opening_without_create_makes_nothing(space: Path) -> None:
    with pytest.raises(NotFound):
        Store.open(space / "none", create=False)
    assert not (space / "none").exists()


def _damage(path: Path, how: str) -> None:
    connection = sqlite3.connect(path)
    if how == "missing":
        connection.execute("DELETE FROM records")
    else:
        connection.execute("UPDATE records SET data = ?", (b"E" + os.urandom(60) if how == "garbled" else b"E",))
    connection.commit()
    connection.close()


@pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")
@pytest.mark.parametrize("how", ["missing", "garbled", "cut short"])
@pytest.mark.parametrize("frontend", ["kernel", "fusepy"])
def test_a_damaged_index_is_eio_and_one_line_of_the_log(space: Path, how: str, frontend: str) -> None:
    for name in ("tree/d/e", "mnt"):
        (space / name).mkdir(parents=True)
    (space / "tree" / "d" / "e" / "f").write_text("f")
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.import_image(space / "tree", "base")
        store.prepare("k", "base")
        log = space / "log"
        handle = store.mount("k", space / "mnt", log=str(log), frontend=frontend)
        try:
            _damage(space / "store" / "index.db", how)
            for _ in range(3):
                done = subprocess.run(["ls", space / "mnt" / "d" / "e"], capture_output=True, text=True, check=False)
                assert "Input/output error" in done.stderr
        finally:
            handle.unmount()
    lines = log.read_text().splitlines()
    assert 1 <= len(lines) <= 3, log.read_text()  # a record each, said once
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert "record" in line
        assert "cowfs check" in line
