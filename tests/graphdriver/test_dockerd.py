"""Real dockerd (Debian's 20.10) on the graph driver plugin: images, containers, limits, kills; nothing is left, and the store is whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.containerd import check
from support.daemon import Daemon, wait_for
from support.dockerd import Dockerd, ask

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")


def mounts_of(engine: Dockerd) -> list[str]:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        return [line for line in file if f" {engine.home}/" in line]


def layers_of(plugin: Daemon) -> list[str]:
    return os.listdir(plugin.root / "layers")


def nothing_left(engine: Dockerd) -> None:
    """No container and no image: no layer, no mount, no file of one; the store is whole."""
    for name in engine.out("ps", "-aq").split():
        engine.docker("rm", "-f", name)
    engine.docker("image", "prune", "-af")
    wait_for(lambda: layers_of(engine.plugin) == [], f"the layers to go: {layers_of(engine.plugin)}")
    assert not mounts_of(engine)
    assert os.listdir(engine.home) == []
    engine.stop()
    assert engine.plugin.stop() == 0
    assert check(engine.plugin.root) == []


def test_load_run_exec_and_remove(engine: Dockerd) -> None:
    out = engine.run(
        "bb:1",
        "sh",
        "-c",
        "cat /data/second; ls /data; echo new > /data/new; cat /data/new; rm /etc/group; ls /etc/g*",
        check=False,
    )
    assert out.stdout == "of the second layer\nsecond\nnew\n"
    engine.docker("run", "-d", "--name", "one", "--network=none", "bb:1", "sleep", "1000")
    engine.docker("exec", "one", "sh", "-c", "echo from exec > /data/exec")
    assert engine.out("exec", "one", "cat", "/data/exec") == "from exec"
    assert (
        engine.out("inspect", "-f", "{{.GraphDriver.Name}} {{.GraphDriver.Data.Store}}", "one")
        == f"cowfs {engine.plugin.root}"
    )
    assert "Driver: overlay" in engine.out("info")
    engine.docker("restart", "-t", "0", "one")
    assert engine.out("exec", "one", "cat", "/data/exec") == "from exec", "a restart keeps what was written"
    engine.docker("rm", "-f", "one")
    nothing_left(engine)


def test_the_kernel_mounts_what_has_no_limit(engine: Dockerd) -> None:
    kind = "grep ' / ' /proc/mounts"
    assert engine.run("bb:1", "sh", "-c", kind).stdout.split()[2] == "overlay"
    assert engine.run("--storage-opt", "size=1G", "bb:1", "sh", "-c", kind).stdout.split()[2] == "fuse.cowfs"
    nothing_left(engine)


@pytest.mark.parametrize("limit", ["", "64M"])
def test_diff_and_commit_of_a_running_container(engine: Dockerd, limit: str) -> None:
    options = ["--storage-opt", f"size={limit}"] if limit else []
    engine.docker("run", "-d", "--name", "one", "--network=none", *options, "bb:1", "sleep", "1000")
    engine.docker(
        "exec",
        "one",
        "sh",
        "-c",
        "echo new > /data/new; rm /data/second; echo x >> /etc/passwd; mkdir /d; ln -s a /d/l",
    )
    changes = "C /data\nA /data/new\nD /data/second\nC /etc\nC /etc/passwd\nA /d\nA /d/l"
    assert sorted(engine.out("diff", "one").splitlines()) == sorted(changes.splitlines())
    engine.docker("commit", "-c", "ENV A=b", "one", "two:1")
    told = json.loads(engine.out("inspect", "two:1"))[0]
    assert len(told["RootFS"]["Layers"]) == 3
    out = engine.run("two:1", "sh", "-c", "echo $A; cat /data/new; ls /data; tail -1 /etc/passwd; readlink /d/l").stdout
    assert out == "b\nnew\nfile\nnew\nx\na\n".replace("file\n", "")
    size = engine.out("ps", "-as", "--format", "{{.Size}}")
    assert size.startswith(("2", "1")) and "kB" in size, f"a few blocks, not {size}"
    nothing_left(engine)


def test_copying_in_and_out(engine: Dockerd, tmp_path: Path) -> None:
    """Of a running container and of one that does not run: it is mounted meanwhile, and not afterwards."""
    (tmp_path / "in").write_text("from outside\n")
    engine.docker("create", "--name", "still", "--network=none", "bb:1", "cat", "/data/in")
    engine.docker("run", "-d", "--name", "runs", "--network=none", "--storage-opt", "size=8M", "bb:1", "sleep", "1000")
    for name in ("still", "runs"):
        engine.docker("cp", tmp_path / "in", f"{name}:/data/in")
        engine.docker("cp", f"{name}:/data", tmp_path / name)
        assert (tmp_path / name / "in").read_text() == "from outside\n"
        assert (tmp_path / name / "second").read_text() == "of the second layer\n"
    assert len(mounts_of(engine)) == 1, "the one that runs"
    assert engine.out("exec", "runs", "cat", "/data/in") == "from outside"
    assert engine.out("start", "-a", "still") == "from outside"
    nothing_left(engine)


def test_saved_layers_are_those_that_were_loaded(engine: Dockerd, image: Path, tmp_path: Path) -> None:
    """dockerd keeps no headers: the plugin gives each layer's archive back, byte for byte."""
    engine.docker("save", "-o", tmp_path / "saved.tar", "bb:1")

    def layers(path: Path) -> list[bytes]:
        with tarfile.open(path) as archive:
            found = archive.extractfile("manifest.json")
            assert found is not None
            names = json.load(found)[0]["Layers"]
            opened = [archive.extractfile(name) for name in names]
            return [each.read() for each in opened if each is not None]

    assert layers(tmp_path / "saved.tar") == layers(image)
    assert not list((engine.base / "data/image/cowfs/layerdb").rglob("tar-split*"))
    engine.docker("run", "--name", "one", "--network=none", "bb:1", "sh", "-c", "echo more > /more")
    engine.docker("commit", "one", "more:1")
    engine.docker("save", "-o", tmp_path / "more.tar", "more:1")
    engine.docker("rm", "one")
    engine.docker("image", "rm", "more:1", "bb:1")
    engine.docker("load", "-i", tmp_path / "more.tar")
    assert engine.run("more:1", "cat", "/more").stdout == "more\n"
    engine.docker("create", "--name", "out", "more:1")
    engine.docker("export", "-o", tmp_path / "export.tar", "out")
    with tarfile.open(tmp_path / "export.tar") as archive:
        assert {"bin/busybox", "data/second", "more"} <= set(archive.getnames())
    nothing_left(engine)


