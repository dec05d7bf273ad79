"""A disk without a free byte, or without a free inode, below the store, or below the run directory, costs what needs room there, with a sentence, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, clean_up, wait_for
from support.hostfs import make_tmpfs

PLACES = {
    "store": ("store", "48m", "0"),
    "run": ("run", "1m", "0"),
    "store-inodes": ("store", "48m", "400"),
    "run-inodes": ("run", "1m", "200"),
}


class Full:
    """A daemon with the running container ``on``, and one of its directories on a small file system."""

    def __init__(self, daemon: Daemon, place: str, inodes: bool) -> None:
        self.daemon = daemon
        self.place = daemon.base / place
        self.filler = self.place / "filler"
        self.inodes = inodes

    def fill(self) -> None:
        """Leave no byte, or no inode."""
        self.filler.mkdir()
        if self.inodes:
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    (self.filler / str(number)).touch()
            return
        with open(self.filler / "bytes", "wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def free(self) -> None:
        """Give the room back."""
        shutil.rmtree(self.filler, ignore_errors=True)

    def refused(self, *words: str) -> str:
        """The sentence of a verb that fails."""
        done = self.daemon.docker(*words, check=False)
        assert done.returncode, words
        return done.stderr

    def events(self) -> list[str]:
        """The actions of the container, in their order."""
        until = f"{time.time():.9f}"
        words = ("events", "--since", "1h", "--until", until, "-f", "container=on", "--format", "{{.Action}}")
        return self.daemon.out(*words).split("\n")

    def state(self, format: str = "{{.State.Status}}") -> str:
        return self.daemon.out("inspect", "-f", format, "on")


@pytest.fixture(params=list(PLACES))
def full(
    request: pytest.FixtureRequest, make_daemon: Callable[..., Daemon], short: Path, busybox: bytes, docker_command: str
) -> Iterator[Full]:
    if os.geteuid():
        pytest.skip("containers need root here")
    daemon = make_daemon("-D")
    daemon.base.mkdir()
    place, size, inodes = PLACES[request.param]
    make_tmpfs(daemon.base, size, place, inodes)
    daemon.start()
    daemon.docker("import", "-c", 'CMD ["sh"]', "-", "bb", input=busybox)
    daemon.docker(
        "run", "-d", "--name", "on", "bb", "sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    )
    wait_for(lambda: daemon.out("logs", "on") == "ready", "the trap")
    made = Full(daemon, place, inodes != "0")
    made.fill()
    yield made
    made.free()
    clean_up(daemon)


def test_a_running_container_goes_on_and_its_end_is_kept(full: Full) -> None:
    """A verb that fails says where there is no room; a container outlives an exec and a commit that fail, can be stopped, and its status is known."""
    daemon = full.daemon
    full.daemon.docker("exec", "on", "true", check=False)
    full.daemon.docker("commit", "on", "image:1", check=False)
    assert full.state() == "running"
    place = full.place
    assert re.search(rf"(?i)no (space|inodes) left on.* {place}", full.refused("run", "--rm", "bb", "true"))
    daemon.docker("stop", "on")
    assert full.state("{{.State.Status}} {{.State.ExitCode}}") == "exited 7"
    full.free()
    daemon.stop(9)
    daemon.start()
    assert full.state("{{.State.Status}} {{.State.ExitCode}}") == "exited 7"
    assert daemon.out("run", "--rm", "bb", "echo", "works") == "works"
    daemon.docker("start", "on")
    assert "no damage" in daemon.cowfs("check").stdout


@pytest.mark.parametrize("full", ["store", "run"], indirect=True)
def test_a_change_that_cannot_be_kept_is_not_half_done(full: Full) -> None:
    """A new name and new limits are there in whole or not at all, also after a start of the daemon."""
    daemon = full.daemon
    daemon.docker("rename", "on", "other", check=False)
    names = daemon.out("ps", "--format", "{{.Names}}")
    wanted = daemon.out("inspect", "-f", "{{.HostConfig.PidsLimit}}", names)
    changed = daemon.docker("update", "--pids-limit", "77", names, check=False)
    assert "level=" not in changed.stderr
    kept = daemon.out("inspect", "-f", "{{.HostConfig.PidsLimit}}", names)
    assert kept == (wanted if changed.returncode else "77")
    full.free()
    daemon.stop(9)
    daemon.start()
    assert daemon.out("ps", "--format", "{{.Names}}") == names
    assert daemon.out("inspect", "-f", "{{.HostConfig.PidsLimit}}", names) == kept


@pytest.mark.parametrize("full", ["store"], indirect=True)
def test_what_was_done_without_room_is_told_when_there_is(full: Full) -> None:
    """The events of a stop on a full disk come with the next one's, at the times of what they tell."""
    daemon = full.daemon
    daemon.docker("stop", "on")
    full.free()
    daemon.docker("rm", "on")
    told = [action for action in full.events() if action in ("stop", "destroy")]
    assert told == ["stop", "destroy"]


@pytest.mark.parametrize("full", ["store", "store-inodes"], indirect=True)
def test_what_waits_for_room_outlives_a_kill(full: Full) -> None:
    """An end and a stop of a full disk are in the log once, in their order, when a daemon that was killed comes back to a disk with room."""
    daemon = full.daemon
    daemon.docker("stop", "on")
    daemon.stop(9)
    daemon.start()
    full.free()
    daemon.stop(9)
    daemon.start()
    assert [action for action in full.events() if action in ("start", "die", "stop")] == ["start", "die", "stop"]


@pytest.mark.parametrize("full", ["store"], indirect=True)
def test_what_waits_for_room_is_told_as_soon_as_there_is_some(full: Full) -> None:
    full.daemon.docker("stop", "on")
    full.free()
    wait_for(lambda: [action for action in full.events() if action in ("die", "stop")] == ["die", "stop"], "the events")


def test_a_running_container_can_be_removed(full: Full) -> None:
    full.daemon.docker("rm", "-f", "on")
    assert full.daemon.out("ps", "-aq") == ""
