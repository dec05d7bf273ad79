"""Wrong usages over a store: one line on standard error that says what, where and how to mend it; nothing is changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import mounts as kernel, namespace
from support.command import Run, environment, one_line, run_module

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def store(run_directory: Path, space: Path) -> Cowfs:
    """The command over a store with the tag base, the committed snapshot made on it, the key work on that, and the tag app of it."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        done = run_module("cowfs", *arguments, env=env, cwd=space)
        assert done.returncode == code, f"{arguments}: {done.returncode}: {done.stderr}"
        return done

    (space / "tree" / "app").mkdir(parents=True)
    (space / "mnt").mkdir()
    run("import", space / "tree", "base")
    run("prepare", "seed", "base")
    run("commit", "seed", "made")
    run("tag", "app", "made")
    run("prepare", "work", "made")
    return run


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "size below a unit": (("prepare", "k", "base", "--size", "5"), ("'5'", "4096", "5M"), 2),
    "part of a byte": (("prepare", "k", "base", "--size", "1.5"), ("'1.5'", "1.5T"), 2),
    "part of an inode": (("prepare", "k", "base", "--inodes", "1.5"), ("'1.5'", "100k"), 2),
    "size that is none": (("fork", "base", "k", "--size", "2X"), ("'2X'", "2G"), 2),
    "limit below a unit": (("limit", "work", "--size", "100"), ("'100'", "4096"), 2),
    "tag with a blank": (("tag", "my app", "base"), ("'my app'", "blank"), 2),
    "imported under a tag with a blank": (("import", "tree", "my app"), ("'my app'", "blank"), 2),
    "run with a mistyped option": (("run", "--rn", "base", "true"), ("--rn", "--help"), 2),
    "run for no time": (("run", "--timeout", "0", "base", "true"), ("timeout", "more than zero"), 2),
    "a shell in a committed one": (("sh", "made"), ("committed", "cowfs run made --rm -- sh"), 5),
    "a shell in nothing": (("sh", "nope"), ("'nope'", "cowfs ls"), 3),
    "cat of a snapshot": (("cat", "base"), ("'base'", "base:/PATH"), 2),
    "cat of what no store has": (("cat", "nope:/etc/x"), ("'nope'", "cowfs ls"), 3),
    "cat of no file": (("cat", "base:/no"), ("/no", "No such file"), 1),
    "cat of a directory": (("cat", "base:/app"), ("/app", "directory"), 1),
    "copy inside the host": (("cp", "./tree", "./other"), ("NAME:PATH",), 2),
    "copy into what is committed": (("cp", "./tree", "made:/x"), ("'made'", "committed"), 5),
    "copy of nothing": (("cp", "./nowhere", "work:/x"), ("nowhere",), 3),
    "copy below nothing": (("cp", "./tree", "work:/no/where"), ("no/where", "No such file"), 1),
    "copy into a directory that is not there": (("cp", "./tree", "work:/no/"), ("/no/", "directory"), 3),
    "copy of a snapshot into itself": (("cp", "work:/app", "work:/app/x"), ("/app", "itself"), 2),
    "find with a type that is none": (("find", "base", "-type", "q"), ("'q'", "f d l"), 2),
    "find with a size that is none": (("find", "base", "-size", "+much"), ("'much'", "512M"), 2),
    "find with a mode that is none": (("find", "base", "-perm", "rwx"), ("'rwx'", "644"), 2),
    "find with an age that is none": (("find", "base", "-mtime", "soon"), ("'soon'", "-7"), 2),
    "ls of no directory": (("ls", "base:/no"), ("/no", "No such file"), 1),
    "du of nothing": (("du", "nope"), ("'nope'", "cowfs ls"), 3),
    "prune by an age that is none": (("prune", "--older", "soon"), ("'soon'", "7d"), 2),
    "prune by a filter that is none": (("prune", "color==red"), ("'color'", "labels.KEY"), 2),
    "prune and keep less than nothing": (("prune", "--keep", "-1"), ("not negative",), 2),
    "rename of nothing": (("rename", "nope", "x"), ("'nope'",), 3),
    "rename to a taken name": (("rename", "work", "made"), ("'made'", "taken"), 4),
    "rename to a path": (("rename", "work", "./x"), ("'./x'", "path"), 2),
    "tag without a snapshot": (("tag", "x"), ("cowfs tag TAG NAME",), 2),
    "drop a tag and give it": (("tag", "-d", "app", "made"), ("cowfs tag -d TAG",), 2),
    "drop a tag that is none": (("tag", "-d", "made"), ("'made'", "cowfs images"), 3),
    "copy of nothing to another store": (("copy", "nope", "--to", "./other"), ("'nope'",), 3),
    "copy of what is active": (("copy", "work", "--to", "./other"), ("'work'", "commit it"), 2),
    "copy to itself": (("copy", "made", "--to", "./store"), ("this one",), 2),
    "copy onto something else": (("copy", "made", "--to", "./tree"), ("tree", "empty directory"), 2),
    "logs of what is not mounted": (("logs", "work"), ("'work'", "cowfs mount"), 3),
    "a template with a field that is none": (("ls", "--format", "{size}"), ("'size'", "usage"), 2),
    "a template that ends early": (("ls", "--format", "{name"), ("{name", "{created:age}"), 2),
    "a digest that is none": (("stat", "sha256:0000"), ("sha256:0000", "cowfs ls"), 3),
    "run of what is not there": (("run", "bsae", "--", "true"), ("'bsae'", "cowfs ls"), 3),
    "run with both ends": (("run", "base", "--rm", "--commit", "x", "--", "true"), ("--rm", "--commit"), 2),
    "commit of a committed one": (("commit", "app", "x"), ("'app'",), 3),
    "commit under a taken name": (("commit", "work", "app"), ("'app'", "tag"), 4),
    "remove with children": (("rm", "made"), ("children", "work"), 5),
    "parent that is active": (("prepare", "k", "work"), ("'work'", "commit it first"), 2),
    "parent that is not there": (("prepare", "k", "nope"), ("'nope'", "cowfs ls"), 3),
    "mount of a committed one": (("mount", "--key", "made", "./mnt"), ("committed", "view"), 5),
    "mount of a tag": (("mount", "--key", "base", "./mnt"), ("tag", "cowfs prepare KEY base"), 3),
    "commit of a tag": (("commit", "base", "x"), ("tag", "cowfs prepare KEY base"), 3),
    "mount of a key and layers": (("mount", "--key", "work", "tree", "./mnt"), ("--key", "mount point"), 2),
    "kernel mount with a limit's driver": (("mounts", "nope"), ("'nope'",), 3),
    "import of nothing": (("import", "./nowhere"), ("nowhere",), 3),
    "apply of nothing": (("apply", "work", "./nowhere"), ("nowhere",), 3),
    "export into nothing": (("export", "base", "./nowhere/x.tar"), ("nowhere", "make it"), 3),
    "export onto a directory": (("export", "base", "./tree"), ("tree", "name a file"), 2),
    "label without a value": (("label", "work", "oops"), ("'oops'", "KEY=VALUE"), 2),
    "filter": (("ls", "color==red"), ("'color'", "labels.KEY"), 2),
    "snapshot of a committed one": (("snapshot", "made", "s"), ("'made'", "committed"), 5),
    "rollback to a stranger": (("rollback", "work", "work"), ("'work'", "cowfs log"), 2),
    "unknown option": (("ls", "--colour"), ("--colour", "--help"), 2),
    "missing argument": (("commit", "work"), ("NAME", "--help"), 2),
    "another driver": (("ls", "--driver", "vfs"), ("vfs", "store of its own"), 2),
    "no such driver": (("init", "--root", "./new", "--driver", "vsf"), ("'vsf'", "overlay"), 3),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_changes_nothing(store: Cowfs, space: Path, case: str) -> None:
    arguments, words, code = WRONG[case]
    before = store("ls", "--json").stdout, store("images").stdout, sorted(os.listdir(space / "store/layers"))
    line = one_line(store(*arguments, code=code))
    for word in words:
        assert word in line, line
    assert (store("ls", "--json").stdout, store("images").stdout, sorted(os.listdir(space / "store/layers"))) == before
    assert not [name for name in os.listdir(space / "store") if name.startswith(("new-", "rm-"))]
    assert not os.path.ismount(space / "mnt")


