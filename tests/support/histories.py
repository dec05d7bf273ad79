"""Histories of stores (``support.history``): drawn from a seed, carried out, and shrunk when they fail.

Every operation is independent of the state: what does not apply fails alike on both sides, or is left out. So any part of
a failing history is one as well, and :func:`shrink` finds a short one.

By hand: ``python -m support.histories --driver overlay --seed 7 --operations 2000 --place DIR`` (PYTHONPATH=tests, in a
private mount namespace); ``--replay FILE`` carries a printed history out again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .history import Machine, Mismatch
from .ops import Op

NAMES = ["a", "b", "c", "d"]
TREES = 3  # directories of a path

#: operation -> how often
WEIGHTS = {
    "create": 9, "write": 9, "mkdir": 6, "link": 13, "unlink": 7, "rmdir": 2, "rmtree": 1, "rename": 12, "rename2": 4,
    "symlink": 2, "chmod": 4, "setxattr": 3, "removexattr": 1, "truncate": 3, "mknod": 1, "utime": 2, "open": 3, "fwrite": 3,
    "close": 1, "flink": 1,
}  # fmt: skip
VERBS = {
    "snapshot": 14, "squash": 7, "rollback": 1, "commit": 2, "remount": 2, "forget": 5, "kill": 1, "read": 3, "look": 4, "remove": 2,
}  # fmt: skip
EVERY = 12  # operations between two verbs, on average
EXCHANGE = 2


class Draw:
    """Steps out of a seed, given what the plain directory holds now."""

    def __init__(self, seed: int, plain: str, root: bool) -> None:
        self.rng, self.plain, self.root = random.Random(seed), plain, root

    def step(self) -> list[Any]:
        rng = self.rng
        if rng.random() < 1 / EVERY:
            verb = rng.choices(list(VERBS), list(VERBS.values()))[0]
            if verb in ("squash", "rollback"):
                return [verb, rng.random(), rng.random() < 0.7]
            if verb == "snapshot":
                return [verb, rng.random() < 0.8]
            return [verb, rng.random()] if verb in ("read", "remove") else [verb]
        return ["op", *self.operation()]

    def operation(self) -> Op:
        rng = self.rng
        paths, directories = self.listed()
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        there = rng.choice(paths or ["nothing"])
        new = self.new(directories)
        if name == "rename2":
            return (name, there, rng.choice(paths or ["nothing"]), EXCHANGE)
        if name == "mknod":
            return (name, new, "fifo" if not self.root else rng.choice(["fifo", "char"]))
        offset, length, seed = rng.choice([0, 0, 5, 4090, 9000]), rng.choice([1, 40, 5000, 9000]), rng.randrange(1000)
        return {
            "create": (name, new, rng.choice([0o600, 0o644])),
            "write": (name, there, 0, offset, length, seed),
            "mkdir": (name, new, 0o755),
            "link": (name, there, new),
            "unlink": (name, there),
            "rmdir": (name, there),
            "rmtree": (name, there),
            "rename": (name, there, new if rng.random() < 0.7 else rng.choice(paths or ["nothing"])),
            "symlink": (name, f"to-{seed}", new),
            "chmod": (name, there, rng.choice([0o600, 0o644, 0o755, 0o444])),
            "setxattr": (name, there, rng.choice(["user.one", "user.two"]), rng.choice([3, 100]), seed, 0),
            "removexattr": (name, there, "user.one"),
            "truncate": (name, there, rng.choice([0, 3, 4096, 10_000])),
            "utime": (name, there, rng.randrange(10**18)),
            "open": (name, seed % 3, there, os.O_RDWR),
            "fwrite": (name, seed % 3, offset, length, seed),
            "close": (name, seed % 3),
            "flink": (name, seed % 3, new),
        }[name]

    def listed(self) -> tuple[list[str], list[str]]:
        paths: list[str] = []
        directories = [""]
        for at, inner, files in os.walk(self.plain):
            here = os.path.relpath(at, self.plain)
            base = "" if here == "." else here + "/"
            paths += [base + name for name in inner + files]
            directories += [base + name + "/" for name in inner if base.count("/") < TREES - 1]
        return sorted(paths), sorted(directories)

    def new(self, directories: list[str]) -> str:
        return self.rng.choice(directories) + self.rng.choice(NAMES)


# -- running ------------------------------------------------------------------------------------------------------------

Run = Callable[[], Machine]


def play(make: Run, steps: Iterator[list[Any]] | list[list[Any]], done: list[list[Any]]) -> str | None:
    """Carry steps out. Returns what went wrong; ``done`` receives the steps."""
    machine = make()
    try:
        for step in steps:
            done.append(step)
            machine.do(step)
        if done:
            done.append(["finish"])
            machine.finish()
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is a finding
        trace = "" if isinstance(error, Mismatch) else traceback.format_exc()
        return f"{done[-1]}: {error}\n{trace}{_log_of(error)}"
    finally:
        machine.close()
    return None


def _log_of(error: Exception) -> str:
    """The log of a server that a message "see FILE" names."""
    log = str(error).rpartition("; see ")[2]
    return Path(log).read_text() if log.endswith(".log") and os.path.exists(log) else ""


def drawn(machine: Machine, seed: int, count: int) -> Iterator[list[Any]]:
    draw = Draw(seed, machine.plain, os.geteuid() == 0)
    for _ in range(count):
        yield draw.step()


def kind_of(wrong: str) -> str:
    """The common part of two failures of one cause: the verb, and the first words of the message without numbers."""
    step, _, message = wrong.partition("]: ")
    return re.sub(r"[0-9]+", "N", f"{step.split(',')[0]} {' '.join(message.split()[:2])}")


def shrink(make: Run, steps: list[list[Any]], wrong: str, seconds: float) -> tuple[list[list[Any]], str]:
    """A shorter history that fails in the same way, found by leaving pieces out for so many seconds; and how it fails."""
    end, kind = time.monotonic() + seconds, kind_of(wrong)
    size = max(1, len(steps) // 2)
    while size and time.monotonic() < end:
        at = 0
        while at < len(steps) and time.monotonic() < end:
            done: list[list[Any]] = []
            now = play(make, steps[:at] + steps[at + size :], done)
            if now is not None and kind_of(now) == kind:
                steps, wrong = [step for step in done if step != ["finish"]], now
            else:
                at += size
        size = size // 2 if size > 1 else 0
    return steps, wrong


def forget_here(mountpoint: str) -> None:
    """Have the kernel drop the names and inodes of one mount that are not in use."""
    subprocess.run(["mount", "-i", "-o", "remount", mountpoint], check=True, capture_output=True)


def forget_there(mountpoint: str) -> None:
    """The same, by a privileged process that reads our output."""
    print(f"forget {mountpoint}", flush=True)
    sys.stdin.readline()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver", default="overlay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--length", type=int, default=400, help="operations of one history")
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--failures", type=int, default=1, help="go on until so many histories have failed")
    parser.add_argument("--shrink", type=float, default=0.0, help="seconds")
    wish = parser.parse_args()
    forget = forget_here if os.geteuid() == 0 else forget_there
    places = iter(range(1_000_000))

    def make() -> Machine:
        place = wish.place / f"history-{os.getpid()}-{next(places)}"
        place.mkdir()
        current.append(Machine(place, wish.driver, forget))
        return current[-1]

    current: list[Machine] = []
    failures = 0
    seeds = [0] if wish.replay else [wish.seed * 1000 + n for n in range(-(-wish.operations // wish.length))]
    for seed in seeds:
        done: list[list[Any]] = []
        if wish.replay:
            wrong = play(make, json.loads(wish.replay.read_text()), done)
        else:
            wrong = play(make, _later(current, seed, wish.length), done)
        if wrong is not None:
            steps = [step for step in done if step != ["finish"]]
            if wish.shrink:
                print(f"first {wrong}", flush=True)
                steps, wrong = shrink(make, steps, wrong, wish.shrink)
            print(
                f"driver {wish.driver}, seed {seed}, {len(steps)} steps: {wrong}\nhistory: {json.dumps(steps)}",
                flush=True,
            )
            failures += 1
            if failures >= wish.failures:
                return 1
            continue
        shutil.rmtree(current[-1].place, ignore_errors=True)
    print(f"driver {wish.driver}: {len(seeds) * wish.length} operations", flush=True)
    return 0


def _later(current: list[Machine], seed: int, count: int) -> Iterator[list[Any]]:
    """Steps for the machine that is about to be made."""
    yield from drawn(current[-1], seed, count)


if __name__ == "__main__":
    sys.exit(main())
