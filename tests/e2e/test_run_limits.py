"""`cowfs run --memory --cpus --pids-limit`: control groups that hold, of the version that the host has, where they are delegated."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.daemon import wait_for
from support.sandboxes import Runner, runner  # noqa: F401  (a fixture)
from support.users import GID, UID, command_as

from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.store import Store
from cowfs.sys import cgroups

CONTROLLERS = ("memory", "cpu", "pids")


def of_version_1() -> dict[str, str]:
    """Where each controller of version 1 is mounted."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        if tail.startswith("cgroup "):
            for word in tail.split()[-1].split(","):
                if word in CONTROLLERS:
                    found[word] = head.split()[4]
    return found


class Place:
    """A group of a test's own in each hierarchy, which holds the caller of cowfs, so that nothing is made in that of others."""

    def __init__(self, directories: dict[str, Path]) -> None:
        self.directories = directories

    def give(self, uid: int) -> None:
        """Delegate it."""
        for path in set(self.directories.values()):
            for each in (path, path / "cgroup.procs", path / "tasks", path / "cgroup.subtree_control"):
                if each.exists():
                    os.chown(each, uid, uid)

    def words(self, command: list[str]) -> list[str]:
        """A command line that is in it."""
        script = "".join(f"echo $$ > {path}/cgroup.procs; " for path in sorted(set(self.directories.values())))
        return ["sh", "-c", script + 'exec "$@"', "sh", *command]

    def made(self) -> list[str]:
        """The groups of commands that are there."""
        return sorted({name for path in self.directories.values() for name in os.listdir(path) if "cowfs-run-" in name})


@pytest.fixture
def place() -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("makes control groups: needs root")
    mounted = of_version_1()
    if set(mounted) != set(CONTROLLERS):
        pytest.skip("this host has no control groups of version 1")
    found = {}
    for controller, top in mounted.items():
        found[controller] = Path(top) / f"cowfs-test-{os.getpid()}"
        try:
            found[controller].mkdir(exist_ok=True)
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
    yield Place(found)
    for path in found.values():
        for name in os.listdir(path):
            if (path / name).is_dir():
                os.rmdir(path / name)
        wait_for(partial(_removed, path), "the end of its processes")


def _removed(path: Path) -> bool:
    try:
        os.rmdir(path)
    except OSError:
        return False
    return True


