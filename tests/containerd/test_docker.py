"""Current dockerd (29), which keeps images and containers in containerd, on the snapshotter.

It is in no distribution yet; where ``COWFS_CONTAINERD_BIN`` (test_real.py) has it, it is tested, with a runc of 1.2 or later. ``.ci/engines`` builds both.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.archives import directory, member, tar
from support.containerd import BIN, Containerd, Snapshotter, check, image_of_busybox, needs_containerd
from support.daemon import wait_for
from support.dockerd import CurrentDockerd

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"),
    pytest.mark.skipif(
        not BIN or not os.path.exists(f"{BIN}/dockerd") or shutil.which("docker") is None,
        reason="COWFS_CONTAINERD_BIN has no dockerd 29 (see this module), or there is no docker command",
    ),
]


@pytest.fixture
def make_docker(make_snapshotter: Callable[..., Snapshotter], scratch: Path) -> Iterator[Callable[..., CurrentDockerd]]:
    """A function that makes dockerd on containerd on a snapshotter with options, with the image bb:1."""
    needs_containerd()
    made: list[CurrentDockerd] = []

    def make(*options: str) -> CurrentDockerd:
        snapshotter = make_snapshotter("-s", "overlay", *options).start()
        engine = Containerd(scratch / f"k{len(made)}", snapshotter).start()
        docker = CurrentDockerd(scratch / f"m{len(made)}", engine)
        made.append(docker)
        docker.start()
        more = tar(directory("data"), member("data/.wh.file"), member("data/second", b"of the second layer\n"))
        archive = snapshotter.base / "image.tar"
        archive.write_bytes(image_of_busybox(more))
        docker.docker("load", "-i", archive)
        return docker

    yield make
    for docker in made:
        docker.clean_up()
        docker.engine.clean_up()


def nothing_left(docker: CurrentDockerd) -> None:
    """No container and no image: no layer, no mount; the store is whole."""
    for name in docker.out("ps", "-aq").split():
        docker.docker("rm", "-f", name)
    docker.docker("image", "prune", "-af")
    snapshotter = docker.engine.snapshotter
    wait_for(lambda: snapshotter.names() == [], "the snapshots to go")
    wait_for(lambda: os.listdir(snapshotter.root / "layers") == [], "their files to go")
    wait_for(lambda: os.listdir(snapshotter.run_dir / "held") == [], "held mounts to go")
    with open("/proc/self/mounts", encoding="utf-8") as file:
        assert not [line for line in file if str(snapshotter.base) in line]
    docker.stop()
    docker.engine.stop()
    assert snapshotter.stop() == 0
    assert check(snapshotter.root) == []


@pytest.mark.parametrize("options", [(), ("--storage-opt", "size=64M")])
def test_a_container_and_an_image_of_it(
    make_docker: Callable[..., CurrentDockerd], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """load, run, exec, diff, cp, commit of a running container, save, rm; with a default limit, too."""
    docker = make_docker(*options)
    assert "cowfs" in docker.out("info", "-f", "{{.Driver}}")
    assert docker.run("bb:1", "sh", "-c", "cat /data/second; ls /data").stdout == "of the second layer\nsecond\n"
    docker.docker("run", "-d", "--name", "one", "--network=none", "bb:1", "sleep", "1000")
    docker.docker("exec", "one", "sh", "-c", "echo new > /data/new; rm /data/second; echo x >> /etc/passwd")
    assert {"A /data/new", "D /data/second", "C /etc/passwd"} <= set(docker.out("diff", "one").splitlines())
    (tmp_path / "in").write_text("from outside\n")
    docker.docker("cp", tmp_path / "in", "one:/data/in")
    docker.docker("cp", "one:/data", tmp_path / "out")
    assert (tmp_path / "out" / "in").read_text() == "from outside\n"
    docker.docker("commit", "one", "two:1")
    out = docker.run("two:1", "sh", "-c", "cat /data/new /data/in; ls /data; tail -1 /etc/passwd").stdout
    assert out == "new\nfrom outside\nin\nnew\nx\n"
    docker.docker("save", "-o", tmp_path / "two.tar", "two:1")
    docker.docker("rm", "-f", "one")
    docker.docker("image", "rm", "two:1")
    docker.docker("load", "-i", tmp_path / "two.tar")
    assert docker.run("two:1", "cat", "/data/new").stdout == "new\n"
    with tarfile.open(tmp_path / "two.tar") as archive:
        found = archive.extractfile("manifest.json")
        assert found is not None
        assert len(json.load(found)[0]["Layers"]) == 3
    nothing_left(docker)


def test_a_default_limit_holds(make_docker: Callable[..., CurrentDockerd]) -> None:
    docker = make_docker("--storage-opt", "size=2M")
    done = docker.run("bb:1", "sh", "-c", "df -k / | tail -1; dd if=/dev/zero of=/f bs=64k; rm /f; echo room")
    assert "No space left on device" in done.stderr
    assert done.stdout.split()[1] == "2048"
    assert done.stdout.splitlines()[-1] == "room"
    nothing_left(docker)


def test_all_are_killed_under_a_running_container(make_docker: Callable[..., CurrentDockerd]) -> None:
    docker = make_docker("--storage-opt", "size=8M")
    docker.docker("run", "-d", "--name", "one", "--network=none", "bb:1", "sleep", "1000")
    docker.docker("exec", "one", "sh", "-c", "echo kept > /kept")
    for each in (docker, docker.engine, docker.engine.snapshotter):
        each.stop(signal.SIGKILL)
    docker.engine.snapshotter.start()
    docker.engine.start()
    docker.start()
    docker.docker("start", "one")
    assert docker.out("exec", "one", "cat", "/kept") == "kept"
    nothing_left(docker)
