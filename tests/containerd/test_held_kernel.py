"""Snapshots that no record of the kernel can express, and that need no server of ours: the service holds a mount of the kernel's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.archives import directory, member, tar
from support.containerd import (
    IMAGE,
    LIMIT,
    Containerd,
    Snapshotter,
    check,
    environment,
    image_of_busybox,
    layer,
    mounted,
    needs_containerd,
    nothing_left,
    text,
    unmount_below,
)
from support.daemon import wait_for

from cowfs.mounting import client
from cowfs.store import Store, kernel_image
from cowfs.sys.mounts import mountinfo

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

TOP = "default/9/sha256:" + "0" * 64
"""A committed snapshot named as containerd names the chains of images' layers."""


@pytest.fixture
def snapshotter(make_snapshotter: Callable[..., Snapshotter]) -> Iterator[Snapshotter]:
    """A running snapshotter with the driver overlay; its store is whole afterwards, and nothing is held."""
    made = make_snapshotter("-s", "overlay").start()
    yield made
    unmount_below(made.base / "m")
    for name in reversed(made.names()):
        made.call("Remove", key=name)
    wait_for(lambda: not [each for each in os.listdir(made.root) if each.startswith("rm-")], "the files to go")
    assert os.listdir(made.run_dir / "held") == []
    assert made.stop() == 0
    assert check(made.root) == []


def lowers(place: str) -> int | None:
    """The number of lower layers of the kernel's overlayfs there, data-only ones left out; None for another mount."""
    found = [entry for entry in mountinfo() if os.fsdecode(entry.target) == place]
    if not found or found[-1].fstype != "overlay":
        return None
    return found[-1].super_options.count(b"lowerdir+=")


def chain(snapshotter: Snapshotter, top: str, depth: int = 90) -> None:
    """So many layers under a name: more than one page of options has room for."""
    parent = ""
    for number in range(depth):
        name = top if number == depth - 1 else f"l{number}"
        if number % 30 == 0 or number == depth - 1:
            layer(snapshotter, name, parent, text(f"d/f{number}", str(number)))
        else:
            snapshotter.call("Prepare", key=f"extract-{name}", parent=parent)
            snapshotter.call("Commit", key=f"extract-{name}", name=name)
        parent = name


def test_a_long_chain_is_a_bind_of_a_kernel_mount_over_one_image(snapshotter: Snapshotter) -> None:
    """Written in, committed, viewed, removed while mounted, as any other; the image is made once, for all that stand on the chain."""
    chain(snapshotter, TOP)
    for key in ("one", "two"):
        answer = snapshotter.call("Prepare", key=key, parent=TOP)
        (record,) = answer.mounts
        assert record.type == "bind"
        assert lowers(record.source) == 1
        with mounted(snapshotter, answer) as root:
            assert sorted(os.listdir(root / "d")) == ["f0", "f30", "f60", "f89"]
            text("d/f0", key, 0o600)(root)
            os.chmod(root / "d/f30", 0o640)
            os.rename(root / "d", root / "e")
    assert len(os.listdir(Path(snapshotter.root, kernel_image.FOLDER))) == 1
    snapshotter.call("Commit", key="one", name="made")
    with mounted(snapshotter, snapshotter.call("Prepare", key="upon", parent="made")) as root:
        assert (root / "e/f0").read_text() == "one"
        assert (root / "e/f30").read_text() == "30"
        assert (root / "e/f30").stat().st_mode & 0o777 == 0o640
        snapshotter.call("Remove", key="upon")
        assert (root / "e/f60").read_text() == "60"
    with mounted(snapshotter, snapshotter.call("View", key="look", parent="made")) as root:
        assert not (root / "d").exists()
        with pytest.raises(OSError, match="Read-only"):
            (root / "new").touch()


def test_what_is_made_for_one_container_costs_no_image(snapshotter: Snapshotter) -> None:
    """A parent that is no chain of an image's layers, or a layer that is being unpacked: the kernel mounts all layers."""
    chain(snapshotter, "of-one-container")
    (record,) = snapshotter.call("Prepare", key="one", parent="of-one-container").mounts
    assert lowers(record.source) == 90
    (record,) = snapshotter.call("Prepare", key="extract-more", parent="of-one-container").mounts
    assert lowers(record.source) == 90
    assert not os.path.exists(Path(snapshotter.root, kernel_image.FOLDER))


def test_a_layer_with_metacopies_needs_no_server(snapshotter: Snapshotter) -> None:
    """A record, which an engine may add redirect_dir=off to, could not show it."""
    layer(snapshotter, "base", "", text("d/f", "x"))
    snapshotter.call("Prepare", key="k", parent="base")
    with Store.open(snapshotter.root) as store:
        place = snapshotter.base / "m"
        place.mkdir(exist_ok=True)
        with store.mount("containerd: k", place, mount_type="kernel"):
            os.chmod(place / "d/f", 0o600)
            os.rename(place / "d", place / "e")
    snapshotter.call("Commit", key="k", name=TOP)
    (record,) = snapshotter.call("Prepare", key="one", parent=TOP).mounts
    assert record.type == "bind"
    assert lowers(record.source) == 1
    assert (Path(record.source) / "e/f").read_text() == "x"