def test_a_build_of_several_steps(engine: Dockerd, tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "hello").write_text("hello\n")
    (tmp_path / "context" / "Dockerfile").write_text(
        "FROM bb:1\nCOPY hello /data/hello\nRUN cat /data/hello > /data/again && rm /data/second\n"
        "RUN mkdir /made && chmod 1777 /made && mv /data/again /made/moved\nCMD cat /made/moved\n"
    )
    engine.docker("build", "--network=none", "-t", "built:1", tmp_path / "context")
    assert engine.run("built:1").stdout == "hello\n"
    assert engine.run("built:1", "ls", "/data").stdout == "hello\n"
    nothing_left(engine)


FILL = "df -k / | tail -1; dd if=/dev/zero of=/f bs=64k; rm /f; echo room > /g; cat /g"


def test_limits_hold(engine: Dockerd) -> None:
    done = engine.run("--storage-opt", "size=2M", "bb:1", "sh", "-c", FILL)
    assert "No space left on device" in done.stderr
    assert done.stdout.split()[1] == "2048"
    assert done.stdout.splitlines()[-1] == "room"
    count = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do touch /data/$i || exit 7; done"
    done = engine.run("--storage-opt", "inodes=10", "bb:1", "sh", "-c", count, check=False)
    assert done.returncode == 7
    assert "No space left on device" in done.stderr
    for option, words in (("size=no", "not a size: 'no'"), ("colour=red", "no storage option 'colour'")):
        done = engine.run("--storage-opt", option, "bb:1", "true", check=False)
        assert done.returncode == 125
        assert words in done.stderr
    nothing_left(engine)


