"""A pool of sandboxes: trees that are mounted already, each with a limit, lent to one caller at a time and put back to what they were.

    python examples/pool.py STORE BASE COUNT COMMAND ...

Runs each COMMAND (a line for /bin/sh) in a sandbox of the pool, COUNT at once, and says what it changed. Lending costs no prepare and no mount,
putting back a rollback. For what strangers send, use Store.run, which also isolates processes (docs/security.md).
"""

import queue
import subprocess
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cowfs


class Pool:
    """Sandboxes on one base; a context manager. Any thread may borrow.

    Args:
        size: the limit of each, as "64M".
    """

    def __init__(self, store: cowfs.Store, base: str, count: int, *, size: str = "64M") -> None:
        self._store = store
        self._base = base
        self._free: queue.Queue[tuple[str, Path]] = queue.Queue()
        self._held = ExitStack()
        place = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="pool-")))
        keys = [f"{place.name}-{number}" for number in range(count)]
        with ExitStack() as undo:
            undo.push(self._held)
            store.fork(base, *keys, size=size)
            for key in keys:
                self._held.callback(store.remove, key)
            for key in keys:
                (place / key).mkdir()
                self._held.enter_context(store.mount(key, place / key))
                self._free.put((key, place / key))
            undo.pop_all()

    @contextmanager
    def borrow(self) -> Generator[tuple[str, Path], None, None]:
        """A sandbox as (key, mount point), as fresh as its base; waits while all are lent."""
        key, root = self._free.get()
        try:
            yield key, root
        finally:
            self._store.rollback(key, self._base)
            self._free.put((key, root))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


def main(root: str, base: str, count: str, *commands: str) -> int:
    """Exit status 0 where all commands succeeded."""
    with cowfs.Store.open(root, create=False) as store, Pool(store, base, int(count)) as pool:

        def attempt(command: str) -> int:
            with pool.borrow() as (key, place):
                status = subprocess.run(["/bin/sh", "-c", command], check=False, cwd=place).returncode
                changes = [f"{each.kind} {each.path.decode(errors='replace')}" for each in store.diff(key) if each.path]
                print(f"{command!r} ended with {status}: {', '.join(changes) or 'no change'}", flush=True)
                return status

        with ThreadPoolExecutor(int(count)) as workers:
            return 1 if any(list(workers.map(attempt, commands))) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
