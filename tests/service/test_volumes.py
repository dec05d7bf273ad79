"""Named volumes, by the real docker command and docker-py."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any

import pytest
from support.daemon import Daemon, docker_major, prune_all_volumes, wait_for


def run(engine: Daemon, *words: str) -> str:
    return engine.out("run", "--rm", *words)


def test_data_outlives_containers_and_is_shared(shared: Daemon) -> None:
    run(shared, "-v", "data:/d", "bb", "sh", "-c", "echo one > /d/file; chown 1000 /d/file; ln -s file /d/link")
    assert (
        run(shared, "-v", "data:/elsewhere", "bb", "sh", "-c", "cat /elsewhere/link; stat -c %u /elsewhere/file")
        == "one\n1000"
    )
    shared.docker("run", "-d", "--name", "reads", "-v", "data:/d:ro", "bb", "sleep", "1000")
    run(shared, "--mount", "type=volume,src=data,dst=/d", "bb", "sh", "-c", "echo two > /d/file")
    assert shared.out("exec", "reads", "cat", "/d/file") == "two"
    assert "Read-only" in shared.docker("exec", "reads", "touch", "/d/x", check=False).stderr
    assert shared.out("ps", "-q", "--filter", "volume=data", "--format", "{{.Names}}")
    (mount,) = shared.json("inspect", "-f", "{{json .Mounts}}", "reads")
    assert (mount["Type"], mount["Name"], mount["Destination"], mount["RW"]) == ("volume", "data", "/d", False)
    assert (mount["Source"], os.path.exists(mount["Source"] + "/file")) == (
        shared.out("volume", "inspect", "-f", "{{.Mountpoint}}", "data"),
        True,
    )
    assert "volume is in use" in shared.docker("volume", "rm", "data", check=False).stderr
    shared.docker("rm", "-f", "reads")
    assert shared.out("volume", "rm", "data") == "data"
    assert not os.path.exists(mount["Source"])
    assert "no such volume" in shared.docker("volume", "inspect", "data", check=False).stderr.lower()


def test_an_empty_volume_gets_what_the_image_has_there(shared: Daemon) -> None:
    shared.docker(
        "run",
        "--name",
        "mk",
        "bb",
        "sh",
        "-c",
        "mkdir -p /seed/sub; echo of the image > /seed/sub/file; chmod 2750 /seed; chown 5:6 /seed; ln /seed/sub/file /seed/hard; ln -s /etc/passwd /seed/out",
    )
    shared.docker("commit", "mk", "seeded")
    told = "stat -c '%a %u:%g' /seed; cat /seed/hard; readlink /seed/out; stat -c %h /seed/sub/file"
    assert run(shared, "-v", "filled:/seed", "seeded", "sh", "-c", told) == "2750 5:6\nof the image\n/etc/passwd\n2"
    run(shared, "-v", "filled:/seed", "seeded", "rm", "-r", "/seed/sub")
    assert run(shared, "-v", "filled:/seed", "seeded", "ls", "/seed") == "hard\nout"  # not again
    assert run(shared, "-v", "bare:/seed:nocopy", "seeded", "ls", "/seed") == ""
    assert run(shared, "-v", "new:/not/in/the/image", "seeded", "ls", "/not/in/the/image") == ""
    shared.docker("rm", "mk")
    shared.docker("volume", "rm", "filled", "bare", "new")


def test_an_image_cannot_lead_the_copy_out_of_its_tree(shared: Daemon) -> None:
    """Links on the way to the target are followed inside of the container, never on the host."""
    (shared.base / "secret").write_text("of the host")
    where = str(shared.base)
    shared.docker(
        "run",
        "--name",
        "mk",
        "bb",
        "sh",
        "-c",
        f"mkdir -p /a; ln -s {where} /a/link; ln -s ../../../../../../..{where} /up",
    )
    shared.docker("commit", "mk", "leads")
    shared.docker("rm", "mk")
    for target in ("/a/link", "/up"):
        found = shared.docker(
            "run",
            "--rm",
            "-v",
            "caught:/x",
            "-v",
            f"v{target.count('/')}:{target}",
            "leads",
            "find",
            "/",
            "-name",
            "secret",
            check=False,
        )
        assert "secret" not in found.stdout
    for volume in shared.out("volume", "ls", "-q").split():
        shared.docker("volume", "rm", volume)


def test_volumes_without_a_name(shared: Daemon) -> None:
    """They go with ``--rm`` and ``rm -v``, and stay otherwise; an image's VOLUME makes one."""
    shared.docker("run", "--rm", "-v", "/d", "bb", "true")
    assert shared.out("volume", "ls", "-q") == ""
    shared.docker("run", "--name", "keeps", "-v", "/d", "bb", "sh", "-c", "echo x > /d/x")
    (name,) = shared.out("volume", "ls", "-q").split()
    assert len(name) == 64
    shared.docker("rm", "keeps")
    assert shared.out("volume", "ls", "-q", "--filter", "dangling=true") == name
    assert name in shared.out("volume", "prune", "-f")
    shared.docker("run", "--name", "mk", "bb", "true")
    shared.docker("commit", "-c", "VOLUME /declared", "mk", "declares")
    shared.docker("rm", "mk")
    shared.docker("run", "--name", "one", "-v", "named:/declared/below", "declares", "true")
    found = shared.json("inspect", "-f", "{{json .Mounts}}", "one")
    assert sorted(each["Destination"] for each in found) == ["/declared", "/declared/below"]
    shared.docker("rm", "-v", "one")
    assert shared.out("volume", "ls", "-q") == "named"
    shared.docker("run", "--rm", "-v", "named:/declared", "declares", "true")  # in the place of the declared one
    assert shared.out("volume", "ls", "-q") == "named"
    shared.docker("volume", "rm", "named")