def test_with_a_limit_our_server_holds_it(make_snapshotter: Callable[..., Snapshotter]) -> None:
    made = make_snapshotter("-s", "overlay", "--storage-opt", "size=1M").start()
    layer(made, TOP, "", text("f", "x"))
    (record,) = made.call("Prepare", key="one", parent=TOP).mounts
    assert lowers(record.source) is None
    assert client.attach(record.source).usage().bytes >= 0


def test_a_limit_that_comes_before_the_container_is_held_by_our_server(snapshotter: Snapshotter) -> None:
    """As Kubernetes' annotations do: Prepare was answered, nothing is bound yet. A container that runs keeps its mount."""
    chain(snapshotter, TOP)
    first = snapshotter.call("Prepare", key="one", parent=TOP)
    assert lowers(first.mounts[0].source) == 1
    info = {"name": "one", "labels": {LIMIT: "1048576"}}
    with mounted(snapshotter, first):
        assert snapshotter.code("Update", info=info) == "FAILED_PRECONDITION"
        assert lowers(first.mounts[0].source) == 1
    snapshotter.call("Update", info=info)
    with mounted(snapshotter, snapshotter.call("Mounts", key="one")) as root:
        assert sorted(os.listdir(root / "d")) == ["f0", "f30", "f60", "f89"]
        with (root / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(65536))


def test_of_the_driver_row_the_kernel_shows_views_and_our_server_redirects(
    tmp_path_factory: pytest.TempPathFactory, can_mount: None
) -> None:
    """Not on tmpfs, where an image that points into files is not mounted."""
    pytest.importorskip("grpc", reason="the extra cowfs-storage[containerd] is not installed")
    base = tmp_path_factory.mktemp("r")  # short: the address of a unix socket has 107 bytes
    made = Snapshotter(base, "-s", "row").start()
    try:
        layer(made, "base", "", text("f", "x" * 100_000))

        def patch(root: Path) -> None:
            with open(root / "f", "r+b") as file:
                file.write(b"patched")

        layer(made, TOP, "base", patch)
        answer = made.call("View", key="view", parent=TOP)
        assert lowers(answer.mounts[0].source) == 1
        with mounted(made, answer) as root:
            assert (root / "f").read_bytes() == b"patched" + b"x" * 99_993
        (record,) = made.call("Prepare", key="active", parent=TOP).mounts
        assert lowers(record.source) is None
        assert (Path(record.source) / "f").read_bytes() == b"patched" + b"x" * 99_993
    finally:
        made.clean_up()


def test_a_container_of_an_image_of_many_layers(containerd: Containerd, tmp_path: Path) -> None:
    """Real containerd: imported, run, looked into, its diff, the service killed beneath it; nothing is left."""
    needs_containerd()
    archive = tmp_path / "image.tar"
    more = [tar(directory("data"), member(f"data/{number}", b"%d\n" % number)) for number in range(80)]
    archive.write_bytes(image_of_busybox(*more))
    containerd.ctr("image", "import", "--snapshotter", "cowfs", archive)
    shown = containerd.run("one", "sh", "-c", "cat /data/0 /data/79; ls /data | wc -l; chmod 600 /data/3; echo new > /data/3; rm /data/4; cat /data/3")  # fmt: skip
    assert shown.stdout == "0\n79\n81\nnew\n"
    containerd.ctr("run", "-d", "--snapshotter", "cowfs", IMAGE, "two", "sleep", "1000")
    held = containerd.snapshotter.run_dir / "held"
    assert 1 in [lowers(str(place)) for place in held.iterdir()]
    containerd.ctr(
        "tasks", "exec", "--exec-id", "a", "two", "sh", "-c", "echo x > /data/x; rm /data/7; mv /data /moved"
    )
    containerd.snapshotter.stop(9)
    assert containerd.ctr("tasks", "exec", "--exec-id", "b", "two", "cat", "/moved/x").stdout == "x\n"
    containerd.snapshotter.start()
    wait_for(lambda: containerd.ctr("snapshots", "--snapshotter", "cowfs", "info", "two", check=False).returncode == 0, "the service")  # fmt: skip
    diff = tmp_path / "diff.tar"
    with diff.open("wb") as out:
        command = ["ctr", "-a", str(containerd.base / "c.sock"), "snapshots", "--snapshotter", "cowfs", "diff", "two"]
        subprocess.run(command, stdout=out, check=True, timeout=120, env=environment())
    listed = subprocess.run(["tar", "tf", diff], capture_output=True, text=True, check=True).stdout.split()
    assert {"moved/x", "moved/79", ".wh.data"} <= {name.removeprefix("./") for name in listed}
    assert not any(name.removeprefix("./") == "moved/7" for name in listed)
    containerd.ctr("tasks", "rm", "-f", "two")
    containerd.ctr("containers", "rm", "two")
    nothing_left(containerd, layers=81)