def test_a_default_limit_of_dockerd(make_dockerd: Callable[..., Dockerd], image: Path) -> None:
    engine = make_dockerd("--storage-opt", "size=3M").start()
    engine.docker("load", "-i", image)
    done = engine.run("bb:1", "sh", "-c", FILL)
    assert "No space left on device" in done.stderr
    assert done.stdout.split()[1] == "3072"
    assert engine.run("--storage-opt", "size=4M", "bb:1", "sh", "-c", "df -k / | tail -1").stdout.split()[1] == "4096"
    assert "Default size: 3M" in engine.out("info")
    engine.plugin.stop(signal.SIGKILL)
    engine.plugin.start()
    assert "No space left on device" in engine.run("bb:1", "sh", "-c", FILL).stderr, (
        "a service that was killed knows it"
    )
    nothing_left(engine)


def test_the_service_is_killed_under_a_running_container(engine: Dockerd) -> None:
    loop = "while true; do echo x >> /x; sleep 0.05; done"
    engine.docker("run", "-d", "--name", "one", "--network=none", "--storage-opt", "size=2M", "bb:1", "sh", "-c", loop)
    engine.plugin.stop(signal.SIGKILL)
    (mount,) = mounts_of(engine)
    written = Path(mount.split()[1], "x")
    wait_for(written.exists, "the container to write")
    size = written.stat().st_size
    wait_for(lambda: written.stat().st_size > size, "the container, which does not need the service")
    engine.plugin.start()
    assert "A /x" in engine.out("diff", "one").splitlines()
    assert len(mounts_of(engine)) == 1
    engine.docker("stop", "-t", "0", "one")
    assert not mounts_of(engine), "the Get of a service that was killed is counted"
    nothing_left(engine)


@pytest.mark.parametrize("live", [False, True])
def test_dockerd_is_killed_under_a_running_container(
    make_dockerd: Callable[..., Dockerd], image: Path, live: bool
) -> None:
    engine = make_dockerd(*(["--live-restore"] if live else [])).start()
    engine.docker("load", "-i", image)
    engine.docker("run", "-d", "--name", "one", "--network=none", "--storage-opt", "size=2M", "bb:1", "sleep", "1000")
    engine.docker("exec", "one", "sh", "-c", "echo kept > /kept")
    engine.stop(signal.SIGKILL)
    engine.plugin.stop(signal.SIGKILL)
    engine.plugin.start()
    engine.start()
    if live:
        assert engine.out("exec", "one", "cat", "/kept") == "kept"
        engine.docker("stop", "-t", "0", "one")
    assert not mounts_of(engine)
    engine.docker("start", "one")
    assert engine.out("exec", "one", "cat", "/kept") == "kept"
    engine.docker("stop", "-t", "0", "one")
    assert not mounts_of(engine)
    nothing_left(engine)


def test_layers_that_dockerd_lost_are_removed_at_its_start(engine: Dockerd) -> None:
    """Of this dockerd alone, and never while its records cannot be read."""
    keep = len(layers_of(engine.plugin))
    engine.stop()
    ask("GraphDriver.Create", ID="lost")
    ask("GraphDriver.CreateReadWrite", ID="upon", Parent="lost")
    home = str(engine.home)
    ask("GraphDriver.Init", Home=str(engine.base / "other"))
    assert ask("GraphDriver.Create", ID="others")["Err"] == ""
    records = engine.base / "data/image/cowfs/layerdb/sha256"
    (one, *_) = records.iterdir()
    os.rename(one / "cache-id", engine.base / "cache-id")
    ask("GraphDriver.Init", Home=home)
    assert ask("GraphDriver.Exists", ID="lost")["Exists"], "a record is missing: nothing is removed"
    os.rename(engine.base / "cache-id", one / "cache-id")
    engine.start()
    wait_for(lambda: len(layers_of(engine.plugin)) == keep + 1, "the lost ones to go")
    assert ask("GraphDriver.Exists", ID="others")["Exists"]
    ask("GraphDriver.Remove", ID="others")
    assert engine.run("bb:1", "cat", "/data/second").stdout == "of the second layer\n"
    nothing_left(engine)