LOOKS = ("ls", "tree", "df", "info", "images", "check", "gc", "log x", "stat x", "usage x", "diff x y", "mounts x",
         "rm x", "prepare k base", "view v base", "run base -- true", "commit a b", "export x -", "label x a=b")  # fmt: skip


@pytest.mark.parametrize("verb", LOOKS)
def test_looking_never_makes_a_store(run_directory: Path, space: Path, verb: str) -> None:
    """A mistyped root is refused, and is not there afterwards."""
    env = {**environment(), "COWFS_ROOT": str(space / "sotre")}
    done = run_module("cowfs", *verb.split(), env=env, cwd=space)
    assert done.returncode == 3, done.stderr
    line = one_line(done)
    assert not os.path.exists(space / "sotre")
    if verb.split()[0] not in ("usage", "diff"):  # those take a mount point as well
        assert "sotre" in line
        assert "cowfs init" in line


def test_looking_leaves_an_empty_index_alone(run_directory: Path, space: Path) -> None:
    (space / "store").mkdir()
    (space / "store" / "index.db").touch()
    done = run_module("cowfs", "ls", "--root", space / "store")
    assert done.returncode == 3
    assert "no store" in one_line(done)
    assert (space / "store" / "index.db").stat().st_size == 0


@pytest.mark.parametrize(
    "names",
    [
        ("bin", "home", "srv"),
        ("etc", "usr"),
        ("bin", "home", "lib", "usr", "app"),
        ("usr",),
        ("etc", "var"),
        ("proc", "sys"),
    ],
)
def test_a_root_given_as_a_stack_is_refused(cowfs: Run, space: Path, mnt: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (space / "root" / name).mkdir(parents=True)
    for more in ((), ("--ephemeral",), ("--read-only",)):
        line = one_line(cowfs("mount", space / "root", mnt, *more, code=2))
        assert "root file system" in line
        assert f"--layer {space / 'root'}" in line
    assert sorted(os.listdir(space / "root")) == sorted(names)


def test_a_stack_with_one_such_name_is_a_stack(cowfs: Run, space: Path, mnt: Path) -> None:
    for name in ("base", "dev", "prod"):
        (space / "stack" / name).mkdir(parents=True)
    cowfs("mount", space / "stack", mnt)


def test_nothing_is_written_into_a_layer(cowfs: Run, stack: Path, mnt: Path, space: Path) -> None:
    """A layer of a stack that was mounted, one that an overlay wrote, one of a store."""
    cowfs("mount", stack, mnt)
    cowfs("umount", mnt)
    (space / "lower" / "app").mkdir(parents=True)
    for name in ("upper", "work"):
        (space / name).mkdir()
    with kernel.overlay([space / "lower"], mnt, space / "upper", space / "work"):
        (mnt / "app" / "new").mkdir()
    env = {**environment(), "COWFS_ROOT": str(space / "store")}
    assert run_module("cowfs", "import", space / "lower", "base", env=env).returncode == 0
    (of_store,) = (space / "store" / "layers").glob("*/fs")
    for layer in (stack / "10-app", space / "upper", of_store):
        before = sorted(os.listdir(layer))
        assert "layer" in one_line(cowfs("mount", layer, mnt, code=2))
        assert "layer" in one_line(cowfs("mount", "--layer", layer / "app", mnt, "--ephemeral", code=2))
        assert sorted(os.listdir(layer)) == before
    assert not os.path.ismount(mnt)


def test_options_may_stand_between_the_layers_and_the_mount_point(
    cowfs: Run, stack: Path, mnt: Path, space: Path
) -> None:
    cowfs("mount", stack / "1-base", stack / "2-python", "--upper", space / "up", mnt)
    assert (mnt / "etc/motd").read_text() == "python\n"
    cowfs("umount", mnt)
    line = one_line(cowfs("mount", stack / "1-base", "--uper", space / "up", mnt, code=2))
    assert "--uper" in line


def test_a_damaged_archive_is_named_without_its_bytes(store: Cowfs, space: Path) -> None:
    (space / "garbage.tar").write_bytes(bytes(range(256)) * 40)
    line = one_line(store("import", "./garbage.tar", "x", code=2))
    assert line.isprintable()
    assert "garbage.tar" in line or "archive" in line


def test_remedies_name_options_of_the_command(store: Cowfs, space: Path) -> None:
    """Input of a user, not of a program."""
    import re

    from cowfs import __file__ as package

    found = []
    for path in (*Path(package).parent.rglob("*.py"), *(Path(package).parents[1] / "drivers").glob("*.py")):
        for remedy in re.findall(r'remedy=f?"([^"]*)"', path.read_text()):
            if re.search(
                r"(?<![-\w])(owners|mount_type|max_entries|max_bytes|max_file|io|form)=|leave out mount_type", remedy
            ):
                found.append((path.name, remedy))
    assert found == []


@pytest.mark.skipif(namespace.why_not is not None, reason=namespace.why_not or "")
def test_no_room_for_standard_output_is_named(store: Cowfs, space: Path) -> None:
    target = space / "small"
    target.mkdir()
    namespace.mount("tmpfs", str(target), "tmpfs", 0, "size=64k")
    (space / "tree" / "big").write_bytes(os.urandom(200_000))
    store("import", "./tree", "big")
    env = {**environment(), "COWFS_ROOT": str(space / "store")}
    with (target / "out.tar").open("wb") as out:
        done = run_module(
            "cowfs",
            "export",
            "big",
            "-",
            "--format",
            "tar",
            env=env,
            stdout=out,
            stderr=subprocess.PIPE,
            capture_output=False,
        )
    namespace.umount(str(target))
    assert done.returncode == 1
    assert "out.tar" in one_line(done)


def test_there_are_sixty_wrong_usages() -> None:
    assert len(WRONG) >= 60
