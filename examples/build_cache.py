"""A build with a cache: each step is a snapshot, named after its parent and its command; a step that was done before costs nothing.

    python examples/build_cache.py STORE BASE TAG STEPS

STEPS is a file with a shell command on each line. A step that fails leaves nothing, and the steps before it stay for the next try.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import cowfs

LABEL = "build.step"


def name_of(parent: str, command: str) -> str:
    """The name of what a command makes of a snapshot. The same words on the same tree are the same step."""
    return "build-" + hashlib.sha256(f"{parent}\n{command}".encode()).hexdigest()[:32]


def build(store: cowfs.Store, base: str, commands: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Do the steps that are not there yet: (command, snapshot, whether it was there).

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    parent = store.stat(base).name  # of a tag, the snapshot that it names now
    for command in commands:
        name = name_of(parent, command)
        known = store.exists(name)
        if not known:
            options = ["--root", store.root, "--commit", name, "--key", f"{name}-at-work"]
            words = [sys.executable, "-m", "cowfs", "run", parent, *options, "--", "/bin/sh", "-c", command]
            try:
                subprocess.run(words, check=True)
            except subprocess.CalledProcessError:
                store.remove(f"{name}-at-work")
                raise
            store.update(name, {LABEL: command[:200]})
        yield command, name, known
        parent = name


def prune(store: cowfs.Store) -> list[str]:
    """Remove the steps that no tag and no other step stands on; the names."""
    removed: list[str] = []
    while True:
        parents = {info.parent for info in store.walk()} | {tag.target for tag in store.tags()}
        old = [info.name for info in store.walk([f"labels.{LABEL}"]) if info.name not in parents]
        if not old:
            return removed
        for name in old:
            removed += store.remove(name)


def main(root: str, base: str, tag: str, steps: str) -> int:
    """Exit status 1 where a step failed."""
    commands = [line for line in Path(steps).read_text().splitlines() if line.strip() and not line.startswith("#")]
    with cowfs.Store.open(root, create=False) as store:
        last = base
        try:
            for command, last, known in build(store, base, commands):  # noqa: B007  the last one gets the tag
                print(f"{'cached' if known else 'done  '} {command}", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"a step ended with {error.returncode}", file=sys.stderr)
            return 1
        store.tag(tag, last)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
