"""Images by the real docker command and docker-py: each verb, by what it leaves behind and shows."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support.daemon import DATA, Daemon, wait_for

SMALL = "localhost/small:1"
ID = "sha256:9c33d969275253f462e75d433ce358a90b9551c9f65a6bcfd068744db262313d"
"""The digest of the configuration in the archive."""


@pytest.fixture
def loaded(daemon: Daemon) -> Daemon:
    assert daemon.out("load", "-i", str(DATA / "small-docker.tar")) == f"Loaded image: {SMALL}"
    return daemon


def tree(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def names(daemon: Daemon, *arguments: str) -> list[str]:
    return daemon.out("images", "--format", "{{.Repository}}:{{.Tag}}", *arguments).split()


@pytest.mark.parametrize("version", ["1.40", "1.43", "1.50"])
def test_load_and_list(daemon: Daemon, version: str) -> None:
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"), DOCKER_API_VERSION=version)
    told = json.loads(daemon.out("images", "--no-trunc", "--format", "{{json .}}", DOCKER_API_VERSION=version))
    assert (told["ID"], told["Repository"], told["Tag"]) == (ID, "localhost/small", "1")
    assert names(daemon, "--filter", "reference=localhost/*") == [SMALL]
    assert names(daemon, "--filter", "reference=other") == []
    assert names(daemon, "--filter", "dangling=true") == []
    if "--tree" in daemon.out("images", "--help"):  # docker 28
        assert SMALL in daemon.out("images", "--tree")


def test_an_oci_layout_loads_too(daemon: Daemon) -> None:
    daemon.docker("load", "-i", str(DATA / "small-oci.tar"))
    assert daemon.out("images", "-q", "--no-trunc") == ID


def test_bad_archives_are_refused(daemon: Daemon) -> None:
    for data in (b"", b"nonsense" * 1000, (DATA / "small-docker.tar").read_bytes()[:20_000], tree(a="b")):
        done = daemon.docker("load", check=False, input=data)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
    assert names(daemon) == []


def test_inspect_and_history(loaded: Daemon) -> None:
    (told,) = loaded.json("image", "inspect", SMALL)
    with tarfile.open(DATA / "small-docker.tar") as tar:
        config = json.load(tar.extractfile(ID[7:] + ".json"))  # type: ignore[arg-type]
    assert told["Id"] == ID
    assert told["RootFS"] == {"Type": "layers", "Layers": config["rootfs"]["diff_ids"]}
    assert told["Created"] == config["created"]
    assert told["GraphDriver"]["Name"] == loaded.json("info", "--format", "{{json .Driver}}")
    rows = [
        json.loads(line) for line in loaded.out("history", "--no-trunc", "--format", "{{json .}}", SMALL).splitlines()
    ]
    assert len(rows) == len(config["history"])
    assert rows[0]["ID"] == ID
    for name in (ID, ID[7:], ID[7:19], "localhost/small:1"):
        assert loaded.out("image", "inspect", "-f", "{{.Id}}", name) == ID
    missing = loaded.docker("image", "inspect", "nothing", check=False)
    assert "No such image: nothing" in missing.stderr


def test_save_gives_back_what_was_loaded(loaded: Daemon, space: Path) -> None:
    """Layer for layer the same bytes, with all names asked for."""
    loaded.docker("tag", SMALL, "again:2")
    loaded.docker("save", "-o", str(space / "out.tar"), SMALL, "again:2")
    with tarfile.open(space / "out.tar") as out, tarfile.open(DATA / "small-docker.tar") as source:
        (entry,) = json.load(out.extractfile("manifest.json"))  # type: ignore[arg-type]
        (before,) = json.load(source.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert entry["RepoTags"] == [SMALL, "again:2"]

        def digests(tar: tarfile.TarFile, layers: list[str]) -> list[str]:
            return [hashlib.sha256(tar.extractfile(name).read()).hexdigest() for name in layers]  # type: ignore[union-attr]

        assert digests(out, entry["Layers"]) == digests(source, before["Layers"])
    loaded.docker("rmi", SMALL, "again:2")
    assert names(loaded) == []
    loaded.docker("load", "-i", str(space / "out.tar"))
    assert sorted(names(loaded)) == ["again:2", SMALL]


def test_tags_and_removal(loaded: Daemon) -> None:
    loaded.docker("tag", SMALL, "app")
    loaded.docker("tag", "app", "docker.io/library/app:v2")
    assert sorted(names(loaded)) == ["app:latest", "app:v2", SMALL]
    assert loaded.out("rmi", "app:v2") == "Untagged: app:v2"
    refused = loaded.docker("rmi", ID, check=False)
    assert "referenced in multiple repositories" in refused.stderr
    assert "must be lowercase" in loaded.docker("tag", SMALL, "Upper", check=False).stderr
    told = loaded.out("rmi", "-f", ID).splitlines()
    assert f"Deleted: {ID}" in told
    assert sum(line.startswith("Deleted: ") for line in told) == 3  # the image and its two layers
    with_store = subprocess.run(
        [sys.executable, "-m", "cowfs", "ls", "--json", "--root", str(loaded.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert with_store.stdout.strip() == "[]"


def test_a_name_that_moves_on_leaves_a_dangling_image(loaded: Daemon) -> None:
    loaded.docker("tag", SMALL, "app:1")
    loaded.docker("rmi", SMALL)
    loaded.docker("import", "-", "app:1", input=tree(hello="hi"))
    assert names(loaded) == ["app:1", "<none>:<none>"]
    assert loaded.out("images", "-q", "--no-trunc", "--filter", "dangling=true") == ID
    told = loaded.out("image", "prune", "-f")
    assert f"deleted: {ID}" in told
    assert "Total reclaimed space: 0B" not in told
    assert names(loaded) == ["app:1"]


def test_import_with_changes(daemon: Daemon) -> None:
    id = daemon.out(
        "import", "-c", 'CMD ["/hello"]', "-c", "ENV a=b c='d e'", "-c", "WORKDIR /w", "-c", "LABEL x=y", "-m", "why", "-", "tree:1",
        input=tree(hello="hi"),
    )  # fmt: skip
    (told,) = daemon.json("image", "inspect", "tree:1")
    assert told["Id"] == id
    config = told["Config"]
    assert (config["Cmd"], config["Env"], config["WorkingDir"], config["Labels"]) == (
        ["/hello"], ["a=b", "c=d e"], "/w", {"x": "y"},
    )  # fmt: skip
    assert told["Comment"] == "why"
    assert names(daemon, "--filter", "label=x=y") == ["tree:1"]
    assert names(daemon, "--filter", "label=x=z") == []
    bad = daemon.docker("import", "-c", "RUN ls", "-", "tree:2", input=tree(a="b"), check=False)
    assert "run is not a valid change command" in bad.stderr


def test_system_df_adds_up(loaded: Daemon) -> None:
    """An image that shares a layer with another counts it once; what no container uses can be had back."""
    loaded.docker("import", "-", "tree:1", input=tree(hello="x" * 50_000))
    rows = {
        row["Type"]: row for row in map(json.loads, loaded.out("system", "df", "--format", "{{json .}}").splitlines())
    }
    images = loaded.request("GET", "/system/df")[1]["Images"]
    assert rows["Images"]["TotalCount"] == "2"
    assert rows["Images"]["Active"] == "0"
    assert rows["Images"]["Reclaimable"].endswith("(100%)")
    loaded.docker("tag", SMALL, "other:1")
    again = loaded.request("GET", "/system/df")[1]
    assert again["LayersSize"] == sum(each["Size"] for each in images)
    assert "Images space usage" in loaded.out("system", "df", "-v")
    assert "localhost/small" in loaded.out("system", "df", "-v")


def test_the_seeds_events_beside_a_load(daemon: Daemon) -> None:
    """``docker events --filter 'type=image'`` in one terminal, ``docker load`` in another."""
    process = subprocess.Popen(
        ["docker", "-H", f"unix://{daemon.socket}", "events", "--filter", "type=image", "--format", "{{json .}}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: daemon.request("GET", "/info")[1]["NEventsListener"] == 1, "the follower")
        daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(2)]
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert [(each["Type"], each["Action"], each["id"]) for each in told] == [
        ("image", "tag", ID),
        ("image", "load", ID),
    ]
    assert told[1]["Actor"]["Attributes"]["name"] == SMALL


def test_events_since_until_and_filters(loaded: Daemon) -> None:
    before = time.time()
    subprocess.run(
        [sys.executable, "-m", "cowfs", "prepare", "work", "--root", str(loaded.root)], check=True, capture_output=True
    )
    loaded.docker("tag", SMALL, "app:1")

    def told(*arguments: str) -> list[str]:
        lines = loaded.out("events", "--until", f"{time.time():.6f}", "--format", "{{.Type}} {{.Action}}", *arguments)
        return lines.splitlines()

    assert told("--since", f"{before:.6f}") == ["snapshot prepare", "image tag"]
    assert told("--since", f"{before:.6f}", "--filter", "type=snapshot") == ["snapshot prepare"]
    assert told("--since", "0.000001", "--filter", "event=load") == ["image load"]
    assert told("--since", "0.000001", "--filter", "image=app") == ["image tag"]
    assert loaded.request("GET", '/events?until=1&filters={"nonsense":["x"]}')[0] == 400


def test_docker_py(loaded: Daemon) -> None:
    docker = pytest.importorskip("docker")
    client = docker.DockerClient(base_url=f"unix://{loaded.socket}")
    try:
        image = client.images.get(SMALL)
        assert image.id == ID
        assert image.tag("py", "1")
        assert [each.tags for each in client.images.list()] == [["localhost/small:1", "py:1"]]
        data = b"".join(client.images.get("py:1").save(named=True))
        client.images.remove("py:1")
        (again,) = client.images.load(data)
        assert again.id == ID
        assert image.history()[0]["Id"] == ID
        assert client.df()["LayersSize"] > 0
        with pytest.raises(docker.errors.ImageNotFound):
            client.images.get("nothing")
    finally:
        client.close()


def test_images_of_the_command_are_those_of_the_daemon(daemon: Daemon) -> None:
    """``cowfs import`` and ``docker images`` see the same; and a tree without configuration is an image, too."""

    def cowfs(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "cowfs", *arguments, "--root", str(daemon.root)], check=True, capture_output=True
        )

    cowfs("import", str(DATA / "small-docker.tar"))
    assert daemon.out("images", "-q", "--no-trunc") == ID
    cowfs("prepare", "work")
    cowfs("commit", "work", "base")
    cowfs("tag", "plain", "base")
    assert sorted(names(daemon)) == [SMALL, "plain:latest"]
    assert daemon.out("image", "inspect", "-f", "{{len .RootFS.Layers}}", "plain") == "1"
    daemon.docker("rmi", "plain")
    assert names(daemon) == [SMALL]


def test_two_loads_of_one_image_at_once(daemon: Daemon) -> None:
    processes = [
        subprocess.Popen(["docker", "-H", f"unix://{daemon.socket}", "load", "-q", "-i", str(DATA / "small-docker.tar")], stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]  # fmt: skip
    assert [each.wait() for each in processes] == [0] * 4
    assert names(daemon) == [SMALL]


def test_sizes_follow_every_change_of_the_store(engine: Daemon) -> None:
    """Cached results of the index are never older than the last commit of any process; deep chains are counted once."""
    for number in range(3):
        engine.docker(
            "run",
            "--name",
            "mk",
            "bb" if not number else f"step:{number - 1}",
            "sh",
            "-c",
            f"head -c 100000 /dev/zero > /f{number}",
        )
        engine.docker("commit", "mk", f"step:{number}")
        engine.docker("rm", "mk")
    engine.cowfs("tag", "by:command", "step:1")
    found = {name: each for each in engine.request("GET", "/system/df")[1]["Images"] for name in each["RepoTags"]}
    base, one, two = found["bb:latest"], found["step:1"], found["step:2"]
    assert "by:command" in one["RepoTags"]
    assert base["SharedSize"] == base["Size"] and one["SharedSize"] == one["Size"]  # another image stands on all of it
    assert two["Size"] - two["SharedSize"] == two["Size"] - one["Size"] > 100_000
    assert engine.request("GET", "/system/df")[1]["LayersSize"] == two["Size"]
    engine.cowfs("rm", "step:2")
    assert "step:2" not in engine.out("images", "--format", "{{.Repository}}:{{.Tag}}")
