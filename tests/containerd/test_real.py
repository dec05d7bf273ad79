"""Real containerd on the snapshotter: images, containers, limits, kills; nothing is left, and the store is whole.

Debian's 1.6, or what is in the directory ``COWFS_CONTAINERD_BIN``; ``.ci/engines`` builds 2.x.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import registry
from support.archives import directory, member, tar
from support.containerd import (
    IMAGE,
    LIMIT,
    Containerd,
    Snapshotter,
    collect,
    environment,
    image_of_busybox,
    lasting,
    needs_containerd,
    nothing_left,
)
from support.daemon import wait_for

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")


@pytest.fixture
def engine(containerd: Containerd, tmp_path: Path) -> Containerd:
    """containerd with the image of two layers; the second hides a file of the first."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(
        image_of_busybox(
            tar(directory("data"), member("data/.wh.file"), member("data/second", b"of the second layer\n"))
        )
    )
    containerd.ctr("image", "import", "--snapshotter", "cowfs", archive)
    return containerd


def keys(engine: Containerd, namespace: str = "default") -> list[str]:
    lines = engine.ctr("snapshots", "--snapshotter", "cowfs", "ls", namespace=namespace).stdout.splitlines()[1:]
    return [line.split()[0] for line in lines if line.strip()]


def again(engine: Containerd, *arguments: str) -> None:
    """A command that must succeed once containerd has found the service again, which it waits for in growing pauses."""
    wait_for(lambda: engine.ctr(*arguments, check=False).returncode == 0, " ".join(arguments))


def test_import_run_exec_and_remove(engine: Containerd) -> None:
    out = engine.run(
        "one", "sh", "-c", "cat /data/second; ls /data; echo written > /data/new; cat /data/new; rm /etc/group; ls /etc"
    )
    assert out.stdout == "of the second layer\nsecond\nwritten\npasswd\n"
    words = ["run", "-d", "--snapshotter", "cowfs", IMAGE, "two", "sleep", "1000"]
    engine.ctr(*words)
    engine.ctr("tasks", "exec", "--exec-id", "e", "two", "sh", "-c", "echo from exec > /data/exec")
    assert engine.ctr("tasks", "exec", "--exec-id", "f", "two", "cat", "/data/exec").stdout == "from exec\n"
    usage = engine.ctr("snapshots", "--snapshotter", "cowfs", "usage", "two").stdout
    assert "two" in usage
    engine.ctr("tasks", "kill", "-s", "9", "two")
    wait_for(lambda: "STOPPED" in engine.ctr("tasks", "ls").stdout, "the task to end")
    engine.ctr("tasks", "rm", "two", check=False)
    engine.ctr("containers", "rm", "two")
    nothing_left(engine)


def test_a_limit_by_label_holds_and_is_changed_while_the_container_runs(engine: Containerd) -> None:
    options = ["--snapshotter-label", f"{LIMIT}=2097152"]
    done = engine.run(
        "one",
        "sh",
        "-c",
        "dd if=/dev/zero of=/f bs=64k; df -k / | tail -1; rm /f; echo room > /g; cat /g",
        options=options,
    )
    assert "No space left on device" in done.stderr
    assert done.stdout.split()[1] == "2048"
    assert done.stdout.splitlines()[-1] == "room"
    engine.ctr("run", "-d", "--snapshotter", "cowfs", *options, IMAGE, "two", "sleep", "1000")
    full = engine.ctr("tasks", "exec", "--exec-id", "a", "two", "dd", "if=/dev/zero", "of=/f", "bs=64k", check=False)
    assert "No space left" in full.stderr
    engine.snapshotter.stop(signal.SIGKILL)
    still = engine.ctr("tasks", "exec", "--exec-id", "b", "two", "dd", "if=/dev/zero", "of=/f", "bs=64k", "count=8")
    assert still.returncode == 0, "the container does not need the service"
    engine.snapshotter.start()
    again(engine, "snapshots", "--snapshotter", "cowfs", "label", "two", f"{LIMIT}=4194304")
    more = engine.ctr("tasks", "exec", "--exec-id", "c", "two", "dd", "if=/dev/zero", "of=/f", "bs=64k", "count=48")
    assert more.returncode == 0
    engine.ctr("tasks", "rm", "-f", "two")
    engine.ctr("containers", "rm", "two")
    nothing_left(engine)


@pytest.mark.parametrize("limit", [None, "8388608"])
def test_the_diff_of_a_running_container_is_what_it_wrote(
    engine: Containerd, tmp_path: Path, limit: str | None
) -> None:
    options = ["--snapshotter-label", f"{LIMIT}={limit}"] if limit else []
    engine.ctr("run", "-d", "--snapshotter", "cowfs", *options, IMAGE, "one", "sleep", "1000")
    engine.ctr(
        "tasks",
        "exec",
        "--exec-id",
        "a",
        "one",
        "sh",
        "-c",
        "echo new > /data/new; rm /data/second; echo x >> /etc/passwd",
    )
    diff = tmp_path / "diff.tar"
    with diff.open("wb") as out:
        command = ["ctr", "-a", str(engine.base / "c.sock"), "snapshots", "--snapshotter", "cowfs", "diff", "one"]
        subprocess.run(command, stdout=out, check=True, timeout=120, env=environment())
    listed = subprocess.run(["tar", "tf", diff], capture_output=True, text=True, check=True).stdout.split()
    assert {"data/new", "data/.wh.second", "etc/passwd"} <= {name.removeprefix("./") for name in listed}
    assert not any("busybox" in name for name in listed)
    engine.ctr("tasks", "rm", "-f", "one")
    engine.ctr("containers", "rm", "one")
    engine.ctr("content", "ls")
    nothing_left(engine)


