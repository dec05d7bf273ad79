"""kill -9 of the daemon: containers, their streams, logs and statuses live on, and the next daemon takes them over."""

from __future__ import annotations

import glob
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
from support.daemon import Daemon, docker_environment, prune_all_volumes, wait_for

from cowfs.service.containers.cgroups import PREFIX


def state(engine: Daemon, name: str) -> str:
    return engine.out("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name)


def again(engine: Daemon) -> None:
    engine.stop(signal.SIGKILL)
    engine.start()


def cowfs(engine: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cowfs", *words, "--root", str(engine.root)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_container_goes_on_and_is_taken_over(engine: Daemon) -> None:
    engine.docker(
        "run", "-d", "--name", "on", "bb", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    )
    pid = engine.out("inspect", "-f", "{{.State.Pid}}", "on")
    again(engine)
    assert engine.out("inspect", "-f", "{{.State.Status}} {{.State.Pid}}", "on") == f"running {pid}"
    assert engine.out("exec", "on", "echo", "hi") == "hi"
    engine.docker("stop", "-t", "0", "on")
    numbers = [int(line) for line in engine.out("logs", "on").split()]
    assert numbers == list(range(1, len(numbers) + 1))  # nothing of its output is missing


def test_an_end_while_no_daemon_was_there(engine: Daemon) -> None:
    """Its status, log, event and unmount are all there afterwards; --rm is done by the next daemon."""
    before = time.time()
    engine.docker("run", "-d", "--name", "ends", "bb", "sh", "-c", "sleep 0.5; echo last; exit 6")
    engine.docker("run", "-d", "--rm", "--name", "goes", "bb", "sh", "-c", "sleep 0.5")
    engine.stop(signal.SIGKILL)
    record = engine.root / "service" / "containers"
    wait_for(lambda: all("finished" in json.loads(path.read_text()) for path in record.glob("*/run.json")), "the ends")
    engine.start()
    assert state(engine, "ends") == "exited 6"
    assert engine.out("logs", "ends") == "last"
    wait_for(lambda: engine.out("ps", "-a", "--format", "{{.Names}}") == "ends", "the removal")
    told = cowfs(
        engine, "events", "--since", f"{before:.6f}", "--filter", "type=container", "--filter", "event=die"
    ).stdout
    assert "exitCode=6" in told
    engine.docker("start", "ends")
    assert engine.out("wait", "ends") == "6"


def test_a_stream_survives_the_daemon(engine: Daemon) -> None:
    """An attached client's socket is the supervisor's: it goes on while there is no daemon.

    (The docker command of version 28 leaves when its request for the end breaks, so the client here is a socket.)
    """
    engine.docker("create", "-i", "--name", "str", "bb", "sh", "-c", "read x; echo got $x; read y; echo got $y")
    with engine.raw() as sock, sock.makefile("rb") as got:
        sock.sendall(
            b"POST /containers/str/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        )
        assert got.readline().startswith(b"HTTP/1.1 101")
        while got.readline() != b"\r\n":
            pass
        engine.docker("start", "str")
        sock.sendall(b"one\n")
        assert got.read(8 + 8) == b"\1\0\0\0\0\0\0\x08got one\n"
        engine.stop(signal.SIGKILL)
        sock.sendall(b"two\n")
        assert got.read(8 + 8) == b"\1\0\0\0\0\0\0\x08got two\n"
        assert got.read() == b""
    engine.start()
    assert state(engine, "str") == "exited 0"


def test_paused_stays_paused(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "ice", "bb", "sleep", "1000")
    engine.docker("pause", "ice")
    again(engine)
    assert state(engine, "ice").startswith("paused")
    engine.docker("unpause", "ice")
    engine.docker("rm", "-f", "ice")


def test_a_start_that_was_cut_after_its_attach_leaves_no_supervisor(engine: Daemon) -> None:
    """docker run attaches first, then starts; the next daemon ends the supervisor that waits for a start that never comes."""
    engine.docker("create", "--name", "half", "-i", "bb", "cat")
    with engine.raw() as client:
        client.sendall(
            b"POST /containers/half/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            b"Upgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        )
        assert b" 101 " in client.recv(4096)
        again(engine)
        client.settimeout(60)
        while client.recv(4096):
            pass  # until the supervisor lets the client go
    assert state(engine, "half") == "created 0"
    assert engine.docker("start", "-ai", "half", input=b"hi").stdout == "hi"


class Load:
    """Clients that make, run and remove containers, volumes and names of images, and know what was acknowledged."""

    def __init__(self, engine: Daemon) -> None:
        self.engine = engine
        self.env = docker_environment(f"unix://{engine.socket}", engine.base)
        self.over = threading.Event()
        self.created: list[str] = []
        self.ran: list[str] = []
        self.tagged: list[str] = []
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(2)]

    def __enter__(self) -> Self:
        for each in self.threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for each in self.threads:
            each.join()

    def _does(self, *words: str) -> bool:
        done = subprocess.run(["docker", *words], env=self.env, capture_output=True, check=False, timeout=120)
        return done.returncode == 0

    def _work(self, worker: int) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            name = f"w{worker}-{number}"
            if self._does("create", "--name", name, "-v", f"v-{name}:/d", "bb", "true"):
                self.created.append(name)
            if self._does("run", "--rm", "--init", "--name", f"r{name}", "-v", "/d", "bb", "true"):
                self.ran.append(f"r{name}")
            if self._does("tag", "bb", f"t:{name}"):
                self.tagged.append(f"t:{name}")
            self._does("exec", "witness", "true")


def strangers(before: set[int]) -> list[str]:
    """The command lines of processes of this mount namespace that were not there before."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if (
                not name.isdigit()
                or int(name) in before
                or os.readlink(f"/proc/{name}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
            ):
                continue
            line = Path(f"/proc/{name}/cmdline").read_bytes()
        except OSError:
            continue
        if line:
            found.append(f"{name} {line[:200]!r}")
    return found


def left_of(engine: Daemon, ids: set[str]) -> list[str]:
    """Files below the run directory, mounts, control groups and loop devices that containers left."""
    groups = [os.path.basename(path) for path in glob.glob(f"/sys/fs/cgroup/**{PREFIX}/*", recursive=True)]
    backing = [Path(path).read_text() for path in glob.glob("/sys/block/loop*/loop/backing_file")]
    return [
        *os.listdir(engine.run_dir / "containers"),
        *os.listdir(engine.run_dir / "runtime"),
        *(
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if str(engine.base) in line.split()[4]
        ),
        *(f"control group {each}" for each in groups if each in ids),
        *(each for each in backing if str(engine.base) in each),
    ]


@pytest.mark.slow
def test_killed_at_random_moments_under_load(engine: Daemon, request: pytest.FixtureRequest) -> None:
    """Nothing that was acknowledged is lost, nothing leaks, the store is sound; containers outlive all of it.

    (``--kills 1000``: two hundred moments.)
    """
    kills = max(4, request.config.getoption("--kills") // 5)
    chance = random.Random(request.config.getoption("--seed"))
    before = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    mounted = left_of(engine, set())
    engine.docker(
        "run", "-d", "--name", "witness", "bb", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    )
    engine.docker(
        "run",
        "-d",
        "--name",
        "inner",
        "--init",
        "-v",
        "inner:/d",
        "bb",
        "sh",
        "-c",
        "while :; do date +%s >/d/x; sleep 0.1; done",
    )
    engine.docker(
        "run",
        "-d",
        "--name",
        "well",
        "--health-cmd",
        "test -e /tmp",
        "--health-interval",
        "0.2s",
        "bb",
        "sleep",
        "100000",
    )
    engine.docker("run", "-d", "--name", "phoenix", "--restart", "always", "bb", "sleep", "0.3")
    lasting = ("witness", "inner", "well")
    pids = {name: engine.out("inspect", "-f", "{{.State.Pid}}", name) for name in lasting}
    with Load(engine) as load:
        for _ in range(kills):
            time.sleep(chance.uniform(0.05, 1.2))
            again(engine)
    again(engine)
    there = engine.out("ps", "-a", "--format", "{{.Names}}").split()
    assert set(load.created) <= set(there)
    told = cowfs(engine, "events", "--since", "0.000001", "--jsonl").stdout.splitlines()
    events = [json.loads(line) for line in told]
    assert [event["seq"] for event in events] == list(range(events[0]["seq"], events[0]["seq"] + len(events)))
    known: dict[str, list[str]] = {}
    for event in events:
        if event["type"] == "container":
            known.setdefault(event["attributes"].get("name", ""), []).append(event["action"])
    assert [name for name in load.created if "create" not in known[name]] == []
    lacking = {name: {"create", "start", "die", "destroy"} - set(known[name]) for name in load.ran}
    assert {name: actions for name, actions in lacking.items() if actions} == {}
    for name, pid in pids.items():
        assert engine.out("inspect", "-f", "{{.State.Status}} {{.State.Pid}}", name) == f"running {pid}"
    numbers = [int(line) for line in engine.out("logs", "witness").split()]
    assert numbers == list(range(1, len(numbers) + 1))
    wait_for(
        lambda: engine.out("inspect", "-f", "{{.State.Health.Status}}", "well") == "healthy", "the check of health"
    )
    assert engine.out("exec", "inner", "cat", "/d/x").isdecimal()
    assert {f"v-{name}" for name in load.created} <= set(engine.out("volume", "ls", "-q").split())
    assert set(load.tagged) <= set(engine.out("images", "--format", "{{.Repository}}:{{.Tag}}").split())
    # Its pauses double up to a minute and it lasts 0.3 s: after many kills it is seldom seen running.
    wait_for(
        lambda: state(engine, "phoenix").split()[0] in ("running", "restarting"), "the container that is started again"
    )
    engine.docker("rm", "-f", *there)
    engine.docker(*prune_all_volumes())
    assert os.listdir(engine.root / "service" / "volumes") == []
    assert os.listdir(engine.root / "service" / "containers") == []
    assert "container/" not in cowfs(engine, "ls").stdout
    ids = {event["actor"] for event in events if event["type"] == "container"}
    patiently(lambda: [each for each in left_of(engine, ids) if each not in mounted])
    engine.docker("image", "prune", "-af")
    assert engine.stop() == 0
    patiently(lambda: strangers(before))
    checked = cowfs(engine, "check", "--content")
    assert checked.returncode == 0, checked.stdout
    assert "no damage" in checked.stdout


def patiently(left: Callable[[], list[str]]) -> None:
    """Fail with a list that does not get empty; the bound is for leaks, not for speed."""
    end = time.monotonic() + 60
    while left() and time.monotonic() < end:
        time.sleep(0.1)
    assert left() == []
