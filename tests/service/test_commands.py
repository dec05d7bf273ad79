"""Commands and methods of docker-py that no other module looks at, by their results; each by the newest version of the API and the oldest."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, docker_environment, docker_major, wait_for

LASTS = ("sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done")


@pytest.fixture(params=["", "1.40"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version of the API for the docker command; "" is its own. It is set behind what the tests' environment leaves out."""
    told: str = request.param
    if told:
        real = docker_environment
        monkeypatch.setattr(
            "support.daemon.docker_environment",
            lambda *arguments, **more: {**real(*arguments, **more), "DOCKER_API_VERSION": told},
        )
    return told


@pytest.fixture
def on(shared: Daemon) -> Iterator[str]:
    """A running container whose trap is set."""
    name = f"on{time.monotonic_ns()}"
    shared.docker("run", "-d", "--name", name, "-l", "mark=yes", "bb", *LASTS)
    wait_for(lambda: shared.out("logs", name) == "ready", "the trap")
    yield name
    shared.docker("rm", "-f", name, check=False)


def following(engine: Daemon, *words: str) -> subprocess.Popen[str]:
    env = docker_environment(f"unix://{engine.socket}", engine.base)
    return subprocess.Popen(["docker", *words], env=env, stdout=subprocess.PIPE, text=True)


def test_stats_go_on(shared: Daemon, on: str, version: str) -> None:
    """``docker stats`` without --no-stream: line after line, with the container's figures."""
    with following(shared, "stats", "--format", "{{json .}}", on) as process:
        assert process.stdout is not None
        told: list[dict[str, str]] = []
        for line in process.stdout:
            found = re.search(r"\{.*\}", line)
            if found and json.loads(found[0])["PIDs"] not in ("--", "0"):
                told.append(json.loads(found[0]))
            if len(told) == 2:
                break
        process.kill()
    assert {each["Name"] for each in told} == {on}
    assert all(re.fullmatch(r"[\d.]+%", each["CPUPerc"]) and " / " in each["MemUsage"] for each in told)


def test_events_are_followed_with_filters_and_a_format(shared: Daemon, on: str, version: str) -> None:
    words = (
        "events",
        "--since",
        "1h",
        "--filter",
        f"container={on}",
        "--filter",
        "event=die",
        "--filter",
        "label=mark=yes",
    )
    with following(
        shared, *words, "--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.exitCode}} {{.Actor.Attributes.mark}}"
    ) as process:
        assert process.stdout is not None
        shared.docker("stop", on)
        line = process.stdout.readline()
        process.kill()
    assert line == "container die 4 yes\n"
    until = f"{time.time():.6f}"
    assert (
        shared.out(
            "events", "--since", "1h", "--until", until, "--filter", f"container={on}", "--filter", "event=pause"
        )
        == ""
    )


def test_info_tells_of_the_store(shared: Daemon, version: str) -> None:
    told = shared.out("info")
    for line in (
        "Storage Driver: overlay",
        "Backing Filesystem: ",
        "Mount Engine: ",
        "Limit Engine: ",
        f"Docker Root Dir: {shared.root}",
    ):
        assert line in told, line


def test_system_df_in_detail(shared: Daemon, on: str, version: str) -> None:
    """Each container, image and volume with its own size, and the share that can be had back."""
    shared.docker("exec", on, "sh", "-c", "head -c 300000 /dev/zero >/big")
    shared.docker("volume", "create", "kept")
    told = json.loads(shared.out("system", "df", "-v", "--format", "{{json .}}"))
    (row,) = [each for each in told["Containers"] if each["Names"] == on]
    assert re.match(r"30\dkB", row["Size"]), row
    (image,) = [each for each in told["Images"] if each["Repository"] == "bb"]
    assert float(image["UniqueSize"].removesuffix("MB")) == pytest.approx(
        float(image["Size"].removesuffix("MB")), rel=0.01
    )
    assert int(image["Containers"]) >= 1
    (volume,) = [each for each in told["Volumes"] if each["Name"] == "kept"]
    assert volume["Links"] == "0"
    shared.docker("volume", "rm", "kept")


def test_a_read_only_root_has_what_was_given_to_write_in(shared: Daemon, version: str) -> None:
    script = "touch /x; echo a >/tmp/a && cat /tmp/a && echo b >/v/b && cat /v/b"
    done = shared.docker("run", "--rm", "--read-only", "--tmpfs", "/tmp", "-v", "/v", "bb", "sh", "-c", script)
    assert done.stdout == "a\nb\n"
    assert "Read-only file system" in done.stderr


def test_update_of_a_policy_holds(shared: Daemon, on: str, version: str) -> None:
    shared.docker("update", "--restart", "always", on)
    assert shared.out("inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", on) == "always"
    shared.docker("exec", on, "kill", "-TERM", "1")
    wait_for(lambda: int(shared.out("inspect", "-f", "{{.RestartCount}}", on)) == 1, "the restart")


