"""`cowfs unshare`: an ordinary user with the ids of /etc/subuid and /etc/subgid, for snapshots whose files have many owners."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment, user_python
from support.sandboxes import tree
from support.users import GID, UID, command_as

FIRST = 300_000


@pytest.fixture
def cowfs(public_directory: Path, ordinary_user: object) -> Iterator[tuple[Path, list[str]]]:
    """A directory of the user's, and the words that start cowfs as this user, who has a range of ids."""
    python = user_python()
    if python is None:
        pytest.skip("no Python that an ordinary user can start with cowfs in it")
    if shutil.which("newuidmap") is None or not os.path.exists("/etc/subuid"):
        pytest.skip("needs newuidmap (uidmap) and /etc/subuid")
    base = public_directory / "subids"
    base.mkdir()
    os.chown(base, UID, GID)
    (public_directory / "ranges").write_text(f"{UID}:{FIRST}:65536\n")
    bound = [path for path in ("/etc/subuid", "/etc/subgid") if os.path.exists(path)]
    for path in bound:
        namespace.bind(str(public_directory / "ranges"), path)
    yield base, command_as([python, "-m", "cowfs"])
    for path in bound:
        namespace.umount(path)
    subprocess.run(["rm", "-rf", base], check=False)


def test_files_of_many_owners(cowfs: tuple[Path, list[str]]) -> None:
    """A rootfs keeps its owners, a command gives files to others, and they are other ids of the host; the kernel mounts it."""
    base, words = cowfs
    tree(base / "tree")
    (base / "tree/tmp").chmod(0o1777)
    os.chown(base / "tree/etc/inside", 7, 8)
    archive = base / "tree.tar"
    subprocess.run(["tar", "-C", base / "tree", "-cf", archive, "."], check=True)

    def run(*arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [*words, *map(str, arguments)],
            env={**environment(), "COWFS_ROOT": str(base / "store"), "HOME": str(base)},
            capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert done.returncode == status, done
        return done.stdout + done.stderr

    inside = ("unshare", *words[words.index("--") + 1 :])
    run(*inside, "import", archive, "box", "--as", "rootfs")
    script = "stat -c %u:%g /etc/inside; echo x > /tmp/a; chown 1000:1001 /tmp/a; grep ' / ' /proc/self/mountinfo | grep -c overlay"
    done = run(
        *inside, "run", "--key", "many", "box", "/bin/busybox", "sh", "-c", f"ln -s busybox /bin/chown; {script}"
    )
    assert done.split()[:2] == ["7:8", "1"]
    (made,) = (base / "store/layers").glob("*/fs/tmp/a")
    assert (made.stat().st_uid, made.stat().st_gid) == (FIRST + 999, FIRST + 1000)
    assert (
        run(
            *inside,
            "run",
            "--rm",
            "-u",
            "1000:1001",
            "--size",
            "1M",
            "box",
            "/bin/sh",
            "-c",
            "touch /tmp/b; stat -c %u:%g /tmp/b",
        )
        == "1000:1001\n"
    )
    run(*inside, "commit", "many", "more")
    assert "/tmp/a" in run("diff", "box", "more")
    run(*inside, "rm", "more")
    assert "1 snapshots" in run(*inside, "check")


def test_no_range_is_one_line(cowfs: tuple[Path, list[str]], public_directory: Path) -> None:
    base, words = cowfs
    env = {**environment(), "HOME": str(base)}
    (public_directory / "ranges").write_text("somebody:1:2\n")
    for verb, status in ((["/bin/true"], 8), (["/nowhere"], 8)):
        done = subprocess.run([*words, "unshare", *verb], env=env, capture_output=True, text=True, cwd="/", check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done
        assert "usermod --add-subuids" in done.stderr
    (public_directory / "ranges").write_text(f"{UID}:{FIRST}:65536\n")
    done = subprocess.run(
        [*words, "unshare", "/nowhere"], env=env, capture_output=True, text=True, cwd="/", check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done


class Subids:
    """The plain command of a user with ranges, over a store with the snapshot box; nothing here begins with cowfs unshare."""

    def __init__(self, base: Path, words: list[str]) -> None:
        self.base, self.words = base, words
        tree(base / "tree")
        for name in ("chown", "rm"):
            (base / "tree/bin" / name).symlink_to("busybox")
        (base / "tree/tmp").chmod(0o1777)
        os.chown(base / "tree/etc/inside", 7, 8)
        subprocess.run(["tar", "-C", base / "tree", "-cf", base / "tree.tar", "."], check=True)

    def __call__(self, *arguments: object, status: int = 0, **environ: str) -> str:
        done = subprocess.run(
            [shutil.which("setpriv") or "setpriv", *self.words[1:], *map(str, arguments)],
            env={**environment(), "COWFS_ROOT": str(self.base / "store"), "HOME": str(self.base), **environ},
            capture_output=True, text=True, cwd=self.base, check=False,
        )  # fmt: skip
        assert done.returncode == status, done
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def foreign(self) -> set[int]:
        """Owners of files in the store's layers."""
        return {path.lstat().st_uid for path in (self.base / "store/layers").rglob("*")}


@pytest.fixture
def plain(cowfs: tuple[Path, list[str]]) -> Subids:
    made = Subids(*cowfs)
    made("import", made.base / "tree.tar", "box", "--as", "rootfs", "--owners", "ignore")
    return made


SHUT = "mkdir /tmp/d; echo x > /tmp/d/f; chown -R 1000:1001 /tmp/d; rm /etc/inside; "
"""Makes a directory of another id that nobody else can look into."""


def test_run_has_the_ids_by_itself_and_other_verbs_follow(plain: Subids) -> None:
    """As root of the host would do it, with no word about ids: none of them needs to be asked to."""
    script = f"{SHUT} busybox chmod 700 /tmp/d; stat -c %u:%g /tmp/d/f"
    assert plain("run", "-q", "--key", "many", "box", "sh", "-c", script) == "1000:1001\n"
    assert FIRST + 999 in {path.lstat().st_uid for path in (plain.base / "store/layers").rglob("d")}
    assert "/tmp/d/f" in plain("diff", "many")
    assert plain("cat", "many:/tmp/d/f") == "x\n"
    plain("cp", "many:/tmp/d", "./out")
    assert (plain.base / "out/f").read_text() == "x\n"
    plain("snapshot", "many", "first")
    assert plain("sh", "many", "--", "sh", "-c", "cat /tmp/d/f; echo y > /tmp/d/g; chown 5 /tmp/d/g; stat -c %u /tmp/d/g") == "x\n5\n"  # fmt: skip
    plain("commit", "--digests", "many", "second")
    plain("prepare", "k", "second")
    plain("squash", "first")
    plain("export", "second", "x.tar", "--format", "layer")
    listed = subprocess.run(
        ["tar", "--numeric-owner", "-tvf", plain.base / "x.tar"], capture_output=True, text=True, check=True
    )
    assert "1000/1001" in listed.stdout
    plain("check", "--content")
    plain("rm", "k")
    assert plain("rm", "second") == "second\n"
    plain("gc")
    assert plain.foreign() <= {UID}
    assert "0 snapshots" not in plain("ls")


def test_a_run_that_keeps_nothing_leaves_nothing(plain: Subids) -> None:
    before = sorted(os.listdir(plain.base / "store/layers"))
    told = json.loads(plain("run", "--rm", "--json", "box", "sh", "-c", f"{SHUT} busybox chmod 700 /tmp/d"))
    assert "/tmp/d/f" in [change["path"] for change in told[0]["changes"]]
    plain("run", "--commit", "made", "box", "sh", "-c", SHUT)
    plain("run", "-q", "--key", "run-0", "box", "sh", "-c", f"{SHUT} busybox chmod 700 /tmp/d")
    assert "removed 2" in plain("prune", "--all")  # two names that nothing needs; box has a tag
    assert sorted(os.listdir(plain.base / "store/layers")) == before


def test_without_newuidmap_there_is_one_id(plain: Subids, public_directory: Path) -> None:
    script = "busybox id -u; chown 1000 /tmp 2>&1"
    assert plain("run", "--rm", "box", "sh", "-c", script, PATH="/nowhere", status=1).startswith("0\nchown: ")
    (public_directory / "ranges").write_text("somebody:1:2\n")
    assert plain("run", "--rm", "box", "sh", "-c", script, status=1).startswith("0\nchown: ")
    weak = public_directory / "weak"
    weak.mkdir()
    for name in ("newuidmap", "newgidmap"):
        (weak / name).write_text("#!/bin/sh\necho not permitted >&2; exit 1\n")
        (weak / name).chmod(0o755)
    weak.chmod(0o755)
    (public_directory / "ranges").write_text(f"{UID}:{FIRST}:65536\n")
    assert plain("run", "--rm", "box", "sh", "-c", script, PATH=f"{weak}:/usr/bin:/bin", status=1).startswith(
        "0\nchown: "
    )


def test_a_program_gets_the_ids_too(plain: Subids) -> None:
    """Its result is looked at, and its snapshot removed, with them."""
    script = (
        "import os, sys; from cowfs import Store\n"
        "with Store.open(sys.argv[1], create=False, fsync=False) as store:\n"
        f"    done = store.run('box', ['sh', '-c', {SHUT + 'busybox chmod 700 /tmp/d; stat -c %u /tmp/d'!r}])\n"
        "    print(done.returncode, done.stdout.decode().strip(), b'tmp/d/f' in [one.path for one in done.changes], os.getuid())\n"
        "    print([info.name for info in store.walk() if info.name.startswith('run-')])\n"
    )
    python = plain.words[plain.words.index("--") + 1]
    done = subprocess.run(
        command_as([python, "-c", script, str(plain.base / "store")]),
        env={**environment(), "HOME": str(plain.base)}, capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"0 1000 True {UID}", "[]"], done
    assert plain.foreign() <= {UID}
