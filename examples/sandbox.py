"""A sandbox for an agent: let it try several things at once, each on a tree of its own; look at what each changed; keep one.

    python examples/sandbox.py STORE BASE KEPT 'command one' 'command two' ...

Each command runs in a fork of BASE, with a limit, without network, ten minutes at most. The result of the first one (in the order given)
that succeeds becomes the snapshot KEPT; the others are dropped. docs/security.md says what that isolates, and what not.
"""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import cowfs

SECONDS = 600


@dataclass
class Attempt:
    """The result of one command.

    Attributes:
        key: the active snapshot that it wrote in.
        changes: lines like "added etc/motd".
    """

    key: str
    command: str
    status: int
    output: str
    changes: list[str]


def attempt(store: cowfs.Store, base: str, command: str) -> Attempt:
    """Run a command on a fork of a snapshot, and say what it changed there."""
    words = ["/bin/sh", "-c", f"exec 2>&1; {command}"]
    done = store.run(base, words, size="64M", inodes="10k", timeout=SECONDS, keep=True)
    changes = [f"{change.kind} {change.path.decode(errors='replace')}" for change in done.changes if change.path]
    return Attempt(done.key, command, done.returncode, done.stdout.decode(errors="replace"), changes)


def best_of(store: cowfs.Store, base: str, kept: str, commands: Iterable[str]) -> list[Attempt]:
    """Try all commands at once; the first in order that succeeded is committed as ``kept``, the others are dropped."""
    with ThreadPoolExecutor() as pool:
        attempts = list(pool.map(partial(attempt, store, base), commands))
    best = next((each for each in attempts if each.status == 0), None)
    for each in attempts:
        if each is best:
            store.commit(each.key, kept, labels={"sandbox.command": each.command})
        else:
            store.remove(each.key)
    return attempts


def main(root: str, base: str, kept: str, *commands: str) -> int:
    """Exit status 0 if one was kept."""
    with cowfs.Store.open(root, create=False) as store:
        for each in best_of(store, base, kept, commands):
            print(f"{each.command!r} ended with {each.status}: {', '.join(each.changes) or 'no change'}")
        return 0 if store.exists(kept) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
