"""Random histories of a store agree with a plain directory, and every committed snapshot stays what it was.

The model is ``support.history`` and ``support.histories``. ``--history 200000`` makes a long run; a failure prints its driver, seed and steps, shrunk,
which ``python -m support.histories --replay FILE`` carries out again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import users
from support.histories import forget_here
from support.hostfs import HostFs

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

TESTS = str(Path(__file__).parents[1])
#: share of the operations by driver and form
SHARES = {
    ("overlay", "root"): 6, ("row", "root"): 5, ("vfs", "root"): 2,
    ("btrfs", "root"): 1, ("block", "root"): 1, ("aufs", "root"): 1,
    ("overlay", "user"): 3, ("row", "user"): 3, ("vfs", "user"): 1,
}  # fmt: skip

FOUND = json.loads((Path(TESTS) / "data/histories.json").read_text())


def run(command: list[str], environment: dict[str, str]) -> str:
    """Carry a history out in a process of its own, doing for it what needs privilege; returns what it said at the end."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        told = ""
        for line in process.stdout:
            if line.startswith("forget "):
                forget_here(line[len("forget ") :].strip())
                process.stdin.write("\n")
                process.stdin.flush()
            else:
                told += line
    assert process.returncode == 0, told
    return told


def history(place: Path, who: str, *arguments: str) -> str:
    """``python -m support.histories`` as root or as the ordinary user."""
    words = ["-m", "support.histories", "--place", str(place), *arguments]
    if who == "root":
        paths = os.pathsep.join([TESTS, os.path.dirname(TESTS), os.environ.get("PYTHONPATH", "")])
        return run([sys.executable, *words], {**os.environ, "PYTHONPATH": paths})
    os.chown(place, users.UID, users.GID)
    python, environment = users.interpreter()
    environment |= {
        "HOME": str(place),
        "XDG_RUNTIME_DIR": str(place),
        "TMPDIR": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment["PYTHONPATH"] += os.pathsep + TESTS
    return run(users.command_as([python, *words]), environment)


@pytest.mark.parametrize(("driver", "who"), SHARES, ids=lambda value: str(value))
def test_a_store_stays_what_a_plain_directory_is(
    driver: str, who: str, home: Path, request: pytest.FixtureRequest
) -> None:
    if who == "user":
        request.getfixturevalue("ordinary_user")
    count = request.config.getoption("--history") * SHARES[driver, who] // sum(SHARES.values())
    seed = request.config.getoption("--seed")
    told = history(home, who, "--driver", driver, "--operations", str(count), "--seed", str(seed), "--shrink", "60")
    assert f"driver {driver}: " in told


@pytest.mark.parametrize("fs", ["ext4"], indirect=True)
@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_inode_numbers_that_are_given_again_mix_nothing_up(
    driver: str, fs: HostFs, request: pytest.FixtureRequest
) -> None:
    """On ext4, which gives a free number again at once; the other tests are on tmpfs, which never does."""
    count = request.config.getoption("--history") // 10
    place = fs.fresh("history")
    told = history(place, "root", "--driver", driver, "--operations", str(count), "--seed", "7", "--shrink", "60")
    assert f"driver {driver}: " in told


@pytest.mark.parametrize("name", FOUND)
def test_a_history_that_went_wrong_once_does_not_any_more(name: str, space: Path) -> None:
    """Each is what the model found in the version before, shrunk."""
    steps = space / "steps.json"
    steps.write_text(json.dumps(FOUND[name]["steps"]))
    history(space, "root", "--driver", FOUND[name]["driver"], "--replay", str(steps))
