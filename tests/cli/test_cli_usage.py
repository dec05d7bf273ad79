"""Wrong usages: one line that says what, where and how to mend it; an exit status of its own; nothing made and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import Run, environment

from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")


@pytest.fixture
def place(space: Path, cowfs: Run) -> Path:
    """Layers, a mount point, a store with a snapshot ``base`` and a key ``work``."""
    for name in ("layers/1-base/d", "mnt", "root/bin", "root/home", "root/srv", "empty"):
        (space / name).mkdir(parents=True)
    (space / "layers/1-base/f").write_text("f")
    (space / "junk").write_bytes(bytes(range(256)) * 12)
    (space / "short").write_text("not much")
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("first")
        store.commit("first", "base")
        store.prepare("work", "base")
    return space


WRONG: dict[str, tuple[str, int, str]] = {
    "a size below the unit": ("mount layers mnt --size 5", 2, "unit"),
    "half a byte": ("mount layers mnt --size 1.5", 2, "not a size"),
    "half an inode": ("mount layers mnt --inodes 1.5", 2, "not a count"),
    "a size of nothing": ("mount layers mnt --size ,", 2, "not a size"),
    "no such layer": ("mount --layer nothere mnt", 3, "nothere"),
    "no such mount point": ("mount layers nothere", 3, "mount point"),
    "a mount point that is a file": ("mount layers layers/1-base/f", 2, "not a directory"),
    "a root given as a stack": ("mount root mnt", 2, "--layer"),
    "a root as ephemeral stack": ("mount root mnt --ephemeral", 2, "--layer"),
    "nothing is mounted": ("umount mnt", 3, "nothing is mounted"),
    "usage of nothing": ("usage ./mnt", 3, "no mount"),
    "limit of nothing": ("limit ./mnt --size 1G", 3, "no mount"),
    "diff of nothing": ("diff nothere", 3, "nothere"),
    "a tag with a blank": ("tag base a\\ b --root store", 3, "a b"),
    "no such snapshot": ("prepare key nothere --root store", 3, "nothere"),
    "no such key": ("commit nothere name --root store", 3, "nothere"),
    "a key that is taken": ("prepare work base --root store", 4, "work"),
    "a parent that is active": ("prepare key work --root store", 2, "commit it first"),
    "remove what has children": ("rm base --root store", 5, "work"),
    "no such verb": ("snapshoot", 2, "snapshoot"),
    "no such option": ("ls --nothere --root store", 2, "--nothere"),
    "an option without its value": ("mount layers mnt --size", 2, "--size"),
    "a command of what is not there": ("run --root store bsae true", 3, "bsae"),
    "a directory given twice": ("init other --root store", 2, "twice"),
    "no such driver": ("init --root other --driver nothere", 3, "nothere"),
    "another driver": ("init --root store --driver vfs", 2, "overlay"),
    "no archive": ("import junk name --root store", 2, "no tar archive"),
    "less than an archive": ("import short name --root store", 2, "truncated"),
    "an empty source": ("import - name --root store", 2, "empty"),
    "no such source": ("import nothere name --root store", 3, "nothere"),
    "a name of a path": ("commit work ../x --root store", 2, "../x"),
    "an export to nowhere": ("export base nothere/x.tar --root store", 3, "nothere"),
    "an export onto a directory": ("export base mnt --root store", 2, "directory"),
    "a format that is none": ("export base x --format zip --root store", 2, "zip"),
    "mount of a committed one": ("mount --key base mnt --root store", 5, "view"),
    "ls of a store that is none": ("ls --root empty", 3, "no store"),
    "tree of a store that is none": ("tree --root nothere", 3, "no store"),
    "df of a store that is none": ("df --root nothere", 3, "no store"),
    "info of a store that is none": ("info --root nothere", 3, "no store"),
    "images of a store that is none": ("images --root nothere", 3, "no store"),
    "check of a store that is none": ("check --root nothere", 3, "no store"),
    "gc of a store that is none": ("gc --root nothere", 3, "no store"),
    "a store in a directory with something else": ("init --root layers", 2, "not a store"),
    "a store where a file is": ("init --root junk", 2, "directory"),
    "two ways to say the upper": ("mount layers mnt --upper up --ephemeral", 2, "ephemeral"),
    "a layer twice": ("mount --layer layers/1-base --layer layers/1-base mnt", 2, "twice"),
    "a mount inside its layer": ("mount --layer layers/1-base layers/1-base/d", 2, "inside"),
    "an unknown mount option": ("mount layers mnt -o nothere", 2, "nothere"),
    "squash of what has no child": ("squash work --root store", 5, "work"),
    "rollback to no ancestor": ("rollback work nothere --root store", 3, "nothere"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_usage_is_one_line(cowfs: Run, place: Path, what: str) -> None:
    import shlex

    line, status, says = WRONG[what]
    before = there(place)
    command = [sys.executable, "-m", "cowfs", *shlex.split(line)]
    done = subprocess.run(
        command,
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("cowfs"), done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert done.returncode == status, done.stderr
    assert there(place) == before


def there(place: Path) -> list[str]:
    """Everything that is there, but for the index's own files and the store's reserve."""
    return sorted(str(path) for path in place.rglob("*") if not path.name.startswith(("index.db", "reserve")))


def test_arguments_may_stand_on_both_sides_of_an_option(cowfs: Run, place: Path) -> None:
    (place / "second").mkdir()
    cowfs("mount", place / "layers/1-base", place / "second", "--upper", place / "up", place / "mnt")
    assert (place / "mnt" / "f").read_text() == "f"
    cowfs("umount", place / "mnt")


def test_sizes_are_taken_in_both_spellings(cowfs: Run, place: Path) -> None:
    cowfs("mount", place / "layers", place / "mnt", "--size", "2Gi", "--inodes", "1k")
    status = os.statvfs(place / "mnt")
    assert status.f_blocks * status.f_frsize == 2 << 30
    cowfs("umount", place / "mnt")


@pytest.mark.parametrize("delay", [0.05, 0.3, 0.6, 1.0, 2.0])
def test_an_interrupt_ends_a_run_at_any_moment(cowfs: Run, place: Path, delay: float) -> None:
    """Whenever it comes: the exit status is the signal's, and neither snapshot, mount nor process stay."""
    with Store.open(place / "store", fsync=False) as store:
        store.prepare("fill", "base")
        with store.paths("fill") as paths:
            paths.makedirs(b"bin")
            paths.makedirs(b"lib64")
            paths.makedirs(b"lib/x86_64-linux-gnu")
            for program in ("/bin/sleep", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"):
                if os.path.exists(program):
                    paths.write_bytes(program[1:].encode(), Path(program).read_bytes(), mode=0o755)
        store.commit("fill", "filled")
    begun = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); print(flush=True); "
        "runpy.run_module('cowfs', run_name='__main__', alter_sys=True)"
    )
    command = [
        sys.executable,
        "-c",
        begun,  # before, the signal is answered by the interpreter itself, which may still be reading site.py
        "run",
        "filled",
        "--rm",
        "--root",
        str(place / "store"),
        "--",
        "/bin/sleep",
        "60",
    ]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        time.sleep(delay)
        os.killpg(running.pid, signal.SIGINT)
        code = running.wait(60)
    assert code in (130, -signal.SIGINT)
    with Store.open(place / "store", fsync=False) as store:
        assert sorted(info.name for info in store.walk()) == ["base", "filled", "work"]
        assert store.check().damage == []