def test_a_snapshot_is_committed_and_a_container_runs_upon_it(engine: Containerd) -> None:
    engine.ctr("run", "-d", "--snapshotter", "cowfs", IMAGE, "one", "sleep", "1000")
    engine.ctr("tasks", "exec", "--exec-id", "a", "one", "sh", "-c", "echo kept > /data/kept")
    engine.ctr("tasks", "kill", "-s", "9", "one")
    wait_for(lambda: "STOPPED" in engine.ctr("tasks", "ls").stdout, "the task to end")
    engine.ctr("tasks", "rm", "one", check=False)
    engine.ctr("snapshots", "--snapshotter", "cowfs", "commit", "kept", "one")
    engine.ctr("snapshots", "--snapshotter", "cowfs", "prepare", "two", "kept")
    out = engine.ctr("snapshots", "--snapshotter", "cowfs", "mounts", "/nowhere", "two").stdout
    assert "lowerdir" in out
    assert out.count("/fs") >= 4, "three layers and the upper one"
    for key in ("two", "kept"):
        engine.ctr("snapshots", "--snapshotter", "cowfs", "rm", key)
    engine.ctr("containers", "rm", "one")
    nothing_left(engine)


def test_namespaces_are_apart(engine: Containerd, tmp_path: Path) -> None:
    engine.ctr("image", "import", "--snapshotter", "cowfs", tmp_path / "image.tar", namespace="other")
    assert engine.run("one", "cat", "/data/second", namespace="other").stdout == "of the second layer\n"
    assert keys(engine, "other") == keys(engine)
    engine.ctr("image", "rm", "--sync", IMAGE)
    assert keys(engine) == []
    assert engine.run("two", "cat", "/data/second", namespace="other").stdout == "of the second layer\n", (
        "the other's stays"
    )
    engine.ctr("image", "rm", "--sync", IMAGE, namespace="other")
    nothing_left(engine, 0)


@pytest.mark.parametrize("default", [[], ["--storage-opt", "size=1M"]])
def test_a_limit_by_annotation(
    make_snapshotter: Callable[..., Snapshotter], scratch: Path, tmp_path: Path, default: list[str]
) -> None:
    """As Kubernetes has it: containerd's record of the container has the annotation, the snapshot has no label."""
    needs_containerd()
    base = scratch / "annotated"
    address = f"--containerd-address=unix://{base}/c.sock"
    engine = Containerd(base, make_snapshotter("-s", "overlay", address, *default).start()).start()
    try:
        (tmp_path / "image.tar").write_bytes(image_of_busybox())
        engine.ctr("image", "import", "--snapshotter", "cowfs", tmp_path / "image.tar")
        options = ["--annotation", "cowfs.io/max-size=2M", "--annotation", "cowfs.io/max-inodes=50"]
        words = "df -k / | tail -1; dd if=/dev/zero of=/f bs=64k; rm /f; for i in $(seq 60); do touch /data/$i || exit 7; done"
        done = engine.run("one", "sh", "-c", words, options=options, check=False)
        assert done.stdout.split()[1] == "2048"
        assert done.stderr.count("No space left on device") == 2
        assert done.returncode == 7
        free = engine.run("two", "sh", "-c", "grep ' / ' /proc/mounts").stdout.split()[2]
        assert free == ("fuse.cowfs" if default else "overlay"), "another container has none, or the default"
        bad = engine.run("three", "true", options=["--annotation", "cowfs.io/max-size=much"], check=False)
        assert bad.returncode != 0
        assert "not a size: 'much'" in bad.stderr
        engine.ctr("containers", "rm", "three", check=False)
        nothing_left(engine, 1)
    finally:
        engine.clean_up()


def test_layers_are_pulled_and_unpacked_at_once(engine: Containerd, tmp_path: Path) -> None:
    """containerd 2.2 and later unpacks layers apart from each other and puts them upon each other at commit."""
    process, address = registry.start(tmp_path, "registry")
    try:
        name = f"{address}/bb:1"
        engine.ctr("images", "tag", IMAGE, name)
        engine.ctr("images", "push", "--plain-http", name)
        engine.ctr("images", "rm", "--sync", name, IMAGE)
        wait_for(lambda: collect(engine) and lasting(engine.snapshotter) == 0, "the layers to go")
        engine.ctr("images", "pull", "--plain-http", "--snapshotter", "cowfs", name)
    finally:
        process.terminate()
        process.wait()
    if engine.version() >= (2, 4):
        assert " is put upon default/" in engine.snapshotter.log
    words = ["run", "--rm", "--snapshotter", "cowfs", name, "one", "sh", "-c", "ls /data; cat /data/second"]
    assert engine.ctr(*words).stdout == "second\nof the second layer\n"
    nothing_left(engine)


