"""The host fails any one call of a verb (EIO), or every call from one on that needs room (ENOSPC): an error, and a whole state.

The calls are not sampled where a verb makes few: each run lets one call more succeed, until the verb comes through.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import CowfsError
from cowfs.store import Store

from .test_faults import VERBS, _make

NEEDS_ROOM = (
    "mkdir",
    "rename",
    "link",
    "symlink",
    "mknod",
    "write",
    "pwrite",
    "setxattr",
    "posix_fallocate",
    "replace",
)
CHANGES = (
    *NEEDS_ROOM,
    "unlink",
    "rmdir",
    "fsync",
    "ftruncate",
    "truncate",
    "chmod",
    "fchmod",
    "chown",
    "fchown",
    "utime",
)
MOST = 60
"""Runs of one verb and kind of failure; a verb with more calls is failed at evenly spread ones."""


class Host:
    """Fails calls of the module ``os`` that change something: the one with a number, or all from it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, names: tuple[str, ...], *, for_good: bool) -> None:
        self.count = 0
        self.fail_at = -1  # no call
        self._code, self._for_good = code, for_good
        self._lock = threading.Lock()
        for name in names:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with self._lock:
                number = self.count
                self.count += 1
            if self.fail_at >= 0 and (number == self.fail_at or (self._for_good and number > self.fail_at)):
                raise OSError(
                    self._code, os.strerror(self._code), args[0] if isinstance(args[0], str | bytes) else None
                )
            return real(*args, **more)

        return call


@pytest.mark.parametrize("driver", ["overlay", "vfs", "row"])
@pytest.mark.parametrize("kind", ["one call fails", "the disk is full from there on"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_failing_host_is_an_error_and_leaves_a_whole_state(
    verb: str, kind: str, driver: str, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, verify = VERBS[verb]
    full = kind != "one call fails"
    host = Host(monkeypatch, errno.ENOSPC if full else errno.EIO, NEEDS_ROOM if full else CHANGES, for_good=full)
    _make(space / "record", driver)
    with Store.open(space / "record", fsync=True) as store:
        host.count = 0
        act(store)
        calls = host.count
    failed = 0
    for number in sorted({round(at * calls / MOST) for at in range(MOST)} if calls > MOST else range(calls)):
        root = space / f"fail-{number}"
        host.fail_at = -1
        _make(root, driver)
        with Store.open(root, fsync=True) as store:
            host.count, host.fail_at = 0, number
            try:
                act(store)
            except (OSError, CowfsError):
                failed += 1
            host.fail_at = -1
        with Store.open(root, fsync=False) as store:
            assert store.check().damage == [], f"call {number} of {calls}"
            verify(store, True)
            store.gc()
            assert store.check(content=True).problems == [], f"call {number} of {calls}"
            assert not [left for left in os.listdir(root) if left.startswith(("new-", "rm-", "live-"))]
            verify(store, False)
    assert failed or not calls or verb in ("remove", "removal in two steps"), "no failure was told"
