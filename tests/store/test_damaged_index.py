"""Random damage to an index: each verb succeeds, or fails with one of the errors that callers expect."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs import Store
from cowfs.errors import Corrupt, CowfsError

VERBS: dict[str, Callable[[Store], object]] = {
    "walk": lambda store: list(store.walk()),
    "usage": lambda store: store.usage("k"),
    "mounts": lambda store: store.mounts("k"),
    "events": lambda store: list(store.events(follow=False)),
    "check": lambda store: store.check(),
    "prepare": lambda store: store.prepare("n", "base"),
    "commit": lambda store: store.commit("n", "m"),
    "remove": lambda store: store.remove("k"),
    "gc": lambda store: store.gc(),
    "repair": lambda store: store.check(repair=True),
}


def damage(path: Path, seed: int) -> None:
    """Overwrite a few bytes anywhere, or at the head of a page, where SQLite keeps its structure; sometimes cut the file short."""
    rng = random.Random(seed)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for _ in range(rng.choice([1, 1, 2, 5, 50])):
            anywhere, head = rng.randrange(size), rng.randrange(size // 4096) * 4096 + rng.randrange(60)
            file.seek(rng.choice([anywhere, head]))
            file.write(rng.randbytes(rng.choice([1, 4, 100])))
        if rng.random() < 0.1:
            file.truncate(rng.randrange(size))


def test_a_damaged_index_gives_no_other_error(tmp_path: Path) -> None:
    with Store.open(tmp_path / "whole", driver="overlay", fsync=False) as store:
        store.prepare("a")
        store.commit("a", "base")
        store.tag("tag", "base")
        store.prepare("k", "base", size="1G")
    opened = 0
    for seed in range(200):
        place = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", place, symlinks=True)
        damage(place / "index.db", seed)
        doing = "open"
        try:
            with Store.open(place, fsync=False, create=False) as store:
                opened += 1
                for doing, verb in VERBS.items():  # noqa: B007  (named in the failure)
                    try:
                        verb(store)
                    except (CowfsError, OSError):
                        pass
        except (CowfsError, OSError):
            pass
        except Exception as error:  # noqa: BLE001  (the point of the test)
            pytest.fail(f"seed {seed}, {doing}: {error!r}")
        shutil.rmtree(place)
    assert 50 < opened < 190  # some are too damaged to be opened, and most are not


@pytest.mark.parametrize("value", ["NULL", "'nothing'", "7"])
@pytest.mark.parametrize("column", ["kind", "labels"])
def test_a_record_with_another_value_is_corrupt(tmp_path: Path, column: str, value: str) -> None:
    import sqlite3

    with Store.open(tmp_path / "s", driver="overlay", fsync=False) as store:
        store.prepare("a")
    connection = sqlite3.connect(tmp_path / "s/index.db")
    connection.execute("PRAGMA ignore_check_constraints = 1")
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE name = 'snapshots'")
    connection.commit()
    connection.close()
    connection = sqlite3.connect(tmp_path / "s/index.db")
    connection.execute("PRAGMA ignore_check_constraints = 1")
    connection.execute(f"UPDATE snapshots SET {column} = {value}")
    connection.commit()
    connection.close()
    if os.path.exists(tmp_path / "s/index.db-wal"):
        os.unlink(tmp_path / "s/index.db-wal")
    with Store.open(tmp_path / "s", fsync=False) as store, pytest.raises(Corrupt, match="damaged"):
        list(store.walk())
