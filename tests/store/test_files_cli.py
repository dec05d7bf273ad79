"""`cowfs cat`, `cp`, `find`, `du` and `ls NAME:PATH`: the command beside the tools whose names they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trees import assert_same, snapshot

from cowfs.store import Store

Cowfs = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def cowfs(space: Path) -> Cowfs:
    """The command in a directory with a store that has the committed ``base`` (tags ``app:1`` and ``app``) and the active ``work``."""
    (space / "tree/etc/deep").mkdir(parents=True)
    (space / "tree/etc/conf").write_text("one\n")
    (space / "tree/etc/deep/big").write_bytes(os.urandom(70_000))
    (space / "tree/etc/empty").touch()
    (space / "tree/etc/link").symlink_to("/etc/conf")
    (space / "tree/usr").mkdir()
    (space / "tree/usr/run").write_text("run")
    os.chmod(space / "tree/usr/run", 0o755)
    os.link(space / "tree/etc/deep/big", space / "tree/usr/same")
    os.utime(space / "tree/etc/conf", ns=(0, 0))
    with (space / "tree" / os.fsdecode(b"odd\xff\nname")).open("w") as file:
        file.write("odd")
    with Store.open(space / "store", fsync=False) as store:
        store.prepare("fill")
        store.copy_in("fill", space / "tree", "/")
        store.commit("fill", "base")
        store.tag("app:1", "base")
        store.tag("app", "base")
        store.prepare("work", "base")

    def run(*arguments: str | Path, data: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "cowfs.cli", *map(str, arguments)],
            input=data,
            capture_output=True,
            cwd=space,
            env={**os.environ, "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"},
            check=False,
        )
        assert done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        return done

    return run


def test_cat_prints_files_of_names_tags_and_keys(cowfs: Cowfs) -> None:
    for name in ("base", "app", "app:1", "work"):
        assert cowfs("cat", f"{name}:/etc/conf").stdout == b"one\n"
        assert cowfs("cat", f"{name}:etc/link", f"{name}:/usr/run").stdout == b"one\nrun"
    for text, code, word in (
        ("base:/etc", 1, "directory"),
        ("base:/no", 1, "No such file"),
        ("nothing:/x", 3, "no snapshot or tag 'nothing'"),
        ("base", 2, "base:/PATH"),
        ("app:2:/etc/conf", 1, "No such file"),
    ):
        assert word in cowfs("cat", text, code=code).stderr.decode()


def test_cp_lands_where_cp_would(cowfs: Cowfs, space: Path) -> None:
    """The same copies by cp(1) in plain directories."""
    (space / "theirs").mkdir()
    (space / "ours").mkdir()
    for source, target in (
        ("etc/conf", "new"),
        ("etc/conf", ""),
        ("etc", "tree"),
        ("etc", ""),
        ("etc/.", "merged"),
        ("usr/", ""),
        ("etc/link", "link"),
    ):
        subprocess.run(["cp", "-a", f"tree/{source}", f"theirs/{target}"], cwd=space, check=True)
        cowfs("cp", "-a", f"base:/{source}", f"./ours/{target}")
    trees = [snapshot(space / "theirs"), snapshot(space / "ours")]
    for tree in trees:
        del tree[""]
    assert_same(*trees, ignore=("ctime", "nlink", "same_as"))
    for source, target in (("theirs/new", "in/"), ("theirs/tree", "in"), ("theirs/.", "in/all"), ("theirs", "in/sub")):
        if source == "theirs/new":
            cowfs("cp", f"./{source}", f"work:/{target}", code=3)
            (space / "in").mkdir()
            cowfs("cp", space / "in", "work:/")
        subprocess.run(["cp", "-a", space / source, space / target], check=True)
        cowfs("cp", "-a", f"./{source}", f"work:/{target}")
    cowfs("cp", "-a", "work:/in", space / "back")
    assert_same(snapshot(space / "in"), snapshot(space / "back"), ignore=("ctime", "mtime"))


def test_cp_by_tar_and_between_snapshots(cowfs: Cowfs, space: Path) -> None:
    listing = subprocess.run(["tar", "-t"], input=cowfs("cp", "base:/etc", "-").stdout, capture_output=True, check=True)
    assert listing.stdout.split() == [b"etc/", b"etc/conf", b"etc/deep/", b"etc/deep/big", b"etc/empty", b"etc/link"]
    assert (
        subprocess.run(
            ["tar", "-t"], input=cowfs("cp", "base:/etc/conf", "-").stdout, capture_output=True, check=True
        ).stdout
        == b"conf\n"
    )
    packed = subprocess.run(["tar", "-cz", "tree"], cwd=space, capture_output=True, check=True).stdout
    cowfs("cp", "-", "work:/usr", data=packed)
    assert cowfs("cat", "work:/usr/tree/etc/conf").stdout == b"one\n"
    cowfs("cp", "app:1:/etc", "work:/usr")
    assert cowfs("cat", "work:/usr/etc/link").stdout == b"one\n"
    assert b"into itself" in cowfs("cp", "work:/usr", "work:/usr/etc", code=2).stderr
    assert b"NAME:PATH" in cowfs("cp", "./a", "./b", code=2).stderr
    assert b"no such file" in cowfs("cp", "./nothing", "work:/x", code=3).stderr
    assert b"is committed" in cowfs("cp", "./tree", "base:/x", code=5).stderr
    assert b"no tar archive" in cowfs("cp", "-", "work:/usr", data=b"x" * 2000, code=2).stderr


def test_find_lists_what_find_lists(cowfs: Cowfs, space: Path) -> None:
    for tests in (
        [], ["-type", "f"], ["-type", "f,l"], ["-name", "*n*"], ["-iname", "*CONF"], ["-path", "*/etc/*"], ["-perm", "755"], ["-perm", "-100"],
        ["-perm", "/022"], ["-size", "+1000c"], ["-type", "f", "-size", "-1000c"], ["-empty"], ["-maxdepth", "1"], ["-maxdepth", "1", "-empty"], ["-links", "2"],
        ["-mtime", "+1"], ["-mtime", "-1", "-type", "f"], ["-uid", "0"],
    ):  # fmt: skip
        theirs = subprocess.run(
            ["find", "tree", *tests, "-print0"], cwd=space, capture_output=True, check=True
        ).stdout.split(b"\0")
        expected = sorted(b"/" + path.removeprefix(b"tree").lstrip(b"/") for path in theirs if path)
        own = [word.rstrip("c") if word[:1] in "+-" and word.endswith("c") else word for word in tests]
        links = "-links" in tests  # find counts those of directories
        found = [path for path in cowfs("find", "base", *own, "-0").stdout.split(b"\0") if path]
        wanted = [path for path in expected if not (links and (space / "tree" / os.fsdecode(path[1:])).is_dir())]
        assert [
            path for path in found if not (links and (space / "tree" / os.fsdecode(path[1:])).is_dir())
        ] == wanted, tests
    (odd,) = json.loads(cowfs("find", "base", "-name", "odd*", "--json").stdout)
    assert odd["path_b64"] == "L29kZP8KbmFtZQ=="
    assert cowfs("find", "base:/usr", "-type", "f").stdout.split() == [b"/usr/run", b"/usr/same"]
    for wrong in (["-type", "q"], ["-size", "much"], ["-perm", "9"], ["-mtime", "3"]):
        cowfs("find", "base", *wrong, code=2)


def test_ls_and_du_of_a_directory(cowfs: Cowfs) -> None:
    assert cowfs("ls", "base:/etc").stdout.split() == [b"conf", b"deep", b"empty", b"link"]
    assert cowfs("ls", "app:1:etc/conf").stdout == b"etc/conf\n"
    lines = cowfs("ls", "-l", "base:/etc").stdout.decode().splitlines()
    assert lines[0].startswith("-rw") and lines[1].startswith("d") and lines[3].endswith("link -> /etc/conf")
    assert [one["path"] for one in json.loads(cowfs("ls", "base:/usr", "--json").stdout)] == ["run", "same"]
    assert [json.loads(line)["size"] for line in cowfs("ls", "base:/usr", "--jsonl").stdout.splitlines()] == [3, 70_000]
    sums = {one["path"]: one["bytes"] for one in json.loads(cowfs("du", "base", "--json").stdout)}
    assert sums == {"/": 72 * 1024 + 3 * 4096, "/etc": 72 * 1024 + 4096, "/usr": 4096}
    assert cowfs("du", "base", "-s", "-b").stdout.split() == [b"86016", b"/"]
