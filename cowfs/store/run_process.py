"""The process behind :meth:`cowfs.Store.run`: ``python -m cowfs.store.run_process ASKED TOLD LIVES``, three descriptors.

It reads a message (a JSON document) from the first, runs it, and tells how it ended on the second. When the last writer of the third is gone, the
command ends, and the snapshot goes unless it is to be kept.
"""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import suppress

from cowfs._typed import Any
from cowfs.errors import CowfsError, NotFound
from cowfs.sandbox import process, subids
from cowfs.sandbox.request import Request
from cowfs.store.sandboxes import run_in
from cowfs.store.store import Store

__all__: list[str] = []


def _run(message: dict[str, Any], lives: int) -> dict[str, Any]:
    """How it ended, with what its snapshot held: only in here may an ordinary user look at files of all his ids."""
    key = message["key"]
    with Store.open(message["root"], create=False, fsync=message["fsync"]) as store:
        made = False
        try:
            with process.held():
                store.prepare(key, message["parent"], size=message["size"], inodes=message["inodes"])
                made = True
            ended = run_in(
                store, key, Request.from_json(message["request"]), mount_type=message["mount_type"], life=lives
            )
            if not message["keep"] and select.select([lives], [], [], 0)[0]:  # nobody is there who would
                raise CowfsError("the caller is gone")
            used = store.usage(key)
            told = {
                **ended._asdict(),
                "usage": {"bytes": used.bytes, "inodes": used.inodes},
                "changes": [
                    [os.fsdecode(one.path), one.kind, one.type, one.size, sorted(one.what)] for one in store.diff(key)
                ],
            }
            if not message["keep"]:
                with process.held():
                    store.remove(key)
        except BaseException:
            if made:
                with process.held(), suppress(NotFound):
                    store.remove(key)
            raise
    return told


def _main(asked: int, told: int, lives: int) -> int:
    for fd in (told, lives):
        os.set_inheritable(fd, False)
    process.open_streams()
    with open(asked, "rb") as file:
        text = file.read()
    if not text:  # the caller was killed before it had said anything
        return 1
    how: dict[str, Any]
    code = 0
    try:
        with process.stop_on_signals():
            if os.geteuid() != 0:
                subids.try_enter()
            how = _run(json.loads(text), lives)
    except process.Stopped as stopped:
        return 128 + stopped.number
    except CowfsError as error:
        how = process.telling(error)
        code = error.exit_code
    with open(told, "wb") as answer:
        answer.write(json.dumps(how).encode())
    return code


if __name__ == "__main__":
    sys.exit(_main(*map(int, sys.argv[1:4])))
