"""Claim: a fresh sandbox is ready sooner than with podman's overlay storage.

From nothing to the first `ls`: cowfs by its library (prepare, mount, list) and by its command (`cowfs prepare` and
`cowfs mount --key`); podman by `podman --storage-driver overlay create` and `mount` of the same tiny image. Durable as
each has it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, run, timed
from ..lab.peers import cowfs_env
from ..lab.stores import COW, Opened, opened

COMMAND = "cowfs command"
PODMAN = "podman"
SUBJECTS = (COW, COMMAND, PODMAN)


def _fill(top: Path) -> None:
    (top / "etc").mkdir()
    for number in range(100):
        (top / "etc" / f"file-{number}").write_text("x" * 1000)


def measure(lab: Lab) -> None:
    names = lab.wanted(SUBJECTS)
    with (
        opened(lab, COW, 8 << 30) as opened_,
        tempfile.TemporaryDirectory(prefix="cowfs-", dir="/run", ignore_cleanup_errors=True) as run_root,
    ):  # podman's --runroot takes no path of more than 50 characters
        opened_.base("base", _fill)
        podman: list[str] = []
        if PODMAN in names:
            with lab.trying(PODMAN):
                podman = _podman(opened_, run_root)
        for number, name in lab.rounds(names, 4 * lab.profile.rounds):
            with lab.trying(name):
                {COW: _library, COMMAND: _command, PODMAN: lambda *more: _by_podman(podman, *more)}[name](
                    lab, opened_, number
                )


def _library(lab: Lab, opened_: Opened, number: int) -> None:
    at = lab.folder("mnt")
    held = []

    def start() -> None:
        opened_.store.prepare(f"lib-{number}", "base")
        held.append(opened_.store.mount(f"lib-{number}", str(at)))
        os.listdir(at)

    lab.record("start", COW, timed(start))
    held[0].unmount()
    opened_.store.remove(f"lib-{number}")


def _command(lab: Lab, opened_: Opened, number: int) -> None:
    at, key, root = lab.folder("mnt"), f"cmd-{number}", str(opened_.root)
    cowfs = [sys.executable, "-m", "cowfs"]
    env = cowfs_env()

    def start() -> None:
        import subprocess

        for words in (["prepare", key, "base", "--root", root], ["mount", "--key", key, "--root", root, str(at)]):
            subprocess.run([*cowfs, *words], env=env, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.listdir(at)

    try:
        lab.record("start", COMMAND, timed(start))
    finally:
        opened_.store.unmount(key)  # waits for the server
    opened_.store.remove(key)


def _podman(opened_: Opened, run_root: str) -> list[str]:
    """The command with a storage of its own that has the same tree as an image."""
    if not shutil.which("podman"):
        raise SkipSubject("podman is not installed")
    place = opened_.disk / "podman"
    podman = ["podman", "--root", f"{place}/root", "--runroot", run_root, "--storage-driver", "overlay"]
    image = opened_.disk / "base.tar"
    opened_.store.tag("base:1", "base")
    opened_.store.export("base:1", image, format="docker")
    run([*podman, "load", "-i", image])
    return podman


def _by_podman(podman: list[str], lab: Lab, opened_: Opened, number: int) -> None:
    import subprocess

    where: list[str] = []

    def start() -> None:
        name = f"c{number}"
        subprocess.run([*podman, "create", "--name", name, "base:1", "/x"], check=True, capture_output=True)
        told = subprocess.run([*podman, "mount", name], check=True, capture_output=True, text=True)
        where.append(told.stdout.strip())
        os.listdir(where[0])

    lab.record("start", PODMAN, timed(start))
    run([*podman, "umount", f"c{number}"])
    run([*podman, "rm", f"c{number}"])


CLAIM = Claim(
    name="store_start",
    title="prepare, mount and first ls",
    why="What a user or an agent waits for before the sandbox is there.",
    metrics=(Metric(name="start", title="from nothing to the first ls"),),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="start", subject=COW, against=PODMAN, at_most=1.0, says="library against podman"),
        Bar(metric="start", subject=COMMAND, against=PODMAN, at_most=1.5, goal=1.0, says="command against podman"),
    ),
    topic="store",
)


def test_store_start(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
