"""kill -9 of the daemon: containers, their streams, logs and statuses live on, and the next daemon takes them over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.daemon import Daemon, docker_environment, prune_all_volumes, wait_for


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


@pytest.mark.slow
def test_killed_at_random_moments_under_load(engine: Daemon, request: pytest.FixtureRequest) -> None:
    """Nothing that was acknowledged is lost, nothing leaks, the store is sound; a container outlives all of it."""
    kills = max(4, request.config.getoption("--kills") // 5)
    chance = random.Random(request.config.getoption("--seed"))
    engine.docker(
        "run", "-d", "--name", "witness", "bb", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    )
    engine.docker("run", "-d", "--name", "phoenix", "--restart", "always", "bb", "sleep", "0.3")
    pid = engine.out("inspect", "-f", "{{.State.Pid}}", "witness")
    stop = threading.Event()
    created: list[str] = []
    env = docker_environment(f"unix://{engine.socket}", engine.base)

    def load(worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"w{worker}-{number}"
            done = subprocess.run(
                ["docker", "create", "--name", name, "-v", f"v-{name}:/d", "bb", "true"],
                env=env,
                capture_output=True,
                check=False,
                timeout=60,
            )
            if done.returncode == 0:
                created.append(name)
            subprocess.run(
                ["docker", "run", "--rm", "bb", "true"], env=env, capture_output=True, check=False, timeout=60
            )

    workers = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for each in workers:
        each.start()
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 1.2))
        again(engine)
    stop.set()
    for each in workers:
        each.join()
    again(engine)
    there = engine.out("ps", "-a", "--format", "{{.Names}}").split()
    assert set(created) <= set(there)
    told = cowfs(engine, "events", "--since", "0.000001", "--jsonl").stdout.splitlines()
    events = [json.loads(line) for line in told]
    names = {
        event["attributes"].get("name")
        for event in events
        if (event["type"], event["action"]) == ("container", "create")
    }
    assert set(created) <= names
    assert [event["seq"] for event in events] == list(range(events[0]["seq"], events[0]["seq"] + len(events)))
    assert engine.out("inspect", "-f", "{{.State.Status}} {{.State.Pid}}", "witness") == f"running {pid}"
    assert {f"v-{name}" for name in created} <= set(engine.out("volume", "ls", "-q").split())
    assert "phoenix" in there
    # Its pauses double up to a minute and it lasts 0.3 s: after many kills it is seldom seen running.
    wait_for(
        lambda: state(engine, "phoenix").split()[0] in ("running", "restarting"), "the container that is started again"
    )
    engine.docker("rm", "-f", *there)
    engine.docker(*prune_all_volumes())
    assert os.listdir(engine.root / "service" / "volumes") == []

    def left() -> list[str]:
        return os.listdir(engine.run_dir / "containers")

    end = time.monotonic() + 30
    while left() and time.monotonic() < end:
        time.sleep(0.1)
    assert left() == []
    assert str(engine.run_dir) not in Path("/proc/self/mountinfo").read_text()
    assert os.listdir(engine.root / "service" / "containers") == []
    checked = cowfs(engine, "check")
    assert checked.returncode == 0, checked.stdout
    keys = cowfs(engine, "ls").stdout
    assert "container/" not in keys