def test_mapped_users(engine: Containerd) -> None:
    """The mount shows mapped owners; the layers keep the container's own (with 1.6, ctr makes a copy with other owners)."""
    options = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", "--remap-labels"]
    before = len(engine.snapshotter.names())
    words = "stat -c %u:%g /bin/busybox /data; touch /data/x; chown 5:6 /data/x; stat -c %u:%g /data/x; sleep 1000"
    command = ["run", "-d", "--snapshotter", "cowfs", *options, IMAGE, "one", "sh", "-c", words]
    engine.ctr(*command)
    numbers = itertools.count()

    def owners() -> list[str]:
        told = ["stat", "-c", "%u:%g", "/bin/busybox", "/data/x"]
        return engine.ctr("tasks", "exec", "--exec-id", f"e{next(numbers)}", "one", *told).stdout.splitlines()

    wait_for(lambda: owners() == ["0:0", "5:6"], "the container's own ids")
    if engine.has_capabilities():
        assert len(engine.snapshotter.names()) == before + 1, "no copy of the image with other owners"
        (mount,) = os.listdir(engine.snapshotter.run_dir / "held")
        outside = os.stat(engine.snapshotter.run_dir / "held" / mount / "data" / "x")
        assert (outside.st_uid, outside.st_gid) == (100005, 100006)
        inside = os.stat(engine.snapshotter.root / "layers" / mount / "fs" / "data" / "x")
        assert (inside.st_uid, inside.st_gid) == (5, 6)
    engine.ctr("tasks", "rm", "-f", "one")
    engine.ctr("containers", "rm", "one")
    for name in keys(engine):
        if "remap" in name or not name.startswith("sha256:"):
            engine.ctr("snapshots", "--snapshotter", "cowfs", "rm", name, check=False)
    engine.ctr("image", "rm", "--sync", IMAGE)
    nothing_left(engine, 0)


def test_containers_at_once(engine: Containerd) -> None:
    def life(number: int) -> str:
        options = ["--snapshotter-label", f"{LIMIT}=1048576"] if number % 2 else []
        return engine.run(f"c{number}", "sh", "-c", f"echo {number} > /data/n; cat /data/n", options=options).stdout

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(life, range(12))) == [f"{number}\n" for number in range(12)]
    nothing_left(engine)


def test_the_service_is_killed_while_containers_come_and_go(engine: Containerd) -> None:
    """Each command succeeds or fails with a word of containerd's; afterwards all is well."""
    rng = random.Random(20261128)
    ending = threading.Event()

    def killer() -> None:
        while not ending.wait(rng.uniform(0.5, 2.0)):
            engine.snapshotter.stop(signal.SIGKILL)
            engine.snapshotter.start()

    thread = threading.Thread(target=killer)
    thread.start()
    succeeded = 0
    try:
        for number in range(20):
            options = ["--snapshotter-label", f"{LIMIT}=1048576"] if number % 2 else []
            done = engine.run(f"c{number}", "sh", "-c", "echo x > /data/n; cat /data/n", options=options, check=False)
            succeeded += done.stdout == "x\n"
    finally:
        ending.set()
        thread.join()
    for number in range(20):
        name = f"c{number}"
        engine.ctr("tasks", "rm", "-f", name, check=False)
        engine.ctr("containers", "rm", name, check=False)
        engine.ctr("snapshots", "--snapshotter", "cowfs", "rm", name, check=False)
    wait_for(
        lambda: engine.run("last", "echo", "well", check=False).stdout == "well\n",
        "containerd to find the service again",
    )
    assert succeeded, "some of twenty got through"
    engine.stop(signal.SIGKILL)
    engine.start()
    assert engine.run("after", "echo", "well").stdout == "well\n"
    nothing_left(engine)


def test_both_are_restarted_under_a_running_container(engine: Containerd) -> None:
    engine.ctr(
        "run", "-d", "--snapshotter", "cowfs", "--snapshotter-label", f"{LIMIT}=2097152", IMAGE, "one", "sleep", "1000"
    )
    engine.ctr("tasks", "exec", "--exec-id", "a", "one", "sh", "-c", "echo before > /data/x")
    for restart in (engine, engine.snapshotter):
        restart.stop(signal.SIGKILL)
        restart.start()
    assert engine.ctr("tasks", "exec", "--exec-id", "b", "one", "cat", "/data/x").stdout == "before\n"
    full = engine.ctr("tasks", "exec", "--exec-id", "c", "one", "dd", "if=/dev/zero", "of=/f", "bs=64k", check=False)
    assert "No space left" in full.stderr
    engine.ctr("tasks", "rm", "-f", "one")
    engine.ctr("containers", "rm", "one")
    nothing_left(engine)
