"""The commands over a store, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import environment, one_line, run_module

from cowfs.store import Store

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cowfs(space: Path) -> Cowfs:
    """Runs ``cowfs ARGUMENTS`` over a store of this test; fails the test on a non-zero status unless told not to."""

    def run(*arguments: object, status: int | None = 0, **more: object) -> subprocess.CompletedProcess[str]:
        env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        done = run_module("cowfs", *arguments, env=env, **more)
        if status is not None:
            assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture
def base(cowfs: Cowfs, space: Path) -> str:
    """A small root with busybox-free content, imported as ``base``; its snapshot's name."""
    root = space / "rootfs"
    for name in ("etc", "bin", "proc", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "hostname").write_text("sandbox\n")
    return cowfs("import", root, "base").stdout.strip()


def test_a_snapshot_from_birth_to_removal(cowfs: Cowfs, base: str, space: Path) -> None:
    mnt = space / "mnt"
    mnt.mkdir()
    assert "lowerdir=" in cowfs("prepare", "work", "base", "--size", "5M", "--label", "team=storage").stdout
    (record,) = json.loads(cowfs("mounts", "work", "--json").stdout)
    assert record["type"] == "fuse.cowfs-overlayfs"
    assert f"size={5 << 20}" in record["options"]
    cowfs("mount", "--key", "work", mnt)
    (mnt / "etc" / "motd").write_text("hello\n")
    assert json.loads(cowfs("usage", "work", "--json").stdout)[0]["limit"]["bytes"] == 5 << 20
    assert "A /etc/motd" in cowfs("diff", "work").stdout
    refused = cowfs("commit", "work", "done", status=5)
    assert "in use" in one_line(refused)
    cowfs("umount", mnt)
    assert json.loads(cowfs("commit", "work", "done", "--json").stdout)[0]["usage"]["inodes"] == 2
    assert [one["path"] for one in json.loads(cowfs("diff", "base", "done", "--json").stdout)] == [
        "/etc",
        "/etc/motd",
    ]
    told = json.loads(cowfs("stat", "done", "--json").stdout)[0]
    assert (told["kind"], told["parent"], told["labels"]) == ("committed", base, {"team": "storage"})
    cowfs("label", "done", "team-", "stage=test")
    assert [json.loads(line)["name"] for line in cowfs("ls", "labels.stage==test", "--jsonl").stdout.splitlines()] == [
        "done"
    ]
    assert [one["name"] for one in json.loads(cowfs("log", "done", "--json").stdout)] == ["done", base]
    assert "done" in cowfs("tree").stdout
    assert cowfs("tag", "app:1", "done").returncode == 0
    assert {one["tag"] for one in json.loads(cowfs("images", "--json").stdout)} == {"app:1", "base"}
    assert "tagged app:1" in one_line(cowfs("rm", "done", status=5))
    assert cowfs("rm", "app:1", "--chain").stdout.split() == ["done"]
    assert cowfs("ls", "--quiet").stdout.split() == [base]


def test_a_tree_says_what_is_based_on_what(cowfs: Cowfs, base: str, space: Path) -> None:
    """A branch goes deeper; a chain without branches stays at its depth, and each of it is marked."""
    with Store.open(space / "store", fsync=False) as store:
        for key, parent, name in (("a", base, "one"), ("b", "one", "two"), ("c", "two", "three"), ("d", base, "other")):
            store.prepare(key, parent)
            store.commit(key, name)
        for key in ("x", "y"):
            store.prepare(key, "three")
    above, *below = cowfs("tree").stdout.splitlines()
    assert not above.startswith(" ")
    assert below == ["  one", "  > two", "  > three", "    x [active]", "    y [active]", "  other"]


def test_archives_go_through_pipes(cowfs: Cowfs, base: str, space: Path) -> None:
    env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
    cowfs("prepare", "copy")
    export = subprocess.Popen([sys.executable, "-m", "cowfs", "export", "base", "-", "--format", "tar", "--compression", "gzip"],
                              env=env, stdout=subprocess.PIPE)  # fmt: skip
    applied = subprocess.run([sys.executable, "-m", "cowfs", "apply", "copy", "-"], env=env, stdin=export.stdout,
                             capture_output=True, text=True, check=True)  # fmt: skip
    assert export.stdout is not None
    export.stdout.close()
    assert export.wait() == 0
    assert applied.stdout.startswith("sha256:")
    cowfs("commit", "copy", "again")
    assert [line for line in cowfs("diff", "base", "again").stdout.splitlines() if not line.endswith("(mtime)")] == []