def test_a_name_of_several_and_prunes_with_filters(shared: Daemon, version: str) -> None:
    for name, label in (("gone1", "a=1"), ("gone2", "a=2"), ("gone3", "b=1")):
        shared.docker("create", "--name", name, "-l", label, "-v", f"of-{name}:/d", "bb", "true")
    assert "Total reclaimed space" in shared.out("container", "prune", "-f", "--filter", "label=a=1")
    names = ("ps", "-a", "--format", "{{.Names}}", "--filter", "name=gone")
    assert set(shared.out(*names).split()) == {"gone2", "gone3"}
    shared.docker("container", "prune", "-f", "--filter", "label!=b=1", "--filter", "label=a")
    assert shared.out(*names) == "gone3"
    for until in ("1h30m", "2001-02-03", "2001-02-03T04:05:06Z", "981173106"):
        shared.docker("container", "prune", "-f", "--filter", f"until={until}")
        shared.docker("image", "prune", "-f", "--filter", f"until={until}")
    assert "is no time" in shared.docker("container", "prune", "-f", "--filter", "until=soon", check=False).stderr
    assert shared.out(*names) == "gone3"
    shared.docker("rm", "-v", "gone3")
    volumes = ("volume", "ls", "-q", "--filter", "name=of-gone")
    assert set(shared.out(*volumes).split()) == {"of-gone1", "of-gone2", "of-gone3"}  # with a name: they stay
    every = ["--all"] if docker_major() >= 23 and not version else []
    shared.docker("volume", "prune", "-f", *every)
    assert shared.out(*volumes) == ""
    shared.docker("tag", "bb", "pruned:1")
    shared.docker("commit", shared.out("create", "bb", "true"), "pruned:2")
    shared.docker("container", "prune", "-f")
    shared.docker("image", "prune", "-f")
    assert set(shared.out("images", "-q", "--filter", "reference=pruned").split()) != set()
    shared.docker("rmi", "pruned:1", "pruned:2")
    assert shared.out("images", "-q", "pruned") == ""


def test_export_into_a_file_and_import_of_it(shared: Daemon, on: str, version: str, tmp_path: Path) -> None:
    shared.docker("exec", on, "sh", "-c", "echo kept >/data/kept; ln -s kept /data/link")
    shared.docker("export", "-o", str(tmp_path / "tree.tar"), on)
    with tarfile.open(tmp_path / "tree.tar") as tar:
        assert tar.getmember("data/link").linkname == "kept"
    shared.docker("import", "-c", 'CMD ["cat", "/data/link"]', str(tmp_path / "tree.tar"), "back:1")
    assert shared.out("run", "--rm", "back:1") == "kept"
    shared.docker("rmi", "back:1")


@pytest.fixture
def client(shared: Daemon) -> Iterator[Any]:
    docker = pytest.importorskip("docker")
    made = docker.DockerClient(base_url=f"unix://{shared.socket}")
    yield made
    made.close()


def test_docker_py_on_containers(shared: Daemon, client: Any) -> None:
    """Methods that the other modules do not call: logs as a stream, top, rename, update, commit, export, attach, kill, restart, wait, prune."""
    made = client.containers.create("bb", list(LASTS), name="python", labels={"py": "1"}, stdin_open=True)
    stream = made.attach(stream=True, logs=True)
    made.start()
    assert next(stream) == b"ready\n"
    made.reload()
    assert made.status == "running"
    assert any("trap" in cell for row in made.top()["Processes"] for cell in row)
    made.rename("renamed")
    made.update(mem_limit="80m", memswap_limit="160m")
    assert client.containers.get("renamed").attrs["HostConfig"]["Memory"] == 80 << 20
    figures = made.stats(stream=True, decode=True)
    assert [next(figures)["name"], next(figures)["memory_stats"]["limit"]] == ["/renamed", 80 << 20]
    assert made.exec_run(["sh", "-c", "echo e >&2; exit 3"], demux=True) == (3, (None, b"e\n"))
    image = made.commit("python", "1", message="why", changes=["ENV A=b"])
    assert image.attrs["Config"]["Env"][-1] == "A=b"
    assert b"of the image" in b"".join(made.export())
    made.restart(timeout=60)
    assert made.logs().count(b"ready") >= 1
    wait_for(lambda: made.logs().count(b"ready") == 2, "the trap")
    made.kill("TERM")
    assert made.wait()["StatusCode"] == 4
    assert list(made.logs(stream=True)) and made.logs(tail=1) == b"ready\n"
    assert [each.name for each in client.containers.list(all=True, filters={"label": "py=1", "status": "exited"})] == [
        "renamed"
    ]
    assert made.id in client.containers.prune(filters={"label": "py=1"})["ContainersDeleted"]
    client.images.remove("python:1")


def test_docker_py_on_the_host(shared: Daemon, client: Any, busybox: bytes) -> None:
    """Events as a stream, df, version, import, prune of images and volumes."""
    since = int(time.time())
    told = client.events(since=since, filters={"type": "image", "event": "tag"}, decode=True)
    client.api.import_image_from_data(busybox, repository="raw", tag="2")
    assert next(iter(told))["Action"] == "tag"
    told.close()
    assert client.version()["ApiVersion"] == "1.50"
    assert {"LayersSize", "Images", "Containers", "Volumes"} <= set(client.df())
    client.volumes.create("old", labels={"w": "1"})
    assert client.volumes.prune(filters={"label": "w=1", "all": True})["VolumesDeleted"] == ["old"]
    client.images.remove("raw:2")
    assert client.images.list("raw") == []
    client.images.prune()
