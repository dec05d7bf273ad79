"""Restart policies, ``--init`` and health checks, by the real docker command."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import pytest
from support.daemon import Daemon, docker_major, wait_for

from cowfs.service.containers.container import Container
from cowfs.service.containers.restarting import Restarts


def told(engine: Daemon, name: str, what: str) -> str:
    return engine.out("inspect", "-f", what, name)


def restarts(engine: Daemon, name: str) -> int:
    return int(told(engine, name, "{{.RestartCount}}"))


# -- restart policies -----------------------------------------------------------------------------------------------------


def test_a_failing_container_is_started_again_so_many_times(shared: Daemon) -> None:
    shared.docker("run", "-d", "--name", "fails", "--restart", "on-failure:2", "bb", "sh", "-c", "echo once; exit 3")
    wait_for(lambda: told(shared, "fails", "{{.State.Status}} {{.RestartCount}}") == "exited 2", "the last end")
    assert shared.out("logs", "fails").split() == ["once"] * 3
    assert told(shared, "fails", "{{.State.ExitCode}} {{.HostConfig.RestartPolicy.Name}}") == "3 on-failure"
    events = shared.out(
        "events",
        "--since",
        "1",
        "--until",
        f"{time.time():.6f}",
        "--filter",
        "container=fails",
        "--format",
        "{{.Action}}",
    )
    assert events.split() == ["create", *["start", "die"] * 3]
    shared.docker("start", "fails")  # somebody starts it: counting begins anew
    wait_for(lambda: told(shared, "fails", "{{.State.Status}} {{.RestartCount}}") == "exited 2", "the last end again")
    shared.docker("rm", "fails")


def test_success_ends_on_failure_and_not_always(shared: Daemon) -> None:
    shared.docker("run", "-d", "--name", "good", "--restart", "on-failure", "bb", "true")
    shared.docker("run", "-d", "--name", "ever", "--restart", "always", "bb", "true")
    wait_for(lambda: restarts(shared, "ever") >= 2, "restarts")
    assert told(shared, "good", "{{.State.Status}} {{.RestartCount}}") == "exited 0"
    shared.docker("rm", "-f", "good", "ever")
    assert shared.out("ps", "-aq") == ""


@pytest.mark.parametrize("verb", [["stop", "-t", "0"], ["kill"]])
def test_whoever_stops_it_ends_it(shared: Daemon, verb: list[str]) -> None:
    shared.docker("run", "-d", "--name", "on", "--restart", "always", "bb", "sleep", "1000")
    shared.docker(*verb, "on")
    wait_for(lambda: told(shared, "on", "{{.State.Status}}") == "exited", "the end")
    time.sleep(0.5)
    assert told(shared, "on", "{{.State.Status}} {{.RestartCount}}") == "exited 0"
    shared.docker("start", "on")
    pid = told(shared, "on", "{{.State.Pid}}")
    shared.docker("restart", "-t", "0", "on")
    assert told(shared, "on", "{{.State.Status}}") == "running" and told(shared, "on", "{{.State.Pid}}") != pid
    shared.docker("rm", "-f", "on")


def test_one_that_waits_for_its_restart(shared: Daemon) -> None:
    """It is shown as restarting, cannot be removed without force, and stop ends its waiting."""
    shared.docker("run", "-d", "--name", "waits", "--restart", "always", "bb", "false")
    wait_for(lambda: restarts(shared, "waits") >= 4, "restarts")
    wait_for(lambda: told(shared, "waits", "{{.State.Restarting}}") == "true", "a long wait")
    wait_for(lambda: shared.out("ps", "-a", "--format", "{{.Status}}").startswith("Restarting (1)"), "the next one")
    wait_for(lambda: shared.out("ps", "-aq", "--filter", "status=restarting"), "the next one")
    assert shared.docker("rm", "waits", check=False).returncode == 1
    shared.docker("stop", "waits")
    count = restarts(shared, "waits")
    assert told(shared, "waits", "{{.State.Status}}") == "exited"
    shared.docker("update", "--restart", "no", "waits")
    shared.docker("start", "waits")
    wait_for(lambda: told(shared, "waits", "{{.State.Status}}") == "exited", "the end")
    assert restarts(shared, "waits") == 0 and count >= 4
    shared.docker("rm", "waits")


def test_a_new_daemon_goes_by_the_policies(shared: Daemon) -> None:
    """A container that ended while there was no daemon is started again; one that a verb ended only where it is ``always``."""
    for name, policy in (
        ("a", "always"),
        ("b", "unless-stopped"),
        ("c", "always"),
        ("d", "unless-stopped"),
        ("e", "on-failure"),
        ("f", "no"),
    ):
        shared.docker("run", "-d", "--name", f"p{name}", "--restart", policy, "bb", "sh", "-c", "sleep 1000; exit 0")
    shared.docker("stop", "-t", "0", "pc", "pd", "pe")
    pids = {name: int(told(shared, name, "{{.State.Pid}}")) for name in ("pa", "pb", "pf")}
    shared.stop(signal.SIGKILL)
    import os

    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    records = shared.root / "service" / "containers"
    wait_for(lambda: all("finished" in json.loads(each.read_text()) for each in records.glob("*/run.json")), "the ends")
    shared.start()
    for name, status in (
        ("pa", "running"),
        ("pb", "running"),
        ("pc", "running"),
        ("pd", "exited"),
        ("pe", "exited"),
        ("pf", "exited"),
    ):
        wait_for(lambda: told(shared, name, "{{.State.Status}}") == status, f"{name} to be {status}")
    shared.docker("rm", "-f", *[f"p{name}" for name in "abcdef"])


def test_a_start_that_failed_is_tried_again_by_the_next_daemon(shared: Daemon) -> None:
    source = shared.base / "source"
    source.mkdir()
    shared.docker(
        "run", "-d", "--name", "again", "--restart", "always", "--mount", f"type=bind,src={source},dst=/s", "bb",
        "sh", "-c", "until test -e /s/go; do sleep 0.05; done",
    )  # fmt: skip
    (source / "go").touch()
    source.rename(shared.base / "elsewhere")
    wait_for(lambda: "does not exist" in told(shared, "again", "{{.State.Error}}"), "the failed restart")
    source.mkdir()
    shared.stop(signal.SIGKILL)
    shared.start()
    wait_for(lambda: told(shared, "again", "{{.State.Status}}") == "running", "the start")
    shared.docker("rm", "-f", "again")


@pytest.mark.parametrize(
    "words", [["--restart", "sometimes"], ["--restart", "always:3"], ["--rm", "--restart", "always"]]
)
def test_policies_that_cannot_be(shared: Daemon, words: list[str]) -> None:
    assert shared.docker("create", *words, "bb", "true", check=False).returncode != 0
    body: dict[str, Any] = {"Image": "bb", "Cmd": ["true"], "HostConfig": {"RestartPolicy": {"Name": "x"}}}
    assert shared.request("POST", "/containers/create", body)[0] == 400


# -- init -----------------------------------------------------------------------------------------------------------------


def test_init_collects_orphans_and_passes_signals(shared: Daemon) -> None:
    if shared.json("info", "-f", "{{json .InitBinary}}") == "":
        pytest.skip("no static docker-init or tini here (Debian: docker.io; CI has it)")
    shared.docker(
        "run",
        "-d",
        "--init",
        "--name",
        "in",
        "bb",
        "sh",
        "-c",
        "trap 'exit 7' TERM; (sleep 0.1 &); while :; do sleep 0.1; done",
    )
    first = shared.out("exec", "in", "cat", "/proc/1/cmdline").split("\0")
    assert first[0] == "/dev/docker-init"
    time.sleep(0.5)
    zombies = shared.out("exec", "in", "sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null; true")
    assert zombies == ""
    assert shared.out("diff", "in") == ""  # nothing of it is in the tree
    shared.docker("stop", "in")
    assert told(shared, "in", "{{.State.ExitCode}}") == "7"
    shared.docker("rm", "in")


# -- health ---------------------------------------------------------------------------------------------------------------


def health(engine: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.json("inspect", "-f", "{{json .State.Health}}", name)
    return found


def test_health_follows_the_check(shared: Daemon) -> None:
    shared.docker(
        "run", "-d", "--name", "well", "--health-cmd", "echo looking; test -e /ok", "--health-interval", "100ms", "--health-retries", "2",
        "bb", "sleep", "1000",
    )  # fmt: skip
    wait_for(lambda: health(shared, "well")["Status"] == "unhealthy", "failures")
    assert health(shared, "well")["FailingStreak"] >= 2
    assert health(shared, "well")["Log"][-1] | {"Start": "", "End": ""} == {
        "Start": "",
        "End": "",
        "ExitCode": 1,
        "Output": "looking\n",
    }
    assert "(unhealthy)" in shared.out("ps", "--format", "{{.Status}}")
    shared.docker("exec", "well", "touch", "/ok")
    wait_for(lambda: health(shared, "well")["Status"] == "healthy", "a success")
    assert shared.out("ps", "-q", "--filter", "health=healthy") and not shared.out(
        "ps", "-q", "--filter", "health=unhealthy"
    )
    assert len(health(shared, "well")["Log"]) <= 5
    assert len(shared.json("inspect", "-f", "{{json .ExecIDs}}", "well") or ()) <= 1
    shared.stop(signal.SIGKILL)
    shared.start()
    wait_for(lambda: health(shared, "well")["Status"] == "healthy", "the new daemon's look")
    shared.docker("rm", "-f", "well")
    events = shared.out(
        "events",
        "--since",
        "1",
        "--until",
        f"{time.time():.6f}",
        "--filter",
        "event=health_status",
        "--format",
        "{{.Action}}",
    )
    assert events.splitlines()[:2] == ["health_status: unhealthy", "health_status: healthy"]


def test_a_check_of_the_image_and_one_that_hangs(shared: Daemon) -> None:
    shared.docker("run", "--name", "mk", "bb", "true")
    shared.docker(
        "commit",
        "-c",
        'HEALTHCHECK --interval=100ms --timeout=200ms --retries=1 CMD ["sleep", "1000"]',
        "mk",
        "checked",
        check=False,
    )
    body = {
        "Image": "bb", "Cmd": ["sleep", "1000"],
        "Healthcheck": {"Test": ["CMD", "sleep", "1000"], "Interval": 100_000_000, "Timeout": 200_000_000, "Retries": 1},
    }  # fmt: skip
    assert shared.request("POST", "/containers/create?name=hangs", body)[0] == 201
    shared.docker("start", "hangs")
    wait_for(lambda: health(shared, "hangs")["Status"] == "unhealthy", "the timeout")
    assert "exceeded timeout" in health(shared, "hangs")["Log"][-1]["Output"]
    found = wait_for(lambda: len(shared.out("top", "hangs").splitlines()) <= 3, "what hung to be killed")
    assert found
    shared.docker("rm", "-f", "hangs", "mk")
    for bad in (
        {"Test": ["NOPE"]},
        {"Test": ["CMD"]},
        {"Test": ["CMD", "x"], "Interval": 5},
        {"Test": ["CMD", "x"], "Retries": -1},
        {"Test": "x"},
    ):
        assert shared.request("POST", "/containers/create", {**body, "Healthcheck": bad})[0] == 400


def test_no_healthcheck_and_the_start_period(shared: Daemon) -> None:
    shared.docker("run", "-d", "--name", "none", "--no-healthcheck", "bb", "sleep", "1000")
    assert health(shared, "none") is None
    often = ["--health-start-interval", "50ms"] if docker_major() >= 25 else []
    shared.docker(
        "run", "-d", "--name", "slow", "--health-cmd", "false", "--health-interval", "50ms", "--health-retries", "1",
        "--health-start-period", "1h", *often, "bb", "sleep", "1000",
    )  # fmt: skip
    wait_for(lambda: len(health(shared, "slow")["Log"]) >= 3, "some checks")
    assert health(shared, "slow")["Status"] == "starting" and health(shared, "slow")["FailingStreak"] == 0
    shared.docker("rm", "-f", "none", "slow")


def test_an_end_before_its_start_is_through_is_followed_by_a_restart() -> None:
    """A process that ends at once is heard of before its start has returned: the wait that follows is not that of the run before."""
    container = Container(
        id="1" * 64,
        folder="",
        bundle="",
        name="quick",
        created=0,
        image="",
        image_name="",
        snapshot="",
        config={},
        host={"RestartPolicy": {"Name": "always"}},
    )
    container.run = {"started": 1, "finished": 2, "code": 1}
    starts = []
    done = threading.Event()

    def start(each: Container) -> None:
        starts.append(each.wait_number)
        if len(starts) < 4:
            policy.ended(each)
        else:
            done.set()

    policy = Restarts(start)
    policy.ended(container)
    try:
        assert done.wait(60)
        assert len(starts) == 4
    finally:
        policy.close()
