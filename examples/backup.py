"""A backup of a snapshot that is written all the time: one instant of it at each call, to another store, which gets only what is new.

    python examples/backup.py STORE KEY BACKUP

BACKUP is a directory, or HOST:DIRECTORY, which ssh reaches and which has cowfs. Programs go on writing in KEY meanwhile. Each
backup is a layer; 'cowfs squash' merges old ones, whose next copy is then whole again.
"""

import subprocess
import sys
import time
from typing import BinaryIO, cast

import cowfs

LABEL = "backup.of"


def snapshot(store: cowfs.Store, key: str) -> str:
    """Commit what the key holds at this instant; the name."""
    name = f"{key}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000_000:09d}"
    return store.snapshot(key, name, labels={LABEL: key}).name


def send(store: cowfs.Store, name: str, target: str) -> list[str]:
    """Bring a snapshot and its ancestors there; the layers that were new to it.

    Raises:
        CowfsError: the other side refused; layers that came whole stay.
    """
    host, colon, directory = target.rpartition(":")
    if not colon:
        with cowfs.Store.open(directory) as other:
            return store.copy_to(name, other)
    command = ["ssh", "-T", "--", host, f"cowfs receive --ask --root '{directory}'"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as there:
        pipe, answers = cast("BinaryIO", there.stdin), cast("BinaryIO", there.stdout)
        return list(store.send([name], pipe, answers=answers).copied or ())


def main(root: str, key: str, target: str) -> int:
    """Exit status 1 where the backup is not there."""
    with cowfs.Store.open(root, create=False) as store:
        name = snapshot(store, key)
        try:
            new = send(store, name, target)
        except (cowfs.CowfsError, OSError) as error:
            print(f"{name} is here, and not at {target}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {len(new)} new layers, {store.usage(name).bytes} bytes in this one", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
