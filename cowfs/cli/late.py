"""The progress of a verb that nearly always answers at once: :mod:`cowfs.cli.progress` is imported only after the first second.

Strategy. A thread waits for the end of the verb. After a second without it, it imports the bar and shows it until the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from cowfs._typed import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

__all__ = ["Late"]

_SECOND = 1.0

T = TypeVar("T")


class Late:
    """Tells from the first second on that a verb is at work, and for how long; a context manager.

    ``--progress`` and ``$COWFS_PROGRESS`` mean what they mean to :class:`cowfs.cli.progress.Bars`; those ways that begin at once do so here, too.

    Args:
        args: the verb's arguments: ``progress``, ``quiet``.
        label: what the verb does, for people.

    Threads: belongs to one; the thread of its own ends with the block.
    """

    def __init__(self, args: argparse.Namespace, label: str) -> None:
        self._args = args
        self._label = label
        self._begun = time.monotonic()
        how = args.progress if args.progress != "auto" else os.environ.get("COWFS_PROGRESS", "")
        self._on = how != "none" and not (args.quiet and args.progress == "auto" and how not in ("plain", "json"))
        self._wait = 0.0 if how in ("plain", "json") else _SECOND
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Late:
        if self._on:
            self._thread = threading.Thread(target=self._watch, name="cowfs-late", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Show nothing any more. Idempotent."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def until_shown(self, found: Iterator[T]) -> Iterator[T]:
        """Stop at the first of what is found, if that is printed to a terminal: the lines themselves are the progress then."""
        for one in found:
            if self._thread is not None and sys.stdout.isatty():
                self.stop()
            yield one

    def _watch(self) -> None:
        if self._ended.wait(self._wait):
            return
        from cowfs.cli.progress import Bars

        with Bars(self._args, self._label, self._begun):
            self._ended.wait()
