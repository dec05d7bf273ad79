"""The programs in examples/ do what they say, with real namespaces, runc and limits."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import environment
from support.daemon import busybox_tar

from cowfs.store import Store

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="containers need root here"
)


@pytest.fixture
def store(space: Path, can_mount: None) -> Iterator[Store]:
    """A store with the image ``base``: busybox."""
    with Store.open(space / "store", driver="overlay", fsync=False) as made:
        made.import_image(io.BytesIO(busybox_tar()), "base")
        yield made
        assert made.check().problems == []


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=300, env=environment())


def names(store: Store) -> list[str]:
    return sorted(info.name for info in store.walk())


@pytest.fixture
def runc() -> None:
    if shutil.which("runc") is None:
        pytest.skip("no runc here (CI has it)")


def test_the_runtime_has_sixty_lines() -> None:
    text = (EXAMPLES / "runtime.py").read_text()
    code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 60


def test_the_runtime_runs_a_command_in_a_container_with_a_limit(store: Store, runc: None) -> None:
    before = names(store)
    done = run("runtime.py", store.root, "base", "4M", "sh", "-c", "cat /data/file; echo $$; df -k / | tail -1; exit 3")
    lines = done.stdout.splitlines()
    assert done.returncode == 3, done.stderr
    assert lines[0] == "of the image"
    assert lines[1] == "1", "a process namespace of its own"
    assert lines[2].split()[1] == "4096"
    full = run("runtime.py", store.root, "base", "1M", "dd", "if=/dev/zero", "of=/f", "bs=64k")
    assert "No space left on device" in full.stderr
    assert names(store) == before


def test_the_sandbox_keeps_the_first_that_succeeds_and_drops_the_others(store: Store) -> None:
    before = names(store)
    done = run(
        "sandbox.py", store.root, "base", "kept",
        "echo broken > /data/file; exit 1", "echo good > /data/good; rm /data/file", "echo late > /data/late",
        "dd if=/dev/zero of=/big bs=1M 2>/dev/null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "added data/good" in done.stdout
    assert "deleted data/file" in done.stdout
    assert names(store) == sorted([*before, "kept"])
    assert {change.path for change in store.diff("base", "kept")} >= {b"data/good", b"data/file"}
    assert store.stat("kept").labels["sandbox.command"].startswith("echo good")
    failed = run("sandbox.py", store.root, "base", "none", "exit 7")
    assert failed.returncode == 1
    assert names(store) == sorted([*before, "kept"])


def test_the_build_does_each_step_once_and_goes_on_where_it_failed(store: Store, space: Path) -> None:
    steps = space / "steps"

    def build(*commands: str) -> subprocess.CompletedProcess[str]:
        steps.write_text("# a comment\n" + "\n".join(commands) + "\n")
        return run("build_cache.py", store.root, "base", "app:1", steps)

    def shown(done: subprocess.CompletedProcess[str]) -> list[str]:
        return [line.split()[0] for line in done.stdout.splitlines()]

    first, second = "echo one > /data/one", "echo two > /data/two"
    done = build(first, second, "false")
    assert (done.returncode, shown(done)) == (1, ["done", "done"]), done.stderr
    done = build(first, second, "echo three > /data/three")
    assert (done.returncode, shown(done)) == (0, ["cached", "cached", "done"]), done.stderr
    done = build(first, "echo other > /data/two", "echo three > /data/three")
    assert shown(done) == ["cached", "done", "done"], "what stands on another step is another step"
    paths = {change.path for change in store.diff("base", "app:1")}
    assert {b"data/one", b"data/two", b"data/three"} <= paths
    sys.path.insert(0, str(EXAMPLES))
    try:
        from build_cache import prune  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    assert len(prune(store)) == 2, "the second and third step of before"
    assert shown(build(first, "echo other > /data/two", "echo three > /data/three")) == ["cached"] * 3


def test_the_pool_lends_fresh_sandboxes_and_leaves_nothing(store: Store) -> None:
    before = names(store)
    commands = [f"test ! -e mark && echo {number} > mark && rm data/file" for number in range(6)]
    done = run("pool.py", store.root, "base", 2, *commands, "dd if=/dev/zero of=big bs=1M count=65 2>/dev/null")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert (
        len(
            [
                line
                for line in lines
                if "ended with 0: " in line and "added mark" in line and "deleted data/file" in line
            ]
        )
        == 6
    )
    assert len([line for line in lines if line.startswith("'dd") and "ended with 1" in line]) == 1
    assert names(store) == before


def test_a_backup_takes_an_instant_and_sends_what_is_new(store: Store, space: Path) -> None:
    store.prepare("system", "base")
    (space / "mnt").mkdir()
    with store.mount("system", space / "mnt"):
        for round_ in ("one", "two"):
            (space / "mnt/data/state").write_text(round_)
            done = run("backup.py", store.root, "system", space / "backup")
            assert done.returncode == 0, done.stderr
            assert f": {2 if round_ == 'one' else 1} new layers" in done.stdout
    with Store.open(space / "backup", create=False) as backup:
        kept = [info.name for info in backup.walk() if info.name.startswith("system-")]
        states = []
        for name in kept:
            with backup.open_file(name, "data/state") as file:
                states.append(file.read())
        assert states == [b"one", b"two"]
        assert backup.check(content=True).problems == []
    (space / "file").write_text("x")
    wrong = run("backup.py", store.root, "system", space / "file")
    assert wrong.returncode == 1
    assert "is here, and not at" in wrong.stderr


def test_each_example_has_less_than_eighty_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def test_examples_pass_strict_type_checkers() -> None:
    """mypy --strict, and pyright where it is installed (its own settings for strict)."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *map(str, sorted(EXAMPLES.glob("*.py")))]
    if subprocess.run([sys.executable, "-c", "import mypy"], check=False, capture_output=True).returncode:
        pytest.skip("mypy is not installed (extra lint)")
    done = subprocess.run(command, cwd=EXAMPLES.parent, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
