"""Containers by crun (`--runtime crun`): the same verbs as by runc.

crun takes control groups of version 2 alone: the daemon sees such a hierarchy in a mount namespace of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, clean_up, wait_for

SCRIPT = 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
NAMESPACE = ("unshare", "-m", "--propagation", "private", "sh", "-c", SCRIPT, "sh")


class ByCrun(Daemon):
    """A daemon that sees control groups of version 2."""

    def command(self) -> list[str]:
        return [*NAMESPACE, *super().command()]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, busybox: bytes, docker_command: str) -> Iterator[Daemon]:
    if shutil.which("crun") is None or os.geteuid():
        pytest.skip("no crun here (Debian: crun), or no root")
    if " cgroup2 " not in Path("/proc/self/mountinfo").read_text():
        pytest.skip("no control groups of version 2 here")
    made = ByCrun(tmp_path_factory.mktemp("c") / "d", "-D", "--runtime", "crun").start()
    try:
        made.docker("import", "-c", 'CMD ["sh"]', "-", "bb", input=busybox)
        yield made
    finally:
        clean_up(made)
    assert "Traceback" not in made.log, made.log


def words(daemon: Daemon) -> tuple[str, ...]:
    """The rules for devices of a container without --privileged are a BPF program, for which crun raises the limit on locked memory."""
    script = "import resource as r; r.setrlimit(r.RLIMIT_MEMLOCK, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    may = subprocess.run(["python3", "-c", script], capture_output=True, check=False).returncode == 0
    return ("run",) if may else ("run", "--privileged")


def test_run_and_its_status(daemon: Daemon) -> None:
    run = words(daemon)
    info = daemon.json("info", "--format", "{{json .}}")
    assert (info["DefaultRuntime"], info["CgroupVersion"]) == ("crun", "2")
    assert daemon.out(*run, "--rm", "bb", "id", "-u") == "0"
    assert daemon.out(*run, "--rm", "-u", "app", "bb", "id", "-u") == "1000"
    assert daemon.out(*run, "--rm", "-t", "bb", "tty") == "/dev/pts/0"
    assert daemon.out(*run, "-i", "--rm", "bb", "cat", input=b"through\n") == "through"
    assert daemon.docker(*run, "--rm", "bb", "sh", "-c", "exit 7", check=False).returncode == 7
    assert daemon.docker(*run, "--rm", "bb", "no-such-program", check=False).returncode == 127
    assert daemon.docker(*run, "--rm", "bb", "/data/file", check=False).returncode == 126
    done = daemon.docker(*run, "--rm", "--storage-opt", "size=2m", "bb", "dd", "if=/dev/zero", "of=/f", "bs=1M", "count=4", check=False)  # fmt: skip
    assert "No space left" in done.stderr


def test_exec_pause_top_stop(daemon: Daemon) -> None:
    script = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"
    daemon.docker(*words(daemon), "-d", "--name", "long", "bb", "sh", "-c", script)
    wait_for(lambda: daemon.out("logs", "long") == "up", "its output")
    assert daemon.out("exec", "-w", "/data", "long", "pwd") == "/data"
    assert daemon.out("exec", "-t", "long", "tty").startswith("/dev/pts/")
    assert daemon.docker("exec", "long", "no-such-program", check=False).returncode == 127
    daemon.docker("pause", "long")
    assert daemon.out("ps", "--format", "{{.Status}}").endswith("(Paused)")
    daemon.docker("unpause", "long")
    assert "trap" in daemon.out("top", "long")
    daemon.docker("stop", "long")
    assert daemon.json("inspect", "long", "--format", "{{json .State.ExitCode}}") == 3
    daemon.docker("rm", "long")