def host_root(root: Path, *programs: str) -> None:
    """A root with some programs of the host and the libraries that they need."""
    for name in ("proc", "dev", "tmp", "bin"):
        (root / name).mkdir(parents=True)
    for program in programs:
        found = shutil.which(program)
        if found is None:
            pytest.skip(f"{program} is not installed")
        shutil.copy(found, root / "bin" / program)
        told = subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/[^ ]+)", told):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_run_passes_the_exit_status_and_removes_what_it_made(cowfs: Cowfs, space: Path, driver: str) -> None:
    cowfs("init", "--driver", driver)
    host_root(space / "box", "sh", "cat", "dd")
    cowfs("import", space / "box", "box")
    before = cowfs("ls", "--quiet").stdout

    def sh(script: str, *options: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return cowfs("run", "box", *options, "--", "sh", "-c", script, status=status)

    assert sh("exit 7", "--rm", status=7).stdout == ""
    assert sh("echo $$; echo x >/dev/null; cat /proc/1/comm >/dev/null", "--rm").stdout == "2\n"
    assert sh("kill -9 $$", "--rm", status=137).stdout == ""
    assert "not found" in one_line(cowfs("run", "box", "--rm", "--", "nothing", status=127))
    assert cowfs("ls", "--quiet").stdout == before
    full = sh("dd if=/dev/zero of=/tmp/big bs=64k count=100", "--rm", "--size", "1M", status=1)
    assert "No space left" in full.stderr
    sh("echo made > /tmp/made", "--commit", "box2")
    assert "A /tmp/made" in cowfs("diff", "box2").stdout
    kept = sh("echo $WHO", "--key", "mine", "--env", "WHO=me")
    assert kept.stdout == "me\n"
    assert "mine" in kept.stderr
    assert cowfs("stat", "mine", "--json").returncode == 0
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "cowfs-run-" in line]


def test_upkeep(cowfs: Cowfs, base: str, space: Path) -> None:
    info = json.loads(cowfs("info", "--json").stdout)[0]
    assert info["driver"] in ("overlay", "row", "vfs")
    assert info["snapshots"] == {"committed": 1}
    assert base in cowfs("df", "-v").stdout
    assert "no damage" in cowfs("check", "--content").stdout
    (space / "store" / "layers" / "stray").mkdir()
    assert "layers/stray" in cowfs("check").stdout
    assert "deleted rm-stray" in cowfs("gc").stdout
    layer = json.loads(cowfs("stat", "base", "--json").stdout)[0]["id"]
    os.rename(space / "store" / "layers" / layer, space / "aside")
    damaged = cowfs("check", status=7).stdout
    assert base in damaged
    assert layer in damaged
    cowfs("check", "--repair", status=7)
    assert "quarantine" in one_line(cowfs("prepare", "x", "base", status=7))
    os.rename(space / "aside", space / "store" / "layers" / layer)
    cowfs("check", "--repair")
    cowfs("prepare", "x", "base")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["stat", "nothing"], 3, "nothing"),
        (["prepare", "x", "nothing"], 3, "nothing"),
        (["prepare", ""], 2, "empty"),
        (["prepare", "bad\nkey"], 2, "print"),
        (["prepare", "x", "--size", "many"], 2, "size"),
        (["commit", "nothing", "x"], 3, "nothing"),
        (["rm", "nothing"], 3, "nothing"),
        (["import", "/nonexistent"], 3, "/nonexistent"),
        (["export", "base", "/dev/null/x"], 3, "no such directory: /dev/null"),
        (["ls", "size==3"], 2, "size"),
        (["label", "base", "novalue"], 2, "novalue"),
        (["mount", "--key", "base", "/mnt", "--size", "3"], 2, "size"),
        (["run", "base", "--rm", "--commit", "x", "--", "true"], 2, "--rm"),
        (["apply", "nothing", "/nonexistent"], 3, "nonexistent"),
        (["init", "--driver", "nosuch"], 3, "nosuch"),
        (["init", "--driver", "vfs"], 2, "not vfs"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    cowfs: Cowfs, base: str, arguments: list[str], status: int, says: str
) -> None:
    before = cowfs("ls", "--json").stdout
    assert says in one_line(cowfs(*arguments, status=status))
    assert cowfs("ls", "--json").stdout == before


def test_a_store_is_made_on_first_use_and_private(cowfs: Cowfs, space: Path) -> None:
    assert "driver" in cowfs("init").stdout
    assert stat.S_IMODE(os.stat(space / "store").st_mode) == 0o700
    assert cowfs("ls").returncode == 0


def test_a_reader_that_leaves_early_is_no_error(cowfs: Cowfs, base: str, space: Path) -> None:
    env = {**environment(), "COWFS_ROOT": str(space / "store")}
    done = subprocess.run(
        f"{sys.executable} -m cowfs ls --json | true", shell=True, env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_the_options_of_a_store_may_stand_before_the_verb(cowfs: Cowfs, space: Path) -> None:
    other = space / "other"
    cowfs("--root", other, "--driver=vfs", "prepare", "k")
    assert [json.loads(line)["name"] for line in cowfs("--jsonl", f"--root={other}", "ls").stdout.splitlines()] == ["k"]
    assert json.loads(cowfs("--json", "info", "--root", other).stdout)[0]["driver"] == "vfs"
    for arguments in (["--root"], ["--root", other], ["--json"]):
        assert "no verb '--" in one_line(cowfs(*arguments, status=2))