def run(runner: Runner, place: Place, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:  # noqa: F811
    if runner.who == "user":
        place.give(UID)
    return subprocess.run(
        place.words(runner.command("run", "--rm", *words)),
        env=runner.environment, capture_output=True, text=True, timeout=60, cwd="/", stdin=subprocess.DEVNULL, check=False, **more,
    )  # fmt: skip


def test_memory_has_a_bound(runner: Runner, place: Place) -> None:  # noqa: F811
    """A command that wants more is ended, one below it is not, and both leave no group."""
    big = ("box", "dd", "if=/dev/zero", "of=/dev/null", "bs=96M", "count=1")
    assert run(runner, place, "--memory", "200M", *big).returncode == 0
    done = run(runner, place, "--memory", "24M", *big)
    assert done.returncode == 137, done
    assert "cowfs run: a process was ended at the limit of memory (--memory)" in done.stderr
    told = json.loads(run(runner, place, "--json", "--memory", "24M", *big).stdout)[0]
    assert (told["oom_killed"], told["returncode"]) == (True, 137)
    assert place.made() == []


def test_processes_have_a_bound(runner: Runner, place: Place) -> None:  # noqa: F811
    many = "for i in 1 2 3 4 5 6 7 8; do sleep 20 & done; echo all"
    done = run(runner, place, "--pids-limit", "5", "box", "sh", "-c", many)
    assert done.returncode != 0
    assert "fork" in done.stderr
    done = run(runner, place, "--pids-limit", "9", "box", "sh", "-c", many)
    assert (done.returncode, done.stdout) == (0, "all\n")
    assert place.made() == []


def test_processors_have_a_bound_that_a_shell_beside_shares(runner: Runner, place: Place) -> None:  # noqa: F811
    if runner.who == "user":
        place.give(UID)
    words = (
        "run",
        "--rm",
        "--key",
        "shared",
        "--cpus",
        "0.25",
        "--pids-limit",
        "20",
        "box",
        "sh",
        "-c",
        "echo ready; cat",
    )
    with subprocess.Popen(
        place.words(runner.command(*words)), env=runner.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True,
    ) as running:  # fmt: skip
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        (name,) = place.made()
        group = place.directories["cpu"] / name
        period, quota = ((group / f"cpu.cfs_{what}_us").read_text() for what in ("period", "quota"))
        assert int(quota) / int(period) == 0.25
        before = len((group / "cgroup.procs").read_text().split())
        beside = subprocess.run(
            runner.command("sh", "shared", "--", "cat", "/proc/self/cgroup"),
            env=runner.environment, capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert beside.returncode == 0, beside
        assert all(name in line for line in beside.stdout.splitlines() if line.split(":")[1] in ("cpu", "pids"))
        refused = subprocess.run(
            runner.command("sh", "--memory", "1G", "shared"),
            env=runner.environment, capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert (refused.returncode, len(refused.stderr.splitlines())) == (FailedPrecondition.exit_code, 1)
        assert "its limits hold" in refused.stderr
        assert before == 2
        running.stdin.close()
        assert running.wait(60) == 0
    assert place.made() == []


def test_a_killed_run_leaves_a_group_that_the_next_one_removes(runner: Runner, place: Place) -> None:  # noqa: F811
    """And one that lives is left alone."""
    if runner.who == "user":
        place.give(UID)
    words = ("run", "--rm", "--pids-limit", "20", "box", "sh", "-c", "echo ready; cat")
    with subprocess.Popen(
        place.words(runner.command(*words)), env=runner.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True,
    ) as living:  # fmt: skip
        assert living.stdout is not None
        assert living.stdin is not None
        assert living.stdout.readline() == "ready\n"
        (alive,) = place.made()
        left = place.directories["pids"] / "cowfs-run-000000000000"
        left.mkdir()
        if runner.who == "user":
            os.chown(left, UID, GID)
        assert run(runner, place, "--pids-limit", "20", "box", "true").returncode == 0
        assert place.made() == [alive]
        living.stdin.close()
        assert living.wait(60) == 0
    assert place.made() == []


def test_where_no_group_can_be_made_one_line_says_so(runner: Runner, place: Place) -> None:  # noqa: F811
    done = subprocess.run(
        place.words(runner.command("run", "--rm", "--memory", "64M", "box", "true")),  # it was not given to the user
        env=runner.environment, capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    if runner.who == "root":
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == Unsupported.exit_code
    assert len(done.stderr.splitlines()) == 1
    assert "systemd-run --user --scope" in done.stderr
    listed = runner.cowfs("ls", "-q").stdout
    assert "run-" not in listed


WRONG: dict[str, tuple[dict[str, str | int], str]] = {
    "memory": ({"memory": "5M"}, "6 MiB or more"),
    "memory is none": ({"memory": "much"}, "512M"),
    "processors": ({"cpus": "0"}, "from 0.01"),
    "processors are none": ({"cpus": "x"}, "from 0.01"),
    "more processors than there are": ({"cpus": 1 << 20}, f"to {os.cpu_count()}"),
    "processes": ({"pids_limit": 0}, "100k"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_limit_that_is_none(runner: Runner, case: str) -> None:  # noqa: F811
    limits, words = WRONG[case]
    if runner.who == "root":
        with Store.open(runner.store, create=False, fsync=False) as store, pytest.raises(InvalidArgument) as caught:
            store.run("box", ["true"], **limits)  # type: ignore[arg-type]
        assert words in str(caught.value)
    ((name, value),) = limits.items()
    done = runner.cowfs("run", f"--{name.replace('_', '-')}", value, "box", "true")
    assert (done.returncode, len(done.stderr.splitlines())) == (InvalidArgument.exit_code, 1)
    assert words in done.stderr


def test_a_program_is_told(runner: Runner, place: Place) -> None:  # noqa: F811
    if runner.who == "user":
        place.give(UID)
    script = (
        "import sys; from cowfs import Store\n"
        "with Store.open(sys.argv[1], create=False, fsync=False) as store:\n"
        "    done = store.run('box', ['dd', 'if=/dev/zero', 'of=/dev/null', 'bs=96M', 'count=1'], memory='24M', cpus=1, pids_limit=10)\n"
        "    print(done.returncode, done.oom_killed)\n"
    )
    words = [runner.python, "-c", script, str(runner.store)]
    done = subprocess.run(
        place.words(words if runner.who == "root" else command_as(words)),
        env=runner.environment, capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    assert done.stdout == "137 True\n", done
    assert place.made() == []


class Tree:
    """A directory with the files of version 2, as a kernel would have it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def group(self, where: str, has: str, hands_on: str) -> Path:
        made = self.path / where
        made.mkdir(parents=True, exist_ok=True)
        for name, text in (("controllers", has), ("subtree_control", hands_on), ("procs", "")):
            (made / f"cgroup.{name}").write_text(text)
        return made


def test_version_2_takes_the_nearest_group_that_hands_controllers_on(tmp_path: Path) -> None:
    """The choice alone, over plain files: a kernel with version 2 would make the rest."""
    tree = Tree(tmp_path)
    tree.group("", "cpu memory pids", "cpu memory pids")
    tree.group("user", "cpu memory pids", "memory pids")
    own = tree.group("user/own", "memory pids", "")
    where = cgroups._Own(str(own), str(tmp_path))
    assert cgroups._place_2(where, ["memory", "pids"]) == str(own)
    assert cgroups._place_2(where, ["cpu"]) == str(tmp_path / "user")
    assert (tmp_path / "user/cgroup.subtree_control").read_text().startswith("+cpu")
    with pytest.raises(cgroups.NoGroup, match="does not have io"):
        cgroups._place_2(where, ["io"])
    with pytest.raises(cgroups.NoGroup, match="in sight"):
        cgroups._place_2(None, ["memory"])
