"""kill -9 of the daemon: containers, their streams, logs and statuses live on, and the next daemon takes them over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

from support.daemon import Daemon, docker_environment, wait_for


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
    """An attached client's socket is the supervisor's: its output goes on while there is no daemon."""
    process = subprocess.Popen(
        ["docker", "run", "-i", "--name", "str", "bb", "sh", "-c", "read x; echo got $x; read y; echo got $y"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=docker_environment(f"unix://{engine.socket}", engine.base),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    with process.stdin as put, process.stdout as got:
        put.write(b"one\n")
        put.flush()
        assert got.readline() == b"got one\n"
        engine.stop(signal.SIGKILL)
        put.write(b"two\n")
        put.flush()
        assert got.readline() == b"got two\n"
    process.wait(60)
    engine.start()
    assert state(engine, "str") == "exited 0"


def test_paused_stays_paused(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "ice", "bb", "sleep", "1000")
    engine.docker("pause", "ice")
    again(engine)
    assert state(engine, "ice").startswith("paused")
    engine.docker("unpause", "ice")
    engine.docker("rm", "-f", "ice")
