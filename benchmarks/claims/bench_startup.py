"""Claim: from the command to the first `ls` at most 200 ms, Python's start included.

The command as a user types it: it goes to the background once the mount answers; then `ls`, all timed together.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, is_mounted, unmount
from ..lab.peers import ALL, COWFS, PEERS, Stack, available, cowfs_env


def measure(lab: Lab) -> None:
    tree = trees.deep_stack(lab, 3)
    names = available(lab, ALL)
    for _, name in lab.rounds(names, 2 * lab.profile.rounds):
        with lab.trying(name), lab.fresh("tmpfs", 64 << 20) as fresh:
            at = lab.folder("mnt")
            stack = Stack(lowers=tree, upper=fresh / "upper", work=fresh / "work")
            (fresh / "upper").mkdir()
            (fresh / "work").mkdir()
            argv = [word for word in PEERS[name].command(stack, at) if word not in ("-f", "--foreground")]
            begin = time.perf_counter()
            try:
                with open(at.with_name(at.name + ".log"), "w+b") as log:  # a pipe would be held open by the server
                    process = subprocess.Popen(
                        argv, cwd=tree[0].parent, env=cowfs_env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                    patience = threading.Timer(20, process.kill)
                    patience.start()
                    process.wait()  # with a timeout it would poll, up to 50 ms apart, and measure that
                    patience.cancel()
                    if process.returncode:
                        log.seek(0)
                        raise RuntimeError(f"exit {process.returncode}: {log.read().decode(errors='replace')[-200:]}")
                subprocess.run(["ls", at], stdout=subprocess.DEVNULL, check=True)
                lab.record("time", name, time.perf_counter() - begin)
            finally:
                if is_mounted(at):
                    unmount(at)


CLAIM = Claim(
    name="startup",
    title="mount to first ls",
    why="A sandbox a request: what starting costs is paid each time.",
    metrics=(Metric(name="time", title="command, mount and first ls"),),
    subjects=ALL,
    measure=measure,
    bars=(Bar(metric="time", subject=COWFS, at_most=0.2, says="mount to first ls, Python's start included"),),
)


def test_startup(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
