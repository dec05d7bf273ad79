"""Many containers of real containerd, and 200 operations with kills of both: nothing leaks, and the store is whole."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.containerd import IMAGE, LIMIT, Containerd, image_of_busybox, nothing_left
from support.daemon import wait_for

pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"),
    pytest.mark.slow,
]

NAMESPACES = ("default", "second", "third")


@pytest.fixture
def engine(containerd: Containerd, tmp_path: Path) -> Containerd:
    """containerd with an image of one layer in three namespaces."""
    archive = tmp_path / "image.tar"
    archive.write_bytes(image_of_busybox())
    for namespace in NAMESPACES:
        containerd.ctr("image", "import", "--snapshotter", "cowfs", archive, namespace=namespace)
    return containerd


def _own_memory(pid: int) -> int:
    """KiB that only this process has (proc(5), smaps_rollup: Private_Dirty and Private_Clean)."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def _servers(below: Path) -> list[int]:
    """The processes that serve mounts below a directory."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                title = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"cowfs server") and os.fsencode(below) in title:
                found.append(int(name))
    return found


def test_fifty_containers_at_once(engine: Containerd) -> None:
    """In three namespaces, every second one with a limit, which holds; each server's own memory is a few megabytes."""
    names = [(f"c{number}", NAMESPACES[number % 3], number % 2) for number in range(50)]

    def begin(one: tuple[str, str, int]) -> None:
        name, namespace, limited = one
        options = ["--snapshotter-label", f"{LIMIT}=1048576"] if limited else []
        words = f"echo {name} > /data/n; sleep 1000"
        engine.ctr("run", "-d", "--snapshotter", "cowfs", *options, IMAGE, name, "sh", "-c", words, namespace=namespace)

    def look(one: tuple[str, str, int]) -> str:
        name, namespace, limited = one
        words = "until grep . /data/n 2>/dev/null; do sleep 0.1; done; dd if=/dev/zero of=/f bs=64k count=32 2>/dev/null || echo full"
        said: list[str] = []
        for attempt in range(3):  # on a busy machine ctr 1.6 may leave before it has copied the output
            done = engine.ctr("tasks", "exec", "--exec-id", f"e{attempt}", name, "sh", "-c", words, namespace=namespace)
            if said := done.stdout.split():
                break
        return f"{said} {limited}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, names))
        assert list(pool.map(look, names)) == [
            f"{[name, 'full'] if limited else [name]} {limited}" for name, _, limited in names
        ]
        servers = _servers(engine.snapshotter.run_dir / "held")
        assert len(servers) == 25, "only those with a limit have one"
        each = statistics.median(map(_own_memory, servers))
        assert each < 16 << 10, f"{each} KiB of its own"

        def end(one: tuple[str, str, int]) -> None:
            engine.ctr("tasks", "rm", "-f", one[0], namespace=one[1])
            engine.ctr("containers", "rm", one[0], namespace=one[1])

        list(pool.map(end, names))
    _remove_images(engine)
    nothing_left(engine, 0)


def _remove_images(engine: Containerd) -> None:
    for namespace in NAMESPACES:
        for name in engine.ctr("images", "ls", "-q", namespace=namespace).stdout.split():
            engine.ctr("images", "rm", "--sync", name, namespace=namespace)


def test_two_hundred_operations_with_kills_of_both(engine: Containerd, tmp_path: Path) -> None:
    """Seeded operations in three namespaces; every tenth on average is met by a SIGKILL of the service, or of containerd, which starts again."""
    rng = random.Random(20261128)
    kills = [0, 0]

    def kill(which: int, after: float) -> None:
        time.sleep(after)
        kills[which] += 1
        victim = engine if which else engine.snapshotter
        victim.stop(signal.SIGKILL)
        victim.start()

    snapshots = ["snapshots", "--snapshotter", "cowfs"]
    steps: list[Callable[[str, str], list[object]]] = [
        lambda name, limit: ["run", "--rm", "--snapshotter", "cowfs", *limit.split(), IMAGE, name, "sh", "-c", "echo x > /data/n"],
        lambda name, limit: ["run", "-d", "--snapshotter", "cowfs", *limit.split(), IMAGE, name, "sleep", "1000"],
        lambda name, limit: [*snapshots, "prepare", name],
        lambda name, limit: [*snapshots, "prepare", name, f"committed{rng.randrange(20)}"],
        lambda name, limit: [*snapshots, "view", name, f"committed{rng.randrange(20)}"],
        lambda name, limit: [*snapshots, "commit", f"committed{rng.randrange(20)}", f"o{rng.randrange(200)}"],
        lambda name, limit: [*snapshots, "rm", f"o{rng.randrange(200)}"],
        lambda name, limit: [*snapshots, "rm", f"committed{rng.randrange(20)}"],
        lambda name, limit: ["tasks", "rm", "-f", f"o{rng.randrange(200)}"],
        lambda name, limit: ["containers", "rm", f"o{rng.randrange(200)}"],
        lambda name, limit: ["image", "import", "--snapshotter", "cowfs", str(tmp_path / "image.tar")],
        lambda name, limit: ["images", "rm", "--sync", IMAGE],
        lambda name, limit: [*snapshots, "usage", f"o{rng.randrange(200)}"],
    ]  # fmt: skip
    succeeded = 0
    for number in range(200):
        step = rng.choices(steps, [4, 3, 3, 3, 1, 3, 2, 1, 2, 2, 1, 0.3, 1])[0]
        words = step(f"o{number}", rng.choice(["", f"--snapshotter-label {LIMIT}=1048576"]))
        killer = None
        if rng.random() < 0.1:
            killer = threading.Thread(target=kill, args=(int(rng.random() < 0.3), rng.uniform(0, 0.3)))
            killer.start()
        succeeded += engine.ctr(*words, namespace=rng.choice(NAMESPACES), check=False).returncode == 0
        if killer is not None:
            killer.join()
            wait_for(lambda: _is_well(engine), "containerd to find the service again")
    assert kills[0] > 3
    assert kills[1] > 0
    assert succeeded > 50, "others name what is not there"
    for namespace in NAMESPACES:
        _remove_all(engine, namespace)
    nothing_left(engine, 0)


def _is_well(engine: Containerd) -> bool:
    return engine.ctr("snapshots", "--snapshotter", "cowfs", "ls", check=False).returncode == 0


def _remove_all(engine: Containerd, namespace: str) -> None:
    def left(*words: str) -> list[str]:
        lines = engine.ctr(*words, namespace=namespace).stdout.splitlines()
        return [
            line.split()[0] for line in lines if line.strip() and line.split()[0] not in ("KEY", "TASK", "CONTAINER")
        ]

    for name in left("tasks", "ls", "-q"):
        engine.ctr("tasks", "rm", "-f", name, namespace=namespace, check=False)
    for name in left("containers", "ls", "-q"):
        engine.ctr("containers", "rm", name, namespace=namespace, check=False)
    for name in left("images", "ls", "-q"):
        engine.ctr("images", "rm", "--sync", name, namespace=namespace, check=False)
    for _ in range(20):  # children first: they are not listed in that order
        for name in left("snapshots", "--snapshotter", "cowfs", "ls"):
            engine.ctr("snapshots", "--snapshotter", "cowfs", "rm", name, namespace=namespace, check=False)
        if not left("snapshots", "--snapshotter", "cowfs", "ls"):
            return
    pytest.fail(f"left in {namespace}: {left('snapshots', '--snapshotter', 'cowfs', 'ls')}")