def test_create_list_prune_df_and_events(shared: Daemon) -> None:
    assert shared.out("volume", "create", "--label", "team=storage", "one") == "one"
    assert shared.out("volume", "create", "one") == "one"  # there already
    shared.docker("volume", "create", "two")
    assert shared.out("volume", "ls", "-q").split() == ["one", "two"]
    assert shared.out("volume", "ls", "-q", "--filter", "label=team=storage") == "one"
    assert shared.out("volume", "ls", "-q", "--filter", "name=tw") == "two"
    run(shared, "-v", "two:/d", "bb", "dd", "if=/dev/zero", "of=/d/file", "bs=1M", "count=3")
    df = [
        each
        for each in json.loads("[" + shared.out("system", "df", "-v", "--format", "{{json .Volumes}}") + "]")[0]
        if each["Name"] == "two"
    ]
    assert df[0]["Size"].startswith("3.1") and df[0]["Links"] == "0"
    if docker_major() >= 23:
        assert shared.out("volume", "prune", "-f").startswith("Total reclaimed space: 0B")  # named ones stay
    assert "two" in shared.out(*prune_all_volumes(), "--filter", "label!=team")
    assert shared.out("volume", "rm", "-f", "nobody") == "nobody"
    events = shared.out(
        "events",
        "--since",
        "1",
        "--until",
        f"{time.time():.6f}",
        "--filter",
        "type=volume",
        "--filter",
        "volume=two",
        "--format",
        "{{.Action}}",
    )
    assert events.split() == ["create", "mount", "unmount", "destroy"]
    shared.docker("volume", "rm", "one")


@pytest.mark.parametrize("words", [["-v", "bad name:/d"],  ["-v", "a:/"], ["-v", "a:relative"], ["-v", "a:/d:nonsense"],
    ["--mount", "type=volume,src=a,dst=/d,volume-driver=nfs"], ["--mount", "type=volume,src=a,dst=/d,volume-opt=o=size"]])  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_left(shared: Daemon, words: list[str]) -> None:
    done = shared.docker("create", *words, "bb", "true", check=False)
    assert done.returncode != 0 and done.stderr.strip()
    assert shared.out("volume", "ls", "-q") == ""
    assert shared.out("ps", "-aq") == ""


def test_names_of_the_api_stay_in_their_folder(shared: Daemon) -> None:
    for name in ("..", ".", "%2e%2e", "..%2fcontainers", "a%2fb", "-x", "x" * 300):
        assert shared.request("GET", f"/volumes/{name}")[0] in (400, 404, 501)
        assert shared.request("DELETE", f"/volumes/{name}")[0] in (400, 404, 501)
    for body in (
        {"Name": "../x"},
        {"Name": "a/b"},
        {"Name": "a\0b"},
        {"Name": "ok", "Driver": "nfs"},
        {"Name": "ok", "DriverOpts": {"o": "x"}},
    ):
        assert shared.request("POST", "/volumes/create", body)[0] in (400, 501)
    assert shared.out("volume", "ls", "-q") == ""


def test_docker_py(shared: Daemon) -> None:
    docker = pytest.importorskip("docker")
    client: Any = docker.DockerClient(base_url=f"unix://{shared.socket}")
    try:
        volume = client.volumes.create("py", labels={"a": "b"})
        said = client.containers.run(
            "bb", "sh -c 'echo hi > /v/x; cat /v/x'", volumes={"py": {"bind": "/v", "mode": "rw"}}, remove=True
        )
        assert said == b"hi\n"
        assert [each.name for each in client.volumes.list(filters={"label": "a=b"})] == ["py"]
        volume.remove()
    finally:
        client.close()


def test_racing_creates_and_prunes_lose_nothing(shared: Daemon) -> None:
    """A volume that a container names is there when the container starts, whoever prunes meanwhile."""
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            shared.request("POST", '/volumes/prune?filters={"all":["true"]}'.replace('"', "%22"))

    other = threading.Thread(target=prune)
    other.start()
    try:
        for number in range(8):
            shared.docker("create", "--name", f"r{number}", "-v", f"race{number}:/d", "bb", "true")
            assert shared.request("GET", f"/volumes/race{number}")[0] == 200
    finally:
        stop.set()
        other.join()
    shared.docker("rm", *[f"r{number}" for number in range(8)])
    shared.docker(*prune_all_volumes())
    assert shared.out("volume", "ls", "-q") == ""


def test_a_killed_daemon_leaves_no_half_of_a_volume(shared: Daemon) -> None:
    shared.docker("run", "-d", "--name", "uses", "-v", "kept:/d", "bb", "sleep", "1000")
    folder = shared.root / "service" / "volumes"
    shared.stop(signal.SIGKILL)
    (folder / ".new-1" / "_data").mkdir(parents=True)
    (folder / ".rm-1" / "_data").mkdir(parents=True)
    (folder / "kept" / ".new-2" / "half").mkdir(parents=True)
    shared.start()
    assert sorted(each.name for each in folder.iterdir()) == ["kept"]
    assert sorted(each.name for each in (folder / "kept").iterdir()) == ["_data", "volume.json"]
    assert "volume is in use" in shared.docker("volume", "rm", "kept", check=False).stderr
    shared.docker("rm", "-f", "uses")
    wait_for(lambda: shared.docker("volume", "rm", "kept", check=False).returncode == 0, "the volume to be free")
