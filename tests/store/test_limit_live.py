"""One limit over a chain of live snapshots: random data that reaches it, snapshots, squash, rollback, remount and kill.

The use is that of everything written since prepare; a remount counts the same; the files stay what they were.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from support.known_files import LIMIT, UNIT, Files, kill

from cowfs.errors import FailedPrecondition
from cowfs.store import Store


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_random_data_and_live_snapshots_share_one_limit(
    space: Path, driver: str, request: pytest.FixtureRequest
) -> None:
    target = space / "mnt"
    target.mkdir()
    files = Files(lambda: target, request.config.getoption("--seed") + len(driver))
    steps = max(60, request.config.getoption("--steps") // 60)
    size = 3 * LIMIT
    with Store.open(space / "store", driver=driver) as store:
        store.prepare("base-key")
        with store.mount("base-key", target):
            for number in range(4):
                data = bytes([65 + number]) * (number * 11 * UNIT // 2 + 100)
                (target / f"f{number}").write_bytes(data)
                files.data[f"f{number}"] = bytearray(data)
        store.commit("base-key", "base")
        store.prepare("work", "base", size=size)
        handle = store.mount("work", target)
        taken: list[str] = []
        allowed = size
        try:
            for number in range(steps):
                files.step()
                assert handle.usage().bytes <= allowed, files.log[-2:]
                allowed = max(size, min(allowed, handle.usage().bytes))
                what = files.random.random()
                if what < 0.06:
                    before = handle.usage().bytes
                    taken.append(f"snap{number}")
                    store.snapshot("work", taken[-1])
                    after = handle.usage().bytes
                    assert abs(after - before) <= 2 * UNIT, f"{before} before a snapshot, {after} after it"
                elif what < 0.1 and taken:
                    with contextlib.suppress(FailedPrecondition):
                        store.squash(taken.pop(files.random.randrange(len(taken))))
                    allowed = max(size, handle.usage().bytes)  # what stood on the layer may now hold its data itself
                    files.compare()
                elif what < 0.16:
                    os.sync()
                    files.compare()
                    used = handle.usage()
                    if what < 0.13:
                        handle.unmount()
                    else:
                        kill(handle, target)
                    handle = store.mount("work", target)
                    again = handle.usage()
                    assert again.inodes == used.inodes, f"{used}, after a remount {again}; {files.log[-20:]}"
                    assert abs(again.bytes - used.bytes) <= 8 * UNIT, (
                        f"{used}, after a remount {again}; {files.log[-20:]}"
                    )
                    files.compare()
            files.compare()
            assert files.full > 2, "the limit was hardly ever reached"
        finally:
            with contextlib.suppress(Exception):
                handle.unmount()
        assert store.check(content=True).damage == []