def test_the_service_is_killed_while_containers_come_and_go(engine: Dockerd, image: Path, tmp_path: Path) -> None:
    """Each command succeeds or fails with a word of dockerd's; after dockerd's restart nothing of what failed is left."""
    rng = random.Random(20261128)
    ending = threading.Event()

    def killer() -> None:
        while not ending.wait(rng.uniform(0.3, 1.5)):
            engine.plugin.stop(signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 0.3))
            engine.plugin.start()

    thread = threading.Thread(target=killer)
    thread.start()
    succeeded = 0
    try:
        for number in range(25):
            options = ["--storage-opt", "size=8M"] if number % 2 else []
            done = engine.run(*options, "bb:1", "sh", "-c", "echo x > /data/n; cat /data/n", check=False)
            succeeded += done.stdout == "x\n"
            if number % 5 == 4:
                engine.docker(
                    "commit",
                    engine.docker("create", "bb:1", check=False).stdout.strip() or "no",
                    f"new:{number}",
                    check=False,
                )
    finally:
        ending.set()
        thread.join()
    assert succeeded, "some of 25 got through"
    engine.stop(signal.SIGKILL)
    engine.start()
    assert engine.run("bb:1", "echo", "well").stdout == "well\n"
    nothing_left(engine)


def test_mapped_users(make_dockerd: Callable[..., Dockerd], image: Path, tmp_path: Path) -> None:
    """dockerd --userns-remap: files belong to the container's users inside, and in the store, whatever they are outside."""
    ids = tmp_path / "ids"
    ids.write_text("nobody:100000:65536\nnogroup:100000:65536\n")
    for file in ("/etc/subuid", "/etc/subgid"):
        if not os.path.exists(file):
            pytest.skip(f"no {file} here, over which the test's own can be mounted")
        subprocess.run(["mount", "--bind", ids, file], check=True)
    try:
        engine = make_dockerd("--userns-remap=nobody:nogroup").start()
    finally:
        for file in ("/etc/subuid", "/etc/subgid"):
            subprocess.run(["umount", file], check=True)
    engine.docker("load", "-i", image)
    words = "stat -c %u:%g /bin/busybox; echo x > /x; chown 5:6 /x; stat -c %u:%g /x; sleep 1000"
    engine.docker("run", "-d", "--name", "one", "--network=none", "bb:1", "sh", "-c", words)
    wait_for(lambda: engine.out("logs", "one").splitlines() == ["0:0", "5:6"], "the container's own ids")
    (mount,) = mounts_of(engine)
    outside = os.stat(Path(mount.split()[1], "x"))
    assert (outside.st_uid, outside.st_gid) == (100005, 100006)
    engine.docker("commit", "one", "two:1")
    engine.docker("save", "-o", tmp_path / "two.tar", "two:1")
    with tarfile.open(tmp_path / "two.tar") as image_archive:
        manifest = image_archive.extractfile("manifest.json")
        assert manifest is not None
        with tarfile.open(fileobj=image_archive.extractfile(json.load(manifest)[0]["Layers"][-1])) as layer:
            member = layer.getmember("x")
            assert (member.uid, member.gid) == (5, 6)
    engine.docker("rm", "-f", "one")
    assert engine.run("two:1", "stat", "-c", "%u:%g", "/x").stdout == "5:6\n"
    nothing_left(engine)
