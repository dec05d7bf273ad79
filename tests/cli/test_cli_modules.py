"""How much a verb that only looks imports: a budget of modules, which no machine's load can bend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("dataclasses", "typing", "inspect", "urllib", "ctypes", "hashlib", "_hashlib", "shutil", "logging", "uuid", "urllib.parse", "concurrent.futures", "subprocess", "tarfile",
         "zstandard", "isal", "xattr", "fuse", "h11", "cryptography")  # fmt: skip
PARTS = ("cowfs.union", "cowfs.fuse", "cowfs.mounting", "cowfs.archive", "cowfs.images", "cowfs.row", "cowfs.erofs", "cowfs.driver",
         "cowfs.store.store", "cowfs.service", "cowfs_drivers")  # fmt: skip

BUDGETS = {
    # arguments: (modules of cowfs, modules in all beyond Python's own start)
    ("--version",): (4, 25),
    ("--help",): (4, 25),
    ("ls", "--help"): (12, 59),
    ("ls",): (26, 66),
    ("ls", "--json"): (26, 77),
    ("stat", "base"): (26, 66),
    ("diff", "base"): (31, 75),
    ("tree",): (26, 66),
    ("log", "base"): (26, 66),
    ("images",): (26, 66),
    ("df",): (27, 66),
    ("df", "-v"): (27, 66),
    ("usage", "base"): (26, 66),
}

WHOLE: dict[tuple[str, ...], tuple[int, int]] = {
    # those that open the store with its driver: nothing that writes, makes archives or mounts
    ("cat", "base:/file"): (104, 175),
    ("ls", "base:/"): (104, 175),
    ("find", "base"): (104, 175),
    ("du", "base"): (104, 175),
}
WRITING = (
    "cowfs.archive.members",
    "cowfs.fuse",
    "cowfs.images",
    "cowfs.row",
    "cowfs.union.view",
    "cowfs.store.mounts",
    "cowfs.service",
)
NEVER = (
    "typing",
    "dataclasses",
    "inspect",
    "logging",
    "concurrent.futures",
    "urllib",
    "tarfile",
    "zstandard",
    "isal",
    "xattr",
    "fuse",
    "h11",
    "cryptography",
)

PROGRAM = """
import sys
before = set(sys.modules)
sys.path[:0] = sys.argv.pop(1).split(":")
from cowfs.cli import main
try:
    assert main() == 0
except SystemExit as end:  # of --help
    assert not end.code
sys.stdout.flush()
sys.stderr.write("\\n".join(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import cowfs_drivers
    from cowfs import Store

    where = tmp_path_factory.mktemp("modules")
    with Store.open(where / "store", driver="overlay") as made:
        made.prepare("work")
        with made.open_file("work", "/file", "w") as file:
            file.write("text")
        made.commit("work", "base")
        made.tag("app:1", "base")
    (where / "cowfs_drivers").symlink_to(
        os.path.dirname(cowfs_drivers.__file__)
    )  # as in a wheel, without the finder of an editable installation
    return where / "store"


def modules(store: Path, arguments: tuple[str, ...]) -> list[str]:
    """The modules that a run of the command imports, beyond those that a bare Python has (-I -S: nothing of ``site``)."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM, ":".join([*sys.path[1:], str(store.parent)]), *arguments],
        env={**os.environ, "COWFS_ROOT": str(store)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stderr.split()


@pytest.mark.parametrize("arguments", BUDGETS, ids=" ".join)
def test_a_verb_that_looks_imports_what_it_needs(store: Path, arguments: tuple[str, ...]) -> None:
    found = modules(store, arguments)
    own = [name for name in found if name.split(".")[0] in ("cowfs", "cowfs_drivers")]
    most_own, most = BUDGETS[arguments]
    measured = {"shutil"} if "--help" in arguments else set()  # the width of the terminal, for who reads
    assert not [name for name in found if name in HEAVY and name not in measured]
    assert not [name for name in own if name.startswith(PARTS)]
    assert len(own) <= most_own, own
    assert len(found) <= most, found


@pytest.mark.parametrize("arguments", [("diff", "base"), ("find", "base"), ("usage", "base")], ids=" ".join)
def test_the_bar_is_imported_only_after_a_second(store: Path, arguments: tuple[str, ...]) -> None:
    assert not {"cowfs.cli.progress", "rich"} & set(modules(store, arguments))


@pytest.mark.parametrize("arguments", WHOLE, ids=" ".join)
def test_a_verb_that_reads_files_imports_nothing_that_writes(store: Path, arguments: tuple[str, ...]) -> None:
    found = modules(store, arguments)
    own = [name for name in found if name.split(".")[0] in ("cowfs", "cowfs_drivers")]
    most_own, most = WHOLE[arguments]
    assert not [name for name in found if name in NEVER]
    assert not [name for name in own if name.startswith(WRITING)]
    assert len(own) <= most_own, own
    assert len(found) <= most, found


def test_a_looking_verb_opens_what_an_older_or_unfinished_store_lacks(tmp_path: Path) -> None:
    """A store whose driver is not settled yet is opened whole, and so becomes a store."""
    from cowfs import Store
    from cowfs.store.look import Look

    with Store.open(tmp_path / "store", driver="vfs") as store, store.index.write():
        store.index._connection().execute("DELETE FROM meta WHERE key = 'driver_class'")
    with Look.open(tmp_path / "store") as look:
        assert look.index.meta("driver_class") == "cowfs_drivers.vfs:VfsDriver"


def test_looking_and_the_whole_store_tell_the_same(store: Path) -> None:
    from cowfs import Store
    from cowfs.store.look import Look

    with Store.open(store) as whole, Look.open(store) as look:
        assert list(look.walk()) == list(whole.walk())
        assert look.stat("app:1") == whole.stat("app:1")
        assert look.chain("base") == whole.chain("base")
        assert look.usage("base") == whole.usage("base")
        assert list(look.diff("base")) == list(whole.diff("base"))
        assert [tag.name for tag in look.tags()] == [tag.name for tag in whole.tags()] == ["app:1"]


def test_a_wrong_driver_and_a_missing_store_are_told_as_ever(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cowfs.cli", "ls", "--json", "--root"]
    wrong = subprocess.run([*command, str(store), "--driver", "vfs"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "has the driver overlay, not vfs" in wrong.stderr
    none = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert none.returncode == 3
    assert "make one with 'cowfs init'" in none.stderr
    assert not (tmp_path / "none").exists()
    right = subprocess.run([*command, str(store)], capture_output=True, text=True, check=True)
    assert json.loads(right.stdout)[0]["name"] == "base"
